"""Loops people have, with clipping, skipping and averages inside the step: as with their own."""

import warnings

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import fastopt
from fastopt.trainer import GradNormCallback
from helpers import native_only
from test_ecosystem import make_trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Lightning imports
    import lightning

pytestmark = native_only

LIMIT, DECAY = 0.2, 0.9


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def batches(count=6):
    generator = torch.Generator().manual_seed(0)
    return [10 * torch.randn(4, 6, generator=generator) for _ in range(count)]


def test_plain_loop():
    def ours():
        model = make_model()
        optimizer = fastopt.AdamW(
            model.parameters(), lr=0.05, max_grad_norm=LIMIT, skip_nonfinite=True, average=DECAY
        )
        losses, norms = [], []
        for inputs in batches():
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            norms.append(optimizer.grad_norm.item())
        with optimizer.averaged():
            return losses, norms, model(batches()[0]).detach()

    def stock():
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        losses, norms = [], []
        for inputs in batches():
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
            if norm.isfinite():
                optimizer.step()
                averaged.update_parameters(model)
            losses.append(loss.item())
            norms.append(norm.item())
        return losses, norms, averaged(batches()[0]).detach()

    assert_close(ours(), stock(), rtol=1e-5, atol=1e-6)


def test_trainer(tmp_path):
    def trained(optimizer, name, **options):
        trainer = make_trainer(tmp_path / name, optimizer, **options)
        if not options["max_grad_norm"]:
            trainer.add_callback(GradNormCallback(trainer))
        trainer.train()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        return [[log[key] for log in logs] for key in ("loss", "grad_norm", "learning_rate")]

    inside = (fastopt.AdamW, {"lr": 1e-2, "max_grad_norm": LIMIT})
    before = (torch.optim.AdamW, {"lr": 1e-2, "fused": True})
    ours = trained(inside, "ours", max_grad_norm=0)
    stock = trained(before, "stock", max_grad_norm=LIMIT)
    assert len(ours[1]) == 6
    assert max(stock[1]) > LIMIT
    assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_trainer_reads_no_gradient_for_the_norm_it_logs(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        accelerate.Accelerator, "clip_grad_norm_", lambda *args, **kwargs: calls.append(args)
    )
    trainer = make_trainer(
        tmp_path, (fastopt.AdamW, {"lr": 1e-2, "max_grad_norm": LIMIT}), max_grad_norm=0
    )
    trainer.add_callback(GradNormCallback(trainer))
    seen = []

    class Later(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("grad_norm"))

    trainer.add_callback(Later())
    trainer.train()
    assert not calls
    assert all(norm > 0 for norm in seen[:6])


def test_accelerate():
    def trained(make, clips):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model()
        model, optimizer = accelerator.prepare(model, make(model.parameters()))
        losses = []
        for inputs in batches():
            with accelerator.accumulate(model):
                loss = model(inputs).square().mean()
                accelerator.backward(loss)
                if clips and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), LIMIT)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    ours = trained(lambda p: fastopt.AdamW(p, lr=0.05, max_grad_norm=LIMIT), clips=False)
    stock = trained(lambda p: torch.optim.AdamW(p, lr=0.05, fused=True), clips=True)
    assert_close(ours, stock, rtol=1e-5, atol=1e-6)


class Module(lightning.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.model, self.make = make_model(), make
        self.losses = []

    def training_step(self, inputs, _):
        loss = self.model(inputs).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.filterwarnings("ignore:.*(num_workers|LeafSpec|litlogger|GPU|log_every_n_steps)")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, tmp_path):
    def trained(make, **options):
        module = Module(make)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            precision=precision,
            **options,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
        return module.losses

    ours = trained(lambda p: fastopt.AdamW(p, lr=0.05, max_grad_norm=LIMIT))
    stock = trained(lambda p: torch.optim.AdamW(p, lr=0.05), gradient_clip_val=LIMIT)
    assert len(ours) == 6
    assert_close(ours, stock, rtol=1e-4, atol=1e-5)
