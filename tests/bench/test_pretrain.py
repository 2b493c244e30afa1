"""bench/pretrain.py: what it trains, writes, skips and takes up again, with 3,000 weights."""

import statistics

import pytest
import torch
from PIL import Image

import pretrain
from pretraining import page as pages
from pretraining import training
from throughput import plots, rivals
from throughput.rows import read
from tiny import rows, small_run  # noqa: F401

NARROW = "torch, bfloat16"
STEPS = 4


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The program on a handful of texts; its exit code, and the rows and page it left."""
    texts = tmp_path / "bbc-news" / "texts"
    texts.mkdir(parents=True)
    for number, (text, _) in enumerate(rows()):
        (texts / f"{number}.txt").write_text(text * 5)
    small = {"SIZE": {"n_embd": 8, "n_layer": 1, "n_head": 2}, "VOCABULARY": 280, "CONTEXT": 8}
    for name, value in small.items():
        monkeypatch.setattr(training, name, value)

    def call(*arguments):
        chosen = ["--betas", "0.9,0.95", "--steps", str(STEPS), "--cache", str(tmp_path)]
        code = pretrain.main([*chosen, "--results", str(tmp_path), *arguments])
        return code, read(tmp_path / "formats.csv"), (tmp_path / "formats.md").read_text()

    return call


def test_rows_page_and_picture(run, tmp_path):
    code, written, page = run("--contender", training.REFERENCE, NARROW, "--seeds", "0", "1")
    assert code == 0
    assert all(list(row) == pretrain.COLUMNS for row in written)
    names = [(row["contender"], row["betas"], row["seed"]) for row in written]
    assert names == [(n, "0.9,0.95", s) for s in "01" for n in (training.REFERENCE, NARROW)]
    assert [row["kept_bytes_per_param"] for row in written] == ["16.00", "8.00"] * 2
    losses = [float(row["held_out_loss"]) for row in written]
    assert all(0 < loss < 6 for loss in losses)  # that of a guess: log(280) = 5.6
    assert f"| {statistics.mean(losses[::2]):.4f} ± " in page
    assert f"| {statistics.mean(losses[1::2]) - statistics.mean(losses[::2]):+.4f} ± " in page
    assert page == pages.page(written)
    picture = Image.open(tmp_path / "formats.png")
    assert picture.text["Source"] == plots.digest(tmp_path / "formats.csv")


def test_a_run_gives_the_same_loss_again(run):
    first, again = (run("--contender", NARROW, "--seeds", "3")[1][0] for _ in range(2))
    assert first["held_out_loss"] == again["held_out_loss"]


def test_all_start_from_the_same_weights_and_no_two_seeds_do(run):
    wide = list(training.new_model(0).float().parameters())
    narrow = list(training.new_model(0).parameters())
    assert {p.dtype for p in narrow} == {torch.bfloat16}
    assert all(torch.equal(w, n.float()) for w, n in zip(wide, narrow, strict=True))
    other = list(training.new_model(1).parameters())
    assert not all(torch.equal(n, o) for n, o in zip(narrow, other, strict=True))


def replace(monkeypatch, rival, make):
    monkeypatch.setitem(rivals.CONTENDERS, rival, rivals.Contender(make, rival))


def broken(params, name, **options):
    raise ImportError("no such library\nand how to install it")


@pytest.mark.parametrize(
    ("name", "rival", "expected"),
    [("optimi, Kahan", "torch-optimi", 0), ("fastopt, split", "fastopt", 1)],
)
def test_a_contender_that_cannot_run_is_skipped_with_its_reason(
    run, monkeypatch, name, rival, expected
):
    replace(monkeypatch, rival, broken)
    code, written, page = run("--contender", name, training.REFERENCE, "--seeds", "0")
    assert code == expected
    assert [row["skipped"] for row in written] == ["ImportError: no such library", ""]
    assert f"- {name}: ImportError: no such library\n" in page
    assert f"| {name} |" not in page


def test_continuing_runs_only_what_is_missing_or_was_skipped(run, monkeypatch):
    makes = []

    def counted(params, name, **options):
        makes.append(name)
        return rivals.torch_fused(params, name, **options)

    replace(monkeypatch, rivals.FUSED, counted)
    replace(monkeypatch, "torch-optimi", broken)
    contenders = ["--contender", training.REFERENCE, "optimi, Kahan"]
    _, before, _ = run(*contenders, "--seeds", "0")
    assert len(makes) == 1
    replace(monkeypatch, "torch-optimi", lambda params, name, **_: counted(params, name))
    _, after, page = run(*contenders, "--seeds", "0", "1", "--continue")
    assert len(makes) == 4  # the other seed, and twice what was skipped
    assert after[0] == before[0]
    assert len(after) == 4
    assert "no such library" not in page


def test_a_run_that_diverges_is_said_to(run, monkeypatch):
    def spoils(params, name, **options):
        optimizer = rivals.torch_fused(params, name)
        optimizer.register_step_post_hook(lambda *_: params[0].data.fill_(torch.nan))
        return optimizer

    replace(monkeypatch, "torch-optimi", spoils)
    contenders = ["--contender", training.REFERENCE, "optimi, Kahan"]
    _, written, page = run(*contenders, "--seeds", "0", "1")
    assert [row["diverged"] for row in written] == ["", "2"] * 2
    assert "`optimi, Kahan` diverged with seed 1 at step 2." in page
    assert "Outside of it: `optimi, Kahan`." in page


def figures(name, *losses):
    empty = dict.fromkeys(pretrain.COLUMNS, "")
    return [
        empty | {"contender": name, "seed": str(seed), "held_out_loss": str(loss)}
        for seed, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "within"),
    [((1.09, 2.09, 3.09), True), ((2.1, 3.1, 4.1), False), ((0, 0.9, 1.9), False)],
)
def test_within_the_spread_is_a_mean_difference_below_the_deviation(losses, within):
    found = pages.outcomes(figures(training.REFERENCE, 1, 2, 3) + figures(NARROW, *losses))
    assert found[NARROW].spread == 1
    assert found[NARROW].within is within


def test_one_seed_has_no_spread_to_lie_within():
    found = pages.outcomes(figures(training.REFERENCE, 1) + figures(NARROW, 1))
    assert found[NARROW].within is None
    assert "two seeds" in " ".join(pages.sentences(found))


def test_differences_are_between_runs_of_one_seed():
    found = pages.outcomes(figures(training.REFERENCE, 1, 2, 3) + figures(NARROW, 1.5, 2.25))
    assert found[NARROW].differences == [0.5, 0.25]
