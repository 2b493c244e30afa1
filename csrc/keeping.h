// How an optimizer keeps its states, and what bfloat16 parameters lose by rounding.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "table.h"
#include "torch.h"

namespace fastopt {

// What is kept beside a rule's own states: the step, which random bits depend on, of a rule that
// counts none, what completes a split parameter, and the average of a parameter.
inline constexpr State kStep = {"step"}, kRemainder = {"remainder"}, kAverage = {"average"};

// What the user has said of it: of states (or none: as torch does) and of bfloat16 parameters.
struct Keeping {
  std::optional<Format> states;   // kFloat32, kBFloat16Stochastic or kBlockSigned: 8 bits
  std::optional<Format> weights;  // kSplit or kBFloat16Stochastic

  Keeping(const std::optional<std::string>& states_name,
          const std::optional<std::string>& weights_name);

  bool as_torch() const { return !states && !weights; }
  bool narrows_states() const { return states && *states != Format::kFloat32; }

  Format of_param(const DLTensor& param) const;

  // Of a state: none where it is as torch has it, in the parameter's dtype or wider.
  std::optional<Format> of_state(const DLTensor& param, Narrow narrow) const;
};

// Whether a tensor has the dtype in which a format keeps numbers.
bool is_kept_as(const DLTensor& tensor, Format format);

// How states of a parameter are kept under these keys; "" where they are as torch has them.
std::vector<std::string> formats(const std::string& rule, const std::optional<std::string>& states,
                                 const std::optional<std::string>& weights, py::handle param,
                                 const std::vector<std::string>& keys);

}  // namespace fastopt
