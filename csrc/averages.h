// Averages of parameters: they go along with the update where they can, and are else tables of
// their own beside the parameters'.
#pragma once

#include <vector>

#include "members.h"
#include "runner.h"
#include "states.h"
#include "table.h"

namespace fastopt {

class AverageTables {
 public:
  // Adds the average of a member, whose parameter has been read. Throws std::invalid_argument where
  // the two do not fit together.
  void add(Member& member, int index, const DLTensor& param, States& states);

  // Once all are added: gives each the place that its parameter has in these tables, or on CUDA
  // makes it one more tensor of the parameter's slot.
  void place_as(std::vector<Table>& tables, size_t members, const Devices& devices);

  // Those of one of these tables.
  Averages of(size_t table, double decay) const;

 private:
  std::vector<Table> unplaced_, placed_;
  std::vector<bool> along_;  // of each table: whether any is in its slots
};

}  // namespace fastopt
