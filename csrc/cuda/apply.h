// The CUDA backend's border: one step of one rule over one table of tensors on one device.
#pragma once

#include "../table.h"

namespace fastopt::cuda {

// Device memory, of any content, that apply needs for a table.
int64_t scratch_bytes(const Table& table);

// Launches both phases, advance and update, on a stream of the table's device and returns at once.
// Throws std::runtime_error when CUDA refuses a launch.
void apply(int rule, const Table& table, const Group* groups, const Number& found_inf,
           const Number& grad_scale, void* scratch, void* stream);

}  // namespace fastopt::cuda
