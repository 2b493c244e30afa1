"""Adagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""`torch.optim.Adagrad` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        s_t &= s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 + (t-1)\,\eta}
            \,\frac{g_t}{\sqrt{s_t} + \epsilon}

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1e-2).
        lr_decay: :math:`\eta`, by which the rate falls (default: 0).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        initial_accumulator_value: :math:`s_0` (default: 0).
        eps: added to the denominator (default: 1e-10).
        foreach: a hint about torch's own step, which backend="torch" makes (default: None).
        maximize: ascend instead of descend (default: False).
        differentiable: True takes torch's differentiable step (default: False).
        fused: likewise, and True lets GradScaler leave its work to the step (default: None).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Duchi et al., `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    <https://jmlr.org/papers/v12/duchi11a.html>`_.
    """

    _rule = "adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
