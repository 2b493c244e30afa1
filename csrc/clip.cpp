#include "clip.h"

#include <cmath>

#include "norm.h"
#include "overlap.h"

namespace fastopt {

void Gradients::add(py::handle placed, const DLTensor& memory, int member) {
  py::object mesh = py::none();
  if (!torch().is_plain(placed.ptr())) {
    mesh = helper("fastopt.clip", "sharded_along")(placed);
    if (py::isinstance<py::str>(mesh)) throw NotOurs{text(mesh)};
  }
  const auto fits = [&](const Part& part) {
    return same(part.device, memory.device) && (part.mesh.is(mesh) || part.mesh.equal(mesh));
  };
  auto part = std::find_if(parts_.begin(), parts_.end(), fits);
  if (part == parts_.end()) {
    parts_.push_back({memory.device, std::move(mesh), {}});
    part = parts_.end() - 1;
  }
  add_gradient(part->tables, memory, member, writes_);
}

Value Gradients::norm(const Value& grad_scale, const Devices& devices, Reader& reader,
                      const Runner& runner) const {
  const auto norm_of = [&](const Part& part) {
    return runner.norm(part.tables, number_on(grad_scale, part.device, devices, reader));
  };
  if (parts_.empty()) return {0, {}};
  if (parts_.size() == 1 && parts_[0].mesh.is_none()) return norm_of(parts_[0]);
  py::list norms, meshes;
  for (const Part& part : parts_) {
    norms.append(norm_of(part).object());
    meshes.append(part.mesh);
  }
  return value_of(helper("fastopt.clip", "combined")(norms, meshes));
}

std::vector<Table> Gradients::tables() const {
  std::vector<Table> tables;
  for (const Part& part : parts_) {
    tables.insert(tables.end(), part.tables.begin(), part.tables.end());
  }
  return tables;
}

const char* Gradients::dtype() const {
  std::optional<Format> widest;
  for (const Part& part : parts_) {
    for (const Table& table : part.tables) {
      const Format format = table.format[kGrad];
      if (format == Format::kFloat64) return name_of(format);
      widest = widest && *widest != format ? Format::kFloat32 : format;
    }
  }
  return name_of(widest.value_or(Format::kFloat32));
}

py::object clip_grad_norm(const py::object& tensors, const py::object& max_norm,
                          bool error_if_nonfinite, int threads,
                          const std::optional<std::string>& backend,
                          const py::function& launch_triton) {
  const bool clips = !max_norm.is_none();
  const py::tuple items = items_of(tensors);
  std::vector<py::object> grads;
  grads.reserve(items.size());
  for (const py::handle item : items) {
    if (!torch().is_tensor(item)) return py::str("an item is no tensor");
    if (!clips) {
      grads.push_back(py::reinterpret_borrow<py::object>(item));
      continue;
    }
    auto grad = py::reinterpret_steal<py::object>(grad_of(item.ptr()));
    if (!grad) throw py::error_already_set();
    if (!grad.is_none()) grads.push_back(std::move(grad));
  }

  Devices devices(backend);
  Reader reader;
  Gradients gradients(clips);
  try {
    for (size_t i = 0; i < grads.size(); ++i) {
      const py::handle grad = grads[i];
      DLTensor memory;
      const py::handle read = reader.read(grad, grad, "grad", &memory);
      if (!is_supported(memory.dtype)) throw NotOurs{"a gradient of " + text(grad.attr("dtype"))};
      if (torch().is_lazy(read)) throw NotOurs{"a gradient is a conjugate or negative view"};
      devices.meet(memory.device, grad);
      gradients.add(grad, memory, static_cast<int>(i));
    }
  } catch (const NotOurs& error) {
    return py::str(error.reason);
  }
  const Runner runner(devices, threads, launch_triton);
  const Value norm = gradients.norm({1, {}}, devices, reader, runner);
  const py::object result = py::make_tuple(norm.object(), gradients.dtype());
  if (error_if_nonfinite && !is_finite(norm.read())) return result;  // which is for Python to say
  if (!clips) return result;

  const Value limit = value_of(max_norm);
  const bool on_host = norm.on_host() && limit.on_host();
  if (on_host && clip_factor(norm.read(), limit.read()) == 1) return result;
  const std::vector<Table> tables = in_turn(gradients.tables(), false);
  std::vector<Scaling> scaling(tables.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    scaling[i].norm = number_on(norm, tables[i].device, devices, reader);
    scaling[i].max_norm = number_on(limit, tables[i].device, devices, reader);
    scaling[i].skip = Skip::kUnclipped;
  }
  py::list written;
  for (const py::object& grad : grads) written.append(grad);
  torch().increment_version(written);
  const std::vector<Group> groups(1);  // gradients move all the way to what they are clipped to
  for (size_t i = 0; i < tables.size(); ++i) {
    runner.run(find_rule("average"), tables[i], groups, scaling[i], i);
  }
  return result;
}

}  // namespace fastopt
