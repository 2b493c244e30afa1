"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""`torch.optim.RMSprop` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        v_t &= \alpha v_{t-1} + (1-\alpha)\,g_t^2, \quad
            a_t = \alpha a_{t-1} + (1-\alpha)\,g_t \\
        b_t &= \mu\,b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}
            \qquad (\text{centered: } \sqrt{v_t - a_t^2}) \\
        \theta_t &= \theta_{t-1} - \gamma\,b_t

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1e-2).
        alpha: decay :math:`\alpha` of the averages (default: 0.99).
        eps: added to the denominator (default: 1e-8).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        momentum: :math:`\mu`; no momentum buffer is kept at 0 (default: 0).
        centered: divide by the standard deviation of the gradient (default: False).
        capturable: keep the counts on the accelerator for graph capture (default: False).
        foreach: a hint about torch's own step, which backend="torch" makes (default: None).
        maximize: ascend instead of descend (default: False).
        differentiable: True takes torch's differentiable step (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Tieleman & Hinton, `Lecture 6.5
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_; centered: Graves,
    `Generating Sequences With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_.
    """

    _rule = "rmsprop"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
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
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )
