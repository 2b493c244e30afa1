// One step: reads an optimizer's param groups into tables, checks everything, and has backends
// apply the rule to them.
#include "step.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "averages.h"
#include "clip.h"
#include "cpu/apply.h"
#include "keeping.h"
#include "members.h"
#include "options.h"
#include "overlap.h"
#include "reading.h"
#include "runner.h"
#include "states.h"

namespace fastopt {
namespace {

// One step() being prepared: tables filled, new states made but not yet in the optimizer.
class Step {
 public:
  Step(const std::string& rule, py::object state, const py::object& grad_scale,
       const py::object& found_inf, const std::optional<std::string>& backend,
       const Keeping& keeping, const Passes& passes)
      : rule_index_(find_rule(rule)),
        rule_(rules()[rule_index_]),
        grad_scale_(grad_scale.is_none() ? Value{1, {}} : value_of(grad_scale)),
        found_inf_(found_inf.is_none() ? Value{0, {}} : value_of(found_inf)),
        rescale_(!grad_scale_.on_host() || grad_scale_.read() != 1),
        devices_(backend),
        keeping_(keeping),
        passes_(passes),
        states_(rule_index_, keeping, passes.decay.has_value(), std::move(state), devices_,
                reader_) {}

  // Throws NotOurs, or ValueError naming the parameter; either way nothing has been changed.
  void prepare(const py::object& param_groups, int threads) {
    param_groups_ = items_of(param_groups);
    for (const py::handle param_group : param_groups_) {
      const auto group = static_cast<int>(options_.size());
      options_.push_back(read_options(rule_index_, param_group, group));
      states_.add_group(param_group, options_.back());
      collect(param_group, group, members_);
    }
    if (has_duplicates(members_)) throw NotOurs{"a parameter is given twice"};
    for (Member& member : members_) states_.find(member);
    for (size_t i = 0; i < members_.size(); ++i) {
      if (i + 4 < members_.size()) members_[i + 4].prefetch(torch_, Ahead::kTensor);
      if (i + 2 < members_.size()) members_[i + 2].prefetch(torch_, Ahead::kStorage);
      try {
        add(static_cast<int>(i));
      } catch (const std::invalid_argument& error) {
        throw py::value_error(name_of(param_groups_[members_[i].group], members_[i]) + ": " +
                              error.what());
      }
    }
    if (!in_slots_order(threads)) {
      tables_ = in_turn(std::move(tables_), rescale_);
    }
    for (const Table& table : tables_) scaling_.push_back(scaling_on(table.device));
    if (passes_.decay) averages_.place_as(tables_, members_.size(), devices_);
  }

  // All checks are done: from here on nothing fails but a device.
  void run(const Runner& runner) {
    if (passes_.max_norm) find_norm(runner);
    if (members_.empty() || is_skipped()) return;
    count_versions();
    size_t done = 0;
    try {
      for (; done < tables_.size(); ++done) {
        const Averages averages = passes_.decay ? averages_.of(done, *passes_.decay) : Averages{};
        runner.run(rule_index_, tables_[done], groups_, scaling_[done], done, averages);
      }
    } catch (...) {
      states_.keep(members_, tables_, done);
      throw;
    }
    states_.keep(members_, tables_, done);
    if (rescale_) unscale_copied();
  }

  const Devices& devices() const { return devices_; }

 private:
  struct Place {
    int group;
    DLDevice device;
  };

  // Reads all tensors of a member and adds its slot to the table it belongs to.
  void add(int index) {
    Member& member = members_[index];
    Tensors tensors;
    DLTensor& param = tensors.at[kParam];
    read_param(member, &param);
    member.copied = reader_.read_grad(member.param, member.grad, param, &tensors.at[kGrad]);
    tensors.format[kParam] = keeping_.of_param(param);
    tensors.format[kGrad] = format_of(tensors.at[kGrad].dtype);
    states_.read(member, members_, tensors);
    const std::vector<int64_t> strides = find_index(member, tensors);
    if (passes_.max_norm && !passes_.total_norm) {
      gradients_.add(member.param, tensors.at[kGrad], index);  // which is laid out like it
    }
    if (passes_.decay) averages_.add(member, index, param, states_);
    add_slot(tables_, tensors, index, group_on(member.group, param.device), member.fresh, rescale_);
  }

  void read_param(const Member& member, DLTensor* out) {
    const py::handle memory = reader_.read(member.param, member.param, "the parameter", out);
    if (!is_supported(out->dtype)) {
      throw NotOurs{"no fastopt arithmetic for parameters of " + text(member.param.attr("dtype"))};
    }
    if (torch_.is_lazy(memory)) throw NotOurs{"a parameter is a conjugate or negative view"};
    devices_.meet(out->device, member.param);
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

  Number number_on(const Value& value, DLDevice device) {
    return fastopt::number_on(value, device, devices_, reader_);
  }

  // Whether slots are updated one after another, as torch does, be their memory shared or not.
  bool in_slots_order(int threads) const {
    const auto alone = [&](const Table& table) {
      return backend_of(table) == Backend::kCpu && (threads == 1 || table.numel < cpu::kSerial);
    };
    return tables_.empty() || (tables_.size() == 1 && alone(tables_[0]));
  }

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

  Backend backend_of(const Table& table) const { return devices_.backend_of(table.device); }

  const Torch& torch_ = torch();
  int rule_index_;
  const RuleInfo& rule_;
  py::tuple param_groups_;
  Value grad_scale_, found_inf_;
  bool rescale_;  // gradients are written, too
  Devices devices_;
  Keeping keeping_;
  Passes passes_;
  Reader reader_;
  States states_;
  std::vector<std::vector<Value>> options_;  // of each param group
  std::vector<Group> groups_;                // of each param group and device that has slots
  std::vector<Place> places_;                // likewise: which they are
  std::vector<Member> members_;
  std::vector<Table> tables_;
  AverageTables averages_;
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

}  // namespace fastopt
