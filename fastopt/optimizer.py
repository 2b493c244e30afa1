"""The one ``step()`` every fastopt class shares, and what falls back to torch."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import _profiler_enabled, profiler  # type: ignore[attr-defined]
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fastopt import _C, checkpoints, triton
from fastopt.options import DEFAULTS, Backend, Options, States, Weights
from fastopt.passes import Passes, check_norm, lent, passes_of
from fastopt.tensors import unscale

# What the method is called in torch 2.10, then since.
_GRAPH_CAPTURE_CHECK = (
    "_accelerator_graph_capture_health_check"
    if hasattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check")
    else "_cuda_graph_capture_health_check"
)


# torch.compiler.disable imports all of torch._dynamo at once; torch's own lazy form does so in the
# first call.
@_disable_dynamo
def _opaque_step(*args: Any) -> str | None:
    """torch.compile breaks the graph here instead of trying to trace native code."""
    return _C.step(*args)


def _why_not_triton() -> str | None:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = [accelerator] if accelerator is not None else []
    reasons = [triton.why_not(device) for device in [*devices, torch.device("cpu")]]
    return None if None in reasons else reasons[0]


# Why a backend is not usable here, or None.
_WHY_NOT: dict[str, Callable[[], str | None]] = {
    "cpu": lambda: None,
    "cuda": lambda: _C.why_not_cuda() or None,
    "triton": _why_not_triton,
    "torch": lambda: None,
}


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it is usable here, else the reason why not.

    Asks CUDA, which must not be used in processes forked afterwards.
    """
    return {name: why_not() for name, why_not in _WHY_NOT.items()}


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack


def _watching_mode() -> str | None:
    """The name of a mode that watches torch's operations in this thread: native code is none."""
    from torch.utils._device import DeviceContext  # not loaded with torch

    if _dispatch_modes():
        return type(torch._C._get_dispatch_stack_at(_dispatch_modes() - 1)).__name__
    for i in range(_function_modes()):
        mode = torch._C._get_function_stack_at(i)
        if not isinstance(mode, DeviceContext):  # a default device: no operation of a step asks it
            return type(mode).__name__
    return None


_KINDS = get_type_hints(Options)
_OURS = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=_KINDS[name])
    for name, value in DEFAULTS.items()
]


def _with_options(signature: inspect.Signature) -> inspect.Signature:
    """A constructor's signature with each of our options in place of ``**options``."""
    return signature.replace(parameters=[*list(signature.parameters.values())[:-1], *_OURS])


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one native call.

    A mixin: ``class AdamW(FusedOptimizer, torch.optim.AdamW)``. Everything but the step itself is
    torch's: arguments, param groups, state, checkpoints, hooks.
    """

    _rule: ClassVar[str]
    _in_torch: ClassVar[bool] = True  # whether torch has such an optimizer, to step instead
    _own_init_group: ClassVar[bool]  # what torch's step asks a class that has one
    _backend: Backend | None = None
    _states: States | None = None
    _weights: Weights | None = None
    _passes: Passes | None = None
    _fallbacks: frozenset[str] = frozenset()  # reasons the user has been told

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = vars(cls).get("__init__")
        if init is not None and init.__annotations__.get("options") == "Unpack[Options]":
            init.__signature__ = _with_options(inspect.signature(init))
        owner = next((base for base in cls.__mro__ if "_init_group" in vars(base)), None)
        cls._own_init_group = owner is not None and not owner.__module__.startswith("torch.optim.")

    def _use(self, options: Options) -> None:
        """Take the options that are ours, before the parameters are known."""
        unknown = sorted(options.keys() - DEFAULTS.keys())
        if unknown:
            name = type(self).__name__
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {unknown[0]!r}")
        given = Options(**{**DEFAULTS, **options})  # type: ignore[typeddict-item]
        for name, choices in (
            ("states", get_args(States)),
            ("weights", get_args(Weights)),
            ("backend", get_args(Backend)),
        ):
            value = given[name]  # type: ignore[literal-required]
            if value is not None and value not in choices:
                known = ", ".join(map(repr, choices))
                raise ValueError(f"unknown {name} {value!r}; choose one of {known} or None")
            # Not as None: an instance is pickled without what it has not.
            if value is not None:
                setattr(self, f"_{name}", value)
        passes = passes_of(given)
        if passes is not None:
            self._passes = passes
        if self._backend is None:
            return
        reason = _WHY_NOT[self._backend]()
        if reason is not None:
            raise RuntimeError(f"backend {self._backend!r} is not usable: {reason}")
        if self._backend == "torch" and not self._in_torch:
            name = type(self).__name__
            raise ValueError(f"torch.optim has no {name}; choose another backend or None")
        if self._backend == "torch" and self._beyond_torch:
            raise ValueError(
                f"torch's own step has no {self._beyond_torch}; leave it or backend='torch' out"
            )

    @property
    def _keeping(self) -> str:
        """The options about formats that are in use, as the user wrote them."""
        options = {"states": self._states, "weights": self._weights}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value)

    @property
    def _beyond_torch(self) -> str:
        """All options in use that torch's own step has not."""
        passes = self._passes or Passes()
        options = {
            "max_grad_norm": passes.max_grad_norm,
            "skip_nonfinite": passes.skip_nonfinite or None,
            "average": passes.average,
        }
        written = [f"{name}={v!r}" for name, v in options.items() if v is not None]
        return ", ".join([self._keeping] * bool(self._keeping) + written)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step before it clipped them, a tensor of no
        dimensions in float32, or float64 where gradients were, on their device, for which nobody
        has waited. None before the first step, and without ``max_grad_norm``."""
        if self._passes is None or self._passes.norm is None:
            return None
        dtype = torch.float64 if self._passes.in_double else torch.float32
        return torch.as_tensor(self._passes.norm, dtype=dtype)

    @property
    def total_norm(self) -> float | Tensor | None:
        """The norm to clip by in the next step, and only in it, where the caller knows more than
        the gradients of this optimizer: as under pipeline or expert parallelism."""
        return self._passes.total_norm if self._passes is not None else None

    @total_norm.setter
    def total_norm(self, value: float | Tensor | None) -> None:
        if self._passes is None or self._passes.max_grad_norm is None:
            raise ValueError("total_norm needs max_grad_norm=, which it is compared with")
        if not (isinstance(value, float) and math.isnan(value)):  # which a norm may be
            check_norm("total_norm", value, "None has the step find it")
        self._passes.total_norm = value

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` has skipped; of an accelerator it waits to hear."""
        if self._passes is None:
            return 0
        return self._passes.skipped + sum(int(c) for c in self._passes.counters.values())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Lends the model its parameters' averages, for evaluation or to save it: afterwards the
        parameters are bit for bit what they were. Those without an average stay.

        Raises:
            ValueError: the optimizer keeps no averages.
            RuntimeError: the model has them already; or a step is made meanwhile.
        """
        if self._passes is None or self._passes.average is None:
            raise ValueError("averaged() needs average=, such as 0.999, from the first step on")
        with lent(self, self._passes):
            yield

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError, too, where a format cannot be kept of a parameter."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        reason = self._why_not(group) if self._beyond_torch else None
        if reason is not None:
            self.param_groups.pop()
            raise ValueError(f"{self._beyond_torch} does not go with {reason}")

    def _why_not(self, group: dict[str, Any]) -> str | None:
        if group.get("differentiable"):
            return "differentiable=True, which is torch's own step; leave one of them out"
        for p in group["params"]:
            if self._weights and p.dtype == torch.float16:
                return (
                    "a float16 parameter: weights= is for bfloat16 ones; convert it with "
                    ".bfloat16() or .float(), or leave the option out"
                )
            if self._states in ("bfloat16", "8bit") and p.is_complex():
                return (
                    "a complex parameter: give it to an optimizer without states=, or keep its "
                    "real and imaginary parts as parameters"
                )
        return None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: an option is no number, or a gradient or a state does not fit its parameter.
            RuntimeError: the backend asked for by name cannot step on these tensors.
                Either way nothing has been changed.
        """
        if "capturable" in self.defaults:  # torch's SGD does not check
            getattr(self, _GRAPH_CAPTURE_CHECK)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if self._passes is not None:
            self._passes.check_step()
        reason = self._why_torch()
        if reason is None:
            native_step = _opaque_step if torch.compiler.is_compiling() else _C.step
            reason = native_step(
                self._rule,
                self.param_groups,
                self.state,
                getattr(self, "grad_scale", None),
                getattr(self, "found_inf", None),
                torch.get_num_threads(),
                self._backend,
                self._states,
                self._weights,
                self._launch_triton,
                self._passes,
            )
            if reason is None:
                return loss
        if self._beyond_torch:
            raise RuntimeError(
                f"fastopt.{type(self).__name__} cannot make this step: {reason}; torch's own step, "
                f"which could, has no {self._beyond_torch}: leave the option out, or give dense "
                "tensors on a device that fastopt.backends() says is usable"
            )
        if self._backend not in (None, "torch"):
            raise RuntimeError(f"backend={self._backend!r} cannot make this step: {reason}")
        if not self._in_torch:
            raise RuntimeError(
                f"fastopt.{type(self).__name__} cannot make this step: {reason}; torch.optim has "
                "none to step through instead: give it dense tensors on a device that "
                "fastopt.backends() says is usable"
            )
        self._tell(reason)
        self._torch_step()
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of a class's ``step``, which names it to profilers and runs hooks, in use
        only where there are any: it takes 5 us, twice a step on one small tensor."""
        hooked_step = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                if (
                    _profiler_enabled()
                    or profiler._is_profiler_enabled  # in any thread: it may look into this one
                    or _dispatch_modes()
                    or self._optimizer_step_pre_hooks
                    or self._optimizer_step_post_hooks
                    or _global_optimizer_pre_hooks
                    or _global_optimizer_post_hooks
                ):
                    return hooked_step(self, *args, **kwargs)
                result = func(self, *args, **kwargs)
                # There are some now if the closure has registered them.
                if self._optimizer_step_post_hooks or _global_optimizer_post_hooks:
                    for hook in itertools.chain(
                        self._optimizer_step_post_hooks.values(),
                        _global_optimizer_post_hooks.values(),
                    ):
                        hook(self, args, kwargs)
                return result
            except BaseException:
                # GradScaler sets both before a step and deletes them after one that returns.
                if "found_inf" in self.__dict__:
                    del self.__dict__["found_inf"]
                    self.__dict__.pop("grad_scale", None)
                raise

        return step

    def _launch_triton(self, kernels: str, *table: Any) -> Any:
        buffers: dict[Any, Any] = self.__dict__.setdefault("_triton_buffers", {})
        return triton.launch(buffers, kernels, *table)

    def _why_torch(self) -> str | None:
        """Why this step is torch's before any tensor is looked at, or None."""
        if self._backend == "torch":
            return "backend='torch'"
        for group in self.param_groups:
            if group.get("differentiable"):
                return "a param group has differentiable=True"
        if self._own_init_group or "_init_group" in self.__dict__:
            return f"{type(self).__name__} has an _init_group of its own"
        if _dispatch_modes() or _function_modes():
            mode = _watching_mode()
            return None if mode is None else f"{mode} watches torch's operations"
        return None

    def _tell(self, reason: str) -> None:
        """Warn once that torch makes the step, unless the constructor's arguments asked for it."""
        asked = self._backend == "torch" or self.defaults.get("differentiable")
        if asked or reason in self._fallbacks:
            return
        name = type(self).__name__
        warnings.warn(f"fastopt.{name} steps through torch.optim: {reason}", stacklevel=4)
        self._fallbacks |= {reason}  # told: where warnings are errors, it is not

    def _torch_step(self) -> None:
        """The stock step, without the hooks that our own step has already run.

        torch wraps ``step`` of a class with hooks when the class is first instantiated.
        """
        stock = super().step.__func__  # type: ignore[attr-defined]
        while getattr(stock, "hooked", False):
            stock = stock.__wrapped__
        present = {"grad_scale", "found_inf"} & self.__dict__.keys()
        amp: dict[str, Any] = {name: self.__dict__.pop(name) for name in present}
        try:
            if self._step_supports_amp_scaling:
                self.__dict__.update(amp)  # torch's fused step reads them itself
            elif float(amp.get("found_inf") or 0):
                return
            elif amp.get("grad_scale") is not None:
                grads = [p.grad for group in self.param_groups for p in group["params"]]
                unscale([grad for grad in grads if grad is not None], amp["grad_scale"])
            stock(self)
        finally:
            self.__dict__.update(amp)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave unscaling and skipping to the step: where it was asked for,
        as of torch. Whoever looks at it (Lightning, Accelerate, FSDP1's scaler) acts on it."""
        return all(group.get("fused") for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignored: torch's constructors set it for ``fused=True``, and copies would lose it."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        own = {"_backend", "_states", "_weights", "_passes"}
        return state | {name: self.__dict__[name] for name in own & self.__dict__.keys()}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with step counts where torch keeps them: on the CPU, unless a group is fused
        or capturable. Its own step would wait for every one of them on an accelerator.

        8-bit states are in it as bfloat16, of which each is one exactly: on the CPU, where
        they take nothing of an accelerator's memory, but DTensors on their mesh.
        """
        with checkpoints.saving(self):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that float32 states of 16-bit parameters stay float32, and numbers
        beside the step count, such as NAdam's ``mu_product``, what they are; and that states are
        then kept as ``states=`` and ``weights=`` say, whatever they come as."""
        with checkpoints.loading(self):
            super().load_state_dict(state_dict)
