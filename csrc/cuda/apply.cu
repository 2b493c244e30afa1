// The CUDA backend: two kernels, advance and update, and their launch.
//
// A step copies nothing to the device and waits for nothing: what only the host knows rides in
// advance's arguments, and advance leaves in device memory what update reads. So a captured graph
// holds the whole step. No thread waits for another either, but for lanes of one warp where they
// look for a block's largest number: which lets the tests run this very source on the host.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <type_traits>

#include "apply.h"
#include "device.h"
#include "launch.h"
#include "tuning.h"
#include "vector.h"

namespace fastopt::cuda {
namespace {

// One warp a block: advance is short, and its blocks spread over the multiprocessors.
constexpr int kAdvanceThreads = 32;

// What gradients are divided by and then multiplied by.
struct Scale {
  double clip;
  float clip_rounded;
  float grad_scale;
  bool clips;  // by a factor that may be 1 in float
};

// A table in device memory.
struct Work {
  Slot* slots;
  void* scalars;  // of every slot, as its rule makes them
  int64_t* layouts;
  Scale* scale;
  int64_t slot_count;
  int64_t chunk_count;
  int counts;
  Format format[kMaxPlaces];
  double average_weight;  // of averages that go along, see apply.h; 0 where none does
  float average_weight_rounded;
};

// advance's arguments: a batch of slots with their groups and layouts.
template <int kBatchSlots, int kBatchGroups, int kBatchLayouts>
struct BatchOf {
  static constexpr int kSlots = kBatchSlots, kGroups = kBatchGroups, kLayouts = kBatchLayouts;

  Work work;
  Scaling scaling;
  int64_t first_slot;    // the table's index of slots[0]
  int64_t first_layout;  // and of layouts[0]
  int tensors, slot_count, group_count, layout_count;
  Slot slots[kSlots];
  Group groups[kGroups];  // which the slots' group counts here
  int64_t layouts[kLayouts];
};

// As large as kernels take them: most models fit into one. One of torch's 64 dimensions fits, too.
using Batch = BatchOf<288, 16, 1 + 64 * (2 + kMaxTensors)>;
static_assert(sizeof(Batch) <= 32764);

// The same for few slots.
using FewBatch = BatchOf<32, 4, 32>;
static_assert(sizeof(FewBatch) <= 4096);

// Phase one, a thread a slot.
template <class Rule, class T, class Batch>
__global__ void advance(const __grid_constant__ Batch batch) {
  let_next_kernel_start();
  const int i = blockIdx.x * kAdvanceThreads + threadIdx.x;
  if (i >= batch.slot_count) return;
  const Work& work = batch.work;
  const Scaling& scaling = batch.scaling;
  const double norm = read(scaling.norm), max_norm = read(scaling.max_norm);
  const bool overflowed = read(scaling.found_inf) != 0;
  const bool skip = overflowed || skips(scaling.skip, norm, max_norm);
  if (batch.first_slot + i == 0) {
    const double clip = clip_factor(norm, max_norm);
    *work.scale = {clip, static_cast<float>(clip), static_cast<float>(read(scaling.grad_scale)),
                   clip != 1};
    if (scaling.skipped && skip && !overflowed) ++*scaling.skipped;
  }

  Slot slot = batch.slots[i];
  constexpr int kMost = kMostCounts<Rule>;
  const int count = Rule::kCounts > 0 ? Rule::kCounts : work.counts;
  Count counts[kMost] = {};
  for (int j = 0; j < kMost; ++j) {
    if (j < count) counts[j] = read_count(slot.data[count_place(j)], work.format[count_place(j)]);
  }
  static_cast<Advanced<Rule, T>*>(work.scalars)[batch.first_slot + i] = advance_slot<Rule, T>(
      options_of<Rule>(batch.groups[slot.group], [](const Number& n) { return read(n); }),
      slot.fresh, count, counts);
  for (int j = 0; j < kMost; ++j) {
    if (!skip && j < count) write_count(slot.data[count_place(j)], counts[j]);
  }

  if (slot.layout != kDense) {
    const int64_t* const from = batch.layouts + (slot.layout - batch.first_layout);
    const int64_t size = layout_size(from[0], batch.tensors);
    for (int64_t j = 0; j < size; ++j) work.layouts[slot.layout + j] = from[j];
  }
  if (skip) slot.numel = 0;  // nothing for update to do
  work.slots[batch.first_slot + i] = slot;
}

// States of a rule that can be narrow: where another is in use, none is.
template <class Rule>
constexpr int narrow_states() {
  int count = -Rule::kCounts;
  for (const State& state : Rule::kStates) count += state.narrow != Narrow::kExact;
  return count;
}

// What an instance of update knows of its tables' formats when it is compiled, and how it is laid
// out: of each tensor a thread moves so many pieces at a time, of so many elements. The loads of
// all threads that a multiprocessor holds are to be 48 KiB: they hide the latency of memory. (The
// compiler shares out 65,536 registers among them.)

// Those of parameters, gradients and states.
template <Format kParamFormat, Format kGradFormat, Format kStateFormat>
struct Known {
  using Arithmetic = std::conditional_t<kParamFormat == Format::kFloat64, double, float>;
  static constexpr bool kBlocks = false, kOpen = false;
  static constexpr bool kMaySplit = kParamFormat == Format::kSplit;

  // Whether tables can be of these formats; without states they have only one name.
  static constexpr bool occur(int states, int narrow_states) {
    if (states == 0) return kStateFormat == (kMaySplit ? Format::kFloat32 : kParamFormat);
    return !is_random(kStateFormat) || states <= narrow_states;
  }
  FASTOPT_RULE static Format at(const Work&, int place, int states) {
    if (place == kState + states) return Format::kRemainder;
    return place == kParam ? kParamFormat : place == kGrad ? kGradFormat : kStateFormat;
  }
  static bool fit(const Table& table) {
    bool all = true;
    for (int i = 0; i < kState + table.states; ++i) {
      all = all && table.format[i] == at({}, i, table.states);
    }
    return all;
  }

  // 16 bytes of the widest tensor.
  FASTOPT_RULE static constexpr int piece(int states) {
    int widest = bytes_of(kParamFormat);
    if (widest < bytes_of(kGradFormat)) widest = bytes_of(kGradFormat);
    if (states > 0 && widest < bytes_of(kStateFormat)) widest = bytes_of(kStateFormat);
    return 16 / widest;
  }
  // Where float64 is computed with, fewer threads have room.
  FASTOPT_RULE static constexpr int pieces(int states) {
    int count = 1;
    while (count * piece_bytes(states) < bytes_ahead(kParamFormat == Format::kFloat64)) count *= 2;
    return count;
  }
  FASTOPT_RULE static constexpr int resident_blocks(int states) {
    return blocks_for(pieces(states) * piece_bytes(states));
  }

 private:
  FASTOPT_RULE static constexpr int piece_bytes(int states) {
    const int element = bytes_of(kParamFormat) + bytes_of(kGradFormat) +
                        states * bytes_of(kStateFormat) +
                        (kMaySplit ? bytes_of(Format::kRemainder) : 0);
    return piece(states) * element;
  }
};

// None, but for whether states are in blocks: serves the rest.
template <bool kInBlocks>
struct Any {
  using Arithmetic = float;
  static constexpr bool kBlocks = kInBlocks, kOpen = true;
  static constexpr bool kMaySplit = true;

  static constexpr bool occur(int states, int narrow_states) {
    return !kBlocks || (states > 0 && states <= narrow_states);
  }
  FASTOPT_RULE static Format at(const Work& work, int place, int states) {
    return place == kState + states ? Format::kRemainder : work.format[place];
  }
  static bool fit(const Table& table) {
    return (table.states > 0 && is_block(table.format[kState])) == kBlocks;
  }

  FASTOPT_RULE static constexpr int piece(int) { return kAnyPiece; }
  FASTOPT_RULE static constexpr int pieces(int states) {
    return kBlocks ? (states < 3 ? 4 : 2) : states < 2 ? 4 : states < 3 ? 2 : 1;
  }
  FASTOPT_RULE static constexpr int resident_blocks(int) { return 512 / kThreads; }
};

// One slot as the threads of update see it.
template <class Rule, int kOfRule, class Formats>
struct Turn {
  using T = typename Formats::Arithmetic;
  static constexpr int kStates = kOfRule;
  static constexpr int kCount = kState + kStates;  // tensors that the rule knows
  static constexpr int kTensors = kCount + Formats::kMaySplit;
  static constexpr int kPiece = Formats::piece(kStates), kPieces = Formats::pieces(kStates);
  // With three states there are no registers left for an average.
  static constexpr bool kMayAverage = kStates <= kMostWithAverage && !std::is_same_v<Rule, Average>;

  const Work& work;
  const Slot& slot;
  const Advanced<Rule, T> advanced;
  const T grad_scale, clip;
  const bool clips;
  void* data[kTensors];  // copies: for all the compiler knows, a store could change the slot
  T* average;            // null where none goes along

  __device__ Turn(const Work& work, const Slot& slot, const Advanced<Rule, T>& advanced,
                  const Scale& scale)
      : work(work),
        slot(slot),
        advanced(advanced),
        grad_scale(static_cast<T>(scale.grad_scale)),
        clip(sizeof(T) == sizeof(double) ? T(scale.clip) : T(scale.clip_rounded)),
        clips(scale.clips) {
#pragma unroll
    for (int j = 0; j < kTensors; ++j) data[j] = slot.data[j];
    average = kMayAverage && work.average_weight_rounded != 0 ? static_cast<T*>(slot.data[count()])
                                                              : nullptr;
  }

  __device__ Format format(int j) const { return Formats::at(work, j, kStates); }
  __device__ int count() const { return kCount + (format(kParam) == Format::kSplit); }
  __device__ bool exists(int j) const { return j < kCount || format(kParam) == Format::kSplit; }
  __device__ bool is_written(int j) const {
    return exists(j) && (j != kGrad || grad_scale != T(1));
  }
  static constexpr __device__ Role role(int j) {
    return j == kParam        ? Role::kParam
           : j == kGrad       ? Role::kGrad
           : j == kCount      ? Role::kRemainder
           : Formats::kBlocks ? Role::kBlocks
                              : Role::kState;
  }
  static constexpr __device__ bool is_in_blocks(int j) { return role(j) == Role::kBlocks; }
  static constexpr __device__ bool is_open(int j) {
    return role(j) != Role::kBlocks && role(j) != Role::kRemainder;
  }
  // Which of the rule's numbers a tensor holds.
  static constexpr __device__ int number_in(int j) { return j < kCount ? j : kParam; }

  // Where element i lies in each tensor, and last its index in the whole parameter.
  __device__ void find_element(int64_t i, int64_t (&at)[kTensors + 1]) const {
    const bool is_dense = slot.layout == kDense;
    for (int64_t& j : at) j = is_dense ? i : 0;
    if (!is_dense) {
      const int64_t* const layout = work.layouts + slot.layout;
      const Layout common = layout_of(layout, kParam);
#pragma unroll 1
      for (int64_t d = common.ndim - 1; d >= 0; --d) {
        const int64_t outer = i / common.shape[d];
        const int64_t index = i - outer * common.shape[d];
#pragma unroll
        for (int j = 0; j < kTensors; ++j) {
          if (exists(j)) at[j] += index * layout_of(layout, j).stride[d];
        }
        at[kTensors] += index * layout_of(layout, count()).stride[d];
        i = outer;
      }
    }
    at[kTensors] += slot.first_index;
  }

  template <int N>
  __device__ Vector load(int j, int64_t at) const {
    return cuda::load<N, T>(data[j], role(j), format(j), at);
  }
  template <int N>
  __device__ void store(int j, int64_t at, const Vector& vector) const {
    cuda::store<N, T>(data[j], role(j), format(j), at, vector);
  }
  template <int N>
  __device__ void unpack(int j, const Vector& vector, int first, uint32_t base, T* to) const {
    if constexpr (Formats::kOpen && !Formats::kBlocks) {
      if (role(j) != Role::kBlocks && role(j) != Role::kRemainder) {
        const Numbers numbers = unpack_any(vector, format(j));
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = numbers.x[i];
        return;
      }
    }
    cuda::unpack<N>(vector, first, role(j), format(j), base, to);
  }
  template <int N>
  __device__ void pack(int j, const T* from, uint32_t base, uint32_t index, int first,
                       Vector& vector) const {
    const Rounding rounding{random_of(advanced.seed, j), base};
    if constexpr (Formats::kOpen) {
      if (role(j) != Role::kRemainder) {
        Numbers numbers{};
#pragma unroll
        for (int i = 0; i < N; ++i) numbers.x[i] = from[i];
        vector = is_in_blocks(j) ? pack_codes(numbers, format(j), rounding, index)
                                 : pack_any(numbers, format(j), rounding.random, index);
        return;
      }
    }
    cuda::pack<N>(from, role(j), format(j), rounding, index, first, vector);
  }

  __device__ void skip(int64_t count) {
#pragma unroll
    for (int j = 0; j < kTensors; ++j) {
      data[j] = static_cast<char*>(data[j]) + count * bytes_of(format(j));
    }
    if (average) average += count;
  }

  // The same with memory; of read, one element.
  __device__ void read(int j, int64_t at, uint32_t base, T& to) const {
    unpack<1>(j, load<1>(j, at), 0, base, &to);
  }
  template <int N>
  __device__ Vector write(int j, int64_t at, const T* from, uint32_t base, uint32_t index) const {
    Vector vector;
    pack<N>(j, from, base, index, 0, vector);
    store<N>(j, at, vector);
    return vector;
  }

  // N numbers of the average, which are numbers of T. To fetch them is to have them near.
  __device__ void fetch_average(int64_t at) const { prefetch(average + at); }
  template <int N>
  __device__ Vector load_average(int64_t at) const {
    return cuda::load<N, T>(average, Role::kState, kFormatOf<T>, at);
  }
  // Moves them towards the parameter's, from element `first` of what is stored of it on.
  template <int N>
  __device__ void store_average(int64_t at, Vector vector, const Vector& param, int first) const {
    const T weight =
        sizeof(T) == sizeof(double) ? T(work.average_weight) : T(work.average_weight_rounded);
    T to[N], x[N];
    unpack<N>(kParam, param, first, 0, to);
    cuda::unpack<N>(vector, 0, Role::kState, kFormatOf<T>, 0, x);
#pragma unroll
    for (int i = 0; i < N; ++i) Average::update<T, 0>({weight}, x[i], to[i], nullptr);
    cuda::pack<N>(x, Role::kState, kFormatOf<T>, {}, 0, 0, vector);
    cuda::store<N, T>(average, Role::kState, kFormatOf<T>, at, vector);
  }

  // Divides gradients by grad_scale, and clips them as if they were written before they are read.
  // (Without a branch, which compilers would make two copies of the rule for.)
  template <int N>
  __device__ void scale_gradient(T (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const T unscaled = x[i] / grad_scale;
      const T clipped = rounded_to(format(kGrad), rounded_to(format(kGrad), unscaled) * clip);
      x[i] = clips ? clipped : unscaled;
    }
  }

  // The rule on N elements, x[j] being those of tensor j.
  template <int N>
  __device__ void update(T (&x)[kCount][N]) const {
    if (grad_scale != T(1) || clips) scale_gradient(x[kGrad]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T s[kStates + 1];  // one more than needed: C++ has no arrays of zero elements
#pragma unroll
      for (int j = 0; j < kStates; ++j) s[j] = x[kState + j][i];
      Rule::template update<T, kStates>(advanced.k, x[kParam][i], x[kGrad][i], s);
#pragma unroll
      for (int j = 0; j < kStates; ++j) x[kState + j][i] = s[j];
    }
  }
};

// A block's turn at a chunk of a slot.
template <class Rule, int kStates, class Formats>
__device__ void update_chunk(Turn<Rule, kStates, Formats>& turn, int64_t chunk) {
  using Turn = Turn<Rule, kStates, Formats>;
  using T = typename Turn::T;
  constexpr int kCount = Turn::kCount, kTensors = Turn::kTensors;
  constexpr int kPiece = Turn::kPiece, kPieces = Turn::kPieces;
  // There are registers to compute with no more elements at a time. Where these are a whole piece,
  // in formats that are known, there are some for averages, too; else averages wait in the cache.
  constexpr int kGroup = kPiece < 4 ? kPiece : 4;
  constexpr bool kAveragesAhead = kGroup == kPiece && !Formats::kOpen;
  const int64_t begin = chunk * kChunk;
  const int64_t rest = turn.slot.numel - begin;
  if (rest <= 0) return;  // the step is skipped
  const int n = static_cast<int>(rest < kChunk ? rest : kChunk);

  // Elements before the first at which a piece of each tensor is aligned, then those in pieces.
  const auto address = [&](int j) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(turn.data[j]));
  };
  const uint32_t param_bytes = bytes_of(turn.format(kParam));
  int head = static_cast<int>((0 - address(kParam)) % (kPiece * param_bytes) / param_bytes);
  bool is_aligned = turn.slot.layout == kDense && head < n;
#pragma unroll
  for (int j = 0; j < kTensors; ++j) {
    const uint32_t bytes = bytes_of(turn.format(j));
    if (turn.exists(j)) is_aligned &= (address(j) + head * bytes) % (kPiece * bytes) == 0;
  }
  is_aligned &= reinterpret_cast<uintptr_t>(turn.average + head) % (kGroup * sizeof(T)) == 0;
  const int in_pieces = is_aligned ? (n - head) / kPiece * kPiece : 0;

  // What is before and after them, or all where there are none.
#pragma unroll 1
  for (int left = threadIdx.x; left < n - in_pieces; left += kThreads) {
    const int i = left < head ? left : left + in_pieces;
    int64_t at[kTensors + 1];
    turn.find_element(begin + i, at);
    T x[kCount][1];
#pragma unroll
    for (int j = 0; j < kTensors; ++j) {
      if (!turn.exists(j)) continue;
      turn.read(j, at[j], 0, x[Turn::number_in(j)][0]);
    }
    turn.update(x);
    const uint32_t index = static_cast<uint32_t>(at[kTensors]);
#pragma unroll
    for (int j = 0; j < kTensors; ++j) {
      if (!turn.is_written(j)) continue;
      const Vector stored = turn.template write<1>(j, at[j], x[Turn::number_in(j)], 0, index);
      if (j == kParam && turn.average) {
        turn.template store_average<1>(at[j], turn.template load_average<1>(at[j]), stored, 0);
      }
    }
  }
  // From here on, elements are counted from the first in a piece: fewer registers are in use.
  const uint32_t first_index = turn.slot.first_index + static_cast<uint32_t>(begin + head);
  turn.skip(begin + head);
#pragma unroll 1
  for (int i = threadIdx.x * kPiece; i < in_pieces; i += kThreads * kPiece * kPieces) {
    constexpr int kStride = kThreads * kPiece;  // from a thread's piece to its next
    const auto has = [&](int q) { return q == 0 || i + q * kStride < in_pieces; };
    Vector vectors[kTensors][kPieces];
#pragma unroll
    for (int j = 0; j < kTensors; ++j) {
#pragma unroll
      for (int q = 0; q < kPieces; ++q) {
        if (turn.exists(j) && has(q)) {
          vectors[j][q] = turn.template load<kPiece>(j, i + q * kStride);
        }
      }
    }
    Vector averages[kPieces];
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      if (!turn.average || !has(q)) continue;
      if constexpr (kAveragesAhead) {
        averages[q] = turn.template load_average<kPiece>(i + q * kStride);
      } else {
        turn.fetch_average(i + q * kStride);
      }
    }
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      if (!has(q)) continue;
#pragma unroll
      for (int g = 0; g < kPiece; g += kGroup) {
        T x[kCount][kGroup];
#pragma unroll
        for (int j = 0; j < kTensors; ++j) {
          if (!turn.exists(j)) continue;
          turn.template unpack<kGroup>(j, vectors[j][q], g, 0, x[Turn::number_in(j)]);
        }
        turn.update(x);
        const uint32_t index = first_index + i + q * kStride + g;
#pragma unroll
        for (int j = 0; j < kTensors; ++j) {
          if (!turn.is_written(j)) continue;
          turn.template pack<kGroup>(j, x[Turn::number_in(j)], 0, index, g, vectors[j][q]);
        }
      }
#pragma unroll
      for (int j = 0; j < kTensors; ++j) {
        if (turn.is_written(j)) turn.template store<kPiece>(j, i + q * kStride, vectors[j][q]);
      }
      if (!turn.average) continue;
#pragma unroll
      for (int g = 0; g < kPiece; g += kGroup) {
        const int at = i + q * kStride + g;
        if constexpr (!kAveragesAhead) averages[q] = turn.template load_average<kGroup>(at);
        turn.template store_average<kGroup>(at, averages[q], vectors[kParam][q], g);
      }
    }
  }
}

// What a block's scale stands for, by the kind of block.
__device__ uint32_t base_in(Format format, uint32_t scale) {
  return format == Format::kBlockSigned ? base_of<BlockSigned>(scale)
                                        : base_of<BlockUnsigned>(scale);
}
__device__ uint32_t scale_in(Format format, uint32_t largest) {
  return format == Format::kBlockSigned ? scale_of<BlockSigned>(largest)
                                        : scale_of<BlockUnsigned>(largest);
}

// The largest of what so many neighbouring lanes bring, a power of two.
__device__ uint32_t largest_among(int lanes, uint32_t largest) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, largest, mask);
    largest = other > largest ? other : largest;
  }
  return largest;
}

// A block of numbers in every state of a slot, and the lane of those that take it.
template <class Turn>
struct Block {
  const Turn& turn;
  int64_t begin;  // its first element
  int n;          // how many there are: none where there is nothing left for the lane
  int lanes, lane;
  int64_t scale_at;
  // Of its scales, as they are read and as they are written; of tensors in no blocks 0.
  uint32_t base[Turn::kTensors] = {}, next_base[Turn::kTensors] = {};

  // A lane's own block of the chunk's, from the one after `passed` on. (All is read anew from the
  // slot: a kernel has too few registers to remember it.)
  __device__ Block(const Turn& turn, int64_t chunk, int passed, int lanes)
      : turn(turn), lanes(lanes), lane(threadIdx.x % lanes) {
    const Blocks blocks(turn.slot.numel, turn.slot.rows);
    const int64_t in_chunk = blocks_in_chunk(blocks), first = chunk * in_chunk;
    const int own = passed + threadIdx.x / lanes;
    const bool exists = own < in_chunk && first + own < turn.slot.rows * blocks.in_row;
    const int64_t block = first + (exists ? own : 0);
    const int64_t rest = blocks.row - block % blocks.in_row * kBlock;
    begin = blocks.begin(block);
    n = !exists ? 0 : rest < kBlock ? static_cast<int>(rest) : static_cast<int>(kBlock);
    scale_at = turn.slot.numel + block;
#pragma unroll
    for (int j = kState; j < Turn::kCount; ++j) base[j] = base_in(turn.format(j), *scale(j));
  }

  __device__ uint8_t* scale(int j) const { return static_cast<uint8_t*>(turn.data[j]) + scale_at; }

  // Takes for each state's scale one for the largest magnitudes that the lanes have seen.
  __device__ void rescale(const uint32_t (&largest)[Turn::kCount]) {
#pragma unroll
    for (int j = kState; j < Turn::kCount; ++j) {
      const Format format = turn.format(j);
      const uint32_t next = scale_in(format, largest_among(lanes, largest[j]));
      next_base[j] = base_in(format, next);
      if (n > 0 && lane == 0) *scale(j) = static_cast<uint8_t>(next);
    }
  }
};

// Likewise where states are in blocks, of which a warp takes several.
template <class Rule, int kStates, class Formats>
__device__ void update_blocks(const Turn<Rule, kStates, Formats>& turn, int64_t chunk) {
  using Turn = Turn<Rule, kStates, Formats>;
  constexpr int kCount = Turn::kCount, kTensors = Turn::kTensors;
  constexpr int kPiece = Turn::kPiece, kPieces = Turn::kPieces;
  const Slot& slot = turn.slot;
  if (slot.numel == 0) return;  // the step is skipped
  const Blocks blocks(slot.numel, slot.rows);
  const int count = static_cast<int>(blocks_in_chunk(blocks));
  // Of short rows vectors would leave most lanes idle.
  bool in_vectors = slot.layout == kDense && blocks.row % kPiece == 0 && blocks.row >= kBlock / 2;
#pragma unroll
  for (int j = 0; j < kTensors; ++j) {
    const int bytes = kPiece * bytes_of(turn.format(j));
    if (turn.exists(j)) in_vectors &= reinterpret_cast<uintptr_t>(turn.data[j]) % bytes == 0;
  }
  in_vectors &= reinterpret_cast<uintptr_t>(turn.average) % (kPiece * sizeof(float)) == 0;

  if (in_vectors) {
    constexpr int kLanes = kBlock / (kPiece * kPieces);
    constexpr int kStride = kLanes * kPiece;  // from a lane's piece to its next
#pragma unroll 1
    for (int next = 0; next < count; next += kThreads / kLanes) {
      Block<Turn> block(turn, chunk, next, kLanes);
      const int64_t at = block.begin + block.lane * kPiece;
      const auto has = [&](int q) { return block.lane * kPiece + q * kStride < block.n; };
      Vector vectors[kTensors][kPieces] = {};
#pragma unroll
      for (int j = 0; j < kTensors; ++j) {
#pragma unroll
        for (int q = 0; q < kPieces; ++q) {
          if (!turn.exists(j) || !has(q)) continue;
          vectors[j][q] = turn.template load<kPiece>(j, at + q * kStride);
        }
      }
#pragma unroll
      for (int q = 0; q < kPieces; ++q) {
        if (turn.average && has(q)) turn.fetch_average(at + q * kStride);
      }
      float x[kPieces][kCount][kPiece];
      uint32_t largest[kCount] = {};
      const auto store = [&](int j, int q) {
        const int64_t to = at + q * kStride;
        const uint32_t index = slot.first_index + static_cast<uint32_t>(to);
        const Vector stored =
            turn.template write<kPiece>(j, to, x[q][Turn::number_in(j)], block.next_base[j], index);
        if (j == kParam && turn.average) {
          turn.template store_average<kPiece>(to, turn.template load_average<kPiece>(to), stored,
                                              0);
        }
      };
#pragma unroll
      for (int q = 0; q < kPieces; ++q) {
#pragma unroll
        for (int j = 0; j < kTensors; ++j) {
          if (!turn.exists(j)) continue;
          turn.template unpack<kPiece>(j, vectors[j][q], 0, block.base[j],
                                       x[q][Turn::number_in(j)]);
        }
        turn.update(x[q]);
#pragma unroll
        for (int j = 0; j < kTensors; ++j) {
          if (!Turn::is_in_blocks(j) && turn.is_written(j) && has(q)) store(j, q);
        }
#pragma unroll
        for (int j = kState; j < kCount; ++j) {
#pragma unroll
          for (int i = 0; i < kPiece; ++i) {
            const uint32_t magnitude = has(q) ? magnitude_of(x[q][j][i]) : 0;
            largest[j] = magnitude > largest[j] ? magnitude : largest[j];
          }
        }
      }
      block.rescale(largest);
#pragma unroll
      for (int j = kState; j < kCount; ++j) {
#pragma unroll
        for (int q = 0; q < kPieces; ++q) {
          if (has(q)) store(j, q);
        }
      }
    }
    return;
  }

  // Element by element, twice: first only to find the largest.
  int lanes = 1;
  while (lanes < 32 && lanes * kPiece < blocks.row) lanes *= 2;
#pragma unroll 1
  for (int next = 0; next < count; next += kThreads / lanes) {
    Block<Turn> block(turn, chunk, next, lanes);
    uint32_t largest[kCount] = {};
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int i = block.lane; i < block.n; i += lanes) {
        int64_t at[kTensors + 1];
        turn.find_element(block.begin + i, at);
        float x[kCount][1];
#pragma unroll
        for (int j = 0; j < kTensors; ++j) {
          if (!turn.exists(j)) continue;
          turn.read(j, at[j], block.base[j], x[Turn::number_in(j)][0]);
        }
        turn.update(x);
#pragma unroll
        for (int j = kState; pass == 0 && j < kCount; ++j) {
          const uint32_t magnitude = magnitude_of(x[j][0]);
          largest[j] = magnitude > largest[j] ? magnitude : largest[j];
        }
        const uint32_t index = static_cast<uint32_t>(at[kTensors]);
#pragma unroll
        for (int j = 0; pass == 1 && j < kTensors; ++j) {
          if (!turn.is_written(j)) continue;
          const Vector stored =
              turn.template write<1>(j, at[j], x[Turn::number_in(j)], block.next_base[j], index);
          if (j == kParam && turn.average) {
            turn.template store_average<1>(at[j], turn.template load_average<1>(at[j]), stored, 0);
          }
        }
      }
      if (pass == 0) block.rescale(largest);
    }
  }
}

// Phase two: as many blocks as the device holds take turns at all the chunks of the table.
template <class Rule, int kStates, class Formats>
__global__ void __launch_bounds__(kThreads, Formats::resident_blocks(kStates))
    update(const __grid_constant__ Work work) {
  using T = typename Formats::Arithmetic;
  wait_for_kernel_before();
  const Scale scale = *work.scale;
  int64_t i = 0;
  for (int64_t chunk = blockIdx.x; chunk < work.chunk_count; chunk += gridDim.x) {
    i = slot_of_chunk(work.slots, work.slot_count, i, chunk);
    const Slot& slot = work.slots[i];
    Turn<Rule, kStates, Formats> turn(
        work, slot, static_cast<const Advanced<Rule, T>*>(work.scalars)[i], scale);
    if constexpr (Formats::kBlocks) {
      update_blocks(turn, chunk - slot.first_chunk);
    } else {
      update_chunk(turn, chunk - slot.first_chunk);
    }
  }
}

// From here on, the host.

int64_t layouts_of(const Table& table, const Slot& slot) {
  return slot.layout == kDense ? 0 : layout_size(table.layouts[slot.layout], table.tensors());
}

// What both launches of a step need.
struct Step {
  const Table& table;
  const Group* groups;
  const Scaling& scaling;
  Variant variant;
  void* stream;
  Work work;
};

// Whether it takes one launch of advance with such arguments.
template <class Batch>
bool fits_in_one(const Table& table) {
  int groups = 0;
  int32_t last_group = -1;
  for (const Slot& slot : table.slots) {
    groups += slot.group != last_group;
    last_group = slot.group;
  }
  return table.slots.size() <= Batch::kSlots && groups <= Batch::kGroups &&
         table.layouts.size() <= Batch::kLayouts;
}

template <class Rule, class T, class Batch>
void advance_all(const Step& step) {
  const Table& table = step.table;
  Batch batch;
  batch.work = step.work;
  batch.scaling = step.scaling;
  batch.tensors = table.tensors();
  batch.first_slot = batch.first_layout = 0;
  batch.slot_count = batch.group_count = batch.layout_count = 0;
  int32_t last_group = -1;
  const auto send = [&] {
    const int blocks = (batch.slot_count + kAdvanceThreads - 1) / kAdvanceThreads;
    launch(advance<Rule, T, Batch>, {blocks, kAdvanceThreads, step.stream}, batch);
    batch.first_slot += batch.slot_count;
    batch.first_layout += batch.layout_count;
    batch.slot_count = batch.group_count = batch.layout_count = 0;
    last_group = -1;
  };
  for (const Slot& slot : table.slots) {
    const int64_t layout_count = layouts_of(table, slot);
    if (batch.slot_count == Batch::kSlots || batch.layout_count + layout_count > Batch::kLayouts ||
        (slot.group != last_group && batch.group_count == Batch::kGroups)) {
      send();
    }
    if (slot.group != last_group) {
      batch.groups[batch.group_count++] = step.groups[slot.group];
      last_group = slot.group;
    }
    for (int64_t i = 0; i < layout_count; ++i) {
      batch.layouts[batch.layout_count++] = table.layouts[slot.layout + i];
    }
    Slot& sent = batch.slots[batch.slot_count++];
    sent = slot;
    sent.group = batch.group_count - 1;
  }
  send();
}

template <class Rule, int kStates, class Formats>
bool launch_update(const Step& step) {
  if constexpr (Formats::occur(kStates, narrow_states<Rule>())) {
    if (!Formats::fit(step.table)) return false;
    const DLDevice device = step.table.device;
    const int64_t blocks = Formats::resident_blocks(kStates) * multiprocessors(device);
    const bool overlaps = step.variant.overlap && can_overlap(device);
    launch(update<Rule, kStates, Formats>,
           {std::min(blocks, step.work.chunk_count), kThreads, step.stream, overlaps}, step.work);
    return true;
  } else {
    return false;
  }
}

// The first of these instances that fits, if any.
template <class Rule, int kStates, class... Formats>
bool launch_first(const Step& step) {
  return (launch_update<Rule, kStates, Formats>(step) || ...);
}

template <class Rule, int kStates = Rule::kFewestStates>
void update_all(const Step& step) {
  if (step.table.states == kStates) {
    constexpr Format k32 = Format::kFloat32, k64 = Format::kFloat64, kB16 = Format::kBFloat16,
                     kF16 = Format::kFloat16, kS16 = Format::kBFloat16Stochastic,
                     kSplit = Format::kSplit;
    const bool known = launch_first<Rule, kStates, Known<k32, k32, k32>, Known<k64, k64, k64>,
                                    Known<kB16, kB16, kB16>, Known<kF16, kF16, kF16>>(step);
    if (known) return;
    if constexpr (kHasKernelsOfFormats<Rule, kStates>) {
      if (launch_first<Rule, kStates, Known<k32, k32, kS16>, Known<kSplit, kB16, k32>,
                       Known<kSplit, kB16, kS16>, Known<kB16, kB16, k32>>(step)) {
        return;
      }
    }
    launch_first<Rule, kStates, Any<false>, Any<true>>(step);
  } else if constexpr (kStates < kMostStates<Rule>) {
    update_all<Rule, kStates + 1>(step);
  }
}

template <class Rule, class T>
void apply_as(const Step& step) {
  constexpr bool kMayBeFew = std::is_same_v<T, float>;  // to make fewer kernels
  if (kMayBeFew && step.variant.few && fits_in_one<FewBatch>(step.table)) {
    advance_all<Rule, T, std::conditional_t<kMayBeFew, FewBatch, Batch>>(step);
  } else {
    advance_all<Rule, T, Batch>(step);
  }
  if (step.work.chunk_count > 0) update_all<Rule>(step);
}

template <class Rule>
void apply_rule(const Step& step) {
  if constexpr (!is_built(Rule::kName)) {
    throw std::runtime_error(std::string("this core was built for tuning, without the rule ") +
                             Rule::kName);
  } else if (step.table.format[kParam] == Format::kFloat64) {
    apply_as<Rule, double>(step);
  } else {
    apply_as<Rule, float>(step);
  }
}

}  // namespace

Variant variant_asked_for() {
  const char* const asked = std::getenv("FASTOPT_CUDA_VARIANT");
  const std::string_view list = asked ? asked : "";
  return {names(list, "overlap"), names(list, "few")};
}

int64_t scratch_bytes(const Table& table) {
  return static_cast<int64_t>(table.slots.size() * (sizeof(Slot) + kScalarBytes) +
                              table.layouts.size() * sizeof(int64_t) + sizeof(Scale));
}

void apply(int rule, const Table& table, const Group* groups, double average_weight,
           const Scaling& scaling, Variant variant, void* scratch, void* stream) {
  constexpr void (*kApply[])(const Step&) = {
#define FASTOPT_APPLY(Rule) apply_rule<Rule>,
      FASTOPT_FOR_EACH_RULE(FASTOPT_APPLY)
#undef FASTOPT_APPLY
  };
  const DeviceGuard guard(table.device);
  Step step{table, groups, scaling, variant, stream, {}};
  Work& work = step.work;
  work.slot_count = static_cast<int64_t>(table.slots.size());
  work.chunk_count = table.chunk_count;
  work.counts = table.counts;
  std::copy(std::begin(table.format), std::end(table.format), work.format);
  work.average_weight = average_weight;
  work.average_weight_rounded = static_cast<float>(average_weight);
  work.slots = static_cast<Slot*>(scratch);
  work.scalars = work.slots + work.slot_count;
  work.layouts =
      reinterpret_cast<int64_t*>(static_cast<char*>(work.scalars) + work.slot_count * kScalarBytes);
  work.scale = reinterpret_cast<Scale*>(work.layouts + table.layouts.size());
  kApply[rule](step);
}

}  // namespace fastopt::cuda
