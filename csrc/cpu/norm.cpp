// Sums of squares, see norm.h.
//
// Compiled once per instruction set and bound like apply.cpp, see Work.
#include "../norm.h"

#include "apply.h"
#include "chunks.h"
#include "tile.h"

namespace fastopt::cpu {
namespace {

// Numbers that are asked for before their turn: one stream alone, as a norm is, a processor does
// not fetch as fast as its memory could send it. Takes a quarter off the time of a large gradient.
constexpr int64_t kAhead = 2048;

// Adds the squares of n numbers, of which the first belongs to lane 0.
template <class T>
void add_squares(const T* from, int64_t n, double (&lane)[kLanes]) {
  double sum[kLanes];  // a copy, which stays in registers
  for (int l = 0; l < kLanes; ++l) sum[l] = lane[l];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const char* const ahead = reinterpret_cast<const char*>(from + i) + kAhead * sizeof(T);
    for (size_t line = 0; line < kLanes * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
    for (int l = 0; l < kLanes; ++l) sum[l] += square(from[i + l]);
  }
  for (int l = 0; l < n - i; ++l) sum[l] += square(from[i + l]);
  for (int l = 0; l < kLanes; ++l) lane[l] = sum[l];
}

template <class T>
double sum_chunk(const Work& work, const Slot& slot, int64_t chunk) {
  const Format format = work.format[kGrad];
  const int64_t end = smaller((chunk + 1) * kChunk, slot.numel);
  double lane[kLanes] = {};
  if (slot.layout == kDense && format == kFormatOf<T>) {
    const int64_t begin = chunk * kChunk;
    add_squares(static_cast<const T*>(slot.data[kGrad]) + begin, end - begin, lane);
    return add_lanes(lane);
  }
  alignas(64) T buffer[kTile];
  for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
    const int64_t n = smaller(kTile, end - begin);
    const auto add = [&](const View& view, int64_t at) { load(view, nullptr, buffer + at); };
    if (slot.layout == kDense) {
      add(view_of(begin, n, slot.data[kGrad], format), 0);
    } else {
      const Layout layout = layout_of(work.layouts + slot.layout, kGrad);
      for_each_stretch(layout, begin, n, slot.data[kGrad], format, add);
    }
    add_squares(buffer, n, lane);
  }
  return add_lanes(lane);
}

}  // namespace

#define FASTOPT_NAME_(isa) sum_squares_##isa
#define FASTOPT_NAME(isa) FASTOPT_NAME_(isa)

void FASTOPT_NAME(FASTOPT_ISA)(const Work& work, double* sums) {
  const bool in_double = work.format[kGrad] == Format::kFloat64;
  for_each_chunk(work, [=, &work](int64_t i, int64_t chunk) {
    const Slot& slot = work.slots[i];
    const int64_t own = chunk - slot.first_chunk;
    sums[chunk] =
        in_double ? sum_chunk<double>(work, slot, own) : sum_chunk<float>(work, slot, own);
  });
}

}  // namespace fastopt::cpu
