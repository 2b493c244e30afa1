#include "keeping.h"

#include <algorithm>
#include <stdexcept>

namespace fastopt {

Keeping::Keeping(const std::optional<std::string>& states_name,
                 const std::optional<std::string>& weights_name) {
  if (states_name == "float32") states = Format::kFloat32;
  if (states_name == "bfloat16") states = Format::kBFloat16Stochastic;
  if (states_name == "8bit") states = Format::kBlockSigned;
  if (weights_name == "split") weights = Format::kSplit;
  if (weights_name == "stochastic") weights = Format::kBFloat16Stochastic;
}

Format Keeping::of_param(const DLTensor& param) const {
  const Format format = format_of(param.dtype);
  if (weights && format == Format::kFloat16) {
    throw std::invalid_argument(
        "weights= is for bfloat16 parameters, and this one is float16; convert it with "
        ".bfloat16() or .float(), or leave the option out");
  }
  return weights && format == Format::kBFloat16 ? *weights : format;
}

std::optional<Format> Keeping::of_state(const DLTensor& param, Narrow narrow) const {
  if (in_double(param)) return {};
  const bool is_complex = param.dtype.code == kDLComplex;
  if (narrows_states() && is_complex) {
    throw std::invalid_argument(
        "states of a complex parameter cannot be narrow; give it to an optimizer without "
        "states=, or keep its real and imaginary parts as parameters");
  }
  if (is_complex) return {};
  if (!narrows_states() || narrow == Narrow::kExact) {
    const bool wide = states == Format::kFloat32 || (of_param(param) == Format::kSplit);
    return wide ? std::optional(Format::kFloat32) : std::nullopt;
  }
  if (states != Format::kBlockSigned || param.ndim < 2) return Format::kBFloat16Stochastic;
  return narrow == Narrow::kUnsigned ? Format::kBlockUnsigned : Format::kBlockSigned;
}

bool is_kept_as(const DLTensor& tensor, Format format) {
  const auto is = [&](uint8_t code, int bits) {
    return tensor.dtype.code == code && tensor.dtype.bits == bits;
  };
  switch (format) {
    case Format::kFloat32: return is(kDLFloat, 32);
    case Format::kBFloat16Stochastic: return is(kDLBfloat, 16);
    case Format::kRemainder: return is(kDLInt, 16);
    case Format::kBlockSigned:
    case Format::kBlockUnsigned: return is(kDLUInt, 8);
    default: return true;
  }
}

std::vector<std::string> formats(const std::string& rule, const std::optional<std::string>& states,
                                 const std::optional<std::string>& weights, py::handle param,
                                 const std::vector<std::string>& keys) {
  const Keeping keeping(states, weights);
  DLTensor read;
  if (!torch().read(param, &read)) throw std::invalid_argument("a parameter has no memory");
  const std::vector<State>& known = rules()[find_rule(rule)].states;
  const auto state_of = [&](const std::string& key) {
    return std::find_if(known.begin(), known.end(), [&](const State& s) { return key == s.name; });
  };
  const bool exact = std::any_of(keys.begin(), keys.end(), [&](const std::string& key) {
    return state_of(key) != known.end() && state_of(key)->narrow == Narrow::kExact;
  });
  std::vector<std::string> found;
  for (const std::string& key : keys) {
    const auto state = state_of(key);
    std::optional<Format> format;
    if (key == kRemainder.name) {
      format = Format::kRemainder;
    } else if (state != known.end()) {
      format = keeping.of_state(read, exact ? Narrow::kExact : state->narrow);
    }
    found.push_back(format ? name_of(*format) : "");
  }
  return found;
}

}  // namespace fastopt
