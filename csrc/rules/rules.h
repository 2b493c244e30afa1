// All rules. One line here registers an optimizer with tables, backends and Python.
#pragma once

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
