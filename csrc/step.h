// One step of an optimizer.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "torch.h"

namespace fastopt {

// Makes a step. None when it is done; otherwise why torch must make it, and nothing has been
// changed. `passes` is a fastopt.passes.Passes, or None.
std::optional<std::string> step(const std::string& rule, const py::object& param_groups,
                                py::object state, const py::object& grad_scale,
                                const py::object& found_inf, int threads,
                                const std::optional<std::string>& backend,
                                const std::optional<std::string>& states,
                                const std::optional<std::string>& weights,
                                const py::function& launch_triton, const py::object& passes);

}  // namespace fastopt
