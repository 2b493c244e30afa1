// The Python module fastopt._C: reads optimizers' param groups into tables, checks everything, and
// has backends apply the rule to them. With torch.cpp, the only file that sees Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "cpu/apply.h"
#include "cuda/apply.h"
#include "cuda/device.h"
#include "torch.h"

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

// What the core leaves to Python: fastopt/tensors.py and the Triton backend's package.
py::object helper(const char* module, const char* name) {
  return py::module_::import(module).attr(name);
}

int find_rule(const std::string& name) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (rules()[i].name == name) return static_cast<int>(i);
  }
  throw py::value_error("fastopt has no rule named '" + name + "'");
}

bool same(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

py::object torch_device(DLDevice device) {
  const char* type = device.device_type == kDLCPU      ? "cpu"
                     : device.device_type == kDLOneAPI ? "xpu"
                                                       : "cuda";
  return helper("torch", "device")(type, device.device_id);
}

enum class Backend { kCpu, kCuda, kTriton };

// Which backend steps the tensors of a device: the one asked for by name, else the first that can.
class Backends {
 public:
  explicit Backends(const std::optional<std::string>& name) : name_(name) {}

  // Throws NotOurs where there is none.
  Backend of(DLDevice device) {
    for (const auto& [known, backend] : chosen_) {
      if (same(known, device)) return backend;
    }
    chosen_.emplace_back(device, choose(device));
    return chosen_.back().second;
  }

 private:
  struct Candidate {
    const char* name;
    Backend backend;
    std::string (*why_not)(DLDevice);
  };
  static constexpr Candidate kCandidates[] = {
      {"cpu", Backend::kCpu,
       [](DLDevice device) -> std::string {
         return device.device_type == kDLCPU ? "" : "it takes CPU tensors only";
       }},
      {"cuda", Backend::kCuda, cuda::why_not},
      {"triton", Backend::kTriton,
       [](DLDevice device) {
         const py::object reason = helper("fastopt.triton", "why_not")(torch_device(device));
         return reason.is_none() ? std::string() : text(reason);
       }},
  };

  Backend choose(DLDevice device) const {
    std::string reasons;
    for (const Candidate& candidate : kCandidates) {
      if (name_ && *name_ != candidate.name) continue;
      const std::string reason = candidate.why_not(device);
      if (reason.empty()) return candidate.backend;
      reasons += (reasons.empty() ? "" : "; ") + std::string(candidate.name) + ": " + reason;
    }
    throw NotOurs{"no fastopt backend for parameters on " + text(torch_device(device)) + " (" +
                  reasons + ")"};
  }

  std::optional<std::string> name_;
  std::vector<std::pair<DLDevice, Backend>> chosen_;
};

// A parameter that takes part in a step, with all that belongs to it. The references keep memory
// alive: while the GIL is released other threads may replace gradients and states.
struct Member {
  int group, index;  // its place in param_groups
  py::object param, grad, state[kMaxStates], step;
  bool fresh = false;  // it has no states yet
  bool keeps =
      false;  // its states here are not those in the optimizer: made or moved for this step
};

// Conjugation or negation is pending: a flag on a view, which DLPack does not pass on. A real
// tensor has it only as .imag of a conjugate, whose last stride is 2.
bool is_lazy(py::handle tensor, const DLTensor& t) {
  if (t.dtype.code != kDLComplex && t.ndim > 0 && t.strides[t.ndim - 1] == 1) return false;
  return tensor.attr("is_conj")().cast<bool>() || tensor.attr("is_neg")().cast<bool>();
}

// Reads tensors as memory.
class Reader {
 public:
  // Throws NotOurs when there is no memory that a backend could use, or none like the parameter's.
  void read(py::handle param, py::handle tensor, DLTensor* out) {
    if (!torch_.is_plain(tensor.ptr())) {
      py::object plain = helper("fastopt.tensors", "memory")(param, tensor);
      if (py::isinstance<py::str>(plain)) throw NotOurs{text(plain)};
      tensor = plain;
      keep(std::move(plain));
    }
    if (!torch_.read(tensor, out)) {
      throw NotOurs{"a tensor has layout " + text(tensor.attr("layout")) + " on device " +
                    text(tensor.attr("device"))};
    }
    if (!out->data && tensor.attr("numel")().cast<int64_t>() != 0) {
      throw NotOurs{"a tensor has no memory"};
    }
  }

  void read_param_and_grad(const Member& member, DLTensor* p, DLTensor* g) {
    read(member.param, member.param, p);
    if (!is_supported(p->dtype)) {
      throw NotOurs{"no fastopt arithmetic for parameters of " + text(member.param.attr("dtype"))};
    }
    read(member.param, member.grad, g);
  }

  // What must live as long as what was read.
  void keep(py::object object) { kept_.push_back(std::move(object)); }

 private:
  const Torch& torch_ = torch();
  std::vector<py::object> kept_;
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

// A param group's values in the order of its rule's Options, betas being two.
std::vector<py::object> read_options(int rule, py::handle param_group) {
  std::vector<py::object> values;
  for (PyObject* key : names().options[rule]) {
    const py::object value = param_group[py::handle(key)];
    if (py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)) {
      for (const py::handle item : value)
        values.push_back(py::reinterpret_borrow<py::object>(item));
    } else {
      values.push_back(value);
    }
  }
  if (static_cast<int>(values.size()) != rules()[rule].option_values) {
    throw py::value_error("a param group's options do not have one value each, betas two");
  }
  return values;
}

// One step() being prepared: tables filled, new states made but not yet in the optimizer.
class Step {
 public:
  Step(const std::string& rule, py::dict state, py::object grad_scale, py::object found_inf,
       const std::optional<std::string>& backend)
      : rule_index_(find_rule(rule)),
        rule_(rules()[rule_index_]),
        state_(std::move(state)),
        grad_scale_(std::move(grad_scale)),
        found_inf_(std::move(found_inf)),
        backends_(backend) {
    if (grad_scale_.is_none()) grad_scale_ = py::float_(1.0);
    if (found_inf_.is_none()) found_inf_ = py::float_(0.0);
    rescale_ = !on_host(grad_scale_) || number(grad_scale_) != 1;
  }

  // Throws NotOurs, or ValueError naming the parameter; either way nothing has been changed.
  void prepare(const py::list& param_groups) {
    for (const py::handle param_group : param_groups) {
      const auto group = static_cast<int>(options_.size());
      options_.push_back(read_options(rule_index_, param_group));
      states_.push_back(states_of(options_.back()));
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
    for (const Table& table : tables_) {
      scaling_.push_back(
          {number_on(found_inf_, table.device), number_on(grad_scale_, table.device)});
    }
  }

  // Whether gradients have overflowed, asked here only where the device cannot be left to see to
  // it: where the CPU steps, and where states are new of which a rule that counts no steps could
  // not tell later that they still are.
  bool overflowed() {
    const auto on_cpu = [&](const Table& table) { return backend_of(table) == Backend::kCpu; };
    const auto untold = [&](const Member& member) { return member.fresh && !rule_.counts_steps; };
    const bool must_know = !torch_.is_tensor(found_inf_) ||
                           std::any_of(tables_.begin(), tables_.end(), on_cpu) ||
                           std::any_of(members_.begin(), members_.end(), untold);
    return must_know && number(found_inf_) != 0;
  }

  // All checks are done: from here on nothing fails but a device.
  void run(int threads, const py::function& launch_triton) {
    for (const Member& member : members_) {
      if (member.keeps) keep_states(member);
    }
    for (size_t i = 0; i < tables_.size(); ++i) {
      switch (backend_of(tables_[i])) {
        case Backend::kCpu: run_on_cpu(tables_[i], scaling_[i], threads); break;
        case Backend::kCuda: run_on_cuda(tables_[i], scaling_[i]); break;
        case Backend::kTriton: run_on_triton(i, launch_triton); break;
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
  struct Place {
    int group;
    DLDevice device;
  };
  struct Scaling {
    Number found_inf, grad_scale;
  };

  const std::vector<PyObject*>& keys() const { return names().states[rule_index_]; }

  Backend backend_of(const Table& table) { return backends_.of(table.device); }

  // Whether a value can be read without waiting for an accelerator.
  bool on_host(const py::object& value) const {
    return !torch_.is_tensor(value) || value.attr("is_cpu").cast<bool>();
  }

  // Values on an accelerator count as not zero here: a state too many does no harm.
  int states_of(const std::vector<py::object>& options) const {
    Group group{};
    for (size_t i = 0; i < options.size(); ++i) {
      group.options[i].value =
          on_host(options[i]) ? number(options[i]) : std::numeric_limits<double>::quiet_NaN();
    }
    return rule_.states_used(group);
  }

  // A value as the device's backend reads it: on an accelerator without waiting for it.
  Number number_on(const py::object& value, DLDevice device) {
    if (!torch_.is_tensor(value) || backends_.of(device) == Backend::kCpu) {
      return {number(value), nullptr, {}, {}};
    }
    DLTensor tensor;
    const auto read = [&](const py::object& object) {
      reader_.read(object, object, &tensor);
      reader_.keep(object);
    };
    read(value);
    if (!same(tensor.device, device)) {
      if (on_host(value)) return {number(value), nullptr, {}, {}};
      read(helper("fastopt.tensors", "moved")(value, torch_device(device)));
    }
    return as_number(tensor);
  }

  // The index in groups_ of a group's values as seen from a device.
  int group_on(int group, DLDevice device) {
    for (auto i = static_cast<int>(groups_.size()); i-- > 0 && places_[i].group == group;) {
      if (same(places_[i].device, device)) return i;
    }
    Group values{};
    for (size_t i = 0; i < options_[group].size(); ++i) {
      values.options[i] = number_on(options_[group][i], device);
    }
    groups_.push_back(values);
    places_.push_back({group, device});
    return static_cast<int>(groups_.size()) - 1;
  }

  void find_states(Member& member) {
    const int count = states_[member.group];
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
    member.fresh = member.keeps = !any;
  }

  FASTOPT_PREFETCHES void prefetch_all(const Member& member, Ahead ahead) const {
    torch_.prefetch(member.param.ptr(), ahead);
    torch_.prefetch(member.grad.ptr(), ahead);
    for (const py::object& state : member.state) torch_.prefetch(state.ptr(), ahead);
    torch_.prefetch(member.step.ptr(), ahead);
  }

  void add(Member& member) {
    Tensors tensors;
    tensors.states = states_[member.group];
    reader_.read_param_and_grad(member, &tensors.at[kParam], &tensors.at[kGrad]);
    const DLDevice device = tensors.at[kParam].device;
    backends_.of(device);  // or there is none
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
    if (rule_.counts_steps) {
      read_state(member, member.step, names().step, &tensors.step);
      if (!same(tensors.step.device, device)) {  // as in a checkpoint of torch's
        member.step = helper("fastopt.tensors", "moved")(member.step, torch_device(device));
        member.keeps = true;
        read_state(member, member.step, names().step, &tensors.step);
      }
    }
    add_slot(tables_, rule_, tensors, group_on(member.group, device), member.fresh, rescale_);
  }

  void make_states(Member& member, int count) {
    py::list wanted;
    for (int i = 0; i < count; ++i) wanted.append(py::handle(keys()[i]));
    const py::dict made =
        helper("fastopt.tensors", "new_states")(member.param, wanted, rule_.counts_steps);
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
    for (int i = 0; i < states_[member.group]; ++i) entry[py::handle(keys()[i])] = member.state[i];
  }

  void read_state(const Member& member, const py::object& value, PyObject* key, DLTensor* out) {
    if (!value || !torch_.is_tensor(value)) {
      const std::string name = "state '" + text(key) + "'";
      throw std::invalid_argument(
          value ? name + " is not a tensor; load_state_dict makes it one"
                : name + " is missing, though others are there (was amsgrad turned on mid-run?); " +
                      "delete the parameter's state to start it anew");
    }
    try {
      reader_.read(member.param, value, out);
    } catch (const NotOurs& error) {
      throw std::invalid_argument("state '" + text(key) + "' cannot be read: " + error.reason +
                                  "; load a state_dict of this very model");
    }
  }

  void run_on_cpu(const Table& table, const Scaling& scaling, int threads) const {
    const auto grad_scale = static_cast<float>(scaling.grad_scale.value);
    std::optional<py::gil_scoped_release> release;
    if (table.numel >= kKeepGil) release.emplace();
    cpu::apply(rule_index_, table, groups_.data(), grad_scale, threads);
  }

  void run_on_cuda(const Table& table, const Scaling& scaling) const {
    const Scratch scratch(table.device, cuda::scratch_bytes(table));
    void* const stream = torch_.stream(table.device);
    // A launch waits where the device's queue is full: for other threads' work, perhaps.
    const py::gil_scoped_release release;
    cuda::apply(rule_index_, table, groups_.data(), scaling.found_inf, scaling.grad_scale,
                scratch.data(), stream);
  }

  // Hands the table to Python as bytes, gradients' addresses apart: they alone change every step.
  void run_on_triton(size_t index, const py::function& launch) const {
    const Table& table = tables_[index];
    std::vector<Slot> slots = table.slots;
    std::vector<void*> grads;
    for (Slot& slot : slots) {
      grads.push_back(slot.data[kGrad]);
      slot.data[kGrad] = nullptr;
    }
    std::vector<Number> numbers = {scaling_[index].found_inf, scaling_[index].grad_scale};
    for (const Group& group : groups_) {
      numbers.insert(numbers.end(), std::begin(group.options), std::end(group.options));
    }
    const auto bytes = [](const auto& items) {
      return py::bytes(reinterpret_cast<const char*>(items.data()),
                       items.size() * sizeof(items[0]));
    };
    py::list dtypes;
    for (int i = 0; i < kState + table.states; ++i) dtypes.append(name_of(table.dtype[i]));
    launch(index, torch_device(table.device), py::tuple(dtypes), name_of(table.step_dtype),
           bytes(slots), bytes(grads), bytes(numbers), bytes(table.layouts), table.chunk_count);
  }

  const Torch& torch_ = torch();
  int rule_index_;
  const RuleInfo& rule_;
  py::dict state_;
  py::object grad_scale_, found_inf_;
  bool rescale_;  // gradients are written, too
  Backends backends_;
  Reader reader_;
  std::vector<std::vector<py::object>> options_;  // of each param group
  std::vector<int> states_;                       // likewise: how many it keeps for a parameter
  std::vector<Group> groups_;                     // of each param group and device that has slots
  std::vector<Place> places_;                     // likewise: which they are
  std::vector<Member> members_;
  std::vector<Table> tables_;
  std::vector<Scaling> scaling_;  // of each table
};

// None when the step is done; otherwise why torch must make it, and nothing has been changed.
std::optional<std::string> step(const std::string& rule, const py::list& param_groups,
                                py::dict state, py::object grad_scale, py::object found_inf,
                                int threads, const std::optional<std::string>& backend,
                                const py::function& launch_triton) {
  Step step(rule, std::move(state), std::move(grad_scale), std::move(found_inf), backend);
  try {
    step.prepare(param_groups);
  } catch (const NotOurs& error) {
    return error.reason;
  }
  if (!step.overflowed()) step.run(threads, launch_triton);
  return std::nullopt;
}

// What step() would return for these parameters and gradients, without making the step.
std::optional<std::string> why_not(const py::list& param_groups,
                                   const std::optional<std::string>& backend) {
  Reader reader;
  Backends backends(backend);
  std::vector<Member> members;
  for (const py::handle group : param_groups) collect(group, 0, members);
  DLTensor param, grad;
  try {
    for (const Member& member : members) {
      reader.read_param_and_grad(member, &param, &grad);
      backends.of(param.device);
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
  m.def(
      "why_not_cuda", [](int index) { return cuda::why_not({kDLCUDA, index}); },
      py::arg("index") = 0);
  m.attr("build") =
      py::dict(py::arg("compiler") = FASTOPT_COMPILER, py::arg("cuda") = FASTOPT_CUDA_BUILD,
               py::arg("instruction_set") = cpu::instruction_set());
}

}  // namespace fastopt
