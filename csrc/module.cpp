// The Python module fastopt._C: its functions, most of which are other files'.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "clip.h"
#include "cpu/apply.h"
#include "cuda/device.h"
#include "keeping.h"
#include "reading.h"
#include "step.h"
#include "torch.h"

namespace fastopt {
namespace {

int64_t block_bytes_of(py::handle param) {
  DLTensor read;
  if (!torch().read(param, &read)) throw std::invalid_argument("a parameter has no memory");
  return block_bytes(read);
}

void encode_state(py::handle from, int64_t rows, int64_t numel, bool is_signed, py::handle to) {
  encode_blocks(memory_of<const float>(from), rows, numel, is_signed, memory_of<uint8_t>(to));
}

void decode_state(py::handle from, int64_t rows, int64_t numel, bool is_signed, py::handle to) {
  decode_blocks(memory_of<const uint8_t>(from), rows, numel, is_signed, memory_of<BFloat16>(to));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastopt's native core; use the classes of fastopt instead.";
  torch();  // fails here, at import, where the torch installed does not suit
  m.def("step", &step);
  m.def("clip_grad_norm", &clip_grad_norm);
  m.def("formats", &formats);
  m.def("block_bytes", &block_bytes_of);
  m.def("encode", &encode_state);
  m.def("decode", &decode_state);
  m.def(
      "why_not_cuda", [](int index) { return cuda::why_not({kDLCUDA, index}); },
      py::arg("index") = 0);
  py::dict counts;
  for (size_t i = 0; i < rules().size(); ++i) {
    py::list keys;
    for (const State& count : rules()[i].counts) keys.append(count.name);
    counts[rules()[i].name.c_str()] = keys;
  }
  m.attr("counts") = counts;
  m.attr("build") = py::dict(
      py::arg("compiler") = FASTOPT_COMPILER, py::arg("cuda") = FASTOPT_CUDA_BUILD,
      py::arg("instruction_set") = cpu::instruction_set(), py::arg("openmp") = cpu::openmp());
}

}  // namespace fastopt
