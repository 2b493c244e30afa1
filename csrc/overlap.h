// Parameters that share memory: tables in which they are stepped one after the other, as by torch.
#pragma once

#include <vector>

#include "table.h"

namespace fastopt {

// The tables of a step, in an order and so divided that no slot shares memory that either writes
// with another one of its table or of a table that torch would step after it.
std::vector<Table> in_turn(std::vector<Table> tables, bool writes_grad);

}  // namespace fastopt
