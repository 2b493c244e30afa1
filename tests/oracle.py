"""The optimizers' mathematics in float64: what the others are judged by."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cases import Case
from helpers import tensors_of

# Two equally good roundings of rms_ulp's samples differ by less than this factor.
SAMPLING = 1.01


def wide(tensor: Tensor) -> Tensor:
    """A float64 copy; complex numbers become pairs, as the optimizers treat them."""
    tensor = tensor.detach().resolve_conj()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(
        torch.float64, copy=True
    )


class Oracle:
    """The optimizers' mathematics in float64, shadowing a real optimizer.

    It starts from the real parameters and states, then follows its own. A step reads the real
    groups and gradients, so it must come before the real step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._rule = _sgd if isinstance(optimizer, torch.optim.SGD) else _adam
        self.values = [
            {name: wide(tensor) for name, tensor in tensors.items()}
            for tensors in tensors_of(optimizer)
        ]

    def step(self) -> None:
        values = iter(self.values)
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                value = next(values)
                if param.grad is not None:
                    grad = wide(param.grad)
                    self._rule(value, -grad if group["maximize"] else grad, group)

    def ulp_errors(self) -> dict[str, Tensor]:
        """How far the real optimizer is off, element by element, in ulp of the real dtype.

        Where the truth is smaller than the root mean square of its kind, ulp of that are
        meant: next to zero a sum's error is that of its terms, and has no bound in ulp of the sum.
        """
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for real, truth in zip(tensors_of(self._optimizer), self.values, strict=True):
            assert real.keys() == truth.keys()
            for name, tensor in real.items():
                pairs.setdefault(name, []).append((tensor, truth[name]))
        errors = {}
        for name, kind in pairs.items():
            floor = torch.cat([truth.flatten() for _, truth in kind]).square().mean().sqrt()
            errors[name] = torch.cat(
                [
                    (
                        (wide(real) - truth).abs() / _ulp(real.dtype, truth.abs().clamp(min=floor))
                    ).flatten()
                    for real, truth in kind
                ]
            )
        return errors


def _ulp(dtype: torch.dtype, at: Tensor) -> Tensor:
    info = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(at, info.eps), torch.frexp(at).exponent - 1)
    return spacing.clamp(min=info.smallest_normal * info.eps)


def _adam(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    beta1, beta2 = map(float, group["betas"])
    param = values["param"]
    step = values["step"] = values.get("step", torch.zeros((), dtype=torch.float64)) + 1

    if group["decoupled_weight_decay"]:
        param = param * (1 - lr * weight_decay)
    elif weight_decay != 0:
        grad = grad + weight_decay * param
    m = beta1 * values.get("exp_avg", torch.zeros_like(param)) + (1 - beta1) * grad
    v = beta2 * values.get("exp_avg_sq", torch.zeros_like(param)) + (1 - beta2) * grad**2
    values["exp_avg"], values["exp_avg_sq"] = m, v
    if group["amsgrad"]:
        v = torch.maximum(values.get("max_exp_avg_sq", torch.zeros_like(param)), v)
        values["max_exp_avg_sq"] = v
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    values["param"] = param - lr * m_hat / (v_hat.sqrt() + group["eps"])


def _sgd(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    lr, weight_decay, momentum = (float(group[k]) for k in ("lr", "weight_decay", "momentum"))
    if weight_decay != 0:
        grad = grad + weight_decay * values["param"]
    if momentum != 0:
        buffer = values.get("momentum_buffer")
        buffer = grad if buffer is None else momentum * buffer + (1 - group["dampening"]) * grad
        values["momentum_buffer"] = buffer
        grad = grad + momentum * buffer if group["nesterov"] else buffer
    values["param"] = values["param"] - lr * grad


def rms_ulp(
    case: Case,
    make: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
    device: str = "cpu",
) -> dict[str, Tensor]:
    """How far an optimizer is off after 20 steps of a case, by tensor name, in ulp."""
    squares: dict[str, list[Tensor]] = {}
    for seed in range(2):
        params = case.parameters(seed, device)
        optimizer = make(params)
        oracle = Oracle(optimizer)
        for step in range(20):
            case.set_gradients(params, 1000 * seed + step)
            oracle.step()
            optimizer.step()
        for name, errors in oracle.ulp_errors().items():
            squares.setdefault(name, []).append(errors.square().mean().cpu())
    return {name: torch.stack(values).mean().sqrt() for name, values in squares.items()}
