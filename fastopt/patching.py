"""torch.optim's own constructors giving our optimizers, for programs that name torch's classes."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from typing_extensions import Self, Unpack

from fastopt.adadelta import Adadelta
from fastopt.adagrad import Adagrad
from fastopt.adam import Adam, AdamW
from fastopt.adamax import Adamax
from fastopt.asgd import ASGD
from fastopt.nadam import NAdam
from fastopt.options import Options
from fastopt.radam import RAdam
from fastopt.rmsprop import RMSprop
from fastopt.rprop import Rprop
from fastopt.sgd import SGD


class patch:
    """Has torch's constructors make our optimizers: ``torch.optim.AdamW(...)`` is then a
    `fastopt.AdamW`.

    It holds from the call on; as a context manager, until its end::

        fastopt.patch()

        with fastopt.patch(states="8bit"):
            train_as_somebody_else_wrote_it()

    No name is replaced. ``torch.optim.AdamW`` stays the class it is, and whoever holds it, by
    ``from torch.optim import AdamW``, in a registry or as a default argument, makes ours by calling
    it: whether that was imported before or after does not matter. What is made meanwhile is ours
    for good: it is an instance of torch's class, too, but ``type(optimizer)`` is ours, and a pickle
    names ours. Optimizers made before, and classes that inherit from torch's, are left as they are.

    It holds in all threads. Of several that hold at once, the options of the last one count.

    Args:
        options: ours, for every optimizer made meanwhile whose caller gives none: see
            `fastopt.options.Options`.

    Raises:
        TypeError, ValueError, RuntimeError: as of `fastopt.AdamW`, for an option that is unknown,
            out of range or not usable here; nothing has been patched.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        AdamW([torch.zeros(1)], **options)  # raises what it cannot be made with
        self._options = options
        with _lock:
            if not _in_force:
                _install()
            _in_force.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            _in_force.remove(self)
            if not _in_force:
                _uninstall()


_lock = threading.Lock()
_in_force: list[patch] = []

_CLASSES: list[Any] = [
    *(Adadelta, Adagrad, Adam, AdamW, Adamax, ASGD),
    *(NAdam, RAdam, RMSprop, Rprop, SGD),
]
_OURS: dict[type, Any] = {getattr(torch.optim, cls.__name__): cls for cls in _CLASSES}
_inits: dict[type, Any] = {cls: vars(cls)["__init__"] for cls in _OURS}


def _install() -> None:
    for stock, ours in _OURS.items():
        stock.__init__ = _becoming(ours, stock, _inits[stock])  # type: ignore[misc]


def _uninstall() -> None:
    for stock, init in _inits.items():
        stock.__init__ = init  # type: ignore[misc]


def _becoming(ours: Any, stock: type, init: Any) -> Any:
    """torch's constructor, whose instances of torch's very class become ours."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        in_force = _in_force[-1:]  # of other threads, none may be left
        if type(self) is stock and in_force:
            self.__class__ = ours
            ours.__init__(self, *args, **{**in_force[0]._options, **kwargs})
        else:
            init(self, *args, **kwargs)

    return __init__
