"""Averaged stochastic gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class ASGD(FusedOptimizer, torch.optim.ASGD):
    r"""`torch.optim.ASGD` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        \theta_t &= (1 - \lambda_d\,\eta_{t-1})\,\theta_{t-1} - \eta_{t-1}\,g_t \\
        a_t &= a_{t-1} + \mu_{t-1}\,(\theta_t - a_{t-1}) \\
        \eta_t &= \gamma / (1 + \lambda_d\,\gamma\,t)^\alpha, \quad \eta_0 = \gamma \\
        \mu_t &= 1 / \max(1,\,t - t_0), \quad \mu_0 = 1

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1e-2).
        lambd: decay :math:`\lambda_d` of parameters and rate (default: 1e-4).
        alpha: power :math:`\alpha` by which the rate falls (default: 0.75).
        t0: step from which the average :math:`a` is one (default: 1e6).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        foreach: a hint about torch's own step, which backend="torch" makes (default: None).
        maximize: ascend instead of descend (default: False).
        differentiable: True takes torch's differentiable step (default: False).
        capturable: keep the counts on the accelerator for graph capture (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Polyak & Juditsky, `Acceleration of Stochastic Approximation by Averaging
    <https://doi.org/10.1137/0330046>`_.
    """

    _rule = "asgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            lambd,
            alpha,
            t0,
            weight_decay,
            foreach,
            maximize,
            differentiable,
            capturable,
        )
