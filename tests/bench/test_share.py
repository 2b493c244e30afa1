"""bench/throughput/share.py: contenders train the same, step by step, and what cannot says why."""

import csv

import pytest
import torch

from throughput import rivals, share
from throughput.rivals import FUSED, INSIDE, OURS


def rows_of(tmp_path, *options: str, code: int = 0) -> dict[str, dict[str, str]]:
    """By job and contender."""
    sink = tmp_path / "share.csv"
    tiny = ["--random", "--tiny", "--steps", "3", "--warm-up", "1", "--csv", str(sink)]
    assert share.main([*tiny, *options]) == code
    with sink.open(newline="") as file:
        return {f"{r['tuning']} {r['contender']}": r for r in csv.DictReader(file)}


def test_all_start_alike_and_train_on_the_same(tmp_path):
    """A loss differs only by what the optimizers do: ours, clipping inside or not, and torch's do
    the same to a few last bits."""
    names = [FUSED, OURS, f"{OURS}{INSIDE}", f"fastopt 8-bit states{INSIDE}"]
    rows = rows_of(tmp_path, "--job", "topics full", "topics lora", "--contender", *names)
    for tuning in ("full", "lora"):
        own = [rows[f"{tuning} {name}"] for name in names]
        assert [float(row["loss_diff"]) < 1e-5 for row in own[:3]] == [True] * 3
        assert float(own[0]["loss"]) > 0
        assert all(float(row["tokens_per_s"]) > 0 for row in own)
        assert all(row["steps"] == "3" for row in own)
        assert all(float(row["whole_p20_ms"]) > 0 for row in own)
    sizes = [int(rows[f"{tuning} {OURS}"]["state_bytes"]) for tuning in ("full", "lora")]
    assert sizes[0] > 10 * sizes[1]
    narrow = rows[f"full fastopt 8-bit states{INSIDE}"]
    assert float(narrow["loss_diff"]) > 0
    assert int(narrow["state_bytes"]) < 0.5 * int(rows[f"full {OURS}"]["state_bytes"])


def test_a_model_in_bfloat16_and_what_cannot_train_it(tmp_path, monkeypatch):
    def absent(params, name, **options):
        raise ImportError("no such library")

    monkeypatch.setitem(rivals.CONTENDERS, "FlashOptim", rivals.Contender(absent, "flashoptim"))
    split = f"fastopt split, 8-bit states{INSIDE}"
    rows = rows_of(
        tmp_path, "--job", "dialogue full", "--contender", FUSED, OURS, split, "FlashOptim"
    )
    assert {row["dtype"] for row in rows.values()} == {"bfloat16"}
    assert rows["full FlashOptim"]["skipped"] == "ImportError: no such library"
    assert rows[f"full {split}"]["skipped"] == ""


def test_a_step_that_fails_ends_only_its_contender(tmp_path, monkeypatch):
    def failing(params, name, **options):
        optimizer = torch.optim.AdamW(params, **options)

        def step():
            raise RuntimeError("it does not step")

        optimizer.step = step
        return optimizer

    monkeypatch.setitem(rivals.CONTENDERS, "apex", rivals.Contender(failing, "apex"))
    rows = rows_of(tmp_path, "--job", "topics full", "--contender", FUSED, "apex", OURS)
    assert rows["full apex"]["skipped"] == "RuntimeError: it does not step"
    assert rows[f"full {OURS}"]["steps"] == "3"


def test_ours_that_fails_fails_the_program(tmp_path, monkeypatch):
    def failing(params, name, **options):
        raise ValueError("broken")

    monkeypatch.setitem(rivals.CONTENDERS, OURS, rivals.Contender(failing, "fastopt"))
    rows = rows_of(tmp_path, "--job", "topics full", "--contender", FUSED, OURS, code=1)
    assert rows[f"full {OURS}"]["skipped"] == "ValueError: broken"


@pytest.fixture
def _a_gpu_is_played(monkeypatch):
    """Whose own time is always a thousandth of a second."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1.0

    def nothing(*args):
        pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", nothing)
    monkeypatch.setattr(torch.cuda, "synchronize", nothing)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", nothing)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def forward(self, input_ids):
        loss = self.layer(input_ids).square().mean()
        return type("Output", (), {"loss": loss})


def test_a_step_that_clips_is_not_clipped_before_it():
    norms = {}
    for contender in (OURS, f"{OURS}{INSIDE}"):
        torch.manual_seed(0)
        trained = share.Trained(Model(), contender, "cpu")
        trained.step({"input_ids": 100 * torch.randn(4, 8)})
        norms[contender] = trained.optimizer.grad_norm if trained.clips_inside else None
    assert norms[OURS] is None
    assert float(norms[f"{OURS}{INSIDE}"]) > share.MAX_NORM  # which clipping before would be


@pytest.mark.usefixtures("_a_gpu_is_played")
def test_on_a_gpu_every_other_step_is_timed_in_parts():
    trained = share.Trained(Model(), FUSED, "cuda")
    for _ in range(9):
        trained.step({"input_ids": torch.randn(4, 8)})
    counts = {phase: len(seconds) for phase, seconds in trained.phases.items()}
    assert counts == {"whole": 5, "host": 5, "clip": 4, "optimizer": 4}
    figures = trained.figures(warm_up=1, first=[])
    assert (figures["clip_ms"], figures["optimizer_ms"]) == ("1.000", "1.000")
    assert float(figures["whole_ms"]) > 0
    stay = 4 * 9 + 2 * 4 * 9  # parameters, two states
    assert figures["peak_mb"] == f"{(5_000_000 + stay) / 1e6:.1f}"
