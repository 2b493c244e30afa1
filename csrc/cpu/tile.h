// Tiles: the elements of a slot that are computed at a time where that cannot be done in place, for
// dtypes or strides differ. Each tensor's are brought into a buffer of floats or doubles, and back.
//
// Part of apply.cpp, and bound by what is said there.
#pragma once

#include <type_traits>

#include "../slot.h"
#include "arrays.h"
#include "blocks.h"

namespace fastopt::cpu {
namespace {

// Elements of a tile at most: five float buffers of it stay in the L1 cache.
constexpr int64_t kTile = 1024;

// Of every tensor so many neighbours in memory belong to one tile, be it along several dimensions:
// whole cache lines are used at once, of 16-bit numbers, too.
constexpr int64_t kEdge = 32;

constexpr int kMaxDims = 64;   // torch allows no more
constexpr int kMaxLoops = 10;  // no more dimensions of two and more elements fit into a tile

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
  Format format;
  int64_t offset;  // in elements, as all that follows
  int64_t ahead;   // from here to the next tile
  int loops;
  Loop loop[kMaxLoops];  // innermost first
};

// Of n elements of an array.
inline View view_of(int64_t begin, int64_t n, void* data, Format format) {
  View view;
  view.data = data;
  view.format = format;
  view.offset = begin;
  view.ahead = n;
  view.loops = 1;
  view.loop[0] = {n, 1, 1};
  return view;
}

inline View view_of(const Tile& tile, const Tile& next, const Layout& layout, void* data,
                    Format format) {
  View view = view_of(0, 1, data, format);
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

// Calls use(view, at) for n elements from `begin` on in the layout's order, a view for each stretch
// of neighbours in it; `at` is where in the buffer that starts.
template <class Use>
void for_each_stretch(const Layout& layout, int64_t begin, int64_t n, void* data, Format format,
                      Use use) {
  const int64_t inner = layout.ndim - 1;
  for (int64_t at = 0; at < n;) {
    int64_t offset = 0, rest = begin + at;
    const int64_t length = smaller(n - at, layout.shape[inner] - rest % layout.shape[inner]);
    for (int64_t d = inner; d >= 0; --d) {
      offset += rest % layout.shape[d] * layout.stride[d];
      rest /= layout.shape[d];
    }
    View view = view_of(offset, length, data, format);
    view.loop[0].in_memory = layout.stride[inner];
    use(view, at);
    at += length;
  }
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
inline void load(const View& view, T* to) {
  const E* const from = static_cast<const E*>(view.data);
  const E* const next = from + view.ahead;
  walk(
      view, [=](int64_t in_memory, int64_t in_buffer) { to[in_buffer] = widen(from[in_memory]); },
      [=](int64_t in_memory) { __builtin_prefetch(next + in_memory); });
}

// To the parameter in the buffer, which its view has loaded.
inline void join(const View& view, float* to) {
  const Remainder* const from = static_cast<const Remainder*>(view.data);
  const Remainder* const next = from + view.ahead;
  walk(
      view,
      [=](int64_t in_memory, int64_t in_buffer) {
        to[in_buffer] = join(to[in_buffer], from[in_memory]);
      },
      [=](int64_t in_memory) { __builtin_prefetch(next + in_memory); });
}

// What rounding a tile's elements takes random bits from.
struct TileRandom {
  Random of;
  const uint32_t* index;  // of each in the whole parameter

  FASTOPT_RULE uint32_t bits(int64_t i) const { return of.bits(index[i]); }
};

template <class E, class T>
inline void store(const View& view, const T* from, const TileRandom& random) {
  E* const to = static_cast<E*>(view.data);
  walk(
      view,
      [=](int64_t in_memory, int64_t in_buffer) {
        if constexpr (std::is_same_v<E, StochasticBFloat16>) {
          to[in_memory] = narrow<E>(from[in_buffer], random.bits(in_buffer));
        } else {
          to[in_memory] = narrow<E>(from[in_buffer]);
        }
      },
      [](int64_t) {});
}

template <class Kind>
void load_blocks(const View& view, const Run& run, float* to) {
  alignas(64) uint32_t base[kRun + kLaid];
  lay_bases<Kind>(run, view.data, base);
  const uint8_t* const codes = static_cast<const uint8_t*>(view.data) + view.offset;
  FASTOPT_INDEPENDENT
  for (int64_t i = 0; i < view.ahead; ++i) to[i] = decode<Kind>(codes[i], base[i]);
}

template <class Kind>
void store_blocks(const View& view, const Run& run, const float* from, const TileRandom& random) {
  // A copy: for all the compiler knows, a store of bytes could change the caller's.
  const TileRandom own = random;
  store_run<Kind>(run, from, view.offset, view.ahead, view.data,
                  [=](int i) { return own.bits(i); });
}

inline void load(const View& view, const Run* run, float* to) {
  switch (view.format) {
    case Format::kFloat32: return load<float>(view, to);
    case Format::kBFloat16: return load<BFloat16>(view, to);
    case Format::kFloat16: return load<Float16>(view, to);
    case Format::kBFloat16Stochastic: return load<StochasticBFloat16>(view, to);
    case Format::kSplit: return load<SplitBFloat16>(view, to);
    case Format::kRemainder: return join(view, to);
    case Format::kBlockSigned: return load_blocks<BlockSigned>(view, *run, to);
    case Format::kBlockUnsigned: return load_blocks<BlockUnsigned>(view, *run, to);
    case Format::kFloat64: return;  // goes with double only: add_slot has checked
  }
}

inline void store(const View& view, const Run* run, const float* from, const TileRandom& random) {
  switch (view.format) {
    case Format::kFloat32: return store<float>(view, from, random);
    case Format::kBFloat16: return store<BFloat16>(view, from, random);
    case Format::kFloat16: return store<Float16>(view, from, random);
    case Format::kBFloat16Stochastic: return store<StochasticBFloat16>(view, from, random);
    case Format::kSplit: return store<SplitBFloat16>(view, from, random);
    case Format::kRemainder: return store<Remainder>(view, from, random);
    case Format::kBlockSigned: return store_blocks<BlockSigned>(view, *run, from, random);
    case Format::kBlockUnsigned: return store_blocks<BlockUnsigned>(view, *run, from, random);
    case Format::kFloat64: return;
  }
}

inline void load(const View& view, const Run*, double* to) { load<double>(view, to); }
inline void store(const View& view, const Run*, const double* from, const TileRandom& random) {
  store<double>(view, from, random);
}

}  // namespace
}  // namespace fastopt::cpu
