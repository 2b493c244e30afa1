// The CUDA backend: two kernels, advance and update, and their launch.
//
// A step copies nothing to the device and waits for nothing: what only the host knows rides in
// advance's arguments, and advance leaves in device memory what update reads. So a captured graph
// holds the whole step. No thread waits for another either, which lets the tests run this very
// source on the host, one thread after another.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "apply.h"
#include "device.h"

namespace fastopt::cuda {
namespace {

constexpr int kThreads = 256;

// One warp a block: advance is short, and its blocks spread over the multiprocessors.
constexpr int kAdvanceThreads = 32;

// A table in device memory.
struct Work {
  Slot* slots;
  void* scalars;  // of every slot, as its rule makes them
  int64_t* layouts;
  float* grad_scale;
  int64_t slot_count;
  int64_t chunk_count;
  Format format[kMaxPlaces];
};

// advance's arguments: a batch of slots with their groups and layouts, which kernels take up to
// 32,764 bytes of. Most models fit into one.
constexpr int kBatchSlots = 288;
constexpr int kBatchGroups = 16;
constexpr int kBatchLayouts = 1 + 64 * (2 + kMaxTensors);  // one of torch's 64 dimensions fits

struct Batch {
  Work work;
  Number found_inf, grad_scale;
  int64_t first_slot;    // the table's index of slots[0]
  int64_t first_layout;  // and of layouts[0]
  int tensors, slot_count, group_count, layout_count;
  Slot slots[kBatchSlots];
  Group groups[kBatchGroups];  // which the slots' group counts here
  int64_t layouts[kBatchLayouts];
};
static_assert(sizeof(Batch) <= 32764);

__device__ double read(const Number& number) {
  if (!number.tensor) return number.value;
  switch (number.format) {
    case Format::kFloat32: return *static_cast<const float*>(number.tensor);
    case Format::kFloat64: return *static_cast<const double*>(number.tensor);
    case Format::kBFloat16: return widen(*static_cast<const BFloat16*>(number.tensor));
    case Format::kFloat16: return widen(*static_cast<const Float16*>(number.tensor));
    default: return 0;  // as_number has checked
  }
}

// Phase one, a thread a slot.
template <class Rule, class T>
__global__ void advance(const __grid_constant__ Batch batch) {
  const int i = blockIdx.x * kAdvanceThreads + threadIdx.x;
  if (i >= batch.slot_count) return;
  const Work& work = batch.work;
  const bool skip = read(batch.found_inf) != 0;
  if (batch.first_slot + i == 0) *work.grad_scale = static_cast<float>(read(batch.grad_scale));

  Slot slot = batch.slots[i];
  Count counts[Rule::kCounts + 1];  // one more than needed: C++ has no arrays of zero elements
  for (int j = 0; j < Rule::kCounts; ++j) {
    counts[j] = read_count(slot.data[count_place(j)], work.format[count_place(j)]);
  }
  double t = slot.fresh ? 1 : 2;
  if constexpr (Rule::kCounts > 0) t = counts[0].value = counts[0].rounded(counts[0].value + 1);
  auto* const scalars = static_cast<typename Rule::template Scalars<T>*>(work.scalars);
  scalars[batch.first_slot + i] = Rule::template advance<T>(
      options_of<Rule>(batch.groups[slot.group], [](const Number& n) { return read(n); }), t,
      counts + 1);
  for (int j = 0; !skip && j < Rule::kCounts; ++j) {
    write_count(slot.data[count_place(j)], counts[j]);
  }

  if (slot.layout != kDense) {
    const int64_t* const from = batch.layouts + (slot.layout - batch.first_layout);
    const int64_t size = layout_size(from[0], batch.tensors);
    for (int64_t j = 0; j < size; ++j) work.layouts[slot.layout + j] = from[j];
  }
  if (skip) slot.numel = 0;  // nothing for update to do
  work.slots[batch.first_slot + i] = slot;
}

// What a format is in C++: calls use with an element of it.
template <class T, class Use>
__device__ void with_type(Format format, Use use) {
  if constexpr (std::is_same_v<T, double>) {
    use(double());
  } else {
    switch (format) {
      case Format::kFloat32: return use(float());
      case Format::kBFloat16: return use(BFloat16());
      case Format::kFloat16: return use(Float16());
      default: return;  // kFloat64 goes with double only: add_slot has checked
    }
  }
}

template <class T>
__device__ T load(const void* data, Format format, int64_t at) {
  T value{};
  with_type<T>(format, [&](auto e) { value = widen(static_cast<const decltype(e)*>(data)[at]); });
  return value;
}

template <class T>
__device__ void store(void* data, Format format, int64_t at, T value) {
  with_type<T>(format,
               [&](auto e) { static_cast<decltype(e)*>(data)[at] = narrow<decltype(e)>(value); });
}

// A few elements of one tensor, at most 16 bytes, between memory and arithmetic.
struct Vector {
  uint4 words;
};

template <class E, int N>
using Words = std::conditional_t<N * sizeof(E) == 16, uint4, uint2>;

// All of it passes through the cache once: the next step comes after a model's forward and backward
// pass.
template <int N, class T>
__device__ Vector load_vector(const void* data, Format format, int64_t at) {
  Vector vector;
  with_type<T>(format, [&](auto e) {
    using W = Words<decltype(e), N>;
    const W* from = reinterpret_cast<const W*>(static_cast<const decltype(e)*>(data) + at);
    const W words = __ldcs(from);
    memcpy(&vector.words, &words, sizeof words);
  });
  return vector;
}

template <int N, class T>
__device__ void unpack(const Vector& vector, Format format, T* to) {
  with_type<T>(format, [&](auto e) {
    decltype(e) values[N];
    memcpy(values, &vector.words, sizeof values);
    for (int i = 0; i < N; ++i) to[i] = widen(values[i]);
  });
}

template <int N, class T>
__device__ void store_vector(void* data, Format format, int64_t at, const T* from) {
  with_type<T>(format, [&](auto e) {
    using W = Words<decltype(e), N>;
    decltype(e) values[N];
    for (int i = 0; i < N; ++i) values[i] = narrow<decltype(e)>(from[i]);
    W words;
    memcpy(&words, values, sizeof words);
    __stcs(reinterpret_cast<W*>(static_cast<decltype(e)*>(data) + at), words);
  });
}

// What all tensors of a table are stored as; where they differ, each is asked for its format.
enum class Storage { kFloat32, kFloat64, kBFloat16, kFloat16, kMixed };

FASTOPT_RULE constexpr int vector_size(Storage storage) {
  return storage == Storage::kFloat64                                    ? 2
         : storage == Storage::kBFloat16 || storage == Storage::kFloat16 ? 8
                                                                         : 4;
}

// Blocks that a multiprocessor holds at once, for which the compiler shares out 65,536 registers:
// 768 threads with 64 bytes each on their way (AdamW in float32) hide the latency of memory.
FASTOPT_RULE constexpr int resident_blocks(Storage storage, int states) {
  return storage == Storage::kFloat64 || storage == Storage::kMixed || states == 3 ? 2 : 3;
}

// Where element i of a slot lies in each of its tensors.
template <int kCount>
__device__ void find_element(const Work& work, const Slot& slot, int64_t i, int64_t (&at)[kCount]) {
  for (int j = 0; j < kCount; ++j) at[j] = slot.layout == kDense ? i : 0;
  if (slot.layout == kDense) return;
  const int64_t* const layout = work.layouts + slot.layout;
  const Layout common = layout_of(layout, kParam);
  for (int64_t d = common.ndim - 1; d >= 0; --d) {
    const int64_t outer = i / common.shape[d];
    const int64_t index = i - outer * common.shape[d];
    for (int j = 0; j < kCount; ++j) at[j] += index * layout_of(layout, j).stride[d];
    i = outer;
  }
}

// The rule on N elements, x[j] being those of tensor j.
template <class Rule, class T, int kStates, int N>
__device__ void update_elements(const typename Rule::template Scalars<T>& k, T grad_scale,
                                T (&x)[kState + kStates][N]) {
  if (grad_scale != T(1)) {
    for (int i = 0; i < N; ++i) x[kGrad][i] /= grad_scale;
  }
  for (int i = 0; i < N; ++i) {
    T s[kStates + 1];  // one more than needed: C++ has no arrays of zero elements
    for (int j = 0; j < kStates; ++j) s[j] = x[kState + j][i];
    Rule::template update<T, kStates>(k, x[kParam][i], x[kGrad][i], s);
    for (int j = 0; j < kStates; ++j) x[kState + j][i] = s[j];
  }
}

// A block's turn at the chunk that begins at an element of the slot.
template <class Rule, class T, int kStates, Storage kStorage>
__device__ void update_chunk(const Work& work, const Slot& slot,
                             const typename Rule::template Scalars<T>& k, T grad_scale,
                             int64_t begin) {
  constexpr int kCount = kState + kStates;
  constexpr int kSize = vector_size(kStorage);
  const auto format = [&](int j) {
    return kStorage == Storage::kMixed ? work.format[j] : static_cast<Format>(kStorage);
  };
  const auto written = [&](int j) { return j != kGrad || grad_scale != T(1); };
  const int64_t rest = slot.numel - begin;
  if (rest <= 0) return;  // the step is skipped
  const int n = static_cast<int>(rest < kChunk ? rest : kChunk);

  void* data[kCount];  // copies: for all the compiler knows, a store could change the slot
  uintptr_t addresses = 0;
  for (int j = 0; j < kCount; ++j) {
    data[j] = slot.data[j];
    addresses |= reinterpret_cast<uintptr_t>(data[j]);
  }
  const bool aligned = slot.layout == kDense && addresses % 16 == 0;
  const int in_vectors = aligned ? n / kSize * kSize : 0;

#pragma unroll 1
  for (int i = threadIdx.x * kSize; i < in_vectors; i += kThreads * kSize) {
    Vector vectors[kCount];
    for (int j = 0; j < kCount; ++j) {
      vectors[j] = load_vector<kSize, T>(data[j], format(j), begin + i);
    }
    T x[kCount][kSize];
    for (int j = 0; j < kCount; ++j) unpack<kSize>(vectors[j], format(j), x[j]);
    update_elements<Rule, T, kStates>(k, grad_scale, x);
    for (int j = 0; j < kCount; ++j) {
      if (written(j)) store_vector<kSize>(data[j], format(j), begin + i, x[j]);
    }
  }
  // What is left of an aligned chunk, or all of another.
#pragma unroll 1
  for (int i = in_vectors + threadIdx.x; i < n; i += kThreads) {
    int64_t at[kCount];
    find_element(work, slot, begin + i, at);
    T x[kCount][1];
    for (int j = 0; j < kCount; ++j) x[j][0] = load<T>(data[j], format(j), at[j]);
    update_elements<Rule, T, kStates>(k, grad_scale, x);
    for (int j = 0; j < kCount; ++j) {
      if (written(j)) store(data[j], format(j), at[j], x[j][0]);
    }
  }
}

// Phase two: as many blocks as the device holds take turns at all the chunks of the table.
template <class Rule, class T, int kStates, Storage kStorage>
__global__ void __launch_bounds__(kThreads, resident_blocks(kStorage, kStates))
    update(const __grid_constant__ Work work) {
  using Scalars = typename Rule::template Scalars<T>;
  const T grad_scale = *work.grad_scale;
  int64_t i = 0;
  for (int64_t chunk = blockIdx.x; chunk < work.chunk_count; chunk += gridDim.x) {
    i = slot_of_chunk(work.slots, work.slot_count, i, chunk);
    const Slot& slot = work.slots[i];
    const Scalars k = static_cast<const Scalars*>(work.scalars)[i];
    update_chunk<Rule, T, kStates, kStorage>(work, slot, k, grad_scale,
                                             (chunk - slot.first_chunk) * kChunk);
  }
}

// From here on, the host.

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA did not launch a step: ") +
                             cudaGetErrorString(error));
  }
}

int64_t layouts_of(const Table& table, const Slot& slot) {
  return slot.layout == kDense ? 0 : layout_size(table.layouts[slot.layout], table.tensors());
}

template <class Rule, class T>
void advance_all(const Table& table, const Group* groups, Batch& batch, void* stream) {
  int32_t last_group = -1;
  const auto send = [&] {
    const int blocks = (batch.slot_count + kAdvanceThreads - 1) / kAdvanceThreads;
    launch(advance<Rule, T>, blocks, kAdvanceThreads, stream, batch);
    batch.first_slot += batch.slot_count;
    batch.first_layout += batch.layout_count;
    batch.slot_count = batch.group_count = batch.layout_count = 0;
    last_group = -1;
  };
  for (const Slot& slot : table.slots) {
    const int64_t layout_count = layouts_of(table, slot);
    if (batch.slot_count == kBatchSlots || batch.layout_count + layout_count > kBatchLayouts ||
        (slot.group != last_group && batch.group_count == kBatchGroups)) {
      send();
    }
    if (slot.group != last_group) {
      batch.groups[batch.group_count++] = groups[slot.group];
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

template <class Rule, class T, int kStates>
auto* update_kernel(Storage storage) {
  if constexpr (std::is_same_v<T, double>) {
    return update<Rule, double, kStates, Storage::kFloat64>;
  } else {
    switch (storage) {
      case Storage::kFloat32: return update<Rule, float, kStates, Storage::kFloat32>;
      case Storage::kBFloat16: return update<Rule, float, kStates, Storage::kBFloat16>;
      case Storage::kFloat16: return update<Rule, float, kStates, Storage::kFloat16>;
      default: return update<Rule, float, kStates, Storage::kMixed>;
    }
  }
}

template <class Rule, class T, int kStates = Rule::kFewestStates>
void update_all(const Table& table, const Work& work, void* stream) {
  if (table.states == kStates) {
    const Format* const last = table.format + kState + kStates;
    const bool mixed =
        std::any_of(table.format, last, [&](Format d) { return d != *table.format; });
    const Storage storage = mixed ? Storage::kMixed : static_cast<Storage>(*table.format);
    const int64_t blocks = resident_blocks(storage, kStates) * multiprocessors(table.device);
    launch(update_kernel<Rule, T, kStates>(storage), std::min(blocks, work.chunk_count), kThreads,
           stream, work);
  } else if constexpr (kStates < kMostStates<Rule>) {
    update_all<Rule, T, kStates + 1>(table, work, stream);
  }
}

template <class Rule, class T>
void apply_as(const Table& table, const Group* groups, Batch& batch, void* stream) {
  static_assert(sizeof(typename Rule::template Scalars<T>) <= kScalarBytes);
  advance_all<Rule, T>(table, groups, batch, stream);
  if (table.chunk_count > 0) update_all<Rule, T>(table, batch.work, stream);
}

template <class Rule>
void apply_rule(const Table& table, const Group* groups, Batch& batch, void* stream) {
  if (table.format[kParam] == Format::kFloat64) {
    apply_as<Rule, double>(table, groups, batch, stream);
  } else {
    apply_as<Rule, float>(table, groups, batch, stream);
  }
}

}  // namespace

int64_t scratch_bytes(const Table& table) {
  return static_cast<int64_t>(table.slots.size() * (sizeof(Slot) + kScalarBytes) +
                              table.layouts.size() * sizeof(int64_t) + sizeof(float));
}

void apply(int rule, const Table& table, const Group* groups, const Number& found_inf,
           const Number& grad_scale, void* scratch, void* stream) {
  constexpr void (*kApply[])(const Table&, const Group*, Batch&, void*) = {
#define FASTOPT_APPLY(Rule) apply_rule<Rule>,
      FASTOPT_FOR_EACH_RULE(FASTOPT_APPLY)
#undef FASTOPT_APPLY
  };
  const DeviceGuard guard(table.device);
  Batch batch;
  Work& work = batch.work;
  work.slot_count = static_cast<int64_t>(table.slots.size());
  work.chunk_count = table.chunk_count;
  std::copy(std::begin(table.format), std::end(table.format), work.format);
  work.slots = static_cast<Slot*>(scratch);
  work.scalars = work.slots + work.slot_count;
  work.layouts =
      reinterpret_cast<int64_t*>(static_cast<char*>(work.scalars) + work.slot_count * kScalarBytes);
  work.grad_scale = reinterpret_cast<float*>(work.layouts + table.layouts.size());
  batch.tensors = table.tensors();
  batch.found_inf = found_inf;
  batch.grad_scale = grad_scale;
  batch.first_slot = batch.first_layout = 0;
  batch.slot_count = batch.group_count = batch.layout_count = 0;
  kApply[rule](table, groups, batch, stream);
}

}  // namespace fastopt::cuda
