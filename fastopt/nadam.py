"""NAdam."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class NAdam(FusedOptimizer, torch.optim.NAdam):
    r"""`torch.optim.NAdam` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2 \\
        \mu_t &= \beta_1\left(1 - \tfrac12\,0.96^{t\psi}\right), \quad
            \Pi_t = \mu_1 \cdots \mu_t \\
        \theta_t &= \theta_{t-1} - \gamma\,\frac{g_t\,(1-\mu_t)/(1-\Pi_t)
            + m_t\,\mu_{t+1}/(1-\Pi_{t+1})}{\sqrt{v_t/(1-\beta_2^t)} + \epsilon}

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 2e-3).
        betas: decay :math:`\beta_1, \beta_2` of the gradient's mean and of its square
            (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        momentum_decay: :math:`\psi`, how fast :math:`\mu` grows (default: 4e-3).
        decoupled_weight_decay: decay as AdamW does (default: False).
        foreach: a hint about torch's own step, which backend="torch" makes (default: None).
        maximize: ascend instead of descend (default: False).
        capturable: keep the counts on the accelerator for graph capture (default: False).
        differentiable: True takes torch's differentiable step (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Dozat, `Incorporating Nesterov Momentum into Adam
    <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_.
    """

    _rule = "nadam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
