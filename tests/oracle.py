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
        self._rule = RULES[type(optimizer).__name__]
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
                    # Rprop's first step takes its size as it is kept.
                    lr = torch.tensor(float(group["lr"]), dtype=param.dtype.to_real())
                    options = group | {"first_size": torch.full_like(grad, lr.item())}
                    self._rule(value, -grad if group["maximize"] else grad, options)

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


def _step(values: dict[str, Tensor]) -> float:
    values["step"] = values.get("step", torch.zeros((), dtype=torch.float64)) + 1
    return values["step"].item()


def _moment(values: dict[str, Tensor], key: str, beta: float, new: Tensor) -> Tensor:
    """An exponential moving average, from zero."""
    values[key] = beta * values.get(key, torch.zeros_like(new)) + (1 - beta) * new
    return values[key]


def _float32(number: float) -> Tensor:
    """A count as torch keeps it."""
    return torch.tensor(number, dtype=torch.float32).double()


def _decayed(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient with its L2 penalty; where decay is decoupled the parameter takes it."""
    decay = float(group["weight_decay"])
    if group.get("decoupled_weight_decay"):
        values["param"] = values["param"] * (1 - float(group["lr"]) * decay)
    elif decay != 0:
        return grad + decay * values["param"]
    return grad


def _rmsprop(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    _step(values)
    alpha = group["alpha"]
    grad = _decayed(values, grad, group)
    variance = _moment(values, "square_avg", alpha, grad**2)
    if group["centered"]:
        variance = variance - _moment(values, "grad_avg", alpha, grad) ** 2
    direction = grad / (variance.sqrt() + group["eps"])
    if group["momentum"] > 0:
        before = values.get("momentum_buffer", torch.zeros_like(grad))
        direction = values["momentum_buffer"] = group["momentum"] * before + direction
    values["param"] = values["param"] - float(group["lr"]) * direction


def _adagrad(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    step = _step(values)
    grad = _decayed(values, grad, group)
    values["sum"] = values["sum"] + grad**2
    rate = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
    values["param"] = values["param"] - rate * grad / (values["sum"].sqrt() + group["eps"])


def _nadam(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    step, lr, (beta1, beta2) = _step(values), float(group["lr"]), group["betas"]
    grad = _decayed(values, grad, group)
    m = _moment(values, "exp_avg", beta1, grad)
    v = _moment(values, "exp_avg_sq", beta2, grad**2)
    mu, mu_next = (
        beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"])) for t in (step, step + 1)
    )
    product = values.get("mu_product", torch.ones((), dtype=torch.float64)) * _float32(mu)
    product = values["mu_product"] = _float32(product.item())
    m_hat = m * mu_next / (1 - product * mu_next) + grad * (1 - mu) / (1 - product)
    v_hat = v / (1 - beta2**step)
    values["param"] = values["param"] - lr * m_hat / (v_hat.sqrt() + group["eps"])


def _radam(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    step, lr, (beta1, beta2) = _step(values), float(group["lr"]), group["betas"]
    grad = _decayed(values, grad, group)
    m_hat = _moment(values, "exp_avg", beta1, grad) / (1 - beta1**step)
    v = _moment(values, "exp_avg_sq", beta2, grad**2)
    most = 2 / (1 - beta2) - 1
    rho = most - 2 * step * beta2**step / (1 - beta2**step)
    if rho > 5:
        rectification = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)
        root = v.sqrt() + group["eps"]
        m_hat = m_hat * rectification**0.5 * (1 - beta2**step) ** 0.5 / root
    values["param"] = values["param"] - lr * m_hat


def _adamax(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    step, (beta1, beta2) = _step(values), group["betas"]
    grad = _decayed(values, grad, group)
    m = _moment(values, "exp_avg", beta1, grad)
    before = values.get("exp_inf", torch.zeros_like(grad))
    values["exp_inf"] = torch.maximum(beta2 * before, grad.abs() + group["eps"])
    rate = float(group["lr"]) / (1 - beta1**step)
    values["param"] = values["param"] - rate * m / values["exp_inf"]


def _adadelta(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    _step(values)
    rho, eps = group["rho"], group["eps"]
    grad = _decayed(values, grad, group)
    v = _moment(values, "square_avg", rho, grad**2)
    before = values.get("acc_delta", torch.zeros_like(grad))
    delta = (before + eps).sqrt() / (v + eps).sqrt() * grad
    _moment(values, "acc_delta", rho, delta**2)
    values["param"] = values["param"] - float(group["lr"]) * delta


def _asgd(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    step, lr, lambd = _step(values), float(group["lr"]), group["lambd"]
    eta = values.get("eta", _float32(lr))
    mu = values.get("mu", _float32(1.0))
    grad = _decayed(values, grad, group)
    param = values["param"] = values["param"] * (1 - lambd * eta) - eta * grad
    average = values.get("ax", torch.zeros_like(param))
    values["ax"] = average + mu * (param - average)
    values["eta"] = _float32(lr / (1 + lambd * lr * step) ** group["alpha"])
    values["mu"] = _float32(1 / max(1, step - group["t0"]))


def _rprop(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    _step(values)
    (shrink, grow), (smallest, largest) = group["etas"], group["step_sizes"]
    size = values.get("step_size", group["first_size"])
    agreement = (grad * values.get("prev", torch.zeros_like(grad))).sign()
    factor = torch.ones_like(grad)
    factor[agreement > 0], factor[agreement < 0] = grow, shrink
    values["step_size"] = (size * factor).clamp(smallest, largest)
    values["prev"] = grad = torch.where(agreement < 0, 0.0, grad)
    values["param"] = values["param"] - grad.sign() * values["step_size"]


def _lion(values: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    m = values.get("exp_avg", torch.zeros_like(grad))
    param = values["param"] * (1 - lr * group["weight_decay"])
    values["param"] = param - lr * (beta1 * m + (1 - beta1) * grad).sign()
    _moment(values, "exp_avg", beta2, grad)


RULES = {
    "Adadelta": _adadelta,
    "Adagrad": _adagrad,
    "Adam": _adam,
    "AdamW": _adam,
    "Adamax": _adamax,
    "ASGD": _asgd,
    "Lion": _lion,
    "NAdam": _nadam,
    "RAdam": _radam,
    "RMSprop": _rmsprop,
    "Rprop": _rprop,
    "SGD": _sgd,
}


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
