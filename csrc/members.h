// The parameters that take part in a step: those that have a gradient.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "slot.h"
#include "torch.h"

namespace fastopt {

// A parameter that takes part in a step, with all that belongs to it. The references keep memory
// alive: while the GIL is released other threads may replace gradients and states.
struct Member {
  int group, index;                          // its place in param_groups
  py::object param, grad, kept[kMaxPlaces];  // what is kept of it, at its place in the slot
  bool fresh = false;                        // it has no states yet
  bool keeps = false;  // its states here are not those in the optimizer: made anew for this step
  py::object average;
  bool fresh_average = false;
  bool copied = false;  // not its gradient is stepped with, but a copy that memory shows as it is

  FASTOPT_PREFETCHES void prefetch(const Torch& torch, Ahead ahead) const {
    torch.prefetch(param.ptr(), ahead);
    torch.prefetch(grad.ptr(), ahead);
    for (const py::object& object : kept) torch.prefetch(object.ptr(), ahead);
  }
};

// Appends the parameters of a group that have a gradient.
void collect(py::handle param_group, int group, std::vector<Member>& members);

// torch only warns of a parameter given twice and steps it twice, SGD's first time by two buffers.
bool has_duplicates(const std::vector<Member>& members);

// What errors call a member.
std::string name_of(py::handle param_group, const Member& member);

}  // namespace fastopt
