// Tensors -> slots -> tables, and every check that needs no Python.
#include "table.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>

#include "rules/rules.h"

namespace fastopt {
namespace {

template <class Rule>
RuleInfo describe() {
  static_assert(std::size(Rule::kOptions) <= kMaxOptions);
  static_assert(sizeof(typename Rule::Options) == std::size(Rule::kOptions) * sizeof(double));
  static_assert(kMostStates<Rule> <= kMaxStates);
  static_assert(tensor_count(kMostStates<Rule>, Format::kSplit) + Rule::kCounts <= kMaxPlaces);
  return {Rule::kName,
          {std::begin(Rule::kOptions), std::end(Rule::kOptions)},
          {std::begin(Rule::kStates), std::begin(Rule::kStates) + Rule::kCounts},
          {std::begin(Rule::kStates) + Rule::kCounts, std::end(Rule::kStates)},
          [](const Group& group) {
            return Rule::states(options_of<Rule>(group, [](const Number& n) { return n.value; }));
          }};
}

bool is_complex(const DLTensor& t) { return t.dtype.code == kDLComplex; }

const char* name_of(DLDataType dtype) {
  if (dtype.code == kDLComplex) return dtype.bits == 128 ? "complex128" : "complex64";
  return name_of(format_of(dtype));
}

std::string shape_of(const DLTensor& t) {
  std::string text = "[";
  for (int d = 0; d < t.ndim; ++d) text += (d ? ", " : "") + std::to_string(t.shape[d]);
  return text + "]";
}

bool is_contiguous(const DLTensor& t) {
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

bool same_strides(const DLTensor& a, const DLTensor& b) {
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

// Dimensions that matter (size over 1), largest stride first.
std::vector<int> by_stride(const DLTensor& t) {
  std::vector<int> dims;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] != 1) dims.push_back(d);
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [&](int a, int b) { return t.strides[a] > t.strides[b]; });
  return dims;
}

// Whether two indices may share memory. Walking from the smallest stride up, each dimension must
// step over all the memory the ones before it span.
bool may_overlap(const DLTensor& t) {
  const std::vector<int> dims = by_stride(t);
  int64_t span = 1;
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    if (t.strides[*d] < span) return true;
    span += (t.shape[*d] - 1) * t.strides[*d];
  }
  return false;
}

// Non-overlapping without gaps: memory order is some permutation of the dimensions.
bool is_dense(const DLTensor& t) {
  const std::vector<int> dims = by_stride(t);
  int64_t span = 1;
  for (auto d = dims.rbegin(); d != dims.rend(); ++d) {
    if (t.strides[*d] != span) return false;
    span *= t.shape[*d];
  }
  return true;
}

// Whether element i of the parameter in row-major order is number first_index + i of the whole.
bool has_plain_index(const Tensors& tensors) {
  const DLTensor& param = tensors.at[kParam];
  if (!is_contiguous(param)) return false;
  for (int d = 0; tensors.index_stride && d < param.ndim; ++d) {
    if (param.shape[d] != 1 && param.strides[d] != tensors.index_stride[d]) return false;
  }
  return true;
}

bool any_random(const Tensors& tensors) {
  return std::any_of(tensors.format, tensors.format + kMaxTensors, is_random);
}

bool flat(const Tensors& tensors, int count) {
  const DLTensor& param = tensors.at[kParam];
  const bool contiguous = is_contiguous(param);
  for (int i = 1; i < count; ++i) {
    const DLTensor& t = tensors.at[i];
    // Two contiguous tensors need no comparison: the common case costs one walk each.
    if (!(contiguous ? is_contiguous(t) : same_strides(param, t))) return false;
  }
  return contiguous || is_dense(param);
}

// The slot's layout in the parameter's memory order, or row-major where blocks are; adjacent
// dimensions merged where every tensor allows it; a complex element becomes a last dimension of
// two.
std::vector<int64_t> make_layout(const Tensors& tensors, int count, bool row_major) {
  const DLTensor& param = tensors.at[kParam];
  const bool indexed = any_random(tensors);
  struct Dim {
    int64_t size, stride[kMaxTensors + 1];
  };
  std::vector<Dim> dims;
  const auto append = [&](const Dim& inner) {
    if (!dims.empty()) {
      Dim& outer = dims.back();
      bool merges = true;
      for (int i = 0; i <= count; ++i) {
        merges = merges && outer.stride[i] == inner.stride[i] * inner.size;
      }
      if (merges) {
        outer.size *= inner.size;
        std::copy_n(inner.stride, count + 1, outer.stride);
        return;
      }
    }
    dims.push_back(inner);
  };
  const int64_t reals = is_complex(param) ? 2 : 1;
  std::vector<int64_t> index_stride(param.ndim, 1);
  for (int d = param.ndim - 1; d > 0; --d) index_stride[d - 1] = index_stride[d] * param.shape[d];
  if (tensors.index_stride)
    index_stride.assign(tensors.index_stride, tensors.index_stride + param.ndim);
  std::vector<int> order = by_stride(param);
  if (row_major) std::sort(order.begin(), order.end());
  for (const int d : order) {
    Dim dim{param.shape[d], {}};
    for (int i = 0; i < count; ++i) dim.stride[i] = tensors.at[i].strides[d] * reals;
    dim.stride[count] = indexed ? index_stride[d] : 0;
    append(dim);
  }
  if (reals == 2 || dims.empty()) {
    Dim dim{reals, {}};
    std::fill_n(dim.stride, count, 1);
    append(dim);
  }

  std::vector<int64_t> layout = {static_cast<int64_t>(dims.size())};
  for (const Dim& dim : dims) layout.push_back(dim.size);
  for (int i = 0; i <= count; ++i) {
    for (const Dim& dim : dims) layout.push_back(dim.stride[i]);
  }
  return layout;
}

int64_t rows_of(const DLTensor& t) { return t.ndim > 0 ? t.shape[0] : 1; }

// What messages call it.
std::string name_at(const Tensors& tensors, int place) {
  const std::string name = tensors.names[place];
  return place < kState ? name : "state '" + name + "'";
}

// Codes and scales of this very parameter, which from here on are seen as numbers in its shape.
void check_blocks(Tensors& tensors, int i, std::vector<int64_t>& row_major) {
  const DLTensor& param = tensors.at[kParam];
  DLTensor& t = tensors.at[i];
  const int64_t expected = block_bytes(param);
  if (t.dtype.code != kDLUInt || t.dtype.bits != 8 || t.ndim != 1 || t.shape[0] != expected ||
      !is_contiguous(t)) {
    throw std::invalid_argument(
        name_at(tensors, i) + " is not the " + std::to_string(expected) +
        " bytes of 8-bit numbers that go with a parameter of shape " + shape_of(param) +
        "; load a state_dict of this very model, or delete the state to " + "start it anew");
  }
  row_major.assign(param.ndim, 1);
  for (int d = param.ndim - 1; d > 0; --d) row_major[d - 1] = row_major[d] * param.shape[d];
  t.ndim = param.ndim;
  t.shape = param.shape;
  t.strides = row_major.data();
}

void check_fits(const Tensors& tensors, int i) {
  const DLTensor& param = tensors.at[kParam];
  const DLTensor& t = tensors.at[i];
  if (t.ndim != param.ndim || !std::equal(t.shape, t.shape + t.ndim, param.shape)) {
    throw std::invalid_argument(
        name_at(tensors, i) + " has shape " + shape_of(t) + ", the parameter " + shape_of(param) +
        "; load a state_dict of this very model, or " + "delete the state to start it anew");
  }
  if (t.device.device_type != param.device.device_type ||
      t.device.device_id != param.device.device_id) {
    throw std::invalid_argument(name_at(tensors, i) +
                                " is on another device than the parameter; move it with " +
                                "optimizer.load_state_dict(optimizer.state_dict())");
  }
  if (is_block(tensors.format[i]) || tensors.format[i] == Format::kRemainder) return;
  if (!is_supported(t.dtype) || is_complex(t) != is_complex(param) ||
      in_double(t) != in_double(param)) {
    throw std::invalid_argument(
        name_at(tensors, i) + " has a dtype that does not go with the parameter's " +
        name_of(param.dtype) +
        "; use the parameter's dtype (float32, bfloat16 and float16 mix freely)");
  }
}

// The table of such tensors.
Table& table_for(std::vector<Table>& tables, const Tensors& tensors) {
  const DLDevice device = tensors.at[kParam].device;
  const auto fits = [&](const Table& table) {
    return table.states == tensors.states && table.device.device_type == device.device_type &&
           table.device.device_id == device.device_id &&
           std::equal(std::begin(tensors.format), std::end(tensors.format), table.format);
  };
  const auto found = std::find_if(tables.rbegin(), tables.rend(), fits);
  if (found != tables.rend()) return *found;
  Table& table = tables.emplace_back();
  table.device = device;
  table.states = tensors.states;
  table.counts = tensors.counts;
  std::copy(std::begin(tensors.format), std::end(tensors.format), table.format);
  return table;
}

}  // namespace

const std::vector<RuleInfo>& rules() {
  static const std::vector<RuleInfo> rules = {
#define FASTOPT_DESCRIBE(Rule) describe<Rule>(),
      FASTOPT_FOR_EACH_RULE(FASTOPT_DESCRIBE)
#undef FASTOPT_DESCRIBE
  };
  return rules;
}

int find_rule(const std::string& name) {
  for (size_t i = 0; i < rules().size(); ++i) {
    if (rules()[i].name == name) return static_cast<int>(i);
  }
  throw std::invalid_argument("fastopt has no rule named '" + name + "'");
}

const char* name_of(Format format) {
  switch (format) {
    case Format::kFloat32: return "float32";
    case Format::kFloat64: return "float64";
    case Format::kBFloat16: return "bfloat16";
    case Format::kFloat16: return "float16";
    case Format::kBFloat16Stochastic: return "bfloat16 stochastic";
    case Format::kSplit: return "split";
    case Format::kRemainder: return "remainder";
    case Format::kBlockSigned: return "block signed";
    case Format::kBlockUnsigned: return "block unsigned";
  }
  return "";
}

Format format_of(DLDataType dtype) {
  const int bits = dtype.code == kDLComplex ? dtype.bits / 2 : dtype.bits;
  if (dtype.code == kDLBfloat) return Format::kBFloat16;
  return bits == 64 ? Format::kFloat64 : bits == 32 ? Format::kFloat32 : Format::kFloat16;
}

int64_t block_bytes(const DLTensor& param) {
  const int64_t numel = numel_of(param), rows = rows_of(param);
  return numel + rows * Blocks(numel, rows).in_row;
}

int64_t numel_of(const DLTensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1}, std::multiplies<>());
}

bool in_double(const DLTensor& tensor) {
  return is_supported(tensor.dtype) && format_of(tensor.dtype) == Format::kFloat64;
}

Number as_number(const DLTensor& tensor) {
  if (numel_of(tensor) != 1 || !is_supported(tensor.dtype) || is_complex(tensor)) {
    throw std::invalid_argument(
        "a hyper-parameter, grad_scale or found_inf is a tensor of another kind than one " +
        std::string("floating-point number; give it as torch.tensor(value, dtype=torch.float32)"));
  }
  return {0, static_cast<char*>(tensor.data) + tensor.byte_offset, format_of(tensor.dtype), {}};
}

bool is_supported(DLDataType dtype) {
  if (dtype.lanes != 1) return false;
  switch (dtype.code) {
    case kDLFloat: return dtype.bits == 16 || dtype.bits == 32 || dtype.bits == 64;
    case kDLBfloat: return dtype.bits == 16;
    case kDLComplex: return dtype.bits == 64 || dtype.bits == 128;
  }
  return false;
}

void append_slot(Table& table, const Slot& slot, int member, const int64_t* layout) {
  Slot& added = table.slots.emplace_back(slot);
  if (slot.layout != kDense) {
    added.layout = static_cast<int32_t>(table.layouts.size());
    table.layouts.insert(table.layouts.end(), layout,
                         layout + layout_size(layout[0], table.tensors()));
  }
  added.first_chunk = static_cast<int32_t>(table.chunk_count);
  table.chunk_count += chunks_of(slot);
  table.numel += slot.numel;
  table.members.push_back(member);
}

Span span_of(const Table& table, const Slot& slot, int place) {
  const bool is_count = place > count_place(table.counts);
  int64_t elements = is_count ? 1 : slot.numel;
  if (is_block(table.format[place])) {
    elements += slot.rows * Blocks(slot.numel, slot.rows).in_row;
  } else if (!is_count && slot.layout != kDense) {
    const Layout layout = layout_of(table.layouts.data() + slot.layout, place);
    elements = 1;
    for (int64_t d = 0; d < layout.ndim; ++d) elements += (layout.shape[d] - 1) * layout.stride[d];
  }
  const auto begin = reinterpret_cast<uintptr_t>(slot.data[place]);
  return {begin, begin + static_cast<uintptr_t>(elements * bytes_of(table.format[place]))};
}

void add_slot(std::vector<Table>& tables, Tensors& tensors, int member, int group, bool fresh,
              bool writes_grad) {
  const int count = tensor_count(tensors.states, tensors.format[kParam]);
  const DLTensor& param = tensors.at[kParam];
  std::vector<int64_t> row_major;
  for (int i = kGrad; i < count; ++i) {
    if (is_block(tensors.format[i])) check_blocks(tensors, i, row_major);
    check_fits(tensors, i);
  }
  for (int i = 0; i < tensors.counts; ++i) {
    const DLTensor& t = tensors.at[count_place(i)];
    if (numel_of(t) != 1 || t.dtype.code != kDLFloat || t.dtype.bits < 32) {
      throw std::invalid_argument(name_at(tensors, count_place(i)) +
                                  " is not one number; make it torch.tensor(float(" +
                                  tensors.names[count_place(i)] + "))");
    }
  }

  Slot slot{};
  slot.numel = numel_of(param) * (is_complex(param) ? 2 : 1);
  slot.group = group;
  slot.fresh = fresh;
  slot.rows = row_major.empty() ? 0 : static_cast<uint32_t>(rows_of(param));
  slot.first_index = static_cast<uint32_t>(tensors.first_index);
  for (int i = 0; i < count; ++i) {
    slot.data[i] = static_cast<char*>(tensors.at[i].data) + tensors.at[i].byte_offset;
    if (param.device.device_type == kDLCPU) {
      __builtin_prefetch(slot.data[i]);  // used soon, and with many small tensors not cached
    }
  }
  for (int i = 0; i < tensors.counts; ++i) {
    const DLTensor& t = tensors.at[count_place(i)];
    slot.data[count_place(i)] = static_cast<char*>(t.data) + t.byte_offset;
    tensors.format[count_place(i)] = format_of(t.dtype);
  }
  slot.layout = kDense;
  const bool in_order = !any_random(tensors) || has_plain_index(tensors);
  const bool dense = slot.numel == 0 || (in_order && flat(tensors, count));
  if (!dense) {
    for (int i = 0; i < count; ++i) {
      const bool written = i != kGrad || writes_grad;
      if (written && may_overlap(tensors.at[i])) {
        throw std::invalid_argument(name_at(tensors, i) +
                                    " has elements that share memory (an expanded tensor?); " +
                                    "replace it with its .clone()");
      }
    }
  }

  Table& table = table_for(tables, tensors);
  if (dense) {
    append_slot(table, slot, member, nullptr);
  } else {
    slot.layout = 0;  // any but kDense: append_slot finds the place
    append_slot(table, slot, member, make_layout(tensors, count, !row_major.empty()).data());
  }

  const Slot& added = table.slots.back();
  Span span[kMaxTensors];
  for (int i = 0; i < count; ++i) {
    span[i] = span_of(table, added, i);
    for (int j = 0; j < i; ++j) {
      if (span[i].meets(span[j])) {  // each operation of torch's reads what the ones before wrote
        throw NotOurs{name_at(tensors, j) + " and " + name_at(tensors, i) + " share memory"};
      }
    }
  }
}

void add_gradient(std::vector<Table>& tables, const DLTensor& grad, int member, bool writes) {
  Tensors tensors;
  tensors.states = tensors.counts = 0;
  for (const int i : {kParam, kGrad}) {
    tensors.at[i] = grad;
    tensors.format[i] = format_of(grad.dtype);
  }
  Slot slot{};
  slot.numel = numel_of(grad) * (is_complex(grad) ? 2 : 1);
  slot.fresh = true;
  slot.data[kParam] = slot.data[kGrad] = static_cast<char*>(grad.data) + grad.byte_offset;
  const bool dense = slot.numel == 0 || flat(tensors, kState);
  if (writes && !dense && may_overlap(grad)) {
    throw NotOurs{"a gradient has elements that share memory"};
  }
  slot.layout = dense ? kDense : 0;
  Table& table = table_for(tables, tensors);
  append_slot(table, slot, member, dense ? nullptr : make_layout(tensors, kState, false).data());
}

}  // namespace fastopt
