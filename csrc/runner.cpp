#include "runner.h"

#include <cmath>

#include "cpu/apply.h"
#include "cuda/apply.h"
#include "norm.h"

namespace fastopt {
namespace {

// Smaller steps keep the GIL: taking it back from a busy thread can cost that thread's whole turn.
constexpr int64_t kKeepGil = 8192;

Number number_of(double value) { return {value, nullptr, {}, {}}; }

int64_t chunks_in(const std::vector<Table>& tables) {
  int64_t chunks = 0;
  for (const Table& table : tables) chunks += table.chunk_count;
  return chunks;
}

}  // namespace

void Runner::run(int rule, const Table& table, const std::vector<Group>& groups,
                 const Scaling& scaling, size_t place, const Averages& averages) const {
  if (devices_.backend_of(table.device) == Backend::kCpu) {
    return run_on_cpu(rule, table, groups, scaling, averages);
  }
  const double weight = averages.along ? 1 - averages.decay.options[0].value : 0;
  run_on_device(rule, table, groups, scaling, weight, py::make_tuple("update", place));
  if (!averages.table) return;
  Scaling of_averages;  // they move when the parameters do
  of_averages.found_inf = scaling.found_inf;
  of_averages.skip = scaling.skip;
  if (scaling.skip != Skip::kNever) of_averages.norm = scaling.norm;
  run_on_device(find_rule("average"), *averages.table, {averages.decay}, of_averages, 0,
                py::make_tuple("average", place));
}

void Runner::run_on_cpu(int rule, const Table& table, const std::vector<Group>& groups,
                        const Scaling& scaling, const Averages& averages) const {
  const double norm = scaling.norm.value, max_norm = scaling.max_norm.value;
  if (scaling.found_inf.value != 0 || skips(scaling.skip, norm, max_norm)) return;
  std::optional<py::gil_scoped_release> release;
  if (table.numel >= kKeepGil) release.emplace();
  cpu::apply(rule, table, groups.data(), averages.table, averages.decay,
             static_cast<float>(scaling.grad_scale.value), clip_factor(norm, max_norm), threads_);
}

void Runner::run_on_device(int rule, const Table& table, const std::vector<Group>& groups,
                           const Scaling& scaling, double average_weight,
                           const py::object& place) const {
  if (devices_.backend_of(table.device) == Backend::kCuda) {
    return run_on_cuda(rule, table, groups, scaling, average_weight);
  }
  std::vector<Number> numbers = {
      scaling.found_inf,
      scaling.grad_scale,
      scaling.norm,
      scaling.max_norm,
      number_of(static_cast<double>(scaling.skip)),
      {0, scaling.skipped, {}, {}},
  };
  for (const Group& group : groups) {
    numbers.insert(numbers.end(), std::begin(group.options), std::end(group.options));
  }
  run_on_triton(rules()[rule].name, table, place, numbers);
}

void Runner::run_on_cuda(int rule, const Table& table, const std::vector<Group>& groups,
                         const Scaling& scaling, double average_weight) const {
  const Scratch scratch(table.device, cuda::scratch_bytes(table));
  void* const stream = torch().stream(table.device);
  const cuda::Variant variant = cuda::variant_asked_for();
  // A launch waits where the device's queue is full: for other threads' work, perhaps.
  const py::gil_scoped_release release;
  cuda::apply(rule, table, groups.data(), average_weight, scaling, variant, scratch.data(), stream);
}

// Hands the table to Python as bytes, gradients' addresses apart: they alone change every step.
py::object Runner::run_on_triton(const std::string& kernels, const Table& table,
                                 const py::object& place,
                                 const std::vector<Number>& numbers) const {
  std::vector<Slot> slots = table.slots;
  std::vector<void*> grads;
  for (Slot& slot : slots) {
    grads.push_back(slot.data[kGrad]);
    slot.data[kGrad] = nullptr;
  }
  const auto bytes = [](const auto& items) {
    return py::bytes(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(items[0]));
  };
  py::list formats, count_formats;
  for (int i = 0; i < table.tensors(); ++i) formats.append(name_of(table.format[i]));
  for (int i = 0; i < table.counts; ++i) {
    count_formats.append(name_of(table.format[count_place(i)]));
  }
  return launch_triton_(kernels, place, devices_.torch_device(table.device), py::tuple(formats),
                        py::tuple(count_formats), bytes(slots), bytes(grads), bytes(numbers),
                        bytes(table.layouts), table.chunk_count);
}

Value Runner::norm(const std::vector<Table>& tables, const Number& grad_scale) const {
  switch (devices_.backend_of(tables[0].device)) {
    case Backend::kCpu: return {norm_on_cpu(tables, grad_scale.value), {}};
    case Backend::kCuda: return {0, norm_on_cuda(tables, grad_scale)};
    case Backend::kTriton: break;
  }
  py::list sums;
  for (const Table& table : tables) {
    sums.append(run_on_triton("norm", table, py::make_tuple("norm", sums.size()), {}));
  }
  const py::bytes scale(reinterpret_cast<const char*>(&grad_scale), sizeof grad_scale);
  return {0, helper("fastopt.triton", "total")(sums, scale)};
}

double Runner::norm_on_cpu(const std::vector<Table>& tables, double grad_scale) const {
  std::vector<double> sums(chunks_in(tables));
  int64_t numel = 0;
  for (const Table& table : tables) numel += table.numel;
  std::optional<py::gil_scoped_release> release;
  if (numel >= kKeepGil) release.emplace();
  double* at = sums.data();
  for (const Table& table : tables) {
    cpu::sum_squares(table, at, threads_);
    at += table.chunk_count;
  }
  return std::sqrt(cpu::total(sums)) / grad_scale;
}

py::object Runner::norm_on_cuda(const std::vector<Table>& tables, const Number& grad_scale) const {
  const DLDevice device = tables[0].device;
  const py::object norm = helper("fastopt.tensors", "new_norm")(devices_.torch_device(device));
  auto* const to = memory_of<double>(norm);
  const Scratch scratch(device, cuda::norm_scratch_bytes(tables));
  void* const stream = torch().stream(device);
  {
    const py::gil_scoped_release release;
    cuda::norm(tables, grad_scale, scratch.data(), to, stream);
  }
  return norm;
}

}  // namespace fastopt
