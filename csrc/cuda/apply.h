// The CUDA backend's border: one step of one rule over one table of tensors on one device.
#pragma once

#include "../table.h"

namespace fastopt::cuda {

// States of a slot with which an average can go along, see apply.
constexpr int kMostWithAverage = 2;

// What a run can try, see tuning.h, as the environment asks for it; to be called where nobody
// changes that, which in Python is while the GIL is held.
struct Variant {
  bool overlap, few;
};
Variant variant_asked_for();

// Device memory, of any content, that apply needs for a table.
int64_t scratch_bytes(const Table& table);

// Launches both phases, advance and update, on a stream of the table's device and returns at once.
// Throws std::runtime_error when CUDA refuses a launch. Where average_weight is not 0, slots have
// behind their tensors the address of an average, or null. It goes along with its parameter, as the
// rule Average would move it with this weight once the parameter is stored: the slot is kDense, the
// average's elements are the arithmetic's, float32 or float64.
void apply(int rule, const Table& table, const Group* groups, double average_weight,
           const Scaling& scaling, Variant variant, void* scratch, void* stream);

// Device memory, of any content, that norm needs for tables of one device.
int64_t norm_scratch_bytes(const std::vector<Table>& tables);

// Launches what leaves the norm of the gradients of such tables, divided by grad_scale, in device
// memory; returns and throws as apply does.
void norm(const std::vector<Table>& tables, const Number& grad_scale, void* scratch, double* norm,
          void* stream);

}  // namespace fastopt::cuda
