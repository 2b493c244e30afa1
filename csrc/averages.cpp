#include "averages.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

namespace fastopt {

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

void AverageTables::place_as(const std::vector<Table>& tables, size_t members) {
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
  for (const Table& table : tables) {
    Table& averages = placed_.emplace_back();
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

Averages AverageTables::of(size_t table, double decay) const {
  Group group{};
  group.options[0].value = decay;
  return {&placed_[table], group};
}

}  // namespace fastopt
