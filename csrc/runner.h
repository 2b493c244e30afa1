// Running a rule, or the norm, on tables that have been checked: each by its device's backend.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "reading.h"
#include "table.h"

namespace fastopt {

// The averages of a table's parameters, slot by slot, if they are kept.
struct Averages {
  const Table* table = nullptr;  // of those that are in no slot of the parameters' table
  Group decay{};
  bool along = false;  // whether any is there, as CUDA's update takes it with the parameter
};

class Runner {
 public:
  // `launch_triton` is given a table in the form of fastopt.triton.Table, and what to do with it.
  Runner(const Devices& devices, int threads, const py::function& launch_triton)
      : devices_(devices), threads_(threads), launch_triton_(launch_triton) {}

  // Takes one step of a rule, and moves the averages with it. `place` tells apart the tables that a
  // call runs.
  void run(int rule, const Table& table, const std::vector<Group>& groups, const Scaling& scaling,
           size_t place, const Averages& averages = {}) const;

  // The norm of the gradients in tables of one device, divided by grad_scale: a number, or on an
  // accelerator a tensor of float64 that nobody waits for.
  Value norm(const std::vector<Table>& tables, const Number& grad_scale) const;

 private:
  void run_on_cpu(int rule, const Table& table, const std::vector<Group>& groups,
                  const Scaling& scaling, const Averages& averages) const;
  void run_on_device(int rule, const Table& table, const std::vector<Group>& groups,
                     const Scaling& scaling, double average_weight, const py::object& place) const;
  void run_on_cuda(int rule, const Table& table, const std::vector<Group>& groups,
                   const Scaling& scaling, double average_weight) const;
  py::object run_on_triton(const std::string& kernels, const Table& table, const py::object& place,
                           const std::vector<Number>& numbers) const;
  double norm_on_cpu(const std::vector<Table>& tables, double grad_scale) const;
  py::object norm_on_cuda(const std::vector<Table>& tables, const Number& grad_scale) const;

  const Devices& devices_;
  int threads_;
  const py::function& launch_triton_;
};

}  // namespace fastopt
