// The Python module fastopt._C: the only file that sees Python. It reads optimizers' param groups
// into tables, has a backend apply the rule, and includes nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/apply.h"

namespace py = pybind11;

namespace fastopt {
namespace {

// Why a step is torch's to make: thrown while nothing has been changed, returned to Python as text.
struct NotOurs {
  std::string reason;
};

// Smaller steps keep the GIL: taking it back from a busy thread can cost that thread's whole turn.
constexpr int64_t kKeepGil = 8192;

// Attribute and key names, interned once: what a step looks up by the thousand.
struct Names {
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* step = PyUnicode_InternFromString("step");
  std::vector<std::vector<PyObject*>> options, states;  // of each rule

  Names() {
    const auto intern = [](const std::vector<const char*>& texts) {
      std::vector<PyObject*> interned;
      for (const char* text : texts) interned.push_back(PyUnicode_InternFromString(text));
      return interned;
    };
    for (const RuleInfo& rule : rules()) {
      options.push_back(intern(rule.options));
      states.push_back(intern(rule.states));
    }
  }
};

const Names& names() {
  static const Names* const names = new Names;
  return *names;
}

// torch, as far as the core knows it: two types whose memory is read as it is, and the API to read.
struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const DLPackExchangeAPI* api;
  py::object increment_version;
};

const Torch& torch() {
  static const Torch* const torch = [] {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object parameter = py::module_::import("torch.nn").attr("Parameter");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
      throw py::import_error("fastopt needs torch >= 2.10; pip install -U torch");
    }
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* api = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    while (api && api->version.major > kDLMajorVersion) api = api->older;
    if (!api || api->version.major != kDLMajorVersion || !api->dltensor_from_py_object_no_sync) {
      throw py::import_error("this torch speaks a DLPack version fastopt does not know; "
                             "pip install -U fastopt");
    }
    return new Torch{reinterpret_cast<PyTypeObject*>(tensor.ptr()),
                     reinterpret_cast<PyTypeObject*>(parameter.ptr()), api,
                     py::module_::import("torch.autograd.graph").attr("increment_version")};
  }();
  return *torch;
}

double number(py::handle value) {
  const double x = PyFloat_AsDouble(value.ptr());
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

Group read_options(int rule, py::handle param_group) {
  Group group{};
  double* next = group.options;
  for (PyObject* key : names().options[rule]) {
    const py::object value = param_group[py::handle(key)];
    if (py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)) {
      for (const py::handle item : value) *next++ = number(item);
    } else {
      *next++ = number(value);
    }
  }
  return group;
}

int find_rule(const std::string& name) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (rules()[i].name == name) return static_cast<int>(i);
  }
  throw py::value_error("fastopt has no rule named '" + name + "'");
}

// Reads tensors as memory and keeps alive whatever it has read: while the GIL is released other
// threads may replace gradients and states.
class Reader {
 public:
  // memory(param, tensor) gives, for a tensor subclass, the plain tensor to read or why there is
  // none (optimizer.py).
  explicit Reader(py::function memory) : memory_(std::move(memory)) {}

  // Throws NotOurs when there is no memory that a backend could use.
  void read(PyObject* param, PyObject* tensor, DLTensor* out) {
    keep(tensor);
    if (Py_TYPE(tensor) != torch().tensor && Py_TYPE(tensor) != torch().parameter) {
      const py::object plain = memory_(py::handle(param), py::handle(tensor));
      if (py::isinstance<py::str>(plain)) throw NotOurs{plain.cast<std::string>()};
      tensor = plain.ptr();
      keep(tensor);
    }
    if (torch().api->dltensor_from_py_object_no_sync(tensor, out) != 0) {
      PyErr_Clear();
      throw NotOurs{"a tensor has layout " + attribute(tensor, "layout") + " on device " +
                    attribute(tensor, "device")};
    }
  }

  // Parameter and gradient; false where there is no gradient and so nothing to do.
  bool read_param(PyObject* param, DLTensor* p, DLTensor* g) {
    const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, names().grad));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) return false;
    read(param, param, p);
    if (p->device.device_type != kDLCPU) {
      throw NotOurs{"no fastopt backend for parameters on " + attribute(param, "device")};
    }
    if (!is_supported(p->dtype)) {
      throw NotOurs{"no fastopt arithmetic for parameters of " + attribute(param, "dtype")};
    }
    read(param, grad.ptr(), g);
    check_bits(param, *p);
    check_bits(grad.ptr(), *g);
    return true;
  }

 private:
  void keep(PyObject* object) { kept_.push_back(py::reinterpret_borrow<py::object>(object)); }

  static std::string attribute(py::handle object, const char* name) {
    return py::str(object.attr(name)).cast<std::string>();
  }

  // Conjugation and negation may be pending: a flag on a view, which DLPack does not pass on. On
  // real tensors only .imag of a conjugate has it, which is not contiguous.
  static void check_bits(py::handle tensor, const DLTensor& t) {
    if (t.dtype.code != kDLComplex && (t.ndim == 0 || t.strides[t.ndim - 1] == 1)) return;
    if (tensor.attr("is_conj")().cast<bool>() || tensor.attr("is_neg")().cast<bool>()) {
      throw NotOurs{"a tensor is a lazy conjugate or negative; .resolve_conj().resolve_neg() it"};
    }
  }

  py::function memory_;
  std::vector<py::object> kept_;
};

std::string param_name(py::handle param_group, size_t group, size_t index) {
  if (param_group.contains("param_names")) {
    return "parameter '" +
           py::str(py::object(param_group["param_names"])[py::int_(index)]).cast<std::string>() +
           "'";
  }
  return "parameter " + std::to_string(index) + " of group " + std::to_string(group);
}

// optimizer.state[param], or nullptr. torch hashes a tensor by its address, through a Python
// call; looking that hash up directly finds the same entry faster, and what it misses is asked
// for in full.
PyObject* find_state(PyObject* state, PyObject* param) {
  PyObject* found =
      _PyDict_GetItem_KnownHash(state, param, static_cast<Py_hash_t>(
                                                  reinterpret_cast<uintptr_t>(param)));
  if (!found && !PyErr_Occurred()) found = PyDict_GetItemWithError(state, param);
  if (PyErr_Occurred()) throw py::error_already_set();
  return found;
}

// One step() being prepared: tables filled, new states made but not yet in the optimizer.
class Step {
 public:
  Step(const std::string& rule, py::dict state, py::function memory, py::function new_states,
       bool rescale)
      : rule_index_(find_rule(rule)),
        rule_(rules()[rule_index_]),
        state_(std::move(state)),
        new_states_(std::move(new_states)),
        reader_(std::move(memory)),
        rescale_(rescale) {}

  void add_group(py::handle param_group) {
    const auto group = static_cast<int>(groups_.size());
    groups_.push_back(read_options(rule_index_, param_group));
    const py::list params = param_group[py::handle(names().params)];
    for (size_t i = 0; i < params.size(); ++i) {
      try {
        add_param(PyList_GET_ITEM(params.ptr(), i), group);
      } catch (const std::invalid_argument& error) {
        throw py::value_error(param_name(param_group, group, i) + ": " + error.what());
      }
    }
  }

  // All checks are done: from here on nothing fails.
  void run(double grad_scale, int threads) {
    for (const auto& [param, states] : fresh_) {
      if (PyObject* entry = find_state(state_.ptr(), param.ptr())) {
        py::handle(entry).attr("update")(states);
      } else {
        state_[param] = states;
      }
    }
    int64_t numel = 0;
    for (const Table& table : tables_) numel += table.numel;
    {
      std::optional<py::gil_scoped_release> release;
      if (numel >= kKeepGil) release.emplace();
      for (const Table& table : tables_) {
        apply(rule_index_, table, groups_.data(), static_cast<float>(grad_scale), threads);
      }
    }
    // As after any in-place operation: a graph that has saved the old values must not use the new.
    if (written_.size() != 0) torch().increment_version(written_);
  }

 private:
  void add_param(PyObject* param, int group) {
    Tensors tensors;
    if (!reader_.read_param(param, &tensors.at[kParam], &tensors.at[kGrad])) return;
    written_.append(py::handle(param));
    tensors.states = rule_.states_used(groups_[group].options);
    PyObject* entry = find_state(state_.ptr(), param);
    const bool fresh = is_fresh(entry, tensors.states);
    if (fresh) entry = make_states(param, tensors.states);
    for (int i = 0; i < tensors.states; ++i) {
      read_state(param, entry, state_key(i), &tensors.at[kState + i]);
    }
    if (rule_.counts_steps) read_state(param, entry, names().step, &tensors.step);
    add_slot(tables_, rule_, tensors, group, fresh, rescale_);
  }

  // Null where the state is missing or None, as SGD's checkpoints have it before the first step.
  static PyObject* get(PyObject* entry, PyObject* key) {
    PyObject* value = PyDict_GetItemWithError(entry, key);
    if (!value && PyErr_Occurred()) throw py::error_already_set();
    return value == Py_None ? nullptr : value;
  }

  // The parameter's first step: none of its states is there.
  bool is_fresh(PyObject* entry, int states) const {
    if (!entry) return true;
    if (rule_.counts_steps && get(entry, names().step)) return false;
    for (int i = 0; i < states; ++i) {
      if (get(entry, state_key(i))) return false;
    }
    return true;
  }

  PyObject* make_states(PyObject* param, int states) {
    if (states == 0 && !rule_.counts_steps) return nullptr;
    py::list keys;
    for (int i = 0; i < states; ++i) keys.append(py::handle(state_key(i)));
    fresh_.emplace_back(py::reinterpret_borrow<py::object>(param),
                        new_states_(py::handle(param), keys, rule_.counts_steps));
    return fresh_.back().second.ptr();
  }

  void read_state(PyObject* param, PyObject* entry, PyObject* key, DLTensor* out) {
    PyObject* value = get(entry, key);
    if (!value || !PyObject_TypeCheck(value, torch().tensor)) {
      const std::string name = "state '" + py::str(py::handle(key)).cast<std::string>() + "'";
      throw std::invalid_argument(
          value ? name + " is not a tensor; load_state_dict makes it one"
                : name + " is missing, though others are there (was amsgrad turned on mid-run?); " +
                      "delete the parameter's state to start it anew");
    }
    reader_.read(param, value, out);
  }

  PyObject* state_key(int i) const { return names().states[rule_index_][i]; }

  int rule_index_;
  const RuleInfo& rule_;
  py::dict state_;
  py::function new_states_;
  Reader reader_;
  bool rescale_;
  std::vector<Group> groups_;
  std::vector<Table> tables_;
  std::vector<std::pair<py::object, py::dict>> fresh_;
  py::list written_;
};

// None when the step is done; otherwise why torch must make it, and nothing has been changed.
std::optional<std::string> step(const std::string& rule, const py::list& param_groups,
                                py::dict state, py::function memory, py::function new_states,
                                const py::object& grad_scale, const py::object& found_inf,
                                int threads) {
  if (!found_inf.is_none() && number(found_inf) != 0) return std::nullopt;
  const double scale = grad_scale.is_none() ? 1 : number(grad_scale);
  Step step(rule, std::move(state), std::move(memory), std::move(new_states), scale != 1);
  try {
    for (const py::handle group : param_groups) step.add_group(group);
  } catch (const NotOurs& error) {
    return error.reason;
  }
  step.run(scale, threads);
  return std::nullopt;
}

// What step() would return for these parameters and gradients, without making the step.
std::optional<std::string> why_not(const py::list& param_groups, py::function memory) {
  Reader reader(std::move(memory));
  DLTensor param, grad;
  try {
    for (const py::handle group : param_groups) {
      for (const py::handle p : group["params"]) reader.read_param(p.ptr(), &param, &grad);
    }
  } catch (const NotOurs& error) {
    return error.reason;
  }
  return std::nullopt;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastopt's native core; use the classes of fastopt instead.";
  torch();  // fails here, at import, where the torch installed does not suit
  m.def("step", &step);
  m.def("why_not", &why_not);
  m.attr("build") = py::dict(py::arg("compiler") = FASTOPT_COMPILER,
                             py::arg("instruction_set") = instruction_set());
}

}  // namespace fastopt
