"""The options that are ours: keyword-only, and the same for every class."""

from __future__ import annotations

from typing import Literal, TypedDict

from torch import Tensor

Backend = Literal["cpu", "cuda", "triton", "torch"]
States = Literal["float32", "bfloat16", "8bit"]
Weights = Literal["split", "stochastic"]


class Options(TypedDict, total=False):
    """What every class of fastopt takes beside the arguments of torch's.

    Args:
        states: how moments are kept: "float32", "bfloat16" or "8bit"; None as torch does, in the
            parameter's dtype (default: None).
        weights: what a bfloat16 parameter keeps beyond bfloat16: "split" all of float32, in 16 bits
            more; "stochastic" nothing, but it is rounded stochastically (default: None).
        max_grad_norm: the step clips the gradients of all its parameters by their common 2-norm, a
            float or a 1-element tensor, as `torch.nn.utils.clip_grad_norm_` would before it; they
            are read for it and not written. `optimizer.grad_norm` is the norm (default: None).
        skip_nonfinite: a step whose gradients' norm is not finite changes nothing, and
            `optimizer.skipped_steps` counts it; needs max_grad_norm, which may be infinite
            (default: False).
        average: the decay, from 0 up to 1, of an exponential moving average of the parameters, kept
            in float32 or wider; `optimizer.averaged()` lends it to the model (default: None).
        backend: "cpu", "cuda", "triton" or, for torch's own step, "torch"; None picks by device
            (default: None).
    """

    states: States | None
    weights: Weights | None
    max_grad_norm: float | Tensor | None
    skip_nonfinite: bool
    average: float | None
    backend: Backend | None


DEFAULTS = Options(
    states=None,
    weights=None,
    max_grad_norm=None,
    skip_nonfinite=False,
    average=None,
    backend=None,
)
