"""What users put around an optimizer: schedulers, averaging, clipping, Accelerate, the Trainer."""

import math
import warnings

import pytest
import torch
import transformers
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import fastopt
from cases import FLOAT64, Case
from helpers import (
    assert_agrees_with_torch,
    assert_equal,
    every_optimizer,
    native_only,
    of_schedulers,
    pair,
    parameters,
    reading_lr,
    snapshot,
)

pytestmark = native_only

# Learning-rate schedulers.

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.8)],
        milestones=[3],
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, gamma=0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    # These two move momentum, or Adam's first beta, along with the rate.
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-4, max_lr=1e-2, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
}


def test_every_scheduler_of_torch_is_tested():
    assert set(SCHEDULERS) == set(lr_scheduler.__all__) - {"LRScheduler"}


def train_scheduled(case: Case, optimizer: Optimizer, scheduler, steps: range) -> list[float]:
    """The rates of each step. A loss that stays the same makes ReduceLROnPlateau act."""
    rates = []
    for step in steps:
        case.set_gradients(parameters(optimizer), step)
        optimizer.step()
        rates.append(float(optimizer.param_groups[0]["lr"]))
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return rates


@of_schedulers
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduled_training_agrees_with_torch(name, scheduler, tensor_lr):
    case = Case(name, "everything", FLOAT64, "sizes")
    pairs = pair(case)
    rates = []
    with warnings.catch_warnings():
        # torch warns when it believes that the scheduler stepped before the optimizer did.
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        for optimizer in pairs:
            if tensor_lr:
                optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, dtype=torch.float64)
            made = SCHEDULERS[scheduler](optimizer)
            rates.append(train_scheduled(case, optimizer, made, range(8)))
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert_agrees_with_torch(*pairs)


@of_schedulers
def test_scheduled_training_resumes_bit_for_bit(name):
    case = Case(name, "everything", FLOAT64, "sizes")

    def make():
        optimizer = case.make_optimizer(case.parameters(), fastopt)
        return optimizer, SCHEDULERS["OneCycleLR"](optimizer)

    straight, interrupted, resumed = make(), make(), make()
    train_scheduled(case, *straight, range(8))
    train_scheduled(case, *interrupted, range(4))
    with torch.no_grad():
        both = parameters(resumed[0]), parameters(interrupted[0])
        for param, saved in zip(*both, strict=True):
            param.copy_(saved)
    for made, saved in zip(resumed, interrupted, strict=True):
        made.load_state_dict(saved.state_dict())
    train_scheduled(case, *resumed, range(4, 8))
    assert_equal(snapshot(resumed[0]), snapshot(straight[0]))


# Averaging and clipping.


def make_model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        # A bias before BatchNorm has nothing but rounding errors for a gradient.
        torch.nn.Linear(6, 8, bias=False),
        torch.nn.BatchNorm1d(8),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 1),
    ).to(dtype)


def batches(count: int = 8, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator, dtype=dtype) for _ in range(count)]


@every_optimizer
@pytest.mark.parametrize(
    "averaging", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}], ids=["SWA", "EMA"]
)
def test_averaged_training_agrees_with_torch(name, averaging):
    def averaged(module):
        model = make_model()
        optimizer = getattr(module, name)(model.parameters(), lr=0.05)
        average = AveragedModel(model, **averaging)
        scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=4)
        for inputs in batches():
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            average.update_parameters(model)
            scheduler.step()
        update_bn(batches(), average)
        return average.state_dict()

    torch.testing.assert_close(averaged(fastopt), averaged(torch.optim), rtol=1e-10, atol=1e-12)


# Accelerate.


def train_accelerated(accelerator, model, optimizer, steps: list[torch.Tensor]) -> None:
    for inputs in steps:
        with accelerator.accumulate(model):
            loss = model(inputs).square().mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


@every_optimizer
@pytest.mark.parametrize(
    "options",
    [{}, {"mixed_precision": "bf16"}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "bf16", "accumulating"],
)
def test_accelerated_training_agrees_with_torch(name, options, accelerator):
    def trained(module):
        accelerated = accelerator(**options)
        model = make_model(torch.float32)
        model, optimizer = accelerated.prepare(
            model, getattr(module, name)(model.parameters(), lr=0.01)
        )
        train_accelerated(accelerated, model, optimizer, batches(dtype=torch.float32))
        return model.state_dict()

    # bf16 rounds activations, and a last bit of a weight may round one the other way.
    tolerance = 1e-3 if "mixed_precision" in options else 1e-5
    torch.testing.assert_close(
        trained(fastopt), trained(torch.optim), rtol=tolerance, atol=tolerance
    )


@every_optimizer
def test_accelerate_saves_and_loads_in_mid_run_bit_for_bit(name, accelerator, tmp_path):
    accelerated = accelerator()

    def prepared():
        model = make_model(torch.float32)
        optimizer = getattr(fastopt, name)(model.parameters(), lr=0.01)
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return accelerated.prepare(model, optimizer, scheduler)

    def forget():
        """Accelerate saves all that it has ever prepared."""
        for prepared_objects in (
            accelerated._models,
            accelerated._optimizers,
            accelerated._schedulers,
        ):
            prepared_objects.clear()

    steps = batches(dtype=torch.float32)
    model, optimizer, scheduler = prepared()
    train_accelerated(accelerated, model, optimizer, steps[:4])
    scheduler.step()
    accelerated.save_state(tmp_path)
    train_accelerated(accelerated, model, optimizer, steps[4:])

    forget()
    resumed, its_optimizer, _ = prepared()
    train_accelerated(accelerated, resumed, its_optimizer, steps[:1])
    accelerated.load_state(tmp_path)
    train_accelerated(accelerated, resumed, its_optimizer, steps[4:])
    assert_equal(resumed.state_dict(), model.state_dict())
    assert_equal(its_optimizer.state_dict(), optimizer.state_dict())


# Hugging Face Trainer.


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": torch.tensor(index % 2)}


def make_bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    return transformers.BertForSequenceClassification(config)


def make_trainer(folder, optimizer, model=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        save_steps=3,
        learning_rate=1e-2,
        warmup_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **options,
    )
    return transformers.Trainer(
        model=model or make_bert(),
        args=arguments,
        train_dataset=Sentences(),
        optimizer_cls_and_kwargs=optimizer,
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@reading_lr
def test_trainer_runs_as_with_torch_and_resumes_bit_for_bit(name, tmp_path, accelerator):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = getattr(fastopt, name), options
    straight = make_trainer(tmp_path / "ours", ours)
    straight.train()

    stock = make_trainer(tmp_path / "torch", (getattr(torch.optim, name), options))
    stock.train()
    assert len(losses(straight)) == 6
    assert all(map(math.isfinite, losses(straight)))
    torch.testing.assert_close(losses(straight), losses(stock), rtol=1e-3, atol=1e-4)

    resumed = make_trainer(tmp_path / "resumed", ours)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_equal(resumed.model.state_dict(), straight.model.state_dict())


def test_trainer_goes_on_from_a_checkpoint_of_torch(tmp_path, accelerator):
    """A user switches in mid-run: Trainer's own default wrote the checkpoint."""
    stock = make_trainer(tmp_path, None)
    stock.train()
    resumed = make_trainer(tmp_path / "resumed", (fastopt.AdamW, {"lr": 1e-2}))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(losses(resumed), losses(stock), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        resumed.model.state_dict(), stock.model.state_dict(), rtol=1e-3, atol=1e-3
    )
