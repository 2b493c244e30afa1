// The norm of gradients on CUDA: a kernel for the sums of chunks, and one for their sum.
//
// In the order of ../norm.h: a warp takes a chunk, and its threads are the lanes. So no thread
// waits for another but for lanes of its warp, and tests run this very source on the host.
#include <cuda_runtime.h>

#include <algorithm>

#include "../norm.h"
#include "apply.h"
#include "device.h"
#include "launch.h"

namespace fastopt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kWarp = 0xFFFFFFFF;  // all its lanes

// Numbers that a thread asks for before it adds the first: they hide the latency of memory.
constexpr int kAhead = 16;

// A gradient, in fewer bytes than a slot.
struct Piece {
  const void* data;
  int64_t numel;
  int32_t first_chunk, layout;
};

// Arguments of sum_chunks, which copy nothing to the device: at most 32,764 bytes.
constexpr int kBatchPieces = 1100;
constexpr int kBatchLayouts = 1 + 64 * (2 + kState);  // one of torch's 64 dimensions fits

struct Batch {
  double* sums;  // of all chunks of the table
  int64_t first_chunk, chunk_count;
  int piece_count, layout_count;
  Piece pieces[kBatchPieces];
  int64_t layouts[kBatchLayouts];
};
static_assert(sizeof(Batch) <= 32764);

// Where an element lies.
__device__ int64_t find_element(const Layout& layout, int64_t i) {
  int64_t at = 0;
  for (int64_t d = layout.ndim - 1; d >= 0; --d) {
    const int64_t outer = i / layout.shape[d];
    at += (i - outer * layout.shape[d]) * layout.stride[d];
    i = outer;
  }
  return at;
}

// Adds the numbers that a lane is dealt of n, in turn; load(i) gives number i.
template <class Load>
__device__ double add_in_turn(int64_t n, int lane, Load load) {
  double sum = 0;
  for (int64_t first = lane; first < n; first += kLanes * kAhead) {
    double x[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k * kLanes;
      x[k] = i < n ? load(i) : 0;  // adding it changes nothing: no sum is -0
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) sum += x[k];
  }
  return sum;
}

// The sum of all lanes, in each of them.
__device__ double add_lanes(double sum) {
  for (int other = 1; other < kLanes; other *= 2) {
    const uint64_t bits = bit_cast<uint64_t>(sum);
    const uint32_t low = __shfl_xor_sync(kWarp, static_cast<uint32_t>(bits), other);
    const uint32_t high = __shfl_xor_sync(kWarp, static_cast<uint32_t>(bits >> 32), other);
    sum += bit_cast<double>(low | uint64_t{high} << 32);
  }
  return sum;
}

template <class E>
__global__ void __launch_bounds__(kThreads) sum_chunks(const __grid_constant__ Batch batch) {
  const int lane = threadIdx.x % kLanes;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / kLanes);
  int64_t chunk = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  for (int64_t low = 0; chunk < batch.chunk_count; chunk += warps) {
    const int64_t in_table = batch.first_chunk + chunk;
    int64_t high = batch.piece_count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (batch.pieces[middle].first_chunk <= in_table ? low : high) = middle;
    }
    const Piece& piece = batch.pieces[low];
    const E* const from = static_cast<const E*>(piece.data);
    const int64_t begin = (in_table - piece.first_chunk) * kChunk;
    const int64_t rest = piece.numel - begin, n = rest < kChunk ? rest : kChunk;
    double sum = 0;
    if (piece.layout == kDense) {
      sum = add_in_turn(n, lane, [&](int64_t i) { return square(widen(from[begin + i])); });
    } else {
      const Layout layout = layout_of(batch.layouts + piece.layout, kGrad);
#pragma unroll 1
      for (int64_t i = lane; i < n; i += kLanes) {
        sum += square(widen(from[find_element(layout, begin + i)]));
      }
    }
    sum = add_lanes(sum);
    if (lane == 0) batch.sums[in_table] = sum;
  }
}

__global__ void __launch_bounds__(kLanes)
    add_chunks(const double* sums, int64_t count, Number grad_scale, double* norm) {
  const int lane = threadIdx.x;
  const double total = add_lanes(add_in_turn(count, lane, [&](int64_t i) { return sums[i]; }));
  if (lane == 0) *norm = sqrt(total) / read(grad_scale);
}

// From here on, the host.

template <class E>
void sum_table(const Table& table, double* sums, void* stream) {
  const int64_t most = 8 * multiprocessors(table.device);  // blocks that the device holds
  Batch batch;
  batch.sums = sums;
  batch.first_chunk = batch.chunk_count = 0;
  batch.piece_count = batch.layout_count = 0;
  const auto send = [&] {
    const int64_t blocks = (batch.chunk_count * kLanes + kThreads - 1) / kThreads;
    if (blocks > 0) launch(sum_chunks<E>, {std::min(blocks, most), kThreads, stream}, batch);
    batch.first_chunk += batch.chunk_count;
    batch.chunk_count = batch.piece_count = batch.layout_count = 0;
  };
  for (const Slot& slot : table.slots) {
    if (slot.numel == 0) continue;
    const int64_t size =
        slot.layout == kDense ? 0 : layout_size(table.layouts[slot.layout], table.tensors());
    if (batch.piece_count == kBatchPieces || batch.layout_count + size > kBatchLayouts) send();
    batch.pieces[batch.piece_count++] = {slot.data[kGrad], slot.numel, slot.first_chunk,
                                         size == 0 ? kDense : batch.layout_count};
    for (int64_t i = 0; i < size; ++i) {
      batch.layouts[batch.layout_count++] = table.layouts[slot.layout + i];
    }
    batch.chunk_count += chunks_of(slot);
  }
  send();
}

}  // namespace

int64_t norm_scratch_bytes(const std::vector<Table>& tables) {
  int64_t chunks = 0;
  for (const Table& table : tables) chunks += table.chunk_count;
  return chunks * static_cast<int64_t>(sizeof(double));
}

void norm(const std::vector<Table>& tables, const Number& grad_scale, void* scratch, double* norm,
          void* stream) {
  const DeviceGuard guard(tables[0].device);
  auto* const sums = static_cast<double*>(scratch);
  int64_t count = 0;
  for (const Table& table : tables) {
    double* const own = sums + count;
    switch (table.format[kGrad]) {
      case Format::kFloat32: sum_table<float>(table, own, stream); break;
      case Format::kFloat64: sum_table<double>(table, own, stream); break;
      case Format::kBFloat16: sum_table<BFloat16>(table, own, stream); break;
      default: sum_table<Float16>(table, own, stream);
    }
    count += table.chunk_count;
  }
  launch(add_chunks, {1, kLanes, stream}, static_cast<const double*>(sums), count, grad_scale,
         norm);
}

}  // namespace fastopt::cuda
