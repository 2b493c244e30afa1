// One step: reads an optimizer's param groups into tables, checks everything, and has backends
// apply the rule to them.
#include "step.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <limits>
#include <set>

#include "clip.h"
#include "cpu/apply.h"
#include "overlap.h"
#include "reading.h"
#include "running.h"

namespace fastopt {
namespace {

// What is kept beside a rule's own states: the step, which random bits depend on, of a rule that
// counts none, what completes a split parameter, and the average of a parameter.
constexpr State kStep = {"step"}, kRemainderState = {"remainder"}, kAverage = {"average"};

// Attribute and key names, interned once: what a step looks up by the thousand.
struct Names {
  struct Option {
    PyObject* key;
    bool in_pair;  // with the next one
    bool flag;     // torch asks for its truth: None or any object will do
  };
  PyObject* params = PyUnicode_InternFromString("params");
  PyObject* step = PyUnicode_InternFromString(kStep.name);
  PyObject* remainder = PyUnicode_InternFromString(kRemainderState.name);
  PyObject* average = PyUnicode_InternFromString(kAverage.name);
  std::vector<std::vector<Option>> options;  // of each rule
  std::vector<std::vector<PyObject*>> counts, states;

  static std::vector<PyObject*> interned(const std::vector<State>& states) {
    std::vector<PyObject*> keys;
    for (const State& state : states) keys.push_back(PyUnicode_InternFromString(state.name));
    return keys;
  }

  Names() {
    const std::set<std::string> flags = {"amsgrad", "centered", "decoupled_weight_decay",
                                         "maximize", "nesterov"};
    for (const RuleInfo& rule : rules()) {
      std::vector<Option>& known = options.emplace_back();
      for (const char* name : rule.options) {
        PyObject* const key = PyUnicode_InternFromString(name);
        if (!known.empty()) known.back().in_pair = known.back().key == key;
        known.push_back({key, false, flags.count(name) > 0});
      }
      counts.push_back(interned(rule.counts));
      states.push_back(interned(rule.states));
    }
  }
};

const Names& names() {
  static const Names* const names = new Names;
  return *names;
}

// How an optimizer is to keep what its user has said: states (or none: as torch does) and bfloat16
// parameters.
struct Keeping {
  std::optional<Format> states;   // kFloat32, kBFloat16Stochastic or kBlockSigned: 8 bits
  std::optional<Format> weights;  // kSplit or kBFloat16Stochastic

  Keeping(const std::optional<std::string>& states_name,
          const std::optional<std::string>& weights_name) {
    if (states_name == "float32") states = Format::kFloat32;
    if (states_name == "bfloat16") states = Format::kBFloat16Stochastic;
    if (states_name == "8bit") states = Format::kBlockSigned;
    if (weights_name == "split") weights = Format::kSplit;
    if (weights_name == "stochastic") weights = Format::kBFloat16Stochastic;
  }

  bool as_torch() const { return !states && !weights; }
  bool narrows_states() const { return states && *states != Format::kFloat32; }

  Format of_param(const DLTensor& param) const {
    const Format format = format_of(param.dtype);
    if (weights && format == Format::kFloat16) {
      throw std::invalid_argument(
          "weights= is for bfloat16 parameters, and this one is float16; convert it with "
          ".bfloat16() or .float(), or leave the option out");
    }
    return weights && format == Format::kBFloat16 ? *weights : format;
  }

  // Of a state: none where it is as torch has it, in the parameter's dtype or wider.
  std::optional<Format> of_state(const DLTensor& param, Narrow narrow) const {
    if (in_double(param)) return {};
    const bool is_complex = param.dtype.code == kDLComplex;
    if (narrows_states() && is_complex) {
      throw std::invalid_argument(
          "states of a complex parameter cannot be narrow; give it to an optimizer without "
          "states=, or keep its real and imaginary parts as parameters");
    }
    if (is_complex) return {};
    if (!narrows_states() || narrow == Narrow::kExact) {
      const bool wide = states == Format::kFloat32 || (of_param(param) == Format::kSplit);
      return wide ? std::optional(Format::kFloat32) : std::nullopt;
    }
    if (states != Format::kBlockSigned || param.ndim < 2) return Format::kBFloat16Stochastic;
    return narrow == Narrow::kUnsigned ? Format::kBlockUnsigned : Format::kBlockSigned;
  }
};

// Whether a tensor has the dtype in which a format keeps numbers.
bool is_kept_as(const DLTensor& tensor, Format format) {
  const auto is = [&](uint8_t code, int bits) {
    return tensor.dtype.code == code && tensor.dtype.bits == bits;
  };
  switch (format) {
    case Format::kFloat32: return is(kDLFloat, 32);
    case Format::kBFloat16Stochastic: return is(kDLBfloat, 16);
    case Format::kRemainder: return is(kDLInt, 16);
    case Format::kBlockSigned:
    case Format::kBlockUnsigned: return is(kDLUInt, 8);
    default: return true;
  }
}

// A parameter that takes part in a step, with all that belongs to it. The references keep memory
// alive: while the GIL is released other threads may replace gradients and states.
struct Member {
  int group, index;                          // its place in param_groups
  py::object param, grad, kept[kMaxPlaces];  // what is kept of it, at its place in the slot
  bool fresh = false;                        // it has no states yet
  bool keeps = false;  // its states here are not those in the optimizer: made anew for this step
  py::object average;
  bool fresh_average = false;
  bool copied = false;  // not its gradient is stepped with, but a copy that memory shows as it is
};

// Appends the parameters of a group that have a gradient.
void collect(py::handle param_group, int group, std::vector<Member>& members) {
  const py::tuple params = items_of(param_group[py::handle(names().params)]);
  members.reserve(members.size() + params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    PyObject* param = PyTuple_GET_ITEM(params.ptr(), i);
    if (i + 4 < params.size()) {
      torch().prefetch(PyTuple_GET_ITEM(params.ptr(), i + 4), Ahead::kTensor);
    }
    auto grad = py::reinterpret_steal<py::object>(grad_of(param));
    if (!grad) throw py::error_already_set();
    if (grad.is_none()) continue;
    if (!torch().is_tensor(param) || !torch().is_tensor(grad)) {
      throw NotOurs{"a parameter or gradient is no tensor"};
    }
    Member& member = members.emplace_back();
    member.group = group;
    member.index = static_cast<int>(i);
    member.param = py::reinterpret_borrow<py::object>(param);
    member.grad = std::move(grad);
  }
}

// torch only warns of a parameter given twice and steps it twice, SGD's first time by two buffers.
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

// A mapping to look things up in: Python's own, which has no methods of its own, directly.
class Mapping {
 public:
  explicit Mapping(py::object object) : object_(std::move(object)) {
    static PyObject* const default_dict =
        PyObject_GetAttrString(py::module_::import("collections").ptr(), "defaultdict");
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object_.ptr()));
    is_dict_ = PyDict_CheckExact(object_.ptr()) || type == default_dict;
  }

  // What the key leads to, or null.
  py::object find(py::handle key) const {
    if (!is_dict_) return object_.contains(key) ? object_[key] : py::object();
    return checked(PyDict_GetItemWithError(object_.ptr(), key.ptr()));
  }

  // The same for a tensor, which torch hashes by its address, but through a Python call.
  py::object find_tensor(py::handle tensor) const {
    const auto hash = static_cast<Py_hash_t>(reinterpret_cast<uintptr_t>(tensor.ptr()));
    static const bool hashed_by_address = py::hash(tensor) == hash;
    if (!is_dict_ || !torch().is_plain(tensor.ptr()) || !hashed_by_address) return find(tensor);
    return checked(_PyDict_GetItem_KnownHash(object_.ptr(), tensor.ptr(), hash));
  }

  void set(py::handle key, py::object value) { object_[key] = std::move(value); }

 private:
  static py::object checked(PyObject* found) {
    if (!found && PyErr_Occurred()) throw py::error_already_set();
    return py::reinterpret_borrow<py::object>(found);
  }

  py::object object_;
  bool is_dict_;
};

Value read_option(const Names::Option& option, const py::object& object) {
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

// A param group's values in the order of its rule's Options.
std::vector<Value> read_options(int rule, py::handle param_group, int group) {
  const std::vector<Names::Option>& options = names().options[rule];
  std::vector<Value> values;
  values.reserve(options.size());
  const auto read = [&](const Names::Option& option, const py::object& value) {
    if (!option.in_pair) return values.push_back(read_option(option, value));
    const py::tuple pair = items_of(value);
    if (pair.size() != 2) throw std::invalid_argument("it is not a pair");
    for (const py::handle item : pair) {
      values.push_back(read_option(option, py::reinterpret_borrow<py::object>(item)));
    }
  };
  while (values.size() < options.size()) {
    const Names::Option& option = options[values.size()];
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

// What a step does beside its rule, see fastopt/passes.py.
struct Passes {
  py::object object;
  std::optional<Value> max_norm, total_norm;
  bool skip_nonfinite = false;
  std::optional<double> decay;

  explicit Passes(py::object passes) : object(std::move(passes)) {
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
};

// One step() being prepared: tables filled, new states made but not yet in the optimizer.
class Step {
 public:
  Step(const std::string& rule, py::object state, const py::object& grad_scale,
       const py::object& found_inf, const std::optional<std::string>& backend,
       const Keeping& keeping, const Passes& passes)
      : rule_index_(find_rule(rule)),
        rule_(rules()[rule_index_]),
        state_(std::move(state)),
        grad_scale_(grad_scale.is_none() ? Value{1, {}} : value_of(grad_scale)),
        found_inf_(found_inf.is_none() ? Value{0, {}} : value_of(found_inf)),
        rescale_(!grad_scale_.on_host() || grad_scale_.read() != 1),
        devices_(backend),
        keeping_(keeping),
        passes_(passes) {}

  // Throws NotOurs, or ValueError naming the parameter; either way nothing has been changed.
  void prepare(const py::object& param_groups, int threads) {
    param_groups_ = items_of(param_groups);
    for (const py::handle param_group : param_groups_) {
      const auto group = static_cast<int>(options_.size());
      options_.push_back(read_options(rule_index_, param_group, group));
      kept_.push_back(kept_with(options_.back()));
      collect(param_group, group, members_);
    }
    if (has_duplicates(members_)) throw NotOurs{"a parameter is given twice"};
    for (Member& member : members_) find_states(member);
    for (size_t i = 0; i < members_.size(); ++i) {
      if (i + 4 < members_.size()) prefetch_all(members_[i + 4], Ahead::kTensor);
      if (i + 2 < members_.size()) prefetch_all(members_[i + 2], Ahead::kStorage);
      try {
        add(static_cast<int>(i));
      } catch (const std::invalid_argument& error) {
        throw py::value_error(param_name(param_groups_[members_[i].group], members_[i]) + ": " +
                              error.what());
      }
    }
    if (!in_slots_order(threads)) {
      tables_ = in_turn(std::move(tables_), rescale_);
    }
    for (const Table& table : tables_) scaling_.push_back(scaling_on(table.device));
    if (passes_.decay) sort_averages();
  }

  // All checks are done: from here on nothing fails but a device.
  void run(const Runner& runner) {
    if (passes_.max_norm) find_norm(runner);
    if (members_.empty() || is_skipped()) return;
    count_versions();
    size_t done = 0;
    try {
      for (; done < tables_.size(); ++done) {
        runner.run(rule_index_, tables_[done], groups_, scaling_[done], done, averages_of(done));
      }
    } catch (...) {
      keep_states(done);
      throw;
    }
    keep_states(done);
    if (rescale_) unscale_copied();
  }

  const Devices& devices() const { return devices_; }

 private:
  struct Place {
    int group;
    DLDevice device;
  };
  // What is kept of every parameter in a group.
  struct Kept {
    int place;  // in a slot
    PyObject* key;
    const State* state;
    bool ours = false;  // not of the rule: made anew where it is missing
  };
  Backend backend_of(const Table& table) const { return devices_.backend_of(table.device); }

  Scaling scaling_on(DLDevice device) {
    Scaling scaling;
    scaling.found_inf = number_on(found_inf_, device);
    scaling.grad_scale = number_on(grad_scale_, device);
    if (passes_.max_norm) scaling.max_norm = number_on(*passes_.max_norm, device);
    if (passes_.total_norm) scaling.norm = number_on(*passes_.total_norm, device);
    return scaling;
  }

  // Finds the norm of all gradients, unless the user has handed it in, and tells the tables.
  void find_norm(const Runner& runner) {
    norm_ = passes_.total_norm ? *passes_.total_norm
                               : gradients_.norm(grad_scale_, devices_, reader_, runner);
    const auto in_double = [](const Table& t) { return t.format[kGrad] == Format::kFloat64; };
    passes_.object.attr("note")(norm_.object(),
                                std::any_of(tables_.begin(), tables_.end(), in_double));
    for (size_t i = 0; i < tables_.size(); ++i) {
      scaling_[i].norm = number_on(norm_, tables_[i].device);
    }
  }

  // Whether the step is to change nothing. It is asked here only where the device cannot be left to
  // see to it: where the CPU steps, and where states are new of which nothing could tell later that
  // they still are.
  bool is_skipped() {
    const auto on_cpu = [&](const Table& table) { return backend_of(table) == Backend::kCpu; };
    const auto untold = [&](const Member& member) {
      return (member.fresh && rule_.counts.empty()) || member.fresh_average;
    };
    const bool must_know = std::any_of(tables_.begin(), tables_.end(), on_cpu) ||
                           std::any_of(members_.begin(), members_.end(), untold);
    if ((must_know || !found_inf_.tensor) && found_inf_.read() != 0) return true;
    if (!passes_.skip_nonfinite) return false;
    if (must_know || norm_.on_host()) {
      if (is_finite(norm_.read())) return false;
      passes_.object.attr("count_skipped")();
      return true;
    }
    for (Scaling& scaling : scaling_) scaling.skip = Skip::kNonfinite;
    if (!tables_.empty()) scaling_[0].skipped = counter_on(tables_[0].device);
    return false;
  }

  // On an accelerator, how many steps have been skipped there.
  int64_t* counter_on(DLDevice device) {
    return memory_of<int64_t>(passes_.object.attr("counter")(devices_.torch_device(device)));
  }

  Averages averages_of(size_t table) const {
    if (!passes_.decay) return {};
    Group group{};
    group.options[0].value = *passes_.decay;
    return {&averages_[table], group};
  }

  // Adds the average of a member's parameter, which its tensors have been read for.
  void add_average(int index, const DLTensor& param) {
    Member& member = members_[index];
    if (!member.average) {
      const Format format = format_of(param.dtype);
      const bool narrow = format == Format::kBFloat16 || format == Format::kFloat16;
      member.average =
          helper("fastopt.tensors", "new_state")(member.param, 0, narrow ? "float32" : "");
      member.fresh_average = true;
    }
    Tensors tensors;
    tensors.names[kParam] = kAverage.name;
    tensors.states = tensors.counts = 0;
    read_state(member, member.average, {kParam, nullptr, &kAverage}, &tensors.at[kParam]);
    tensors.at[kGrad] = param;
    for (const int i : {kParam, kGrad}) tensors.format[i] = format_of(tensors.at[i].dtype);
    try {
      add_slot(unsorted_averages_, tensors, index, 0, member.fresh_average, false);
    } catch (const std::invalid_argument&) {
      throw std::invalid_argument(
          "state 'average' does not go with it; load a state_dict of this very model, or delete "
          "the state to begin the average anew");
    }
  }

  // Tables of averages in which each has the place that its parameter has in its own.
  void sort_averages() {
    struct Found {
      const Table* table;
      const Slot* slot;
    };
    std::vector<Found> of_member(members_.size());
    for (const Table& table : unsorted_averages_) {
      for (size_t i = 0; i < table.slots.size(); ++i) {
        of_member[table.members[i]] = {&table, &table.slots[i]};
      }
    }
    for (const Table& table : tables_) {
      Table& averages = averages_.emplace_back();
      averages.device = table.device;
      const Table& any = *of_member[table.members[0]].table;  // all have these formats
      std::copy(std::begin(any.format), std::end(any.format), averages.format);
      for (const int32_t member : table.members) {
        const auto [from, slot] = of_member[member];
        const bool dense = slot->layout == kDense;
        append_slot(averages, *slot, member, dense ? nullptr : &from->layouts[slot->layout]);
      }
    }
  }

  // Values on an accelerator count as not zero here: a state too many does no harm.
  std::vector<Kept> kept_with(const std::vector<Value>& options) const {
    Group group{};
    for (size_t i = 0; i < options.size(); ++i) {
      group.options[i].value =
          options[i].on_host() ? options[i].read() : std::numeric_limits<double>::quiet_NaN();
    }
    std::vector<Kept> kept;
    kept.reserve(rule_.counts.size() + rule_.states.size());
    for (size_t i = 0; i < rule_.counts.size(); ++i) {
      kept.push_back(
          {count_place(static_cast<int>(i)), names().counts[rule_index_][i], &rule_.counts[i]});
    }
    const unsigned used = rule_.states_used(group);
    int place = kState;
    for (size_t i = 0; i < rule_.states.size(); ++i) {
      if (used >> i & 1) {
        kept.push_back({place++, names().states[rule_index_][i], &rule_.states[i]});
      }
    }
    const bool random =
        (keeping_.narrows_states() && used != 0) || keeping_.weights == Format::kBFloat16Stochastic;
    if (random && rule_.counts.empty())
      kept.push_back({count_place(0), names().step, &kStep, true});
    if (keeping_.weights == Format::kSplit) {
      kept.push_back({place, names().remainder, &kRemainderState, true});
    }
    return kept;
  }

  // Its last place is a state's only where there are no counts.
  bool is_count(const Kept& kept) const {
    return kept.state == &kStep || kept.place > count_place(static_cast<int>(rule_.counts.size()));
  }

  // Whether slots are updated one after another, as torch does, be their memory shared or not.
  bool in_slots_order(int threads) const {
    const auto alone = [&](const Table& table) {
      return backend_of(table) == Backend::kCpu && (threads == 1 || table.numel < cpu::kSerial);
    };
    return tables_.empty() || (tables_.size() == 1 && alone(tables_[0]));
  }

  Number number_on(const Value& value, DLDevice device) {
    return fastopt::number_on(value, device, devices_, reader_);
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
    if (kept_[member.group].empty() && !passes_.decay) return;
    member.keeps = !kept_[member.group].empty();
    member.fresh = std::any_of(kept_[member.group].begin(), kept_[member.group].end(),
                               [](const Kept& kept) { return !kept.ours; });
    py::object found = state_.find_tensor(member.param);
    if (!found) return;
    const Mapping entry(std::move(found));
    if (passes_.decay) member.average = entry.find(names().average);
    for (const Kept& kept : kept_[member.group]) {
      py::object value = entry.find(kept.key);
      // None counts as missing: so SGD's checkpoints have it before the first step.
      if (!value || value.is_none()) continue;
      member.kept[kept.place] = std::move(value);
      member.keeps = false;
      if (!kept.ours) member.fresh = false;
    }
  }

  FASTOPT_PREFETCHES void prefetch_all(const Member& member, Ahead ahead) const {
    torch_.prefetch(member.param.ptr(), ahead);
    torch_.prefetch(member.grad.ptr(), ahead);
    for (const py::object& kept : member.kept) torch_.prefetch(kept.ptr(), ahead);
  }

  void add(int index) {
    Member& member = members_[index];
    Tensors tensors;
    tensors.counts = tensors.states = 0;
    DLTensor& param = tensors.at[kParam];
    read_param(member, &param);
    member.copied = reader_.read_grad(member.param, member.grad, param, &tensors.at[kGrad]);
    if (member.fresh && !made_states_) make_states();
    tensors.format[kParam] = keeping_.of_param(param);
    tensors.format[kGrad] = format_of(tensors.at[kGrad].dtype);
    const auto is_exact = [](const Kept& kept) { return kept.state->narrow == Narrow::kExact; };
    const bool exact =
        keeping_.narrows_states() &&
        std::any_of(kept_[member.group].begin(), kept_[member.group].end(), is_exact);
    for (const Kept& kept : kept_[member.group]) {
      tensors.names[kept.place] = kept.state->name;
      if (is_count(kept)) {
        ++tensors.counts;
        read_count(member, kept, param.device, &tensors.at[kept.place]);
      } else if (kept.state != &kRemainderState) {
        ++tensors.states;
        const Narrow narrow = exact ? Narrow::kExact : kept.state->narrow;
        add_state(member, kept, tensors, keeping_.of_state(param, narrow));
      } else if (tensors.format[kParam] == Format::kSplit) {
        add_state(member, kept, tensors, Format::kRemainder);
      }
    }
    const std::vector<int64_t> strides = find_index(member, tensors);
    if (passes_.max_norm && !passes_.total_norm) {
      gradients_.add(member.param, tensors.at[kGrad], index);  // which is laid out like it
    }
    if (passes_.decay) add_average(index, param);
    add_slot(tables_, tensors, index, group_on(member.group, param.device), member.fresh, rescale_);
  }

  // A state as it is, or converted to what it is to be kept as.
  void add_state(Member& member, const Kept& kept, Tensors& tensors, std::optional<Format> format) {
    const DLTensor& param = tensors.at[kParam];
    DLTensor* const out = &tensors.at[kept.place];
    py::object& value = member.kept[kept.place];
    const auto convert = [&] {
      value =
          helper("fastopt.tensors", "recast")(value, member.param, format ? name_of(*format) : "");
      member.keeps = true;
      read_state(member, value, kept, out);
    };
    if (!value && (member.fresh || kept.ours)) {
      value = helper("fastopt.tensors", "new_state")(member.param, first_of(kept, member.group),
                                                     format ? name_of(*format) : "");
      member.keeps = true;
    }
    read_state(member, value, kept, out);
    // None of ours: the model was cast to or from float64.
    if (format ? !is_kept_as(*out, *format) : in_double(*out) != in_double(param)) convert();
    tensors.format[kept.place] = format ? *format : format_of(out->dtype);
  }

  // Notes where a shard lies in the whole; returns the strides of its index, which tensors point
  // to.
  std::vector<int64_t> find_index(const Member& member, Tensors& tensors) {
    std::vector<int64_t> strides;
    const bool random = std::any_of(tensors.format, tensors.format + kMaxTensors, is_random);
    if (!random || torch_.is_plain(member.param.ptr())) return strides;
    const py::object found = helper("fastopt.tensors", "place_in_whole")(member.param);
    if (found.is_none()) return strides;
    tensors.first_index = found[py::int_(0)].cast<int64_t>();
    strides = found[py::int_(1)].cast<std::vector<int64_t>>();
    tensors.index_stride = strides.data();
    return strides;
  }

  void read_param(const Member& member, DLTensor* out) {
    const py::handle memory = reader_.read(member.param, member.param, "the parameter", out);
    if (!is_supported(out->dtype)) {
      throw NotOurs{"no fastopt arithmetic for parameters of " + text(member.param.attr("dtype"))};
    }
    if (torch_.is_lazy(memory)) throw NotOurs{"a parameter is a conjugate or negative view"};
    devices_.meet(out->device, member.param);
  }

  void read_state(const Member& member, const py::object& value, const Kept& kept, DLTensor* out) {
    const std::string_view name = kept.state->name;
    const auto refuse = [&](const std::string& why) {
      throw std::invalid_argument("state '" + std::string(name) + "' " + why);
    };
    if (!value) {
      refuse(
          "is missing, though others are there (was amsgrad turned on mid-run?); delete the "
          "parameter's state to start it anew");
    }
    if (!torch_.is_tensor(value)) refuse("is not a tensor; load_state_dict makes it one");
    py::handle memory;
    try {
      memory = reader_.read(member.param, value, name.data(), out);
    } catch (const NotOurs& error) {
      refuse("cannot be read: " + error.reason + "; load a state_dict of this very model");
    }
    if (torch_.is_lazy(memory)) throw NotOurs{"a state is a conjugate or negative view"};
  }

  // The count beside its parameter, in a dtype that can count.
  void read_count(Member& member, const Kept& kept, DLDevice device, DLTensor* out) {
    py::object& value = member.kept[kept.place];
    if (!value && kept.ours) value = py::float_(0.0);
    if (!value || torch_.is_tensor(value)) {
      read_state(member, value, kept, out);
      const bool counts = out->dtype.code == kDLFloat && out->dtype.bits >= 32;
      if (counts && same(out->device, device)) return;
    }
    value = helper("fastopt.tensors", "count")(value, devices_.torch_device(device));
    member.keeps = true;
    read_state(member, value, kept, out);
  }

  // What is kept of all parameters that have nothing yet: one Python call a group, but for states
  // in other formats than torch's.
  void make_states() {
    made_states_ = true;
    for (size_t begin = 0, end; begin < members_.size(); begin = end) {
      const int group = members_[begin].group;
      py::list params;
      std::vector<Member*> fresh;
      for (end = begin; end < members_.size() && members_[end].group == group; ++end) {
        if (!members_[end].fresh) continue;
        fresh.push_back(&members_[end]);
        params.append(members_[end].param);
      }
      if (fresh.empty()) continue;
      py::dict counts, states;
      for (const Kept& kept : kept_[group]) {
        if (is_count(kept)) {
          counts[py::handle(kept.key)] = first_of(kept, group);
        } else if (keeping_.as_torch()) {
          states[py::handle(kept.key)] = first_of(kept, group);
        }
      }
      const py::object made = helper("fastopt.tensors", "new_states")(params, counts, states);
      for (const Kept& kept : kept_[group]) {
        if (!made.contains(py::handle(kept.key))) continue;
        const py::tuple tensors = made[py::handle(kept.key)];
        for (size_t i = 0; i < fresh.size(); ++i) {
          // The step of a rule that counts none may be there alone.
          if (!fresh[i]->kept[kept.place]) fresh[i]->kept[kept.place] = tensors[i];
        }
      }
    }
  }

  py::object first_of(const Kept& kept, int group) const {
    const char* const first = kept.state->first;
    return std::isdigit(static_cast<unsigned char>(*first))
               ? py::object(py::float_(std::atof(first)))
               : py::object(param_groups_[group][first]);
  }

  // Puts states that were made for this step into the optimizer, of the tables that have stepped.
  void keep_states(size_t tables) {
    const auto keeps = [](const Member& m) { return m.keeps || m.fresh_average; };
    if (std::none_of(members_.begin(), members_.end(), keeps)) return;
    std::vector<bool> stepped(members_.size());
    for (size_t i = 0; i < tables; ++i) {
      for (const int32_t member : tables_[i].members) stepped[member] = true;
    }
    for (size_t i = 0; i < members_.size(); ++i) {  // in torch's order
      const Member& member = members_[i];
      if (!keeps(member) || !stepped[i]) continue;
      py::object entry = state_.find_tensor(member.param);
      if (!entry) {
        entry = py::dict();
        state_.set(member.param, entry);
      }
      if (member.fresh_average) entry[py::handle(names().average)] = member.average;
      for (const Kept& kept : kept_[member.group]) {
        if (member.kept[kept.place]) entry[py::handle(kept.key)] = member.kept[kept.place];
      }
    }
  }

  // As after any in-place operation, a graph that has saved the old values must not use the new.
  // Before memory is written: an interrupt surfaces in this call, or when all is done.
  void count_versions() const {
    const size_t count = members_.size();
    py::list written(rescale_ ? 2 * count : count);
    for (size_t i = 0; i < count; ++i) {
      written[i] = members_[i].param;
      if (rescale_) written[count + i] = members_[i].grad;
    }
    torch_.increment_version(written);
  }

  // A step with copies has unscaled these, not the gradients.
  void unscale_copied() const {
    py::list grads;
    for (const Member& member : members_) {
      if (member.copied) grads.append(member.grad);
    }
    if (grads.empty()) return;
    helper("fastopt.tensors", "unscale")(grads, grad_scale_.object(), found_inf_.object());
  }

  const Torch& torch_ = torch();
  int rule_index_;
  const RuleInfo& rule_;
  py::tuple param_groups_;
  Mapping state_;
  Value grad_scale_, found_inf_;
  bool rescale_;  // gradients are written, too
  bool made_states_ = false;
  Devices devices_;
  Keeping keeping_;
  Passes passes_;
  Reader reader_;
  std::vector<std::vector<Value>> options_;  // of each param group
  std::vector<std::vector<Kept>> kept_;      // likewise
  std::vector<Group> groups_;                // of each param group and device that has slots
  std::vector<Place> places_;                // likewise: which they are
  std::vector<Member> members_;
  std::vector<Table> tables_;
  std::vector<Table> unsorted_averages_, averages_;  // the latter one for each table
  Gradients gradients_{false};
  Value norm_;                    // of all gradients, where they are clipped
  std::vector<Scaling> scaling_;  // of each table
};

}  // namespace

std::optional<std::string> step(const std::string& rule, const py::object& param_groups,
                                py::object state, const py::object& grad_scale,
                                const py::object& found_inf, int threads,
                                const std::optional<std::string>& backend,
                                const std::optional<std::string>& states,
                                const std::optional<std::string>& weights,
                                const py::function& launch_triton, const py::object& passes) {
  Step step(rule, std::move(state), grad_scale, found_inf, backend, Keeping(states, weights),
            Passes(passes));
  try {
    step.prepare(param_groups, threads);
  } catch (const NotOurs& error) {
    return error.reason;
  }
  step.run(Runner(step.devices(), threads, launch_triton));
  return std::nullopt;
}

std::vector<std::string> formats(const std::string& rule, const std::optional<std::string>& states,
                                 const std::optional<std::string>& weights, py::handle param,
                                 const std::vector<std::string>& keys) {
  const Keeping keeping(states, weights);
  DLTensor read;
  if (!torch().read(param, &read)) throw std::invalid_argument("a parameter has no memory");
  const std::vector<State>& known = rules()[find_rule(rule)].states;
  const auto state_of = [&](const std::string& key) {
    return std::find_if(known.begin(), known.end(), [&](const State& s) { return key == s.name; });
  };
  const bool exact = std::any_of(keys.begin(), keys.end(), [&](const std::string& key) {
    return state_of(key) != known.end() && state_of(key)->narrow == Narrow::kExact;
  });
  std::vector<std::string> found;
  for (const std::string& key : keys) {
    const auto state = state_of(key);
    std::optional<Format> format;
    if (key == kRemainderState.name) {
      format = Format::kRemainder;
    } else if (state != known.end()) {
      format = keeping.of_state(read, exact ? Narrow::kExact : state->narrow);
    }
    found.push_back(format ? name_of(*format) : "");
  }
  return found;
}

}  // namespace fastopt
