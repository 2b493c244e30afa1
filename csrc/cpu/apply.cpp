// The CPU backend: advance every slot, then update every element of the table, over threads.
//
// Compiled once per instruction set (FASTOPT_ISA names the copy); must not include or call anything
// that is not forced inline or local to this file, see Work.
#include "apply.h"

#include <cstring>

#include "../rules/rules.h"
#include "float_mode.h"
#include "tile.h"

namespace fastopt::cpu {
namespace {

template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// The strides of arrays, known when the innermost loop is compiled.
struct Unit {
  int64_t operator[](int) const { return 1; }
};

// The innermost loop: n elements of T, tensors and their strides in slot order.
template <class Rule, int kStates, class T, class Strides>
void update(const typename Rule::template Scalars<T>& scalars, T* const* tensor,
            const Strides& stride, int64_t n) {
  const typename Rule::template Scalars<T> k = scalars;
  T* const p = tensor[kParam];
  const T* const g = tensor[kGrad];
  FASTOPT_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    T s[kStates + 1];  // one more than needed: C++ has no arrays of zero elements
    for (int j = 0; j < kStates; ++j) s[j] = tensor[kState + j][i * stride[kState + j]];
    Rule::template update<T, kStates>(k, p[i * stride[kParam]], g[i * stride[kGrad]], s);
    for (int j = 0; j < kStates; ++j) tensor[kState + j][i * stride[kState + j]] = s[j];
  }
}

// n elements by way of buffers, which `view` says how to fill.
template <class Rule, int kStates, class T>
void update_buffered(const Work& work, const typename Rule::template Scalars<T>& scalars,
                     const View* view, int64_t n) {
  constexpr int kCount = kState + kStates;
  alignas(64) T buffer[kCount][kTile];
  T* tensor[kCount];
  for (int i = 0; i < kCount; ++i) load(view[i], tensor[i] = buffer[i]);
  if (work.grad_scale != 1) {
    for (int64_t i = 0; i < n; ++i) buffer[kGrad][i] /= T(work.grad_scale);
    store(view[kGrad], buffer[kGrad]);
  }
  update<Rule, kStates, T>(scalars, tensor, Unit{}, n);
  for (int i = 0; i < kCount; ++i) {
    if (i != kGrad) store(view[i], buffer[i]);
  }
}

// A chunk of a slot whose tensors differ in their strides. An only dimension needs no buffers: its
// elements can be computed where they lie.
template <class Rule, int kStates, class T>
void update_strided(const Work& work, const typename Rule::template Scalars<T>& scalars,
                    const Slot& slot, int64_t chunk, bool native) {
  constexpr int kCount = kState + kStates;
  const int64_t* const layout = work.layouts + slot.layout;
  if (native && layout[0] == 1) {
    const int64_t begin = chunk * kChunk;
    T* tensor[kCount];
    int64_t stride[kCount];
    for (int i = 0; i < kCount; ++i) {
      stride[i] = *layout_of(layout, i).stride;
      tensor[i] = static_cast<T*>(slot.data[i]) + begin * stride[i];
    }
    return update<Rule, kStates, T>(scalars, tensor, stride, smaller(kChunk, slot.numel - begin));
  }
  // Elements may be taken in any order: the chunk is its share of the slot's tiles.
  const Tiling tiling(layout, kCount);
  const int64_t chunks = (slot.numel + kChunk - 1) / kChunk;
  const int64_t end = tiling.count() * (chunk + 1) / chunks;
  for (int64_t t = tiling.count() * chunk / chunks; t < end; ++t) {
    const Tile tile = tiling.at(t), next = tiling.at(t + 1);
    View view[kCount];
    for (int i = 0; i < kCount; ++i) {
      view[i] = view_of(tile, next, layout_of(layout, i), slot.data[i], work.dtype[i]);
    }
    update_buffered<Rule, kStates, T>(work, scalars, view, tile.numel);
  }
}

template <class Rule, int kStates, class T>
void update_chunk(const Work& work, const typename Rule::template Scalars<T>& scalars,
                  const Slot& slot, int64_t chunk) {
  constexpr int kCount = kState + kStates;
  bool native = work.grad_scale == 1;  // all are T in memory: nothing to convert
  for (int i = 0; i < kCount; ++i) native = native && work.dtype[i] == kNative<T>;
  if (slot.layout != kDense) {
    return update_strided<Rule, kStates, T>(work, scalars, slot, chunk, native);
  }
  const int64_t chunk_begin = chunk * kChunk;
  const int64_t end = smaller(chunk_begin + kChunk, slot.numel);
  if (native) {
    T* tensor[kCount];
    for (int i = 0; i < kCount; ++i) tensor[i] = static_cast<T*>(slot.data[i]) + chunk_begin;
    return update<Rule, kStates, T>(scalars, tensor, Unit{}, end - chunk_begin);
  }
  for (int64_t begin = chunk_begin; begin < end; begin += kTile) {
    const int64_t n = smaller(kTile, end - begin);
    View view[kCount];
    for (int i = 0; i < kCount; ++i) view[i] = view_of(begin, n, slot.data[i], work.dtype[i]);
    update_buffered<Rule, kStates, T>(work, scalars, view, n);
  }
}

// Phase one. Slots of a group mostly share their counts, so the last scalars are tried first.
template <class Rule, class T>
void advance(const Work& work, typename Rule::template Scalars<T>* scalars) {
  constexpr int kCounts = Rule::kCounts;
  const Slot* last = nullptr;
  Count last_before[kCounts + 1] = {}, last_after[kCounts + 1] = {};
  for (int64_t i = 0; i < work.slot_count; ++i) {
    const Slot& slot = work.slots[i];
    Count before[kCounts + 1] = {}, after[kCounts + 1] = {};
    bool same = last && last->group == slot.group && last->fresh == slot.fresh;
    for (int j = 0; j < kCounts; ++j) {
      before[j] = read_count(slot.data[count_place(j)], work.dtype[count_place(j)]);
      same = same && before[j].value == last_before[j].value;
    }
    if (same) {
      scalars[i] = scalars[i - 1];
      for (int j = 0; j < kCounts; ++j) after[j] = last_after[j];
    } else {
      for (int j = 0; j < kCounts; ++j) after[j] = before[j];
      double t = slot.fresh ? 1 : 2;
      if constexpr (kCounts > 0) t = after[0].value = after[0].rounded(after[0].value + 1);
      const auto value = [](const Number& number) { return number.value; };
      scalars[i] =
          Rule::template advance<T>(options_of<Rule>(work.groups[slot.group], value), t, after + 1);
    }
    last = &slot;
    for (int j = 0; j < kCounts; ++j) {
      write_count(slot.data[count_place(j)], after[j]);
      last_before[j] = before[j];
      last_after[j] = after[j];
    }
  }
}

template <class Rule, int kStates, class T>
void apply(const Work& work) {
  using Scalars = typename Rule::template Scalars<T>;
  static_assert(sizeof(Scalars) <= kScalarBytes);
  auto* const scalars = static_cast<Scalars*>(work.scalars);
  advance<Rule, T>(work, scalars);
  // From a chunk's slot, or one before it, to that slot.
  const auto update_at = [&](int64_t chunk, int64_t slot_before) {
    const int64_t i = slot_of_chunk(work.slots, work.slot_count, slot_before, chunk);
    const Slot& slot = work.slots[i];
    update_chunk<Rule, kStates, T>(work, scalars[i], slot, chunk - slot.first_chunk);
    return i;
  };
  if (work.threads == 1 || work.numel < kSerial) {  // without the OpenMP runtime at all
    for (int64_t chunk = 0, slot = 0; chunk < work.chunk_count; ++chunk) {
      slot = update_at(chunk, slot);
    }
    return;
  }
  // Where there are plenty, a thread takes several chunks in a row: longer streams, 4 % more
  // bandwidth.
  const int64_t in_a_row = work.chunk_count < 256 * work.threads ? 4 : 16;
  // Which thread takes a chunk must not decide its bits: all compute in the mode of the caller's.
  const FloatMode callers = float_mode();
#pragma omp parallel num_threads(work.threads)
  {
    const FloatMode own = float_mode();
    if (own != callers) set_float_mode(callers);
    int64_t slot = 0;  // a thread meets chunks in rising order
#pragma omp for schedule(monotonic : dynamic, in_a_row) nowait
    for (int64_t chunk = 0; chunk < work.chunk_count; ++chunk) slot = update_at(chunk, slot);
    if (own != callers) set_float_mode(own);
  }
}

template <class Rule, class T, int kStates = Rule::kFewestStates>
void apply_states(const Work& work) {
  if (work.states == kStates) return apply<Rule, kStates, T>(work);
  if constexpr (kStates < kMostStates<Rule>) {
    apply_states<Rule, T, kStates + 1>(work);
  }
}

template <class Rule>
void apply_rule(const Work& work) {
  if (work.dtype[kParam] == DType::kFloat64) {
    apply_states<Rule, double>(work);
  } else {
    apply_states<Rule, float>(work);
  }
}

}  // namespace

#define FASTOPT_NAME_(isa) apply_##isa
#define FASTOPT_NAME(isa) FASTOPT_NAME_(isa)

void FASTOPT_NAME(FASTOPT_ISA)(const Work& work) {
  constexpr void (*kApply[])(const Work&) = {
#define FASTOPT_APPLY(Rule) apply_rule<Rule>,
      FASTOPT_FOR_EACH_RULE(FASTOPT_APPLY)
#undef FASTOPT_APPLY
  };
  kApply[work.rule](work);
}

}  // namespace fastopt::cpu
