// Tables: what one step works on, read from tensors and checked before anything is written.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack_abi.h"
#include "rules/rules.h"
#include "slot.h"

namespace fastopt {

// What the host must know of a rule; made from the rule by its line in rules/rules.h.
struct RuleInfo {
  std::string name;
  std::vector<const char*> options, states;
  int option_values;  // numbers the options hold together
  bool counts_steps;
  int (*states_used)(const Group& group);
};

// In the order of rules/rules.h, the index by which backends know them.
const std::vector<RuleInfo>& rules();

// A group's numbers as its rule knows them; `read` turns a Number into a double.
template <class Rule, class Read>
FASTOPT_RULE typename Rule::Options options_of(const Group& group, Read read) {
  double values[kMaxOptions];
  for (int i = 0; i < kMaxOptions; ++i) values[i] = read(group.options[i]);
  typename Rule::Options options;
  memcpy(&options, values, sizeof options);
  return options;
}

constexpr int kScalarBytes = 96;  // the most any rule's Scalars take

// All slots that share device and dtypes: one update launch.
struct Table {
  DLDevice device;
  int states;                // buffers the rule keeps for each slot
  DType dtype[kMaxTensors];  // of param, grad and the states in use
  DType step_dtype;
  std::vector<Slot> slots;
  int64_t chunk_count = 0;
  std::vector<int64_t> layouts;  // of slots that are not kDense, see layout_of
  int64_t numel = 0;
};

// One parameter's tensors as read: param, grad and states in slot order, then the step count.
struct Tensors {
  DLTensor at[kMaxTensors];
  DLTensor step;
  int states;
};

// Adds a slot to the table it belongs to; throws std::invalid_argument, naming the fix, when its
// tensors do not fit together. `fresh` states were just made and take the place of missing ones.
void add_slot(std::vector<Table>& tables, const RuleInfo& rule, const Tensors& tensors, int group,
              bool fresh, bool writes_grad);

// torch's name of a dtype, and the dtype of real numbers a tensor is made of.
const char* name_of(DType dtype);
DType dtype_of(DLDataType dtype);

// The one number that a tensor on its parameter's device holds; throws std::invalid_argument where
// it holds more or no such number.
Number as_number(const DLTensor& tensor);

// False for dtypes no backend computes with (integers, float8): such parameters go to torch.
bool is_supported(DLDataType dtype);

}  // namespace fastopt
