// In place of the CUDA backend where there was no compiler for it.
#include "apply.h"
#include "device.h"

namespace fastopt::cuda {

std::string why_not(DLDevice) { return "this build has no CUDA kernels: " FASTOPT_NO_CUDA; }

Variant variant_asked_for() { return {}; }

int64_t scratch_bytes(const Table&) { return 0; }

void apply(int, const Table&, const Group*, double, const Scaling&, Variant, void*, void*) {}

int64_t norm_scratch_bytes(const std::vector<Table>&) { return 0; }

void norm(const std::vector<Table>&, const Number&, void*, double*, void*) {}

}  // namespace fastopt::cuda
