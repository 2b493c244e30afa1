"""RAdam."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""`torch.optim.RAdam` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2 \\
        \rho_t &= \rho_\infty - \frac{2t\beta_2^t}{1-\beta_2^t}, \quad
            \rho_\infty = \frac{2}{1-\beta_2} - 1, \quad
            r_t^2 = \frac{(\rho_t-4)(\rho_t-2)\,\rho_\infty}
                         {(\rho_\infty-4)(\rho_\infty-2)\,\rho_t} \\
        \theta_t &= \theta_{t-1} - \gamma\,\frac{m_t}{1-\beta_1^t}
            \,r_t\,\frac{\sqrt{1-\beta_2^t}}{\sqrt{v_t} + \epsilon}
            \qquad (\rho_t \le 5 \text{: without the last two factors})

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1e-3).
        betas: decay :math:`\beta_1, \beta_2` of the gradient's mean and of its square
            (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        decoupled_weight_decay: decay as AdamW does (default: False).
        foreach: a hint about torch's own step, which backend="torch" makes (default: None).
        maximize: ascend instead of descend (default: False).
        capturable: keep the counts on the accelerator for graph capture (default: False).
        differentiable: True takes torch's differentiable step (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Liu et al., `On the Variance of the Adaptive Learning Rate and Beyond
    <https://arxiv.org/abs/1908.03265>`_.
    """

    _rule = "radam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
