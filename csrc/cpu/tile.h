// Tiles: the elements of a slot that are computed at a time where that cannot be done in place, for
// dtypes or strides differ. Each tensor's are brought into a buffer of floats or doubles, and back.
//
// Part of apply.cpp, and bound by what is said there.
#pragma once

#include "../convert.h"
#include "../slot.h"

// The iterations of the loop that follows do not touch each other's memory: it may be vectorised.
// Where it would not pay, with strides, unrolling takes a quarter off its time.
#ifdef __clang__
#define FASTOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define FASTOPT_UNROLL _Pragma("unroll 8")
#else
#define FASTOPT_INDEPENDENT _Pragma("GCC ivdep")
#define FASTOPT_UNROLL _Pragma("GCC unroll 8")
#endif

namespace fastopt::cpu {
namespace {

// Elements of a tile at most: five float buffers of it stay in the L1 cache.
constexpr int64_t kTile = 1024;

// Of every tensor so many neighbours in memory belong to one tile, be it along several dimensions:
// whole cache lines are used at once, of 16-bit numbers, too.
constexpr int64_t kEdge = 32;

constexpr int kMaxDims = 64;   // torch allows no more
constexpr int kMaxLoops = 10;  // no more dimensions of two and more elements fit into a tile

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A box of elements; buffers hold it in row-major order.
struct Tile {
  int64_t begin[kMaxDims], size[kMaxDims];
  int64_t numel;
};

// How a slot is cut into tiles: all alike but for what is left at a dimension's end.
class Tiling {
 public:
  Tiling(const int64_t* layout, int tensors) : ndim_(layout[0]), shape_(layout + 1) {
    for (int64_t d = 0; d < ndim_; ++d) edge_[d] = 1;
    int64_t numel = 1;
    const auto grow = [&](int64_t d, int64_t most) {
      const int64_t others = numel / edge_[d];
      const int64_t edge = smaller(shape_[d], smaller(most, kTile / others));
      if (edge > edge_[d]) edge_[d] = edge;
      numel = others * edge_[d];
    };
    for (int i = 0; i < tensors; ++i) {
      const int64_t* const stride = layout_of(layout, i).stride;
      int64_t near = 1;
      for (int64_t reached = 0; near < kEdge;) {
        int64_t nearest = -1;
        for (int64_t d = ndim_ - 1; d >= 0; --d) {
          if (stride[d] > reached && (nearest < 0 || stride[d] < stride[nearest])) nearest = d;
        }
        if (nearest < 0) break;
        grow(nearest, kEdge / near);
        near *= edge_[nearest];
        reached = stride[nearest];
      }
    }
    for (int64_t d = ndim_ - 1; d >= 0; --d) grow(d, kTile);
    for (int64_t d = 0; d < ndim_; ++d) count_ *= along(d);
  }

  int64_t count() const { return count_; }

  Tile at(int64_t index) const {
    Tile tile;
    tile.numel = 1;
    for (int64_t d = ndim_ - 1; d >= 0; --d) {
      tile.begin[d] = index % along(d) * edge_[d];
      tile.size[d] = smaller(edge_[d], shape_[d] - tile.begin[d]);
      tile.numel *= tile.size[d];
      index /= along(d);
    }
    return tile;
  }

 private:
  int64_t along(int64_t d) const { return (shape_[d] + edge_[d] - 1) / edge_[d]; }

  int64_t ndim_;
  const int64_t* shape_;
  int64_t edge_[kMaxDims];
  int64_t count_ = 1;
};

// One tensor's elements in a tile, as nested loops over both memory and buffer.
struct View {
  struct Loop {
    int64_t count, in_memory, in_buffer;  // the last two are strides
  };
  void* data;
  DType dtype;
  int64_t offset;  // in elements, as all that follows
  int64_t ahead;   // from here to the next tile
  int loops;
  Loop loop[kMaxLoops];  // innermost first
};

// Of n elements of an array.
View view_of(int64_t begin, int64_t n, void* data, DType dtype) {
  View view;
  view.data = data;
  view.dtype = dtype;
  view.offset = begin;
  view.ahead = n;
  view.loops = 1;
  view.loop[0] = {n, 1, 1};
  return view;
}

View view_of(const Tile& tile, const Tile& next, const Layout& layout, void* data, DType dtype) {
  View view = view_of(0, 1, data, dtype);
  view.ahead = 0;
  int64_t in_buffer = 1;
  for (int64_t d = layout.ndim - 1; d >= 0; --d) {
    const int64_t size = tile.size[d], stride = layout.stride[d];
    view.offset += tile.begin[d] * stride;
    view.ahead += (next.begin[d] - tile.begin[d]) * stride;
    View::Loop& last = view.loop[view.loops - 1];
    if (last.count == 1) {
      last = {size, stride, in_buffer};
    } else if (stride == last.count * last.in_memory) {
      last.count *= size;
    } else if (size > 1) {
      view.loop[view.loops++] = {size, stride, in_buffer};
    }
    in_buffer *= size;
  }
  // Innermost goes where neighbours in memory lie, unless that loop is over before it has begun. An
  // expanded dimension, of stride 0, has none.
  constexpr int64_t kLong = 8;
  int best = 0;
  for (int l = 1; l < view.loops; ++l) {
    const View::Loop &a = view.loop[l], &b = view.loop[best];
    const bool a_is_long = a.count >= kLong, b_is_long = b.count >= kLong;
    const bool nearer = a.in_memory != 0 && (a.in_memory < b.in_memory || b.in_memory == 0);
    if (a_is_long == b_is_long ? nearer : a_is_long) best = l;
  }
  const View::Loop innermost = view.loop[best];
  view.loop[best] = view.loop[0];
  view.loop[0] = innermost;
  return view;
}

// Calls visit(in_memory, in_buffer) for every element; and, where they are no arrays, whose next
// elements a processor fetches by itself, prefetch(in_memory).
template <class Visit, class Prefetch>
inline void walk(const View& view, Visit visit, Prefetch prefetch) {
  const View::Loop run = view.loop[0];
  int64_t index[kMaxLoops] = {};
  int64_t memory = view.offset, buffer = 0;
  int l;
  do {
    if (run.in_memory == 1 && run.in_buffer == 1) {
      FASTOPT_INDEPENDENT
      for (int64_t i = 0; i < run.count; ++i) visit(memory + i, buffer + i);
    } else {
      FASTOPT_UNROLL
      for (int64_t i = 0; i < run.count; ++i) {
        prefetch(memory + i * run.in_memory);
        visit(memory + i * run.in_memory, buffer + i * run.in_buffer);
      }
    }
    for (l = 1; l < view.loops; ++l) {
      const View::Loop& loop = view.loop[l];
      memory += loop.in_memory;
      buffer += loop.in_buffer;
      if (++index[l] < loop.count) break;
      memory -= loop.count * loop.in_memory;
      buffer -= loop.count * loop.in_buffer;
      index[l] = 0;
    }
  } while (l < view.loops);
}

template <class E, class T>
void load(const View& view, T* to) {
  const E* const from = static_cast<const E*>(view.data);
  const E* const next = from + view.ahead;
  walk(
      view, [=](int64_t in_memory, int64_t in_buffer) { to[in_buffer] = widen(from[in_memory]); },
      [=](int64_t in_memory) { __builtin_prefetch(next + in_memory); });
}

template <class E, class T>
void store(const View& view, const T* from) {
  E* const to = static_cast<E*>(view.data);
  walk(
      view,
      [=](int64_t in_memory, int64_t in_buffer) { to[in_memory] = narrow<E>(from[in_buffer]); },
      [](int64_t) {});
}

void load(const View& view, float* to) {
  switch (view.dtype) {
    case DType::kFloat32: return load<float>(view, to);
    case DType::kBFloat16: return load<BFloat16>(view, to);
    case DType::kFloat16: return load<Float16>(view, to);
    case DType::kFloat64: return;  // goes with double only: add_slot has checked
  }
}

void store(const View& view, const float* from) {
  switch (view.dtype) {
    case DType::kFloat32: return store<float>(view, from);
    case DType::kBFloat16: return store<BFloat16>(view, from);
    case DType::kFloat16: return store<Float16>(view, from);
    case DType::kFloat64: return;
  }
}

void load(const View& view, double* to) { load<double>(view, to); }
void store(const View& view, const double* from) { store<double>(view, from); }

}  // namespace
}  // namespace fastopt::cpu
