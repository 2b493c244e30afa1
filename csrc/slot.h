// A slot: one parameter as raw memory. Plain data, shared by every backend, device code included.
#pragma once

#include <cstdint>

#include "rules/arithmetic.h"

namespace fastopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A slot's tensors, always in this order; a rule keeps up to kMaxStates states. Behind them, from
// the end, come its counts: numbers of the state, one each for the whole slot, the step count
// first.
enum : int { kParam, kGrad, kState };
constexpr int kMaxStates = 3;
constexpr int kMaxTensors = kState + kMaxStates;
constexpr int kMaxPlaces = kMaxTensors + 1;

FASTOPT_RULE constexpr int count_place(int i) { return kMaxPlaces - 1 - i; }

// A number, or the tensor on the parameter's own device that holds it: no step waits to read one.
struct Number {
  double value;
  const void* tensor;  // null where value holds the number
  DType dtype;         // of the tensor
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
  int64_t layout;          // kDense, or where this slot's layout starts in Table::layouts
  int64_t first_chunk;     // how many chunks the slots before it have
  int32_t group;
  bool fresh;  // its states were made for this very step
};

// A count is float32 or float64: add_slot has checked.
FASTOPT_RULE Count read_count(const void* data, DType dtype) {
  const bool is_float = dtype == DType::kFloat32;
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

// All tensors are dense with equal strides: element i of each is data[i].
constexpr int64_t kDense = -1;

// How one tensor of any other slot lies in memory, outermost dimension first; strides count real
// elements. All of a slot's tensors share the shape.
struct Layout {
  int64_t ndim;
  const int64_t* shape;
  const int64_t* stride;
};

// Table::layouts holds ndim, shape[ndim], then the strides[ndim] of every tensor in turn.
FASTOPT_RULE Layout layout_of(const int64_t* layout, int tensor) {
  const int64_t ndim = layout[0];
  return {ndim, layout + 1, layout + 1 + (1 + tensor) * ndim};
}

FASTOPT_RULE int64_t layout_size(int64_t ndim, int states) {
  return 1 + ndim * (1 + kState + states);
}

// A run of elements of one slot: a CPU task, a CUDA block's turn, a Triton program. The chunks of a
// table are numbered through, slot after slot; a slot's last one is what is left.
constexpr int64_t kChunk = 4096;

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
