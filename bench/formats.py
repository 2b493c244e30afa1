"""Does training reach the same held-out loss where states and weights are kept in fewer bits?

A small GPT-2 learns BBC News (finetuning/tasks/topics.py) from scratch, once for each contender,
betas and seed. With one seed all start from the same weights and see the same batches.

    python bench/formats.py                  78 runs, an hour on one thread
    python bench/formats.py --continue       the rest of them, and what was skipped
    python bench/formats.py --contender "torch, float32" "fastopt, split" --seeds 0

DIR receives formats.md, formats.png and formats.csv, a row for each run. Columns of the CSV:
diverged, the step whose loss was not finite, where training ended; kept_bytes_per_param, parameter,
gradient and states; skipped, the reason where a contender could not run.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import machine
from finetuning.tasks import TaskError, split, topics
from finetuning.tasks.fetch import default_cache
from finetuning.tasks.options import number
from throughput import plots, rivals, tables
from throughput.measure import Row, reason, refuse_fallbacks
from throughput.memory import state_bytes
from throughput.rows import measured, read

Betas = tuple[float, float]


@dataclass(frozen=True)
class Format:
    """How a model in training is kept.

    Args:
        rival: whose AdamW it is, of rivals.CONTENDERS.
        dtype: of the parameters, and so of their gradients.
        options: beyond torch's.
    """

    rival: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.rival == rivals.OURS


REFERENCE = "torch, float32"
WIDE, NARROW = torch.float32, torch.bfloat16
FORMATS = {
    REFERENCE: Format(rivals.FUSED, WIDE),
    "fastopt, float32": Format(rivals.OURS, WIDE),
    "fastopt, bfloat16 states": Format(rivals.OURS, WIDE, {"states": "bfloat16"}),
    "fastopt, 8-bit states": Format(rivals.OURS, WIDE, {"states": "8bit"}),
    "bitsandbytes, 8-bit states": Format("bitsandbytes 8-bit", WIDE),
    "torchao, 8-bit states": Format("torchao 8-bit", WIDE),
    "fastopt, split": Format(rivals.OURS, NARROW, {"weights": "split"}),
    "fastopt, split, bfloat16 states": Format(
        rivals.OURS, NARROW, {"weights": "split", "states": "bfloat16"}
    ),
    "fastopt, split, 8-bit states": Format(
        rivals.OURS, NARROW, {"weights": "split", "states": "8bit"}
    ),
    "fastopt, stochastic, 8-bit states": Format(
        rivals.OURS, NARROW, {"weights": "stochastic", "states": "8bit"}
    ),
    "torch, bfloat16": Format(rivals.FUSED, NARROW),
    "optimi, Kahan": Format("torch-optimi", NARROW, {"kahan_sum": True}),
    "FlashOptim": Format("FlashOptim", NARROW),
}

KEY = ["contender", "betas", "seed", "steps"]
COLUMNS = [
    *KEY,
    *("held_out_loss", "diverged", "kept_bytes_per_param", "elements", "seconds"),
    *("skipped", "version", "machine", "torch", "commit"),
]

SIZE = {"n_embd": 160, "n_layer": 2, "n_head": 4}
VOCABULARY = 4096  # tokens
CONTEXT = 32  # tokens
BATCH = 4  # windows of CONTEXT tokens
HELD_OUT = 200  # articles, of which so many windows are judged:
WINDOWS = 1024
# Near float32's best, lest a format gain or lose by the mere length of its steps: of 2.5e-4, 5e-4,
# 7e-4 and 1e-3 the best on the validation part with beta2 = .999, 0.015 above the best with .95.
LR = 7e-4
WEIGHT_DECAY, MAX_NORM = 0.1, 1.0
WARM_UP = 0.05  # of the steps

INTRODUCTION = f"""\
# Narrow states and weights: the held-out loss

Made by `python bench/formats.py`. A GPT-2 of {{elements:.3g}} M parameters learns BBC News from
scratch with AdamW: {BATCH} windows of {CONTEXT} tokens a step, learning rate {LR:g} after a warm-up
and then down a cosine to 0, weight decay {WEIGHT_DECAY:g}, gradients clipped to norm {MAX_NORM:g}.
A seed settles the first weights, rounded to bfloat16, and the batches: with one seed all contenders
have the same. The loss, in nats a token, is that on {WINDOWS} windows of articles not trained on,
the same for all. ± is the standard deviation over the seeds; a difference is to `{REFERENCE}` with
the same seed, and within the seed spread if its mean is no more than that one's deviation. Kept are
parameter, gradient and states.

Forward and backward compute in float32 on parameters widened to it, and a gradient is rounded once,
to its parameter's dtype: in bfloat16 they took 1.5 to 1.8 times as long on an Intel Xeon with
AVX512-BF16. So what is compared is how numbers are kept and updated, not the model's arithmetic."""


@dataclass(frozen=True)
class Data:
    """Tokens of all articles to train on, and the windows (one a row) to judge by."""

    train: Tensor
    held_out: Tensor


def load(cache: Path) -> Data:
    texts = sorted({text for text, _ in topics.articles(cache)})
    random.Random(split.SEED).shuffle(texts)
    train, held_out = split.divide(texts, split.share_of(len(texts), HELD_OUT), validate=False)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(train, vocab_size=VOCABULARY, show_progress=False)

    def tokens(articles: list[str]) -> Tensor:
        return torch.tensor([i for each in tokenizer.encode_batch(articles) for i in each.ids])

    judged = tokens(held_out)
    windows = judged[: len(judged) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return Data(tokens(train), windows[:WINDOWS])


def new_model(seed: int) -> nn.Module:
    """Without dropout, whose noise would hide what is asked for."""
    torch.manual_seed(seed)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"))  # GPT-2's own are of its vocabulary
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, **SIZE, **dropout, **ends)
    return GPT2LMHeadModel(config).bfloat16()


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    widened = {name: param.float() for name, param in model.named_parameters()}
    logits = functional_call(model, widened, windows).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Data) -> float:
    parts = data.held_out.split(64)
    total = sum(loss_of(model, windows).item() * len(windows) for windows in parts)
    return total / len(data.held_out)


def schedule(done: int, steps: int) -> float:
    """What the learning rate is multiplied by: up along a line, then down along a cosine to 0."""
    return min((done + 1) / max(1, WARM_UP * steps), (1 + math.cos(math.pi * done / steps)) / 2)


def train(
    kept: Format, betas: Betas, seed: int, steps: int, data: Data, advance: Callable[[], Any]
) -> Row:
    """The figures of one run; `advance` is called after each step."""
    model = new_model(seed).to(kept.dtype)
    params = list(model.parameters())
    optimizer = rivals.CONTENDERS[kept.rival].make(
        params, "AdamW", lr=LR, betas=betas, eps=1e-8, weight_decay=WEIGHT_DECAY, **kept.options
    )
    rate = LambdaLR(optimizer, lambda done: schedule(done, steps))
    order = torch.Generator().manual_seed(seed)
    diverged = None
    start = time.perf_counter()
    for count in range(1, steps + 1):
        first = torch.randint(len(data.train) - CONTEXT, (BATCH, 1), generator=order)
        optimizer.zero_grad()
        loss = loss_of(model, data.train[first + torch.arange(CONTEXT)])
        if not math.isfinite(loss.item()):
            diverged = count
            break
        loss.backward()
        clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        rate.step()
        advance()
    seconds = time.perf_counter() - start
    reached = held_out_loss(model, data)
    if diverged is None and not math.isfinite(reached):
        diverged = steps
    elements = sum(param.numel() for param in params)
    # An optimizer may take the gradients away: they are as large as the parameters.
    stored = 2 * sum(param.nbytes for param in params) + state_bytes([optimizer])
    return {
        "held_out_loss": "" if diverged else f"{reached:.6f}",
        "diverged": str(diverged or ""),
        "kept_bytes_per_param": f"{stored / elements:.2f}",
        "elements": str(elements),
        "seconds": f"{seconds:.1f}",
    }


def run_all(args: argparse.Namespace, data: Data, results: Path) -> list[Row]:
    """The rows that were there, if they are to stay, and those of every run that is yet missing.

    They are written as they come: what ends the program loses none of them.
    """
    rows = measured(read(results)) if args.resume and results.exists() else []
    done = {tuple(row[column] for column in KEY) for row in rows}
    runs = [
        (name, betas, seed)
        for seed, betas, name in itertools.product(args.seeds, args.betas, args.contender)
        if key(name, betas, seed, args.steps) not in done
    ]
    facts = {
        "machine": machine.device_name("cpu"),
        "torch": torch.__version__,
        "commit": machine.commit(),
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    with (
        results.open("w", newline="") as sink,
        tqdm(total=len(runs) * args.steps, unit="step") as bar,
    ):
        writer = csv.DictWriter(sink, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        sink.flush()
        for count, (name, betas, seed) in enumerate(runs, start=1):
            bar.set_description(f"{name}; {written(betas)}; seed {seed}")
            kept = FORMATS[name]
            try:
                figures = train(kept, betas, seed, args.steps, data, bar.update)
            except Exception as error:  # a rival's own: whatever it is, the others go on
                figures = {"skipped": reason(error)}
            named = dict(zip(KEY, key(name, betas, seed, args.steps), strict=True))
            version = {"version": rivals.CONTENDERS[kept.rival].version()}
            rows.append(dict.fromkeys(COLUMNS, "") | named | figures | version | facts)
            writer.writerow(rows[-1])
            sink.flush()
            bar.update(count * args.steps - bar.n)
    return rows


def key(name: str, betas: Betas, seed: int, steps: int) -> tuple[str, ...]:
    return name, written(betas), str(seed), str(steps)


def written(betas: Betas) -> str:
    return f"{betas[0]:g},{betas[1]:g}"


@dataclass(frozen=True)
class Outcome:
    """A contender's runs with one pair of betas.

    Args:
        losses: by seed, of the runs that did not diverge.
        differences: to the reference's with the same seed.
        spread: the standard deviation of the reference's losses, if it has several.
        diverged: the step, by seed.
    """

    losses: dict[str, float]
    differences: list[float]
    spread: float | None
    diverged: dict[str, str]
    kept: str

    @property
    def within(self) -> bool | None:
        """Whether the mean difference is no more than the spread; None if that is not known."""
        if self.diverged:
            return False
        if self.spread is None or not self.differences:
            return None
        return abs(statistics.mean(self.differences)) <= self.spread


def outcomes(rows: Iterable[Row]) -> dict[str, Outcome]:
    """By contender, in the order of FORMATS, of the rows of one pair of betas."""
    found = {name: tables.pick(measured(rows), contender=name) for name in FORMATS}
    losses = {
        name: {row["seed"]: float(row["held_out_loss"]) for row in own if not row["diverged"]}
        for name, own in found.items()
    }
    reference = losses[REFERENCE]
    spread = statistics.stdev(reference.values()) if len(reference) > 1 else None
    return {
        name: Outcome(
            losses=losses[name],
            differences=[
                loss - reference[seed] for seed, loss in losses[name].items() if seed in reference
            ],
            spread=spread,
            diverged={row["seed"]: row["diverged"] for row in own if row["diverged"]},
            kept=own[0]["kept_bytes_per_param"],
        )
        for name, own in found.items()
        if own
    }


def settings(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each pair of betas and number of steps, by its title."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        title = "betas {betas}; {steps} steps".format_map(row).replace(",", ", ")
        grouped.setdefault(title, []).append(row)
    return grouped


def mean(values: Iterable[float], form: str) -> str:
    """`5.8700 ± 0.0120`; without the deviation if there is but one."""
    numbers = list(values)
    if not numbers:
        return ""
    deviation = f" ± {statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):{form}}" + deviation


def table(found: dict[str, Outcome]) -> str:
    answers = {True: "yes", False: "no", None: ""}
    lines = [
        [
            name,
            str(FORMATS[name].dtype).removeprefix("torch."),
            outcome.kept,
            str(len(outcome.losses) + len(outcome.diverged)),
            mean(outcome.losses.values(), ".4f") or "diverged",
            mean(outcome.differences, "+.4f") if name != REFERENCE else "",
            answers[outcome.within] if name != REFERENCE else "",
        ]
        for name, outcome in found.items()
    ]
    head = ["", "parameters", "kept, bytes a parameter", "seeds"]
    head += ["held-out loss", "difference", "within the seed spread"]
    return tables.markdown(head, lines)


def sentences(found: dict[str, Outcome]) -> list[str]:
    reference = found.get(REFERENCE)
    if reference is None or reference.spread is None:
        return [f"`{REFERENCE}` needs two seeds before there is a spread to compare with."]
    lines = [
        f"`{REFERENCE}` reaches {statistics.mean(reference.losses.values()):.4f}, and its seeds "
        f"spread by {reference.spread:.4f}."
    ]
    for answer, text in ((True, "Within that spread"), (False, "Outside of it")):
        names = [n for n, o in found.items() if n != REFERENCE and o.within is answer]
        lines.append(f"{text}: {'; '.join(f'`{name}`' for name in names) or 'none'}.")
    lines += [
        f"`{name}` diverged with seed {seed} at step {at}."
        for name, outcome in found.items()
        for seed, at in outcome.diverged.items()
    ]
    return lines


def page(rows: Sequence[Row]) -> str:
    """formats.md."""
    good = measured(rows)
    parts = [INTRODUCTION.format(elements=int(good[0]["elements"]) / 1e6)] if good else []
    for title, own in settings(good).items():
        found = outcomes(own)
        parts += [f"## {title.capitalize()}", table(found), " ".join(sentences(found))]
    if good:
        parts += ["![Differences of the held-out loss](formats.png)", f"{measured_on(good)}."]
    return "\n\n".join([*parts, "## Not run", not_run(rows)]) + "\n"


def not_run(rows: Sequence[Row]) -> str:
    tried = {row["contender"] for row in rows}
    missing = "\n".join(f"- {name}: not tried yet" for name in FORMATS if name not in tried)
    skipped = any(row["skipped"] for row in rows) or not missing
    return "\n".join([missing] * bool(missing) + [tables.skipped_list(rows)] * skipped)


def measured_on(rows: Iterable[Row]) -> str:
    versions = dict.fromkeys(row["version"] for row in rows)
    return "; ".join([tables.measured_on(list(rows)), *versions])


def differences(rows: Sequence[Row]) -> Figure:
    """Every run's difference, a dot each, before the reference's spread."""
    grouped = settings(measured(rows))
    figure = Figure(figsize=(9, 0.8 + 4 * max(1, len(grouped))), layout="constrained")
    places = figure.subplots(max(1, len(grouped)), 1, squeeze=False).flat
    for axes, (title, own) in zip(places, grouped.items(), strict=False):
        draw_differences(axes, outcomes(own))
        axes.set_title(title, loc="left")
    figure.supxlabel(f"held-out loss less that of {REFERENCE} with the same seed")
    return figure


def draw_differences(axes: Axes, found: dict[str, Outcome]) -> None:
    names = [name for name in reversed(found) if name != REFERENCE]
    spread = next(iter(found.values())).spread
    if spread is not None:
        axes.axvspan(-spread, spread, color="#dfe7ee", label="seed spread of float32")
        axes.legend(loc="best")
    axes.axvline(0, color="#999999", linewidth=0.8)
    for place, name in enumerate(names):
        dots = found[name].differences
        colour = plots.colour(rivals.OURS) if FORMATS[name].is_ours else "#555555"
        axes.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.7)
    axes.set_yticks(range(len(names)), names)


def parse_betas(text: str) -> Betas:
    parse = number(float, 0)
    first, second = (parse(part) for part in text.split(","))
    return first, second


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--contender",
        choices=list(FORMATS),
        default=list(FORMATS),
        nargs="+",
        metavar="NAME",
        help="default: all of them",
    )
    parser.add_argument(
        "--betas",
        type=parse_betas,
        default=[(0.9, 0.999), (0.9, 0.95)],
        nargs="+",
        metavar="B1,B2",
        help="default: 0.9,0.999 and 0.9,0.95",
    )
    parser.add_argument(
        "--seeds", type=number(int, 0), default=[0, 1, 2], nargs="+", metavar="N", help="0 1 2"
    )
    parser.add_argument("--steps", type=number(int, 1), default=2000, help="%(default)s")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="%(default)s")
    parser.add_argument(
        "--continue",
        dest="resume",
        action="store_true",
        help="keep the rows of DIR's formats.csv, and run what it lacks or has skipped",
    )
    parser.add_argument("--results", type=Path, metavar="DIR", default=tables.RESULTS)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of the data")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_options(argv)
    torch.set_num_threads(args.threads)
    refuse_fallbacks()
    try:
        data = load(args.cache)
    except TaskError as error:
        print(f"formats: {error}", file=sys.stderr)
        return error.exit_code
    results = args.results / "formats.csv"
    rows = run_all(args, data, results)
    text = page(rows)
    results.with_suffix(".md").write_text(text, encoding="utf-8")
    plots.save(differences, results, "formats")
    print(text)
    return int(any(row["skipped"] and FORMATS[row["contender"]].is_ours for row in rows))


if __name__ == "__main__":
    sys.exit(main())
