"""Stochastic gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""`torch.optim.SGD` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        b_t &= \mu\,b_{t-1} + (1-\tau)\,g_t \qquad (b_1 = g_1) \\
        \theta_t &= \theta_{t-1} - \gamma\,b_t
            \qquad (\text{nesterov: } g_t + \mu\,b_t \text{ in place of } b_t)

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1e-3).
        momentum: :math:`\mu`; no momentum buffer is kept at 0 (default: 0).
        dampening: :math:`\tau`, from the second step on (default: 0).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        nesterov: look ahead along the momentum; needs momentum and no dampening (default: False).
        maximize: ascend instead of descend (default: False).
        foreach: a hint of torch's that chooses nothing here (default: None).
        differentiable: True takes torch's own step (default: False).
        fused: a hint likewise, but True leaves unscaling to the step under GradScaler
            (default: None).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Sutskever et al., `On the importance of initialization and momentum in deep learning
    <http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf>`_.
    """

    _rule = "sgd"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
