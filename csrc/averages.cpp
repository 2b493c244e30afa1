#include "averages.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "cuda/apply.h"

namespace fastopt {
namespace {

// Whether CUDA's update can take it with its parameter, see cuda/apply.h: one that begins with this
// step is a copy.
bool goes_along(const Table& table, const Slot& slot, const Table& averages, const Slot& average) {
  const bool in_double = table.format[kParam] == Format::kFloat64;
  const bool has_room = table.tensors() + table.counts < kMaxPlaces;
  return has_room && table.states <= cuda::kMostWithAverage && slot.layout == kDense &&
         average.layout == kDense && !average.fresh &&
         averages.format[kParam] == (in_double ? Format::kFloat64 : Format::kFloat32);
}

}  // namespace

void AverageTables::add(Member& member, int index, const DLTensor& param, States& states) {
  Tensors tensors;
  tensors.names[kParam] = kAverage.name;
  tensors.states = tensors.counts = 0;
  states.read_average(member, param, &tensors.at[kParam]);
  tensors.at[kGrad] = param;
  for (const int i : {kParam, kGrad}) tensors.format[i] = format_of(tensors.at[i].dtype);
  try {
    add_slot(unplaced_, tensors, index, 0, member.fresh_average, false);
  } catch (const std::invalid_argument&) {
    throw std::invalid_argument(
        "state 'average' does not go with it; load a state_dict of this very model, or delete "
        "the state to begin the average anew");
  }
}

void AverageTables::place_as(std::vector<Table>& tables, size_t members, const Devices& devices) {
  struct Found {
    const Table* table;
    const Slot* slot;
  };
  std::vector<Found> of_member(members);
  for (const Table& table : unplaced_) {
    for (size_t i = 0; i < table.slots.size(); ++i) {
      of_member[table.members[i]] = {&table, &table.slots[i]};
    }
  }
  for (Table& table : tables) {
    Table& averages = placed_.emplace_back();
    averages.device = table.device;
    const Table& any = *of_member[table.members[0]].table;  // all have these formats
    std::copy(std::begin(any.format), std::end(any.format), averages.format);
    const bool on_cuda = devices.backend_of(table.device) == Backend::kCuda;
    bool along = false;
    for (size_t i = 0; i < table.slots.size(); ++i) {
      const auto [from, slot] = of_member[table.members[i]];
      if (on_cuda && goes_along(table, table.slots[i], *from, *slot)) {
        table.slots[i].data[table.tensors()] = slot->data[kParam];
        along = true;
        continue;
      }
      const bool dense = slot->layout == kDense;
      append_slot(averages, *slot, table.members[i],
                  dense ? nullptr : &from->layouts[slot->layout]);
    }
    along_.push_back(along);
  }
}

Averages AverageTables::of(size_t table, double decay) const {
  Group group{};
  group.options[0].value = decay;
  return {placed_[table].slots.empty() ? nullptr : &placed_[table], group, along_[table]};
}

}  // namespace fastopt
