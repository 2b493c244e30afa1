#include "options.h"

#include <set>
#include <string>

namespace fastopt {
namespace {

struct Option {
  PyObject* key;  // interned once: a step looks it up in every group
  bool in_pair;   // with the next one
  bool flag;      // torch asks for its truth: None or any object will do
};

// Of each rule.
const std::vector<std::vector<Option>>& known_options() {
  static const auto* const known = [] {
    const std::set<std::string> flags = {"amsgrad", "centered", "decoupled_weight_decay",
                                         "maximize", "nesterov"};
    auto* const all = new std::vector<std::vector<Option>>;
    for (const RuleInfo& rule : rules()) {
      std::vector<Option>& options = all->emplace_back();
      for (const char* name : rule.options) {
        PyObject* const key = PyUnicode_InternFromString(name);
        if (!options.empty()) options.back().in_pair = options.back().key == key;
        options.push_back({key, false, flags.count(name) > 0});
      }
    }
    return all;
  }();
  return *known;
}

Value read_option(const Option& option, const py::object& object) {
  if (torch().is_tensor(object)) {
    if (object.attr("numel")().cast<int64_t>() != 1 || object.attr("is_complex")().cast<bool>()) {
      throw std::invalid_argument("it is a tensor of another kind than one real number");
    }
  } else if (option.flag) {
    const int truth = PyObject_IsTrue(object.ptr());
    if (truth < 0) throw py::error_already_set();
    return {truth != 0 ? 1.0 : 0.0, {}};
  }
  return value_of(object);
}

}  // namespace

std::vector<Value> read_options(int rule, py::handle param_group, int group) {
  const std::vector<Option>& options = known_options()[rule];
  std::vector<Value> values;
  values.reserve(options.size());
  const auto read = [&](const Option& option, const py::object& value) {
    if (!option.in_pair) return values.push_back(read_option(option, value));
    const py::tuple pair = items_of(value);
    if (pair.size() != 2) throw std::invalid_argument("it is not a pair");
    for (const py::handle item : pair) {
      values.push_back(read_option(option, py::reinterpret_borrow<py::object>(item)));
    }
  };
  while (values.size() < options.size()) {
    const Option& option = options[values.size()];
    const py::object value = param_group[py::handle(option.key)];
    const auto message = [&](const std::string& why) {
      return "option " + text(py::repr(option.key)) + " of group " + std::to_string(group) +
             " cannot be " + text(py::repr(value)) + ": " + why + "; give " +
             (option.in_pair ? "two numbers" : "a number");
    };
    try {
      read(option, value);
    } catch (const std::invalid_argument& error) {
      throw py::value_error(message(error.what()));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_Exception)) throw;  // an interrupt
      py::raise_from(error, PyExc_ValueError, message(text(error.value())).c_str());
      throw py::error_already_set();
    }
  }
  return values;
}

Passes::Passes(py::object passes) : object(std::move(passes)) {
  if (object.is_none()) return;
  const auto find = [&](const char* name) -> std::optional<Value> {
    const py::object value = object.attr(name);
    return value.is_none() ? std::nullopt : std::optional(value_of(value));
  };
  max_norm = find("max_grad_norm");
  total_norm = find("total_norm");
  skip_nonfinite = object.attr("skip_nonfinite").cast<bool>();
  if (const auto average = find("average")) decay = average->number;
}

}  // namespace fastopt
