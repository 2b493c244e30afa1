// The CPU backend: advance every slot, then update every element of the table, over threads.
//
// Compiled once per instruction set (FASTOPT_ISA names the copy); must not include or call anything
// that is not forced inline or local to this file, see Work.
#include "apply.h"

#include <cstring>

#include "../convert.h"
#include "../rules/rules.h"

// The iterations of the loop that follows do not touch each other's memory: it may be vectorised.
#ifdef __clang__
#define FASTOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTOPT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fastopt::cpu {
namespace {

// Elements converted at a time: five float buffers of it stay in the L1 cache.
constexpr int64_t kBlock = 1024;

// Calls visit(i, offset) for i in [0, n), offset being where element begin + i lies.
template <class Visit>
inline void walk(const Layout& w, int64_t begin, int64_t n, Visit visit) {
  int64_t index[64];  // torch allows 64 dimensions
  int64_t offset = 0;
  for (int64_t d = w.ndim - 1, rest = begin; d >= 0; --d) {
    index[d] = rest % w.shape[d];
    rest /= w.shape[d];
    offset += index[d] * w.stride[d];
  }
  for (int64_t i = 0; i < n; ++i) {
    visit(i, offset);
    for (int64_t d = w.ndim - 1; d >= 0; --d) {
      offset += w.stride[d];
      if (++index[d] < w.shape[d]) break;
      offset -= w.shape[d] * w.stride[d];
      index[d] = 0;
    }
  }
}

// One tensor of one slot, seen as an array of its storage type.
struct View {
  void* data;
  DType dtype;
  bool dense;
  Layout strided;
};

template <class E, class T>
void load(const View& view, int64_t begin, int64_t n, T* to) {
  const E* from = static_cast<const E*>(view.data);
  if (view.dense) {
    FASTOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[begin + i]);
  } else {
    walk(view.strided, begin, n, [=](int64_t i, int64_t at) { to[i] = widen(from[at]); });
  }
}

template <class E, class T>
void store(const View& view, int64_t begin, int64_t n, const T* from) {
  E* to = static_cast<E*>(view.data);
  if (view.dense) {
    FASTOPT_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) to[begin + i] = narrow<E>(from[i]);
  } else {
    walk(view.strided, begin, n, [=](int64_t i, int64_t at) { to[at] = narrow<E>(from[i]); });
  }
}

void load(const View& view, int64_t begin, int64_t n, float* to) {
  switch (view.dtype) {
    case DType::kFloat32: return load<float>(view, begin, n, to);
    case DType::kBFloat16: return load<BFloat16>(view, begin, n, to);
    case DType::kFloat16: return load<Float16>(view, begin, n, to);
    case DType::kFloat64: return;  // goes with double only: add_slot has checked
  }
}

void store(const View& view, int64_t begin, int64_t n, const float* from) {
  switch (view.dtype) {
    case DType::kFloat32: return store<float>(view, begin, n, from);
    case DType::kBFloat16: return store<BFloat16>(view, begin, n, from);
    case DType::kFloat16: return store<Float16>(view, begin, n, from);
    case DType::kFloat64: return;
  }
}

void load(const View& view, int64_t begin, int64_t n, double* to) {
  load<double>(view, begin, n, to);
}

void store(const View& view, int64_t begin, int64_t n, const double* from) {
  store<double>(view, begin, n, from);
}

template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// The innermost loop: n elements of T, tensors in slot order.
template <class Rule, int kStates, class T>
void update(const typename Rule::template Scalars<T>& scalars, T* const* tensor, int64_t n) {
  const typename Rule::template Scalars<T> k = scalars;
  T* const p = tensor[kParam];
  const T* const g = tensor[kGrad];
  FASTOPT_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    T s[kStates + 1];  // one more than needed: C++ has no arrays of zero elements
    for (int j = 0; j < kStates; ++j) s[j] = tensor[kState + j][i];
    Rule::template update<T, kStates>(k, p[i], g[i], s);
    for (int j = 0; j < kStates; ++j) tensor[kState + j][i] = s[j];
  }
}

template <class Rule, int kStates, class T>
void update_chunk(const Work& work, const typename Rule::template Scalars<T>& scalars,
                  const Slot& slot, int64_t chunk_begin) {
  constexpr int kCount = kState + kStates;
  const int64_t rest = slot.numel - chunk_begin;
  const int64_t end = chunk_begin + (rest < kChunk ? rest : kChunk);
  const bool rescale = work.grad_scale != 1;

  View view[kCount];
  bool native = !rescale;  // all arrays of T in memory: computed in place
  for (int i = 0; i < kCount; ++i) {
    view[i] = {slot.data[i], work.dtype[i], slot.layout == kDense, {}};
    if (!view[i].dense) view[i].strided = layout_of(work.layouts + slot.layout, i);
    native = native && view[i].dense && view[i].dtype == kNative<T>;
  }

  T* tensor[kCount];
  if (native) {
    for (int i = 0; i < kCount; ++i) tensor[i] = static_cast<T*>(slot.data[i]) + chunk_begin;
    return update<Rule, kStates, T>(scalars, tensor, end - chunk_begin);
  }
  alignas(64) T buffer[kCount][kBlock];
  for (int i = 0; i < kCount; ++i) tensor[i] = buffer[i];
  for (int64_t begin = chunk_begin; begin < end; begin += kBlock) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    for (int i = 0; i < kCount; ++i) load(view[i], begin, n, buffer[i]);
    if (rescale) {
      for (int64_t i = 0; i < n; ++i) buffer[kGrad][i] /= T(work.grad_scale);
      store(view[kGrad], begin, n, buffer[kGrad]);
    }
    update<Rule, kStates, T>(scalars, tensor, n);
    for (int i = 0; i < kCount; ++i) {
      if (i != kGrad) store(view[i], begin, n, buffer[i]);
    }
  }
}

// A count is float32 or float64: add_slot has checked.
Count read_count(const void* data, DType dtype) {
  const bool is_float = dtype == DType::kFloat32;
  return {is_float ? *static_cast<const float*>(data) : *static_cast<const double*>(data),
          is_float};
}

void write_count(void* data, Count count) {
  if (count.is_float) {
    *static_cast<float*>(data) = static_cast<float>(count.value);
  } else {
    *static_cast<double*>(data) = count.value;
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
    update_chunk<Rule, kStates, T>(work, scalars[i], slot, (chunk - slot.first_chunk) * kChunk);
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
#pragma omp parallel num_threads(work.threads)
  {
    int64_t slot = 0;  // a thread meets chunks in rising order
#pragma omp for schedule(monotonic : dynamic, in_a_row) nowait
    for (int64_t chunk = 0; chunk < work.chunk_count; ++chunk) slot = update_at(chunk, slot);
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
