"""Adam and AdamW."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""`torch.optim.Adam` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda\,\theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma\,\frac{m_t/(1-\beta_1^t)}
                    {\sqrt{v_t/(1-\beta_2^t)} + \epsilon}

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1e-3).
        betas: decay :math:`\beta_1, \beta_2` of the gradient's mean and of its square, both floats
            or both 1-element tensors (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: L2 penalty :math:`\lambda` (default: 0).
        amsgrad: divide by the largest :math:`v` so far (default: False).
        foreach: a hint of torch's that chooses nothing here (default: None).
        maximize: ascend instead of descend (default: False).
        capturable: keep the step count on the accelerator for graph capture (default: False).
        differentiable: True takes torch's own step (default: False).
        fused: a hint likewise, but True leaves unscaling to the step under GradScaler
            (default: None).
        decoupled_weight_decay: decay as AdamW does (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Kingma & Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_;
    Reddi et al., `On the Convergence of Adam and Beyond
    <https://openreview.net/forum?id=ryQu7f-RZ>`_.
    """

    _rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(FusedOptimizer, torch.optim.AdamW):
    r"""`torch.optim.AdamW` whose step is one native call.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1)\,g_t \\
        v_t &= \beta_2 v_{t-1} + (1-\beta_2)\,g_t^2 \\
        \theta_t &= (1-\gamma\lambda)\,\theta_{t-1} - \gamma\,\frac{m_t/(1-\beta_1^t)}
                    {\sqrt{v_t/(1-\beta_2^t)} + \epsilon}

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor (default: 1e-3).
        betas: decay :math:`\beta_1, \beta_2` of the gradient's mean and of its square, both floats
            or both 1-element tensors (default: (0.9, 0.999)).
        eps: added to the denominator (default: 1e-8).
        weight_decay: decoupled decay :math:`\lambda` (default: 1e-2).
        amsgrad: divide by the largest :math:`v` so far (default: False).
        maximize: ascend instead of descend (default: False).
        foreach: a hint of torch's that chooses nothing here (default: None).
        capturable: keep the step count on the accelerator for graph capture (default: False).
        differentiable: True takes torch's own step (default: False).
        fused: a hint likewise, but True leaves unscaling to the step under GradScaler
            (default: None).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError, RuntimeError: torch's own, for arguments out of range or at odds.

    Loshchilov & Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_.
    """

    _rule = "adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
