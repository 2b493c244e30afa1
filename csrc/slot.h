// A slot: one parameter as raw memory. Plain data, shared by every backend, device code included.
#pragma once

#include <cstdint>

#include "formats/formats.h"
#include "rules/arithmetic.h"

namespace fastopt {

// A slot's tensors, always in this order; a rule keeps up to kMaxStates states, and a split
// parameter has its remainder behind them. From the end come its counts: numbers of the state, one
// each for the whole slot, the step count first. On CUDA an average may be in between.
enum : int { kParam, kGrad, kState };
constexpr int kMaxStates = 3;
constexpr int kMaxTensors = kState + kMaxStates + 1;
constexpr int kMaxPlaces = kMaxTensors + 1;

FASTOPT_RULE constexpr int tensor_count(int states, Format param) {
  return kState + states + (param == Format::kSplit);
}

FASTOPT_RULE constexpr int count_place(int i) { return kMaxPlaces - 1 - i; }

// A number, or the tensor on the parameter's own device that holds it: no step waits to read one.
struct Number {
  double value;
  const void* tensor;  // null where value holds the number
  Format format;       // of the tensor
  uint8_t zero[7];     // no byte is left to chance: Triton's backend compares them
};

// A param group's hyper-parameters in the order of its rule's Options.
constexpr int kMaxOptions = 8;
struct Group {
  Number options[kMaxOptions];
};

struct Slot {
  void* data[kMaxPlaces];  // null where the rule keeps nothing
  int64_t numel;           // real elements: a complex one is two
  int32_t layout;          // kDense, or where this slot's layout starts in Table::layouts
  int32_t first_chunk;     // how many chunks the slots before it have
  int32_t group;
  bool fresh;            // its states were made for this very step
  uint8_t zero[3];       // as in Number
  uint32_t rows;         // into which blocks cut it; 0 where its states are not in blocks
  uint32_t first_index;  // of its first element in the whole parameter, of which it may be a shard
};

// A count is float32 or float64: add_slot has checked.
FASTOPT_RULE Count read_count(const void* data, Format format) {
  const bool is_float = format == Format::kFloat32;
  return {is_float ? *static_cast<const float*>(data) : *static_cast<const double*>(data),
          is_float};
}

FASTOPT_RULE void write_count(void* data, Count count) {
  if (count.is_float) {
    *static_cast<float*>(data) = static_cast<float>(count.value);
  } else {
    *static_cast<double*>(data) = count.value;
  }
}

// All tensors are dense with equal strides: element i of each is data[i], and of the whole
// parameter it is element first_index + i.
constexpr int32_t kDense = -1;

// How one tensor of any other slot lies in memory, outermost dimension first; strides count real
// elements. All of a slot's tensors share the shape.
struct Layout {
  int64_t ndim;
  const int64_t* shape;
  const int64_t* stride;
};

// Table::layouts holds ndim, shape[ndim], then the strides[ndim] of every tensor in turn, and those
// of the index in the whole parameter as if it were one more. In it the dimensions of a slot with
// blocks are in row-major order.
FASTOPT_RULE Layout layout_of(const int64_t* layout, int tensor) {
  const int64_t ndim = layout[0];
  return {ndim, layout + 1, layout + 1 + (1 + tensor) * ndim};
}

FASTOPT_RULE int64_t layout_size(int64_t ndim, int tensors) { return 1 + ndim * (2 + tensors); }

// A run of elements of one slot: a CPU task, a CUDA block's turn, a Triton program. The chunks of a
// table are numbered through, slot after slot; a slot's last one is what is left. Where states are
// in blocks it is as many whole ones, with rows shorter than a block more of them.
constexpr int64_t kChunk = 4096;

FASTOPT_RULE int64_t blocks_in_chunk(const Blocks& blocks) {
  return kChunk / (blocks.row < kBlock ? blocks.row : kBlock);
}

FASTOPT_RULE int64_t chunks_of(const Slot& slot) {
  if (slot.rows == 0 || slot.numel == 0) return (slot.numel + kChunk - 1) / kChunk;
  const Blocks blocks(slot.numel, slot.rows);
  const int64_t in_chunk = blocks_in_chunk(blocks);
  return (slot.rows * blocks.in_row + in_chunk - 1) / in_chunk;
}

// The slot a chunk belongs to, searched upwards from slot `low`: mostly it is very near.
FASTOPT_RULE int64_t slot_of_chunk(const Slot* slots, int64_t count, int64_t low, int64_t chunk) {
  int64_t step = 1;
  for (; low + step < count && slots[low + step].first_chunk <= chunk; step *= 2) low += step;
  while (step /= 2) {
    if (low + step < count && slots[low + step].first_chunk <= chunk) low += step;
  }
  return low;
}

}  // namespace fastopt
