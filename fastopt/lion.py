"""Lion, which torch does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optimizer import FusedOptimizer
from fastopt.options import Options


class Lion(FusedOptimizer, torch.optim.Optimizer):
    r"""Lion whose step is one native call: momentum's sign, at half of Adam's memory.

    .. math::
        \theta_t &= (1-\gamma\lambda)\,\theta_{t-1}
            - \gamma\,\text{sign}\left(\beta_1 m_{t-1} + (1-\beta_1)\,g_t\right) \\
        m_t &= \beta_2 m_{t-1} + (1-\beta_2)\,g_t

    Args:
        params: parameters, named parameters, or param groups (dicts) of them; any shapes, strides
            and floating-point or complex dtypes.
        lr: learning rate :math:`\gamma`, a float or a 1-element tensor; the paper advises a third
            to a tenth of AdamW's (default: 1e-4).
        betas: weight :math:`\beta_1` of the momentum in a step, and its decay :math:`\beta_2`
            (default: (0.9, 0.99)).
        weight_decay: decoupled decay :math:`\lambda`; the paper advises three to ten times AdamW's
            (default: 0).
        maximize: ascend instead of descend (default: False).
        options: ours, the same for every class: see `fastopt.options.Options`.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: the backend is not usable here.

    Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_.
    """

    _rule = "lion"
    _in_torch = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._use(options)
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
