// Averages of parameters: tables beside the parameters' own, moved with them.
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

  // Once all are added: gives each the place that its parameter has in these tables.
  void place_as(const std::vector<Table>& tables, size_t members);

  // Those beside one of these tables.
  Averages of(size_t table, double decay) const;

 private:
  std::vector<Table> unplaced_, placed_;
};

}  // namespace fastopt
