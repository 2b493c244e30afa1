// All rules. One line here registers an optimizer with tables, backends and Python.
#pragma once

#include "adam.h"
#include "sgd.h"

#define FASTOPT_FOR_EACH_RULE(DO) \
  DO(Adam)                        \
  DO(SGD)
