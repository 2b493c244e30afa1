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

// Whether kernels are compiled for each of the formats that save bytes: of what models are trained
// with that hardly fit into memory. A rule's take seconds to build. Of the others one that serves
// any format serves these, with the same bits.
template <class Rule, int kStates>
constexpr bool kHasKernelsOfFormats =
    kStates <= 2 && (std::is_same_v<Rule, Adam> || std::is_same_v<Rule, Average> ||
                     std::is_same_v<Rule, Lion> || std::is_same_v<Rule, SGD>);

}  // namespace fastopt
