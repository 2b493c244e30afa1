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

// Between two steps a model's forward and backward pass have emptied the caches, and reading a
// tensor is mostly waiting for memory. So memory is asked for ahead of its use: first a tensor's
// TensorImpl, then its storage. A cold step on 1000 small tensors takes half the time for it.
enum class Ahead { kTensor, kStorage };

// For functions that only prefetch: compilers drop calls that compute nothing.
#define FASTOPT_PREFETCHES __attribute__((always_inline)) inline

// torch, as far as the core knows it: two types whose memory is read as it is, and the API to read.
struct Torch {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  const DLPackExchangeAPI* api;
  py::object increment_version;
  int impl_word;     // the word of a tensor object that points to its TensorImpl, 0 if not found
  int storage_word;  // the word of a TensorImpl that points to its storage

  // A tensor that is no subclass's: its memory is what it says it is.
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == tensor || Py_TYPE(object) == parameter;
  }

  FASTOPT_PREFETCHES void prefetch(PyObject* object, Ahead ahead) const {
    if (!object || !is_plain(object) || !impl_word || !storage_word) return;
    const char* address = reinterpret_cast<char* const*>(object)[impl_word];
    if (ahead == Ahead::kStorage && address) {
      address = reinterpret_cast<char* const*>(address)[storage_word];
    }
    for (int line = 0; line < 4; ++line) __builtin_prefetch(address + 64 * line);
  }
};

// The index of the word, among the first after the object's head, that holds `value`; else 0.
int word_holding(const void* object, py::handle value) {
  for (int i = 2; i < 4; ++i) {
    if (static_cast<void* const*>(object)[i] == PyLong_AsVoidPtr(value.ptr())) return i;
  }
  return 0;
}

Torch find_torch() {
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
    throw py::import_error(
        "fastopt does not know this torch's version of DLPack; "
        "pip install -U fastopt");
  }
  const py::object sample = py::module_::import("torch").attr("empty")(1);
  const py::object impl = sample.attr("_cdata");
  const py::object storage = sample.attr("untyped_storage")().attr("_cdata");
  return {reinterpret_cast<PyTypeObject*>(tensor.ptr()),
          reinterpret_cast<PyTypeObject*>(parameter.ptr()),
          api,
          py::module_::import("torch.autograd.graph").attr("increment_version"),
          word_holding(sample.ptr(), impl),
          word_holding(PyLong_AsVoidPtr(impl.ptr()), storage)};
}

const Torch& torch() {
  static const Torch* const torch = new Torch(find_torch());
  return *torch;
}

double number(py::handle value) {
  const double x = PyFloat_AsDouble(value.ptr());
  if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
  return x;
}

Group read_options(int rule, py::handle param_group) {
  Group group{};
  int count = 0;
  const auto append = [&](py::handle value) {
    if (count < kMaxOptions) group.options[count].value = number(value);
    ++count;
  };
  for (PyObject* key : names().options[rule]) {
    const py::object value = param_group[py::handle(key)];
    if (py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)) {
      for (const py::handle item : value) append(item);
    } else {
      append(value);
    }
  }
  if (count != rules()[rule].option_values) {
    throw py::value_error("a param group's options do not have one value each, betas two");
  }
  return group;
}

int find_rule(const std::string& name) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (rules()[i].name == name) return static_cast<int>(i);
  }
  throw py::value_error("fastopt has no rule named '" + name + "'");
}

// A parameter that takes part in a step, with all that belongs to it. The references keep memory
// alive: while the GIL is released other threads may replace gradients and states.
struct Member {
  int group, index;  // its place in param_groups
  py::object param, grad, state[kMaxStates], step;
  bool fresh = false;  // it has no states yet
};

// Conjugation or negation is pending: a flag on a view, which DLPack does not pass on. A real
// tensor has it only as .imag of a conjugate, whose last stride is 2.
bool is_lazy(py::handle tensor, const DLTensor& t) {
  if (t.dtype.code != kDLComplex && t.ndim > 0 && t.strides[t.ndim - 1] == 1) return false;
  return tensor.attr("is_conj")().cast<bool>() || tensor.attr("is_neg")().cast<bool>();
}

std::string text(py::handle object) { return py::str(object).cast<std::string>(); }

// Reads tensors as memory.
class Reader {
 public:
  // memory(param, tensor) gives, for a tensor subclass, the plain tensor to read or why there is
  // none (optimizer.py).
  explicit Reader(py::function memory) : memory_(std::move(memory)) {}

  // Throws NotOurs when there is no memory that a backend could use.
  void read(const Member& member, py::handle tensor, DLTensor* out) {
    if (!torch_.is_plain(tensor.ptr())) {
      py::object plain = memory_(member.param, tensor);
      if (py::isinstance<py::str>(plain)) throw NotOurs{text(plain)};
      tensor = plain;
      plain_.push_back(std::move(plain));
    }
    if (torch_.api->dltensor_from_py_object_no_sync(tensor.ptr(), out) != 0) {
      PyErr_Clear();
      throw NotOurs{"a tensor has layout " + text(tensor.attr("layout")) + " on device " +
                    text(tensor.attr("device"))};
    }
    if (!out->data && tensor.attr("numel")().cast<int64_t>() != 0) {
      throw NotOurs{"a tensor has no memory"};
    }
  }

  void read_param_and_grad(const Member& member, DLTensor* p, DLTensor* g) {
    read(member, member.param, p);
    if (p->device.device_type != kDLCPU) {
      throw NotOurs{"no fastopt backend for parameters on " + text(member.param.attr("device"))};
    }
    if (!is_supported(p->dtype)) {
      throw NotOurs{"no fastopt arithmetic for parameters of " + text(member.param.attr("dtype"))};
    }
    read(member, member.grad, g);
  }

 private:
  const Torch& torch_ = torch();
  py::function memory_;
  std::vector<py::object> plain_;  // kept alive
};

// param.grad, without looking the attribute up anew for each of a thousand plain tensors.
PyObject* grad_of(PyObject* param) {
  static PyObject* const property =
      PyObject_GetAttr(reinterpret_cast<PyObject*>(torch().tensor), names().grad);
  if (!torch().is_plain(param)) return PyObject_GetAttr(param, names().grad);
  return Py_TYPE(property)->tp_descr_get(property, param, nullptr);
}

// Appends the parameters of a group that have a gradient.
void collect(py::handle param_group, int group, std::vector<Member>& members) {
  const py::list params = param_group[py::handle(names().params)];
  members.reserve(members.size() + params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* param = PyList_GET_ITEM(params.ptr(), i);
    if (i + 4 < params.size()) {
      torch().prefetch(PyList_GET_ITEM(params.ptr(), i + 4), Ahead::kTensor);
    }
    auto grad = py::reinterpret_steal<py::object>(grad_of(param));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    Member& member = members.emplace_back();
    member.group = group;
    member.index = static_cast<int>(i);
    member.param = py::reinterpret_borrow<py::object>(param);
    member.grad = std::move(grad);
  }
}

// torch only warns of a parameter given twice and steps it twice; threads must not do so at once.
bool has_duplicates(const std::vector<Member>& members) {
  int bits = 4;
  while ((size_t{1} << bits) < 2 * members.size()) ++bits;
  const size_t mask = (size_t{1} << bits) - 1;
  std::vector<PyObject*> table(mask + 1);  // open addressing: a few ns a parameter
  for (const Member& member : members) {
    PyObject* const param = member.param.ptr();
    size_t at = reinterpret_cast<uintptr_t>(param) * 0x9E3779B97F4A7C15u >> (64 - bits);
    for (; table[at]; at = (at + 1) & mask) {
      if (table[at] == param) return true;
    }
    table[at] = param;
  }
  return false;
}

std::string param_name(py::handle param_group, const Member& member) {
  if (param_group.contains("param_names")) {
    const py::sequence param_names = param_group["param_names"];
    return "parameter '" + text(param_names[member.index]) + "'";
  }
  return "parameter " + std::to_string(member.index) + " of group " + std::to_string(member.group);
}

// optimizer.state[param], or nullptr. torch hashes a tensor by its address, through a Python
// call; looking that hash up directly finds the same entry faster, and what it misses is asked
// for in full.
PyObject* find_state(PyObject* state, PyObject* param) {
  PyObject* found = _PyDict_GetItem_KnownHash(
      state, param, static_cast<Py_hash_t>(reinterpret_cast<uintptr_t>(param)));
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

  // Throws NotOurs, or ValueError naming the parameter; either way nothing has been changed.
  void prepare(const py::list& param_groups) {
    for (const py::handle param_group : param_groups) {
      const auto group = static_cast<int>(groups_.size());
      groups_.push_back(read_options(rule_index_, param_group));
      collect(param_group, group, members_);
    }
    if (has_duplicates(members_)) throw NotOurs{"a parameter is given twice"};
    for (Member& member : members_) find_states(member);
    for (size_t i = 0; i < members_.size(); ++i) {
      if (i + 4 < members_.size()) prefetch_all(members_[i + 4], Ahead::kTensor);
      if (i + 2 < members_.size()) prefetch_all(members_[i + 2], Ahead::kStorage);
      try {
        add(members_[i]);
      } catch (const std::invalid_argument& error) {
        throw py::value_error(param_name(param_groups[members_[i].group], members_[i]) + ": " +
                              error.what());
      }
    }
  }

  // All checks are done: from here on nothing fails.
  void run(double grad_scale, int threads) {
    for (const Member& member : members_) {
      if (member.fresh) keep_states(member);
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
    if (members_.empty()) return;
    // As after any in-place operation: a graph that has saved the old values must not use the new.
    const size_t count = members_.size();
    py::list written(rescale_ ? 2 * count : count);
    for (size_t i = 0; i < count; ++i) {
      written[i] = members_[i].param;
      if (rescale_) written[count + i] = members_[i].grad;
    }
    torch_.increment_version(written);
  }

 private:
  const std::vector<PyObject*>& keys() const { return names().states[rule_index_]; }
  int states(const Member& member) const {
    return rule_.states_used(groups_[member.group]);
  }

  void find_states(Member& member) {
    const int count = states(member);
    if (count == 0 && !rule_.counts_steps) return;
    PyObject* const entry = find_state(state_.ptr(), member.param.ptr());
    bool any = false;
    // A state that is None counts as missing: so SGD's checkpoints have it before the first step.
    const auto get = [&](PyObject* key) {
      PyObject* value = entry ? PyDict_GetItemWithError(entry, key) : nullptr;
      if (!value && PyErr_Occurred()) throw py::error_already_set();
      if (value == Py_None) value = nullptr;
      any = any || value;
      return py::reinterpret_borrow<py::object>(value);
    };
    for (int i = 0; i < count; ++i) member.state[i] = get(keys()[i]);
    if (rule_.counts_steps) member.step = get(names().step);
    member.fresh = !any;
  }

  FASTOPT_PREFETCHES void prefetch_all(const Member& member, Ahead ahead) const {
    torch_.prefetch(member.param.ptr(), ahead);
    torch_.prefetch(member.grad.ptr(), ahead);
    for (const py::object& state : member.state) torch_.prefetch(state.ptr(), ahead);
    torch_.prefetch(member.step.ptr(), ahead);
  }

  void add(Member& member) {
    Tensors tensors;
    tensors.states = states(member);
    reader_.read_param_and_grad(member, &tensors.at[kParam], &tensors.at[kGrad]);
    if (is_lazy(member.param, tensors.at[kParam])) {
      throw std::invalid_argument("it is a lazy conjugate; make it from .resolve_conj()");
    }
    if (is_lazy(member.grad, tensors.at[kGrad])) {
      member.grad = member.grad.attr("resolve_conj")().attr("resolve_neg")();
      member.param.attr("grad") = member.grad;
      reader_.read_param_and_grad(member, &tensors.at[kParam], &tensors.at[kGrad]);
    }
    if (member.fresh) make_states(member, tensors.states);
    for (int i = 0; i < tensors.states; ++i) {
      read_state(member, member.state[i], keys()[i], &tensors.at[kState + i]);
    }
    if (rule_.counts_steps) read_state(member, member.step, names().step, &tensors.step);
    add_slot(tables_, rule_, tensors, member.group, member.fresh, rescale_);
  }

  void make_states(Member& member, int count) {
    py::list wanted;
    for (int i = 0; i < count; ++i) wanted.append(py::handle(keys()[i]));
    const py::dict made = new_states_(member.param, wanted, rule_.counts_steps);
    for (int i = 0; i < count; ++i) member.state[i] = made[py::handle(keys()[i])];
    if (rule_.counts_steps) member.step = made[py::handle(names().step)];
  }

  void keep_states(const Member& member) {
    py::dict entry;
    if (PyObject* found = find_state(state_.ptr(), member.param.ptr())) {
      entry = py::reinterpret_borrow<py::dict>(found);
    } else {
      state_[member.param] = entry;
    }
    if (member.step) entry[py::handle(names().step)] = member.step;
    for (int i = 0; i < states(member); ++i) entry[py::handle(keys()[i])] = member.state[i];
  }

  void read_state(const Member& member, const py::object& value, PyObject* key, DLTensor* out) {
    if (!value || !PyObject_TypeCheck(value.ptr(), torch_.tensor)) {
      const std::string name = "state '" + text(key) + "'";
      throw std::invalid_argument(
          value ? name + " is not a tensor; load_state_dict makes it one"
                : name + " is missing, though others are there (was amsgrad turned on mid-run?); " +
                      "delete the parameter's state to start it anew");
    }
    try {
      reader_.read(member, value, out);
    } catch (const NotOurs& error) {
      throw std::invalid_argument("state '" + text(key) + "' cannot be read: " + error.reason +
                                  "; load a state_dict of this very model");
    }
  }

  const Torch& torch_ = torch();
  int rule_index_;
  const RuleInfo& rule_;
  py::dict state_;
  py::function new_states_;
  Reader reader_;
  bool rescale_;
  std::vector<Group> groups_;
  std::vector<Member> members_;
  std::vector<Table> tables_;
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
    step.prepare(param_groups);
  } catch (const NotOurs& error) {
    return error.reason;
  }
  step.run(scale, threads);
  return std::nullopt;
}

// What step() would return for these parameters and gradients, without making the step.
std::optional<std::string> why_not(const py::list& param_groups, py::function memory) {
  Reader reader(std::move(memory));
  std::vector<Member> members;
  for (const py::handle group : param_groups) collect(group, 0, members);
  DLTensor param, grad;
  try {
    for (const Member& member : members) reader.read_param_and_grad(member, &param, &grad);
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
