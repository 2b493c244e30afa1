"""Adadelta."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    r"""`torch.optim.Adadelta` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        v_t &= \rho v_{t-1} + (1-\rho)\,g_t^2 \\
        \delta_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}}\,g_t \\
        u_t &= \rho u_{t-1} + (1-\rho)\,\delta_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,\delta_t

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1.0).
        rho: decay :math:`\rho` of the averages (default: 0.9).
        eps: added under both roots (default: 1e-6).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        foreach: a hint about torch's own step, which backend="torch" makes (default: None).
        capturable: keep the counts on the accelerator for graph capture (default: False).
        maximize: ascend instead of descend (default: False).
        differentiable: True takes torch's differentiable step (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Zeiler, `ADADELTA: An Adaptive Learning Rate Method <https://arxiv.org/abs/1212.5701>`_.
    """

    _rule = "adadelta"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            rho,
            eps,
            weight_decay,
            foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
