// The total norm of gradients, and clipping them by it.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "reading.h"
#include "runner.h"

namespace fastopt {

// Gradients whose norm is asked for, with what their sum of squares is to be summed over: nothing,
// or the dimensions of a mesh that they are sharded along.
class Gradients {
 public:
  // `writes`: they are to be clipped where they lie.
  explicit Gradients(bool writes) : writes_(writes) {}

  // Adds the memory of a gradient, which lies along meshes as `placed` does: as the gradient
  // itself, or its parameter. Throws NotOurs where that is pending, or it cannot be clipped where
  // it lies.
  void add(py::handle placed, const DLTensor& memory, int member);

  // The norm of all, divided by grad_scale: a number where no accelerator has any of them.
  Value norm(const Value& grad_scale, const Devices& devices, Reader& reader,
             const Runner& runner) const;

  // That of the norm in torch: the widest of theirs.
  const char* dtype() const;

  // Their tables, for a rule to run on.
  std::vector<Table> tables() const;

 private:
  struct Part {
    DLDevice device;
    py::object mesh;
    std::vector<Table> tables;
  };

  bool writes_;
  std::vector<Part> parts_;
};

// torch.nn.utils.clip_grad_norm_ of order 2: the norm, or why it is torch's to do, and then nothing
// has been changed; beside the norm the name of its dtype. Without max_norm the norm is that of the
// tensors themselves, and nothing is written.
py::object clip_grad_norm(const py::object& tensors, const py::object& max_norm,
                          bool error_if_nonfinite, int threads,
                          const std::optional<std::string>& backend,
                          const py::function& launch_triton);

}  // namespace fastopt
