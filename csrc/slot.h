// A slot: one parameter as raw memory. Plain data, shared by every backend, device code included.
#pragma once

#include <cstdint>

namespace fastopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A slot's tensors, always in this order; a rule keeps up to kMaxStates states.
enum : int { kParam, kGrad, kState };
constexpr int kMaxStates = 3;
constexpr int kMaxTensors = kState + kMaxStates;

constexpr int kMaxOptions = 8;  // hyper-parameters of a group, betas counting as two

struct Slot {
  void* data[kMaxTensors];  // states the rule does not use are null
  void* step;               // the step count's tensor, null where the rule keeps none
  int64_t numel;            // real elements: a complex one is two
  int64_t layout;           // kDense, or where this slot's layout starts in Table::layouts
  int32_t group;
  bool fresh;  // its states were made for this very step
};

// All tensors are dense with equal strides: element i of each is data[i].
constexpr int64_t kDense = -1;

// A run of elements of one slot: one CPU task, one CUDA block's turn, one Triton program.
// 16,384: five float32 arrays of it fill 320 KiB, inside a core's L2 cache, and a float32 AdamW
// chunk takes about 20 us at memory speed, well above what it costs to hand it to a thread.
struct Chunk {
  int64_t begin;
  int32_t slot;
};
constexpr int64_t kChunk = 16384;

}  // namespace fastopt
