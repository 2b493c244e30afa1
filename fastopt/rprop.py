"""Resilient backpropagation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class Rprop(FusedOptimizer, torch.optim.Rprop):
    r"""`torch.optim.Rprop` whose step is one native call.

    .. math::
        s_t &= s_{t-1} \cdot \begin{cases}
            \eta_+ & g_{t-1} g_t > 0 \\
            \eta_- & g_{t-1} g_t < 0, \text{ and then } g_t = 0 \\
            1 & \text{else} \end{cases}
            \quad \text{within } [s_{min}, s_{max}], \quad s_0 = \gamma \\
        \theta_t &= \theta_{t-1} - s_t\,\text{sign}(g_t)

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: first step size :math:`\gamma`, a float or a 1-element tensor (default: 1e-2).
        etas: factors :math:`\eta_-, \eta_+` of a step size (default: (0.5, 1.2)).
        step_sizes: its bounds :math:`s_{min}, s_{max}` (default: (1e-6, 50)).
        capturable: keep the counts on the accelerator for graph capture (default: False).
        foreach: a hint about torch's own step, which backend="torch" makes (default: None).
        maximize: ascend instead of descend (default: False).
        differentiable: True takes torch's differentiable step (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Riedmiller & Braun, `A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
    Algorithm <https://doi.org/10.1109/ICNN.1993.298623>`_.
    """

    _rule = "rprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            etas,
            step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
