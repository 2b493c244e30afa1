// Sharing a table's chunks out to threads.
//
// Part of apply.cpp and norm.cpp, and bound by what is said there.
#pragma once

#include "apply.h"
#include "float_mode.h"

namespace fastopt::cpu {
namespace {

// Calls visit(slot, chunk) for all of them: the slot's index, and the chunk's in the table.
template <class Visit>
void for_each_chunk(const Work& work, Visit visit) {
  // From a chunk's slot, or one before it, to that slot.
  const auto visit_at = [&](int64_t chunk, int64_t slot_before) {
    const int64_t i = slot_of_chunk(work.slots, work.slot_count, slot_before, chunk);
    visit(i, chunk);
    return i;
  };
  if (work.threads == 1 || work.numel < kSerial) {  // without the OpenMP runtime at all
    for (int64_t chunk = 0, slot = 0; chunk < work.chunk_count; ++chunk) {
      slot = visit_at(chunk, slot);
    }
    return;
  }
  // Where there are plenty, a thread takes several chunks in a row: longer streams, 4 % more
  // bandwidth.
  [[maybe_unused]] const int64_t in_a_row = work.chunk_count < 256 * work.threads ? 4 : 16;
  // Which thread takes a chunk must not decide its bits: all compute in the mode of the caller's.
  const FloatMode callers = float_mode();
#pragma omp parallel num_threads(work.threads)
  {
    const FloatMode own = float_mode();
    if (own != callers) set_float_mode(callers);
    int64_t slot = 0;  // a thread meets chunks in rising order
#pragma omp for schedule(monotonic : dynamic, in_a_row) nowait
    for (int64_t chunk = 0; chunk < work.chunk_count; ++chunk) slot = visit_at(chunk, slot);
    if (own != callers) set_float_mode(own);
  }
}

}  // namespace
}  // namespace fastopt::cpu
