// What is kept of the parameters of one step: found in the optimizer, read as memory, made or
// converted where it is not as it is to be kept, and put back once the step is done.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "keeping.h"
#include "members.h"
#include "reading.h"
#include "table.h"

namespace fastopt {

class States {
 public:
  // `state` is the optimizer's; averages are kept, too, if asked for. What is read lives as long as
  // the reader.
  States(int rule, const Keeping& keeping, bool averages, py::object state, const Devices& devices,
         Reader& reader)
      : rule_index_(rule),
        rule_(rules()[rule]),
        keeping_(keeping),
        averages_(averages),
        state_(std::move(state)),
        devices_(devices),
        reader_(reader) {}

  // To be called for each param group in turn.
  void add_group(py::handle param_group, const std::vector<Value>& options);

  // Notes what the optimizer has of a member.
  void find(Member& member) const;

  // Reads what is kept of a member, whose parameter and gradient have been read, and of one that
  // has nothing makes it, for all members alike. Throws NotOurs, or std::invalid_argument.
  void read(Member& member, std::vector<Member>& members, Tensors& tensors);

  // The average of a member's parameter, which begins as a copy of it.
  void read_average(Member& member, const DLTensor& param, DLTensor* out);

  // Puts what was made for this step into the optimizer, of the first `done` tables' members.
  void keep(const std::vector<Member>& members, const std::vector<Table>& tables, size_t done);

 private:
  // What is kept of every parameter in a group.
  struct Kept {
    int place;  // in a slot
    PyObject* key;
    const State* state;
    bool ours = false;  // not of the rule: made anew where it is missing
  };

  std::vector<Kept> kept_with(const std::vector<Value>& options) const;
  void make(std::vector<Member>& members);
  py::object first_of(const Kept& kept, int group) const;
  // Called for each tensor: as inline as if they were defined here.
  inline bool is_count(const Kept& kept) const;
  inline void add_state(Member& member, const Kept& kept, Tensors& tensors,
                        std::optional<Format> format);
  inline void read_state(const Member& member, const py::object& value, const Kept& kept,
                         DLTensor* out);
  inline void read_count(Member& member, const Kept& kept, DLDevice device, DLTensor* out);

  const Torch& torch_ = torch();
  int rule_index_;
  const RuleInfo& rule_;
  Keeping keeping_;
  bool averages_;
  Mapping state_;
  const Devices& devices_;
  Reader& reader_;
  std::vector<py::handle> param_groups_;
  std::vector<std::vector<Kept>> kept_;  // of each param group
  bool made_ = false;
};

}  // namespace fastopt
