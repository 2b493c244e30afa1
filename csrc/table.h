// Tables: what one step works on, read from tensors and checked before anything is written.
#pragma once

#include <cstdint>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack_abi.h"
#include "norm.h"
#include "rules/rules.h"
#include "slot.h"

namespace fastopt {

// Why a step is torch's to make: thrown while nothing has been changed, returned to Python as text.
struct NotOurs {
  std::string reason;
};

// What the host must know of a rule; made from the rule by its line in rules/rules.h.
struct RuleInfo {
  std::string name;
  std::vector<const char*> options;
  std::vector<State> counts, states;
  unsigned (*states_used)(const Group& group);  // a bit each
};

// In the order of rules/rules.h, the index by which backends know them.
const std::vector<RuleInfo>& rules();

int find_rule(const std::string& name);

template <class Rule>
constexpr int kMostStates = std::size(Rule::kStates) - Rule::kCounts;

// A group's numbers as its rule knows them; `read` turns a Number into a double.
template <class Rule, class Read>
FASTOPT_RULE typename Rule::Options options_of(const Group& group, Read read) {
  double values[kMaxOptions];
  for (int i = 0; i < kMaxOptions; ++i) values[i] = read(group.options[i]);
  typename Rule::Options options;
  memcpy(&options, values, sizeof options);
  return options;
}

// When a step changes nothing, besides where gradients have overflowed.
enum class Skip : int { kNever, kNonfinite, kUnclipped };

// What becomes of a table's gradients before its rule sees them. The numbers are as its device
// reads them.
struct Scaling {
  Number found_inf;       // where it is not 0, the step changes nothing
  Number grad_scale;      // gradients are divided by it and written back; 1 leaves them alone
  Number norm, max_norm;  // then multiplied by clip_factor of these, as if that were written, too
  Skip skip = Skip::kNever;
  int64_t* skipped = nullptr;  // on an accelerator: counts steps that a norm has stopped

  Scaling() : found_inf{}, grad_scale{}, norm{}, max_norm{} {
    grad_scale.value = 1;
    max_norm.value = std::numeric_limits<double>::infinity();
  }
};

// Whether a step is to be skipped for its norm.
FASTOPT_RULE bool skips(Skip skip, double norm, double max_norm) {
  return skip == Skip::kNonfinite   ? !is_finite(norm)
         : skip == Skip::kUnclipped ? clip_factor(norm, max_norm) == 1
                                    : false;
}

// What a backend keeps of a slot between the two phases, at most kScalarBytes.
template <class Rule, class T>
struct Advanced {
  typename Rule::template Scalars<T> k;
  uint32_t seed;  // of the step's random bits
};
constexpr int kScalarBytes = 96;

// A rule that counts nothing has the step counted where random bits depend on it.
template <class Rule>
constexpr int kMostCounts = Rule::kCounts > 0 ? Rule::kCounts : 1;

// Phase one of a slot: takes its counts, so many of them, one step further.
template <class Rule, class T>
FASTOPT_RULE Advanced<Rule, T> advance_slot(const typename Rule::Options& options, bool fresh,
                                            int count, Count* counts) {
  static_assert(sizeof(Advanced<Rule, T>) <= kScalarBytes);
  if (count > 0) counts[0].value = counts[0].rounded(counts[0].value + 1);
  const double t = Rule::kCounts > 0 ? counts[0].value : fresh ? 1 : 2;
  return {Rule::template advance<T>(options, t, counts + 1), seed_of(counts[0].value)};
}

// All slots that share device and formats: one update launch.
struct Table {
  DLDevice device;
  int states, counts;         // how many are kept for each slot
  Format format[kMaxPlaces];  // of whatever is at this place in a slot
  std::vector<Slot> slots;
  std::vector<int32_t> members;  // of each slot, its parameter's place in the step
  int64_t chunk_count = 0;
  std::vector<int64_t> layouts;  // of slots that are not kDense, see layout_of
  int64_t numel = 0;

  int tensors() const { return tensor_count(states, format[kParam]); }
};

// One parameter's tensors as read, each at its place in the slot, what they are kept as, and for
// errors their names.
struct Tensors {
  DLTensor at[kMaxPlaces];
  Format format[kMaxPlaces] = {};
  const char* names[kMaxPlaces] = {"the parameter", "grad"};
  int states, counts;
  // Where the parameter lies in the whole that it is a shard of: the index of its first element,
  // and how the index grows along each dimension; null where it is the whole.
  int64_t first_index = 0;
  const int64_t* index_stride = nullptr;
};

// Adds the slot of a member to the table it belongs to; throws std::invalid_argument, naming the
// fix, when its tensors do not fit together, NotOurs when they share memory. `fresh` states were
// just made and take the place of missing ones.
void add_slot(std::vector<Table>& tables, Tensors& tensors, int member, int group, bool fresh,
              bool writes_grad);

// Adds a slot whose parameter and gradient both are this tensor, for its norm and to be clipped;
// throws NotOurs where it cannot be written, if it is to be.
void add_gradient(std::vector<Table>& tables, const DLTensor& grad, int member, bool writes);

// Adds a slot that has been checked; `layout` is where its own starts, unless it is kDense.
void append_slot(Table& table, const Slot& slot, int member, const int64_t* layout);

// The addresses that what is at a place of a slot lies between: none where it has no elements.
struct Span {
  uintptr_t begin, end;

  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};
Span span_of(const Table& table, const Slot& slot, int place);

// A format's name, and the format of the real numbers a tensor of torch's is made of.
const char* name_of(Format format);
Format format_of(DLDataType dtype);

// Bytes of a state in blocks that is kept of a parameter: codes and scales.
int64_t block_bytes(const DLTensor& param);

// The one number that a tensor on its parameter's device holds; throws std::invalid_argument where
// it holds more or no such number.
Number as_number(const DLTensor& tensor);

int64_t numel_of(const DLTensor& tensor);

// Whether float64 arithmetic is due.
bool in_double(const DLTensor& tensor);

// False for dtypes no backend computes with (integers, float8): such parameters go to torch.
bool is_supported(DLDataType dtype);

}  // namespace fastopt
