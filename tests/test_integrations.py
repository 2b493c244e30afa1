"""Libraries that are given an optimizer, or name torch's: docs/integrations.md says how.

Those that no test extra has are tried where they are installed (pip install '.[integrations]').
"""

import os
import warnings
from functools import partial

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed import checkpoint
from torch.distributed.tensor import DTensor

import fastopt
from fastopt.optimizer import FusedOptimizer
from helpers import assert_equal, native_only
from test_distributed import make_llama, make_wide_model, run_in_two_processes
from test_ecosystem import losses, make_bert, make_trainer
from test_loops import make_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Lightning imports
    import lightning

pytestmark = native_only

FORMATS = {
    "8bit": ({"states": "8bit"}, torch.float32),
    "bfloat16": ({"states": "bfloat16"}, torch.float32),
    "split 8bit": ({"states": "8bit", "weights": "split"}, torch.bfloat16),
}
every_format = pytest.mark.parametrize(("kept", "dtype"), FORMATS.values(), ids=FORMATS)


def rows(step: int, columns: int = 300) -> torch.Tensor:
    return torch.randn(4, columns, generator=torch.Generator().manual_seed(step))


# Trainer, Accelerate, Lightning: what is kept in fewer bytes comes back bit for bit.


@every_format
def test_trainer_resumes_formats(kept, dtype, tmp_path, accelerator):
    def trainer(name):
        optimizer = fastopt.AdamW, {"lr": 1e-2, **kept}
        return make_trainer(tmp_path / name, optimizer, make_bert().to(dtype))

    straight, resumed = trainer("straight"), trainer("resumed")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert len(losses(resumed)) == 6
    assert_equal(resumed.model.state_dict(), straight.model.state_dict())


def accelerated(accelerator, steps: range, model, optimizer):
    part = slice(accelerator.process_index, None, accelerator.num_processes)
    seen = []
    for step in steps:
        loss = model(rows(step)[part].to(next(model.parameters()).dtype)).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def assert_accelerate_resumes(make_accelerator, kept, dtype, folder) -> None:
    def prepared():
        accelerator = make_accelerator()
        model = make_wide_model(dtype)
        optimizer = fastopt.AdamW(model.parameters(), lr=0.01, **kept)
        return accelerator, *accelerator.prepare(model, optimizer)

    accelerator, model, optimizer = prepared()
    accelerated(accelerator, range(3), model, optimizer)
    accelerator.save_state(folder)
    straight = accelerated(accelerator, range(3, 6), model, optimizer)
    accelerator, model, optimizer = prepared()
    accelerator.load_state(folder)
    assert accelerated(accelerator, range(3, 6), model, optimizer) == straight


@every_format
def test_accelerate_resumes_formats(kept, dtype, tmp_path, accelerator):
    assert_accelerate_resumes(accelerator, kept, dtype, tmp_path)


def as_torchrun_says(rank: int) -> None:
    world = str(dist.get_world_size())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world)
    os.environ.update(LOCAL_WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT="0")


def accelerate_shards(folder, rank: int) -> None:
    as_torchrun_says(rank)

    def make():
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="no_wrap"
        )
        made = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        # On CPUs it takes DistributedDataParallel instead, without a word.
        for state in (accelerate.PartialState._shared_state, vars(made.state)):
            state["distributed_type"] = DistributedType.FSDP
        made.state.fsdp_plugin = plugin
        assert made.is_fsdp2
        return made

    for name, (kept, dtype) in FORMATS.items():
        assert_accelerate_resumes(make, kept, dtype, folder / name)


@pytest.mark.slow
def test_accelerate_resumes_formats_that_it_shards(tmp_path):
    run_in_two_processes(partial(accelerate_shards, tmp_path), tmp_path)


class Module(lightning.LightningModule):
    def __init__(self, kept, dtype):
        super().__init__()
        self.model, self.kept = make_wide_model(dtype), kept

    def training_step(self, inputs, _):
        return self.model(inputs.to(self.model[0].weight.dtype)).square().mean()

    def configure_optimizers(self):
        return fastopt.AdamW(self.parameters(), lr=0.01, **self.kept)


@pytest.mark.filterwarnings("ignore:.*(num_workers|LeafSpec|litlogger|GPU|log_every_n_steps)")
@every_format
def test_lightning_resumes_formats(kept, dtype, tmp_path):
    def trained(epochs, begin=None):
        module = Module(kept, dtype)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        batches = torch.utils.data.DataLoader([rows(step) for step in range(3)], batch_size=None)
        trainer.fit(module, batches, ckpt_path=begin)
        return trainer, module.state_dict()

    half, _ = trained(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert_equal(trained(2, begin=tmp_path / "half.ckpt")[1], trained(2)[1])


# Where they are installed.


@pytest.mark.needs("timm")
def test_timm():
    import timm.optim
    from timm.optim import OptimInfo, create_optimizer_v2

    info = OptimInfo(name="fastopt", opt_class="fastopt.AdamW", has_betas=True)
    timm.optim._optim_factory.default_registry.register(info)
    made = create_optimizer_v2(make_model(), "fastopt", lr=0.01, weight_decay=0.1, states="8bit")
    assert type(made) is fastopt.AdamW
    assert made._states == "8bit"
    assert [group["weight_decay"] for group in made.param_groups] == [0.0, 0.1]
    # Of a name it reads only what follows the last underscore.
    by_its_end = create_optimizer_v2(make_model(), "fastopt_adamw", lr=0.01)
    assert type(by_its_end) is torch.optim.AdamW
    with fastopt.patch():
        assert type(create_optimizer_v2(make_model(), "adamw", lr=0.01)) is fastopt.AdamW


@pytest.mark.needs("stable_baselines3")
def test_stable_baselines3():
    from stable_baselines3 import PPO

    def trained(**optimizer):
        algorithm = PPO(
            *("MlpPolicy", "CartPole-v1"),
            n_steps=32,
            batch_size=16,
            n_epochs=2,
            device="cpu",
            seed=0,
            policy_kwargs=optimizer,
        )
        algorithm.learn(64)
        return algorithm.policy

    stock = trained()
    assert stock.optimizer.defaults["eps"] == 1e-5
    with fastopt.patch():
        patched = trained()
    assert type(patched.optimizer) is fastopt.Adam
    assert patched.optimizer.defaults["eps"] == 1e-5
    given = trained(optimizer_class=fastopt.Adam)
    assert given.optimizer.defaults["eps"] == 1e-8  # of its own choice only for torch's very class
    told = trained(optimizer_class=fastopt.Adam, optimizer_kwargs={"eps": 1e-5})
    assert_equal(told.state_dict(), patched.state_dict())
    torch.testing.assert_close(told.state_dict(), stock.state_dict(), rtol=1e-4, atol=1e-5)


def deepspeed_engine(cls, stage: int, allowed: bool = True, offloaded: bool = False, **kept):
    import deepspeed

    model = make_wide_model(torch.float32)
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offloaded else {})
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=cls(model.parameters(), lr=0.01, **kept),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.5,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": allowed,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine


def train_deepspeed(engine, steps: range) -> list[float]:
    seen = []
    for step in steps:
        loss = engine(rows(step)[dist.get_rank() :: dist.get_world_size()]).square().mean()
        engine.backward(loss)
        engine.step()
        seen.append(loss.item())
    return seen


def under_deepspeed(folder, rank: int) -> None:
    as_torchrun_says(rank)
    os.environ["DS_ACCELERATOR"] = "cpu"
    with pytest.raises(AssertionError, match="zero_allow_untested_optimizer"):
        deepspeed_engine(fastopt.AdamW, 1, allowed=False)
    for stage in (1, 2, 3):
        stock = train_deepspeed(deepspeed_engine(torch.optim.AdamW, stage, fused=True), range(3))
        offloaded = deepspeed_engine(fastopt.AdamW, stage, offloaded=True)
        torch.testing.assert_close(train_deepspeed(offloaded, range(3)), stock, rtol=1e-6, atol=0)
        for kept in ({}, {"states": "bfloat16"}):
            engine = deepspeed_engine(fastopt.AdamW, stage, **kept)
            seen = train_deepspeed(engine, range(3))
            torch.testing.assert_close(seen, stock, rtol=1e-2 if kept else 1e-6, atol=0)
            engine.save_checkpoint(folder, tag=f"{stage}{kept}")
            straight = train_deepspeed(engine, range(3, 6))
            resumed = deepspeed_engine(fastopt.AdamW, stage, **kept)
            resumed.load_checkpoint(folder, tag=f"{stage}{kept}")
            assert train_deepspeed(resumed, range(3, 6)) == straight


@pytest.mark.slow
@pytest.mark.needs("deepspeed")
def test_deepspeed_zero(tmp_path):
    run_in_two_processes(partial(under_deepspeed, tmp_path), tmp_path)


def titan_container(model, **kept):
    from torchtitan.components.optimizer import default_adamw

    with fastopt.patch(**kept):
        made = default_adamw(lr=0.01).build(model_parts=[model])
    assert [type(optimizer) for optimizer in made.optimizers] == [fastopt.AdamW]
    return made


def under_torchtitan(folder, rank: int) -> None:
    """A checkpoint as its own code makes it, of keys that join names of parameters and states."""
    from torch.distributed.fsdp import fully_shard

    def prepared():
        model = make_wide_model(torch.float32)
        fully_shard(model)
        return model, titan_container(model, states="8bit")

    def train(model, container, steps):
        for step in steps:
            container.zero_grad()
            model(rows(step)[rank::2]).square().mean().backward()
            container.step()
        return [param.full_tensor() for param in model.parameters()]

    model, container = prepared()
    train(model, container, range(3))
    saved = {"model": model.state_dict(), "optimizer": container.state_dict()}
    assert isinstance(saved["optimizer"]["state.0.weight.exp_avg"], DTensor)
    checkpoint.save(saved, checkpoint_id=folder / "titan")
    straight = train(model, container, range(3, 6))

    model, container = prepared()
    found = {"model": model.state_dict(), "optimizer": container.state_dict()}
    checkpoint.load(found, checkpoint_id=folder / "titan")
    model.load_state_dict(found["model"])
    container.load_state_dict(found["optimizer"])
    assert_equal(train(model, container, range(3, 6)), straight)


@pytest.mark.slow
@pytest.mark.needs("torchtitan")
def test_torchtitan(tmp_path):
    run_in_two_processes(partial(under_torchtitan, tmp_path), tmp_path)


@pytest.mark.needs("trl")
def test_trl(tmp_path, accelerator):
    import datasets
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"[PAD]": 0, **{str(i): i for i in range(1, 100)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="1")),
        pad_token="[PAD]",
        eos_token="2",
    )
    texts = datasets.Dataset.from_dict({"input_ids": [list(range(3, 11))] * 8})

    def trained(optimizer, name):
        trainer = SFTTrainer(
            make_llama(),
            args=SFTConfig(
                output_dir=str(tmp_path / name),
                use_cpu=True,
                bf16=False,
                max_steps=3,
                learning_rate=1e-2,
                logging_steps=1,
                report_to=[],
                gradient_checkpointing=False,
            ),
            train_dataset=texts,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=optimizer,
        )
        trainer.train()
        return losses(trainer)

    ours = trained((fastopt.AdamW, {"lr": 1e-2}), "ours")
    stock = trained((torch.optim.AdamW, {"lr": 1e-2, "fused": True}), "stock")
    assert ours[-1] < ours[0]
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=0)


@pytest.mark.needs("ultralytics")
def test_ultralytics(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    from ultralytics.engine.trainer import BaseTrainer

    trainer = BaseTrainer.__new__(BaseTrainer)
    with fastopt.patch(states="8bit"):
        for name in ("AdamW", "SGD", "RMSProp"):
            made = trainer.build_optimizer(make_model(), name=name)
            assert isinstance(made, FusedOptimizer)
            assert made._states == "8bit"
