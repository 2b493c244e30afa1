// All rules. One line here registers an optimizer with tables, backends and Python.
#pragma once

#include <type_traits>

#include "adadelta.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "asgd.h"
#include "average.h"
#include "lion.h"
#include "nadam.h"
#include "radam.h"
#include "rmsprop.h"
#include "rprop.h"
#include "sgd.h"

#define FASTOPT_FOR_EACH_RULE(DO) \
  DO(Adadelta)                    \
  DO(Adagrad)                     \
  DO(Adam)                        \
  DO(Adamax)                      \
  DO(ASGD)                        \
  DO(Average)                     \
  DO(Lion)                        \
  DO(NAdam)                       \
  DO(RAdam)                       \
  DO(RMSprop)                     \
  DO(Rprop)                       \
  DO(SGD)

namespace fastopt {

// Whether kernels are compiled for each of the formats that save bytes. Nobody trains what hardly
// fits into memory with the others, and each rule's take seconds to build; what serves any format
// serves theirs, with the same bits. So it does what has three states.
template <class Rule, int kStates>
constexpr bool kHasKernelsOfFormats =
    kStates <= 2 && !std::is_same_v<Rule, Adadelta> && !std::is_same_v<Rule, Adamax> &&
    !std::is_same_v<Rule, ASGD> && !std::is_same_v<Rule, Rprop>;

}  // namespace fastopt
