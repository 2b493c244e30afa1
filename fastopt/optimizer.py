"""The one ``step()`` every fastopt class shares, and what falls back to torch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastopt import _C

Backend = Literal["cpu", "cuda", "triton", "torch"]

# What the method is called in torch 2.10, then since.
_GRAPH_CAPTURE_CHECK = (
    "_accelerator_graph_capture_health_check"
    if hasattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check")
    else "_cuda_graph_capture_health_check"
)

# torch.compile breaks the graph here instead of trying to trace native code.
_opaque_step = torch.compiler.disable(_C.step)  # type: ignore[no-untyped-call]


def backends() -> dict[str, str | None]:
    """Every backend by name, with None where it is usable here, else the reason why not."""
    return {
        "cpu": None,
        "cuda": "this build has no CUDA kernels",
        "triton": "this version has no Triton kernels",
        "torch": None,
    }


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose step is one native call.

    A mixin: ``class AdamW(FusedOptimizer, torch.optim.AdamW)``. Everything but the step itself is
    torch's: arguments, param groups, state, checkpoints, hooks.
    """

    _rule: ClassVar[str]
    _backend: Backend | None = None
    _fallbacks: frozenset[str] = frozenset()  # reasons the user has been told

    def _use_backend(self, backend: Backend | None) -> None:
        if backend is None:
            return
        reasons = backends()
        if backend not in reasons:
            names = ", ".join(map(repr, reasons))
            raise ValueError(f"unknown backend {backend!r}; choose one of {names} or None")
        if reasons[backend] is not None:
            raise RuntimeError(f"backend {backend!r} is not usable: {reasons[backend]}")
        self._backend = backend

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: a gradient or a state does not fit its parameter.
            RuntimeError: the backend asked for by name cannot step on these tensors.
                Either way nothing has been changed.
        """
        if "capturable" in self.defaults:  # torch's SGD does not check
            getattr(self, _GRAPH_CAPTURE_CHECK)()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        reason = self._asked_for_torch()
        if reason is None:
            native_step = _opaque_step if torch.compiler.is_compiling() else _C.step
            reason = native_step(
                self._rule,
                self.param_groups,
                self.state,
                _memory,
                _new_states,
                getattr(self, "grad_scale", None),
                getattr(self, "found_inf", None),
                torch.get_num_threads(),
            )
            if reason is None:
                return loss
            if self._backend is not None:
                raise RuntimeError(f"backend={self._backend!r} cannot make this step: {reason}")
        self._tell(reason)
        self._torch_step()
        return loss

    def _asked_for_torch(self) -> str | None:
        if self._backend == "torch":
            return "backend='torch'"
        for group in self.param_groups:
            if _chooses_torch(group):
                flags = {name: group[name] for name in ("fused", "foreach", "differentiable")}
                return f"a param group has {flags}"
        return None

    def _tell(self, reason: str) -> None:
        """Warn once that torch makes the step, unless the constructor's arguments asked for it."""
        asked = self._backend == "torch" or _chooses_torch(self.defaults)
        if asked or reason in self._fallbacks:
            return
        self._fallbacks |= {reason}
        name = type(self).__name__
        warnings.warn(f"fastopt.{name} steps through torch.optim: {reason}", stacklevel=4)

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
            if all(group["fused"] for group in self.param_groups):
                self.__dict__.update(amp)  # torch's fused step reads them itself
            elif float(amp.get("found_inf") or 0):
                return
            elif amp.get("grad_scale") is not None:
                self._unscale(amp["grad_scale"])
            stock(self)
        finally:
            self.__dict__.update(amp)

    @torch.no_grad()
    def _unscale(self, grad_scale: Tensor) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(grad_scale)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave unscaling and skipping to the step (torch's contract)."""
        if all(group["fused"] for group in self.param_groups):
            return True
        return self._asked_for_torch() is None and _C.why_not(self.param_groups, _memory) is None

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignored: torch's constructors set it for ``fused=True``, and copies would lose it."""

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._backend is not None:
            state["_backend"] = self._backend
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.setdefault("fused", None)  # torch.optim.SGD would say False: not ours
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that float32 states of 16-bit parameters stay float32."""
        loaded: dict[str, Any] = {}

        def note(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)

        def restore(_: torch.optim.Optimizer) -> None:
            params = [p for group in self.param_groups for p in group["params"]]
            ids = [i for group in loaded["param_groups"] for i in group["params"]]
            for i, p in zip(ids, params, strict=True):
                for key, value in loaded["state"].get(i, {}).items():
                    if isinstance(value, Tensor) and _is_wider(value.dtype, p.dtype):
                        self.state[p][key] = value.to(p.device)

        # torch runs users' hooks before and after; the dict to look at is the one they left.
        handles = (
            self.register_load_state_dict_pre_hook(note),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()


def _chooses_torch(options: dict[str, Any]) -> bool:
    return options["fused"] is False or options["foreach"] or options["differentiable"]


def _is_wider(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype == torch.float32 and than in (torch.bfloat16, torch.float16)


def _memory(param: Tensor, tensor: Tensor) -> Tensor | str:
    """The plain tensor behind a subclass's ``tensor``, laid out as ``param``, or why there is none.

    A DTensor's is its local shard.
    """
    distributed = sys.modules.get("torch.distributed.tensor")  # loaded where there are DTensors
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        if not isinstance(param, distributed.DTensor) or (
            (tensor.device_mesh, tensor.placements) != (param.device_mesh, param.placements)
        ):
            return "a DTensor is sharded differently than its parameter"
        tensor = tensor._local_tensor
    if hasattr(tensor, "wait"):  # AsyncCollectiveTensor: its values are still on their way
        tensor = tensor.wait()
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(tensor).__name__} is a tensor subclass without memory of its own"
    return tensor


def _new_states(param: Tensor, keys: list[str], counts_steps: bool) -> dict[str, Tensor]:
    """The states of a parameter's first step, as torch makes them."""
    states = {"step": torch.zeros((), dtype=torch.float32)} if counts_steps else {}
    for key in keys:
        states[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return states
