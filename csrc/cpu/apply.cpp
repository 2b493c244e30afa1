// The CPU backend: advance every slot, then update every element of the table, over threads.
//
// Compiled once per instruction set (FASTOPT_ISA names the copy); must not include or call anything
// that is not forced inline or local to this file, see Work.
#include "apply.h"

#include <cstring>

#include "../rules/rules.h"
#include "arrays.h"
#include "blocks.h"
#include "chunks.h"
#include "tile.h"

namespace fastopt::cpu {
namespace {

// The innermost loop: n elements of a parameter, its gradient and its states, computed in T; of
// which arrays, `some` says. What rounding takes random bits from are the step's seed and the index
// in the whole parameter: the first element's, and kStep more for each.
template <class Rule, int kStates, class T, int kStep, class Param, class Grad, class State,
          class Some>
FASTOPT_RULE void update_some(const typename Rule::template Scalars<T>& scalars, Param of_params,
                              Grad of_grads, const State* of_states, int64_t n, uint32_t seed,
                              uint32_t first, Some some) {
  const typename Rule::template Scalars<T> k = scalars;
  const auto param = some(of_params);
  const auto grad = some(of_grads);
  decltype(some(*of_states)) state[kStates + 1];  // one more than needed: C++ has no empty arrays
  for (int j = 0; j < kStates; ++j) state[j] = some(of_states[j]);
  // An int: of one of 64 bits the index that random bits are of would be narrowed in every vector.
  FASTOPT_INDEPENDENT
  for (int i = 0; i < static_cast<int>(n); ++i) {
    T p = param.load(i), s[kStates + 1];
    for (int j = 0; j < kStates; ++j) s[j] = state[j].load(i);
    Rule::template update<T, kStates>(k, p, grad.load(i), s);
    const auto random = [=](int place) {  // asked for only where a format takes it
      return random_of(seed, place).bits(first + static_cast<uint32_t>(i) * kStep);
    };
    param.store(i, p, random(kParam));
    for (int j = 0; j < kStates; ++j) state[j].store(i, s[j], random(kState + j));
  }
}

template <class Rule, int kStates, class T, class Param, class Grad, class State>
void update(const typename Rule::template Scalars<T>& k, Param param, Grad grad,
            const State* states, int64_t n, uint32_t seed = 0, uint32_t first = 0) {
  if constexpr (kTakesEveryOther && kIn16Bits<Param> && kIn16Bits<Grad> && kIn16Bits<State>) {
    update_some<Rule, kStates, T, 2>(k, param, grad, states, n / 2, seed, first,
                                     [](auto array) { return every_other<false>(array); });
    update_some<Rule, kStates, T, 2>(k, param, grad, states, n / 2, seed, first + 1,
                                     [](auto array) { return every_other<true>(array); });
    if (n % 2 == 0) return;
    update_some<Rule, kStates, T, 1>(k, param, grad, states, 1, seed,
                                     first + static_cast<uint32_t>(n - 1),
                                     [=](auto array) { return array.from(n - 1); });
  } else {
    update_some<Rule, kStates, T, 1>(k, param, grad, states, n, seed, first,
                                     [](auto array) { return array; });
  }
}

// Rounding to one of the table's formats takes random bits.
bool any_random(const Work& work) {
  for (int i = 0; i < kMaxTensors; ++i) {
    if (is_random(work.format[i])) return true;
  }
  return false;
}

// Where the n elements of a tile lie.
struct Elements {
  const Work& work;
  const Slot& slot;
  int64_t begin, n;         // of them in the slot's order, but for those of a box
  const Run* run;           // the blocks they are, if any
  const Tile *tile, *next;  // the box that they are, if any, and the one after it

  // Calls use(view, at) for the views of tensor i. The one after the last tensor is the index in
  // the whole parameter, of which only a view's loops have a meaning.
  template <class Use>
  FASTOPT_RULE void for_each_view(int i, Use use) const {
    void* const data = slot.data[i];
    const Format format = work.format[i];
    if (slot.layout == kDense || is_block(format)) return use(view_of(begin, n, data, format), 0);
    const Layout layout = layout_of(work.layouts + slot.layout, i);
    if (tile) return use(view_of(*tile, *next, layout, data, format), 0);
    for_each_stretch(layout, begin, n, data, format, use);
  }
};

// These are compiled once, not for every rule.
template <class T>
__attribute__((noinline)) void load_tensor(const Elements& elements, int i, T* to) {
  elements.for_each_view(i,
                         [&](const View& view, int64_t at) { load(view, elements.run, to + at); });
}

template <class T>
__attribute__((noinline)) void store_tensor(const Elements& elements, int i, const T* from,
                                            uint32_t seed, const uint32_t* index) {
  const Random random = random_of(seed, i);
  elements.for_each_view(i, [&](const View& view, int64_t at) {
    store(view, elements.run, from + at, {random, index + at});
  });
}

__attribute__((noinline)) void find_indices(const Elements& elements, int tensors,
                                            uint32_t* index) {
  const uint32_t first = elements.slot.first_index;
  elements.for_each_view(tensors, [&](const View& view, int64_t at) {
    uint32_t* const to = index + at;
    walk(
        view,
        [=](int64_t in_whole, int64_t in_buffer) {
          to[in_buffer] = first + static_cast<uint32_t>(in_whole);
        },
        [](int64_t) {});
  });
}

// Rounds numbers as storing them in a gradient's format and loading them would.
template <class E, class T>
void round_as(T* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = widen(narrow<E>(x[i]));
}

// Divides gradients by grad_scale, and clips them as if they were written before they are read. (A
// loop for each, which compilers vectorise: of one that asks for the format they do not.)
template <class T>
__attribute__((noinline)) void scale_gradient(T* grad, int64_t n, const Work& work) {
  const T divisor = T(work.grad_scale), factor = T(work.clip);
  const auto round = [&] {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (work.format[kGrad] == Format::kBFloat16) round_as<BFloat16>(grad, n);
      if (work.format[kGrad] == Format::kFloat16) round_as<Float16>(grad, n);
    }
  };
  if (work.grad_scale != 1) {
    for (int64_t i = 0; i < n; ++i) grad[i] /= divisor;
  }
  if (work.clip == 1) return;
  if (work.grad_scale != 1) round();
  for (int64_t i = 0; i < n; ++i) grad[i] *= factor;
  round();
}

// A tile by way of buffers, but for tensors that can be computed where they lie.
template <class Rule, int kStates, class T>
void update_tile(const Elements& elements, const Advanced<Rule, T>& advanced) {
  constexpr int kCount = kState + kStates;
  const Work& work = elements.work;
  const int count = tensor_count(kStates, work.format[kParam]);
  const bool rescale = work.grad_scale != 1;
  alignas(64) T buffer[kCount][kTile];
  alignas(64) uint32_t index[kTile];
  Array<T> tensor[kCount];
  for (int i = 0; i < kCount; ++i) {
    const bool in_place = elements.slot.layout == kDense && work.format[i] == kFormatOf<T> &&
                          !(i == kGrad && rescale);
    tensor[i] = {in_place ? at<T>(elements.slot, i, elements.begin) : buffer[i]};
    if (!in_place) load_tensor(elements, i, buffer[i]);
  }
  if (count > kCount) load_tensor(elements, kCount, buffer[kParam]);  // completes a split parameter
  const bool clipped = tensor[kGrad].data == buffer[kGrad];
  if (clipped) scale_gradient(buffer[kGrad], elements.n, work);
  if (rescale) store_tensor(elements, kGrad, buffer[kGrad], 0, index);
  update<Rule, kStates, T>(advanced.k, tensor[kParam],
                           Clipped<Array<T>>{tensor[kGrad], clipped ? 1 : work.clip},
                           tensor + kState, elements.n);
  if (any_random(work)) find_indices(elements, count, index);
  for (int i = 0; i < kCount; ++i) {
    if (i != kGrad && tensor[i].data == buffer[i]) {
      store_tensor(elements, i, buffer[i], advanced.seed, index);
    }
  }
  if (count > kCount) store_tensor(elements, kCount, buffer[kParam], advanced.seed, index);
}

// A chunk of a slot whose tensors differ in their strides. An only dimension needs no buffers: its
// elements can be computed where they lie.
template <class Rule, int kStates, class T>
void update_strided(const Work& work, const Advanced<Rule, T>& advanced, const Slot& slot,
                    int64_t chunk) {
  constexpr int kCount = kState + kStates;
  const int64_t* const layout = work.layouts + slot.layout;
  bool native = work.grad_scale == 1;  // all are T in memory
  for (int i = 0; i < kCount; ++i) native = native && work.format[i] == kFormatOf<T>;
  if (native && layout[0] == 1) {
    const int64_t begin = chunk * kChunk;
    Strided<T> tensor[kCount];
    for (int i = 0; i < kCount; ++i) {
      const int64_t stride = *layout_of(layout, i).stride;
      tensor[i] = {at<T>(slot, i, begin * stride), stride};
    }
    return update<Rule, kStates, T>(advanced.k, tensor[kParam],
                                    Clipped<Strided<T>>{tensor[kGrad], work.clip}, tensor + kState,
                                    smaller(kChunk, slot.numel - begin));
  }
  // Elements may be taken in any order: the chunk is its share of the slot's tiles.
  const Tiling tiling(layout, tensor_count(kStates, work.format[kParam]));
  const int64_t chunks = chunks_of(slot);
  const int64_t end = tiling.count() * (chunk + 1) / chunks;
  for (int64_t t = tiling.count() * chunk / chunks; t < end; ++t) {
    const Tile tile = tiling.at(t), next = tiling.at(t + 1);
    update_tile<Rule, kStates, T>({work, slot, 0, tile.numel, nullptr, &tile, &next}, advanced);
  }
}

// Tables of which the innermost loop takes every element from memory itself and brings it back, so
// that nothing waits for a buffer: those of T alone, and what users are told of. What is left has a
// gradient scale, strides, or another mixture of formats. Processors without FMA have the first
// only: with the others it is arithmetic that takes their time.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

template <class Param, class Grad>
bool are_kept_as(const Work& work, const Slot& slot) {
  return work.format[kParam] == Param::kFormat && work.format[kGrad] == Grad::kFormat &&
         slot.layout == kDense && work.grad_scale == 1;
}

// The n elements from `begin` on, but for their states.
template <class Rule, int kStates, class T, class Param, class Grad, class State>
void update_part(const Work& work, const Advanced<Rule, T>& advanced, const Slot& slot,
                 int64_t begin, int64_t n, const State* state, BFloat16* room) {
  constexpr int kRest = kState + kStates;
  update<Rule, kStates, T>(advanced.k, Param::of(slot, kParam, kRest, begin),
                           clipped(Grad::of(slot, kGrad, kRest, begin), work.clip, n, room), state,
                           n, advanced.seed, slot.first_index + static_cast<uint32_t>(begin));
}

// Returns whether it could.
template <class Rule, int kStates, class T, class Param, class Grad, class State>
bool update_as(const Work& work, const Advanced<Rule, T>& advanced, const Slot& slot,
               int64_t chunk) {
  bool fits = are_kept_as<Param, Grad>(work, slot);
  for (int j = 0; j < kStates; ++j) fits = fits && work.format[kState + j] == State::kFormat;
  if (!fits) return false;
  constexpr int kRest = kState + kStates;
  const int64_t begin = chunk * kChunk, n = smaller(kChunk, slot.numel - begin);
  BFloat16 room[kChunk];
  State state[kStates + 1];
  for (int j = 0; j < kStates; ++j) state[j] = State::of(slot, kState + j, kRest, begin);
  update_part<Rule, kStates, T, Param, Grad>(work, advanced, slot, begin, n, state, room);
  return true;
}

using Single = Array<float>;
using Half = Array<BFloat16>;
using StochasticHalf = Array<StochasticBFloat16>;

template <class Rule, int kStates, class T>
bool update_directly(const Work& work, const Advanced<Rule, T>& advanced, const Slot& slot,
                     int64_t chunk) {
  const auto as = [&](auto param, auto grad, auto state) {
    return update_as<Rule, kStates, T, decltype(param), decltype(grad), decltype(state)>(
        work, advanced, slot, chunk);
  };
  if (as(Array<T>{}, Array<T>{}, Array<T>{})) return true;
  if constexpr (kHasFma && sizeof(T) == sizeof(float)) {
    if (as(Half{}, Half{}, Half{})) return true;
  }
  if constexpr (kHasFma && sizeof(T) == sizeof(float) && kHasKernelsOfFormats<Rule, kStates>) {
    if (as(StochasticHalf{}, Half{}, Half{}) || as(Halves{}, Half{}, Single{})) return true;
    if constexpr (kStates > 0) {
      return as(Single{}, Single{}, StochasticHalf{}) || as(Half{}, Half{}, StochasticHalf{}) ||
             as(StochasticHalf{}, Half{}, StochasticHalf{}) ||
             as(Halves{}, Half{}, StochasticHalf{});
    }
  }
  return false;
}

// Which states of a rule have signs in blocks, a bit for each: known beforehand, so that no loop
// asks in which kind a code is.
template <class Rule, int kStates>
constexpr unsigned signed_states() {
  unsigned found = 0;
  for (int j = 0; j < kStates; ++j) {
    found |= (Rule::kStates[Rule::kCounts + j].narrow != Narrow::kUnsigned) << j;
  }
  return found;
}

// Likewise of blocks, whose codes are made when the last number of a block is there.
template <class Rule, int kStates, class Param, class Grad>
bool update_blocks_as(const Work& work, const Advanced<Rule, float>& advanced, const Slot& slot,
                      const Blocks& blocks, int64_t first, int64_t end) {
  constexpr unsigned kSigned = signed_states<Rule, kStates>();
  const auto is_signed = [=](int j) { return (kSigned >> j & 1) != 0; };
  bool fits = are_kept_as<Param, Grad>(work, slot);
  for (int j = 0; j < kStates; ++j) {
    const Format format = is_signed(j) ? Format::kBlockSigned : Format::kBlockUnsigned;
    fits = fits && work.format[kState + j] == format;
  }
  if (!fits) return false;
  BFloat16 clip_room[kRun];
  CodesRoom room[kStates];
  for (const int64_t most = blocks_in_run(blocks); first < end; first += most) {
    const Run run{blocks, first, smaller(most, end - first), slot.numel};
    const int64_t begin = blocks.begin(first), n = blocks.begin(first + run.count) - begin;
    Codes state[kStates];
    for (int j = 0; j < kStates; ++j) {
      state[j] = is_signed(j)
                     ? load_codes<BlockSigned>(run, begin, slot.data[kState + j], &room[j])
                     : load_codes<BlockUnsigned>(run, begin, slot.data[kState + j], &room[j]);
    }
    update_part<Rule, kStates, float, Param, Grad>(work, advanced, slot, begin, n, state,
                                                   clip_room);
    for (int j = 0; j < kStates; ++j) {
      const auto store = is_signed(j) ? store_codes<BlockSigned> : store_codes<BlockUnsigned>;
      store(run, begin, n, slot.data[kState + j], room[j], random_of(advanced.seed, kState + j),
            slot.first_index + static_cast<uint32_t>(begin));
    }
  }
  return true;
}

// A chunk of blocks.
template <class Rule, int kStates>
void update_blocks(const Work& work, const Advanced<Rule, float>& advanced, const Slot& slot,
                   int64_t chunk) {
  const Blocks blocks(slot.numel, slot.rows);
  const int64_t in_chunk = blocks_in_chunk(blocks);
  const int64_t begin = chunk * in_chunk;
  const int64_t end = smaller(begin + in_chunk, slot.rows * blocks.in_row);
  if constexpr (kHasFma && kStates > 0 && kHasKernelsOfFormats<Rule, kStates>) {
    const auto as = [&](auto param, auto grad) {
      return update_blocks_as<Rule, kStates, decltype(param), decltype(grad)>(work, advanced, slot,
                                                                              blocks, begin, end);
    };
    if (as(Single{}, Single{}) || as(Half{}, Half{}) || as(StochasticHalf{}, Half{}) ||
        as(Halves{}, Half{})) {
      return;
    }
  }
  const int64_t most = blocks_in_run(blocks);
  for (int64_t first = begin; first < end; first += most) {
    const Run run{blocks, first, smaller(most, end - first), slot.numel};
    const int64_t from = blocks.begin(first);
    const int64_t n = blocks.begin(first + run.count) - from;
    update_tile<Rule, kStates, float>({work, slot, from, n, &run, nullptr, nullptr}, advanced);
  }
}

template <class Rule, int kStates, class T>
void update_chunk(const Work& work, const Advanced<Rule, T>& advanced, const Slot& slot,
                  int64_t chunk) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (slot.rows != 0) return update_blocks<Rule, kStates>(work, advanced, slot, chunk);
  }
  if (slot.layout != kDense) return update_strided<Rule, kStates, T>(work, advanced, slot, chunk);
  if (update_directly<Rule, kStates, T>(work, advanced, slot, chunk)) return;
  const int64_t end = smaller((chunk + 1) * kChunk, slot.numel);
  for (int64_t begin = chunk * kChunk; begin < end; begin += kTile) {
    const int64_t n = smaller(kTile, end - begin);
    update_tile<Rule, kStates, T>({work, slot, begin, n, nullptr, nullptr, nullptr}, advanced);
  }
}

// Phase one. Slots of a group mostly share their counts, so the last scalars are tried first.
template <class Rule, class T>
void advance(const Work& work, Advanced<Rule, T>* advanced) {
  constexpr int kMost = kMostCounts<Rule>;
  const int counts = Rule::kCounts > 0 ? Rule::kCounts : work.counts;
  const Slot* last = nullptr;
  Count last_before[kMost] = {}, last_after[kMost] = {};
  for (int64_t i = 0; i < work.slot_count; ++i) {
    const Slot& slot = work.slots[i];
    Count before[kMost] = {}, after[kMost] = {};
    bool same = last && last->group == slot.group && last->fresh == slot.fresh;
    for (int j = 0; j < counts; ++j) {
      before[j] = read_count(slot.data[count_place(j)], work.format[count_place(j)]);
      same = same && before[j].value == last_before[j].value;
    }
    if (same) {
      advanced[i] = advanced[i - 1];
      for (int j = 0; j < counts; ++j) after[j] = last_after[j];
    } else {
      for (int j = 0; j < counts; ++j) after[j] = before[j];
      const auto value = [](const Number& number) { return number.value; };
      advanced[i] = advance_slot<Rule, T>(options_of<Rule>(work.groups[slot.group], value),
                                          slot.fresh, counts, after);
    }
    last = &slot;
    for (int j = 0; j < counts; ++j) {
      write_count(slot.data[count_place(j)], after[j]);
      last_before[j] = before[j];
      last_after[j] = after[j];
    }
  }
}

// Averages. A chunk of one goes along with that of its parameter where both are the same elements.
bool goes_along(const Slot& slot, const Slot& average) {
  return slot.layout == kDense && slot.rows == 0 && average.layout == kDense;
}

template <class T>
__attribute__((noinline)) void average_chunk(const Work& average, int64_t i, int64_t chunk) {
  const auto* const advanced = static_cast<const Advanced<Average, T>*>(average.scalars);
  update_chunk<Average, 0, T>(average, advanced[i], average.slots[i], chunk);
}

template <class T>
void average_the_rest(const Work& work) {
  for_each_chunk(*work.average, [&](int64_t i, int64_t chunk) {
    const Slot& own = work.average->slots[i];
    if (!goes_along(work.slots[i], own))
      average_chunk<T>(*work.average, i, chunk - own.first_chunk);
  });
}

template <class Rule, int kStates, class T>
void apply(const Work& work) {
  auto* const advanced = static_cast<Advanced<Rule, T>*>(work.scalars);
  advance<Rule, T>(work, advanced);
  for_each_chunk(work, [&](int64_t i, int64_t chunk) {
    const Slot& slot = work.slots[i];
    const int64_t own = chunk - slot.first_chunk;
    update_chunk<Rule, kStates, T>(work, advanced[i], slot, own);
    if (work.average && goes_along(slot, work.average->slots[i])) {
      average_chunk<T>(*work.average, i, own);
    }
  });
}

template <class Rule, class T, int kStates = Rule::kFewestStates>
void apply_states(const Work& work) {
  if (work.states == kStates) return apply<Rule, kStates, T>(work);
  if constexpr (kStates < kMostStates<Rule>) {
    apply_states<Rule, T, kStates + 1>(work);
  }
}

template <class Rule, class T>
void apply_as(const Work& work) {
  if (work.average) {
    advance<Average, T>(*work.average, static_cast<Advanced<Average, T>*>(work.average->scalars));
  }
  apply_states<Rule, T>(work);
  if (work.average) average_the_rest<T>(work);
}

template <class Rule>
void apply_rule(const Work& work) {
  if (work.format[kParam] == Format::kFloat64) {
    apply_as<Rule, double>(work);
  } else {
    apply_as<Rule, float>(work);
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
