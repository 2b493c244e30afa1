#include "states.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <limits>
#include <string>

namespace fastopt {
namespace {

// Keys of an optimizer's state, interned once: a step looks them up by the thousand.
struct Keys {
  PyObject* step = PyUnicode_InternFromString(kStep.name);
  PyObject* remainder = PyUnicode_InternFromString(kRemainder.name);
  PyObject* average = PyUnicode_InternFromString(kAverage.name);
  std::vector<std::vector<PyObject*>> counts, states;  // of each rule

  static std::vector<PyObject*> interned(const std::vector<State>& states) {
    std::vector<PyObject*> keys;
    for (const State& state : states) keys.push_back(PyUnicode_InternFromString(state.name));
    return keys;
  }

  Keys() {
    for (const RuleInfo& rule : rules()) {
      counts.push_back(interned(rule.counts));
      states.push_back(interned(rule.states));
    }
  }
};

const Keys& keys() {
  static const Keys* const keys = new Keys;
  return *keys;
}

}  // namespace

void States::add_group(py::handle param_group, const std::vector<Value>& options) {
  param_groups_.push_back(param_group);
  kept_.push_back(kept_with(options));
}

// Values on an accelerator count as not zero here: a state too many does no harm.
std::vector<States::Kept> States::kept_with(const std::vector<Value>& options) const {
  Group group{};
  for (size_t i = 0; i < options.size(); ++i) {
    group.options[i].value =
        options[i].on_host() ? options[i].read() : std::numeric_limits<double>::quiet_NaN();
  }
  std::vector<Kept> kept;
  kept.reserve(rule_.counts.size() + rule_.states.size());
  for (size_t i = 0; i < rule_.counts.size(); ++i) {
    kept.push_back(
        {count_place(static_cast<int>(i)), keys().counts[rule_index_][i], &rule_.counts[i]});
  }
  const unsigned used = rule_.states_used(group);
  int place = kState;
  for (size_t i = 0; i < rule_.states.size(); ++i) {
    if (used >> i & 1) {
      kept.push_back({place++, keys().states[rule_index_][i], &rule_.states[i]});
    }
  }
  const bool random =
      (keeping_.narrows_states() && used != 0) || keeping_.weights == Format::kBFloat16Stochastic;
  if (random && rule_.counts.empty()) kept.push_back({count_place(0), keys().step, &kStep, true});
  if (keeping_.weights == Format::kSplit) {
    kept.push_back({place, keys().remainder, &kRemainder, true});
  }
  return kept;
}

// Its last place is a state's only where there are no counts.
bool States::is_count(const Kept& kept) const {
  return kept.state == &kStep || kept.place > count_place(static_cast<int>(rule_.counts.size()));
}

void States::find(Member& member) const {
  if (kept_[member.group].empty() && !averages_) return;
  member.keeps = !kept_[member.group].empty();
  member.fresh = std::any_of(kept_[member.group].begin(), kept_[member.group].end(),
                             [](const Kept& kept) { return !kept.ours; });
  py::object found = state_.find_tensor(member.param);
  if (!found) return;
  const Mapping entry(std::move(found));
  if (averages_) member.average = entry.find(keys().average);
  for (const Kept& kept : kept_[member.group]) {
    py::object value = entry.find(kept.key);
    // None counts as missing: so SGD's checkpoints have it before the first step.
    if (!value || value.is_none()) continue;
    member.kept[kept.place] = std::move(value);
    member.keeps = false;
    if (!kept.ours) member.fresh = false;
  }
}

void States::read(Member& member, std::vector<Member>& members, Tensors& tensors) {
  if (member.fresh && !made_) make(members);
  const std::vector<Kept>& group = kept_[member.group];
  const auto is_exact = [](const Kept& kept) { return kept.state->narrow == Narrow::kExact; };
  const bool exact = keeping_.narrows_states() && std::any_of(group.begin(), group.end(), is_exact);
  const DLTensor& param = tensors.at[kParam];
  tensors.counts = tensors.states = 0;
  for (const Kept& kept : group) {
    tensors.names[kept.place] = kept.state->name;
    if (is_count(kept)) {
      ++tensors.counts;
      read_count(member, kept, param.device, &tensors.at[kept.place]);
    } else if (kept.state != &kRemainder) {
      ++tensors.states;
      const Narrow narrow = exact ? Narrow::kExact : kept.state->narrow;
      add_state(member, kept, tensors, keeping_.of_state(param, narrow));
    } else if (tensors.format[kParam] == Format::kSplit) {
      add_state(member, kept, tensors, Format::kRemainder);
    }
  }
}

// A state as it is, or converted to what it is to be kept as.
void States::add_state(Member& member, const Kept& kept, Tensors& tensors,
                       std::optional<Format> format) {
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

void States::read_state(const Member& member, const py::object& value, const Kept& kept,
                        DLTensor* out) {
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
void States::read_count(Member& member, const Kept& kept, DLDevice device, DLTensor* out) {
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

void States::read_average(Member& member, const DLTensor& param, DLTensor* out) {
  if (!member.average) {
    const Format format = format_of(param.dtype);
    const bool narrow = format == Format::kBFloat16 || format == Format::kFloat16;
    member.average =
        helper("fastopt.tensors", "new_state")(member.param, 0, narrow ? "float32" : "");
    member.fresh_average = true;
  }
  read_state(member, member.average, {kParam, nullptr, &kAverage}, out);
}

// What is kept of all parameters that have nothing yet: one Python call a group, but for states in
// other formats than torch's.
void States::make(std::vector<Member>& members) {
  made_ = true;
  for (size_t begin = 0, end; begin < members.size(); begin = end) {
    const int group = members[begin].group;
    py::list params;
    std::vector<Member*> fresh;
    for (end = begin; end < members.size() && members[end].group == group; ++end) {
      if (!members[end].fresh) continue;
      fresh.push_back(&members[end]);
      params.append(members[end].param);
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

py::object States::first_of(const Kept& kept, int group) const {
  const char* const first = kept.state->first;
  return std::isdigit(static_cast<unsigned char>(*first)) ? py::object(py::float_(std::atof(first)))
                                                          : py::object(param_groups_[group][first]);
}

void States::keep(const std::vector<Member>& members, const std::vector<Table>& tables,
                  size_t done) {
  const auto keeps = [](const Member& m) { return m.keeps || m.fresh_average; };
  if (std::none_of(members.begin(), members.end(), keeps)) return;
  std::vector<bool> stepped(members.size());
  for (size_t i = 0; i < done; ++i) {
    for (const int32_t member : tables[i].members) stepped[member] = true;
  }
  for (size_t i = 0; i < members.size(); ++i) {  // in torch's order
    const Member& member = members[i];
    if (!keeps(member) || !stepped[i]) continue;
    py::object entry = state_.find_tensor(member.param);
    if (!entry) {
      entry = py::dict();
      state_.set(member.param, entry);
    }
    if (member.fresh_average) entry[py::handle(keys().average)] = member.average;
    for (const Kept& kept : kept_[member.group]) {
      if (member.kept[kept.place]) entry[py::handle(kept.key)] = member.kept[kept.place];
    }
  }
}

}  // namespace fastopt
