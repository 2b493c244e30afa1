// What a step is asked for: the values of its param groups, and what it does beside its rule.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "reading.h"

namespace fastopt {

// A param group's values in the order of its rule's Options. Throws ValueError, which names the
// option and the group.
std::vector<Value> read_options(int rule, py::handle param_group, int group);

// What a step does beside its rule, see fastopt/passes.py.
struct Passes {
  py::object object;
  std::optional<Value> max_norm, total_norm;
  bool skip_nonfinite = false;
  std::optional<double> decay;

  explicit Passes(py::object passes);
};

}  // namespace fastopt
