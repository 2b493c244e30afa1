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
  static_assert(kState + kMostStates<Rule> + Rule::kCounts <= kMaxPlaces);
  return {Rule::kName,
          {std::begin(Rule::kOptions), std::end(Rule::kOptions)},
          {Rule::kStates, Rule::kStates + Rule::kCounts},
          {Rule::kStates + Rule::kCounts, std::end(Rule::kStates)},
          [](const Group& group) {
            return Rule::states(options_of<Rule>(group, [](const Number& n) { return n.value; }));
          }};
}

bool is_complex(const DLTensor& t) { return t.dtype.code == kDLComplex; }

const char* name_of(DLDataType dtype) {
  if (dtype.code == kDLComplex) return dtype.bits == 128 ? "complex128" : "complex64";
  return name_of(dtype_of(dtype));
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

// The slot's layout in the parameter's memory order, adjacent dimensions merged where every tensor
// allows it; a complex element becomes a last dimension of two.
std::vector<int64_t> make_layout(const Tensors& tensors, int count) {
  const DLTensor& param = tensors.at[kParam];
  struct Dim {
    int64_t size, stride[kMaxTensors];
  };
  std::vector<Dim> dims;
  const auto append = [&](const Dim& inner) {
    if (!dims.empty()) {
      Dim& outer = dims.back();
      bool merges = true;
      for (int i = 0; i < count; ++i) {
        merges = merges && outer.stride[i] == inner.stride[i] * inner.size;
      }
      if (merges) {
        outer.size *= inner.size;
        std::copy_n(inner.stride, count, outer.stride);
        return;
      }
    }
    dims.push_back(inner);
  };
  const int64_t reals = is_complex(param) ? 2 : 1;
  for (const int d : by_stride(param)) {
    Dim dim{param.shape[d], {}};
    for (int i = 0; i < count; ++i) dim.stride[i] = tensors.at[i].strides[d] * reals;
    append(dim);
  }
  if (reals == 2 || dims.empty()) append({reals, {1, 1, 1, 1, 1}});

  std::vector<int64_t> layout = {static_cast<int64_t>(dims.size())};
  for (const Dim& dim : dims) layout.push_back(dim.size);
  for (int i = 0; i < count; ++i) {
    for (const Dim& dim : dims) layout.push_back(dim.stride[i]);
  }
  return layout;
}

int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// What messages call it.
std::string name_at(const Tensors& tensors, int place) {
  const std::string name = tensors.names[place];
  return place < kState ? name : "state '" + name + "'";
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
  if (!is_supported(t.dtype) || is_complex(t) != is_complex(param) ||
      in_double(t) != in_double(param)) {
    throw std::invalid_argument(
        name_at(tensors, i) + " has a dtype that does not go with the parameter's " +
        name_of(param.dtype) +
        "; use the parameter's dtype (float32, bfloat16 and float16 mix freely)");
  }
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

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat16: return "float16";
  }
  return "";
}

DType dtype_of(DLDataType dtype) {
  const int bits = dtype.code == kDLComplex ? dtype.bits / 2 : dtype.bits;
  if (dtype.code == kDLBfloat) return DType::kBFloat16;
  return bits == 64 ? DType::kFloat64 : bits == 32 ? DType::kFloat32 : DType::kFloat16;
}

int64_t numel_of(const DLTensor& tensor) {
  return std::accumulate(tensor.shape, tensor.shape + tensor.ndim, int64_t{1}, std::multiplies<>());
}

bool in_double(const DLTensor& tensor) {
  return is_supported(tensor.dtype) && dtype_of(tensor.dtype) == DType::kFloat64;
}

Number as_number(const DLTensor& tensor) {
  if (numel_of(tensor) != 1 || !is_supported(tensor.dtype) || is_complex(tensor)) {
    throw std::invalid_argument(
        "a hyper-parameter, grad_scale or found_inf is a tensor of another kind than one " +
        std::string("floating-point number; give it as torch.tensor(value, dtype=torch.float32)"));
  }
  return {0, static_cast<char*>(tensor.data) + tensor.byte_offset, dtype_of(tensor.dtype), {}};
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
    added.layout = static_cast<int64_t>(table.layouts.size());
    table.layouts.insert(table.layouts.end(), layout,
                         layout + layout_size(layout[0], table.states));
  }
  added.first_chunk = table.chunk_count;
  table.chunk_count += (slot.numel + kChunk - 1) / kChunk;
  table.numel += slot.numel;
  table.members.push_back(member);
}

Span span_of(const Table& table, const Slot& slot, int place) {
  const bool is_count = place > count_place(table.counts);
  int64_t elements = is_count ? 1 : slot.numel;
  if (!is_count && slot.layout != kDense) {
    const Layout layout = layout_of(table.layouts.data() + slot.layout, place);
    elements = 1;
    for (int64_t d = 0; d < layout.ndim; ++d) elements += (layout.shape[d] - 1) * layout.stride[d];
  }
  const auto begin = reinterpret_cast<uintptr_t>(slot.data[place]);
  return {begin, begin + static_cast<uintptr_t>(elements * bytes_of(table.dtype[place]))};
}

void add_slot(std::vector<Table>& tables, const Tensors& tensors, int member, int group, bool fresh,
              bool writes_grad) {
  const int count = kState + tensors.states;
  const DLTensor& param = tensors.at[kParam];
  for (int i = kGrad; i < count; ++i) check_fits(tensors, i);
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
  for (int i = 0; i < count; ++i) {
    slot.data[i] = static_cast<char*>(tensors.at[i].data) + tensors.at[i].byte_offset;
    if (param.device.device_type == kDLCPU) {
      __builtin_prefetch(slot.data[i]);  // used soon, and with many small tensors not cached
    }
  }
  DType dtype[kMaxPlaces] = {};
  for (int i = 0; i < count; ++i) dtype[i] = dtype_of(tensors.at[i].dtype);
  for (int i = 0; i < tensors.counts; ++i) {
    const DLTensor& t = tensors.at[count_place(i)];
    slot.data[count_place(i)] = static_cast<char*>(t.data) + t.byte_offset;
    dtype[count_place(i)] = dtype_of(t.dtype);
  }
  slot.layout = kDense;
  const bool dense = slot.numel == 0 || flat(tensors, count);
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

  const auto fits = [&](const Table& table) {
    return table.states == tensors.states && table.device.device_type == param.device.device_type &&
           table.device.device_id == param.device.device_id &&
           std::equal(std::begin(dtype), std::end(dtype), table.dtype);
  };
  auto table = std::find_if(tables.rbegin(), tables.rend(), fits);
  if (table == tables.rend()) {
    Table fresh_table{};
    fresh_table.device = param.device;
    fresh_table.states = tensors.states;
    fresh_table.counts = tensors.counts;
    std::copy(std::begin(dtype), std::end(dtype), fresh_table.dtype);
    tables.push_back(std::move(fresh_table));
    table = tables.rbegin();
  }
  if (dense) {
    append_slot(*table, slot, member, nullptr);
  } else {
    slot.layout = 0;  // any but kDense: append_slot finds the place
    append_slot(*table, slot, member, make_layout(tensors, count).data());
  }

  const Slot& added = table->slots.back();
  Span span[kMaxTensors];
  for (int i = 0; i < count; ++i) {
    span[i] = span_of(*table, added, i);
    for (int j = 0; j < i; ++j) {
      if (span[i].meets(span[j])) {  // each operation of torch's reads what the ones before wrote
        throw NotOurs{name_at(tensors, j) + " and " + name_at(tensors, i) + " share memory"};
      }
    }
  }
}

}  // namespace fastopt
