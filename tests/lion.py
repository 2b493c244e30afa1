"""Lion as its authors publish it (google/automl, lion/lion_pytorch.py): torch has none to compare
ours with. Added are what every class of torch's has: maximize, and complex numbers as pairs."""

import torch


def _pairs(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                param, grad, exp_avg = map(_pairs, (p, p.grad, state["exp_avg"]))
                if group["maximize"]:
                    grad = -grad
                param.mul_(1 - lr * group["weight_decay"])
                update = exp_avg * beta1 + grad * (1 - beta1)
                param.add_(update.sign() * -lr)
                exp_avg.mul_(beta2).add_(grad * (1 - beta2))
        return loss
