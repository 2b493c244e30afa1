"""How fast is one optimizer step, beside everything else and beside the memory's limit?

The contenders step in turn, round after round, in one process, so that what disturbs one disturbs
the others. Times are medians over the rounds; a ratio is the median of each round's ratio. Where
memory is what bounds a step, the ceiling is measured in the same rounds: on a CPU as many threads
stream the same arrays with next to no arithmetic, on a GPU a gigabyte is copied.

    python bench/step.py
    python bench/step.py --workload lora-bert --contender "torch compile"
    python bench/step.py --situation clip fresh --csv new.csv --compare old.csv

Columns of the CSV: median, p20 and p80 until the device has finished; host, until step() has
returned; device, what a GPU is busy for; GB/s, the bytes that such a step moves at least (all read,
all but the gradient written) over its time; step_peak_mb, memory in use during a step beyond
parameters, gradients and states; ratio, how many times as fast as the reference; skipped, the
reason where a contender could not run.
"""

from __future__ import annotations

import argparse
import csv
import gc
import itertools
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import machine
from throughput import ceiling
from throughput.rivals import CONTENDERS, OURS, reference_of
from throughput.situations import SITUATIONS, Plain
from throughput.workloads import WORKLOADS, Shapes, elements

# The tests' table of cases names the options of every optimizer: what is tested can be timed.
sys.path.append(str(machine.ROOT / "tests"))
from cases import OPTIONS

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    name.lower() + ("" if options == "default" else f"-{options}"): (name, kwargs)
    for name, table in OPTIONS.items()
    for options, kwargs in table.items()
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEY = ["workload", "optimizer", "contender", "situation", "dtype", "device", "reference"]
COLUMNS = [
    *KEY,
    *("tensors", "elements", "rounds"),
    *("median_ms", "p20_ms", "p80_ms", "host_ms", "device_ms"),
    *("gb_per_s", "ceiling_gb_per_s", "ceiling_share"),
    *("state_bytes_per_param", "step_peak_mb"),
    *("ratio", "ratio_p20", "ratio_p80"),
    *("skipped", "version", "machine", "torch", "commit"),
]
SHOWN = [
    *("workload", "optimizer", "contender", "situation", "dtype"),
    *("median_ms", "p20_ms", "p80_ms", "host_ms", "device_ms", "gb_per_s", "ceiling_share"),
    *("state_bytes_per_param", "step_peak_mb", "reference", "ratio", "ratio_p20", "ratio_p80"),
]
Row = dict[str, str]

WARM_UP = 3  # steps
LEAST_ROUNDS = 7
# Bytes a step must move to be bound by memory, not by the caches. Streaming the arrays of a smaller
# one beside it would only push them out.
CACHES = 256e6
# float32: parameter, gradient, two states, and as much as foreach takes for a moment.
BYTES_PER_ELEMENT = 24
TOO_LARGE = "does not fit: "
# A GPU's clock is no faster. It sleeps while the host enqueues what is then timed alone.
CYCLES_PER_SECOND = 2.5e9


class Clock:
    """Times one contender's turns."""

    def __init__(self, situation: Plain, device: str) -> None:
        self.situation = situation
        self.device = device
        self.host: list[float] = []  # seconds until the turn has returned
        self.total: list[float] = []  # until the device has finished, too
        self.busy: list[float] = []  # on a GPU: its own time, waiting for no host

    def turn(self) -> None:
        self.situation.before()
        machine.synchronize(self.device)
        start = time.perf_counter()
        self.situation.turn()
        self.host.append(time.perf_counter() - start)
        machine.synchronize(self.device)
        self.total.append(time.perf_counter() - start)
        if self.device == "cuda":
            self.busy.append(self._device_seconds())

    def _device_seconds(self) -> float:
        self.situation.before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(1.5 * self.host[-1] * CYCLES_PER_SECOND))
        begin.record()
        self.situation.turn()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.situation.before()
            self.situation.turn()
        machine.synchronize(self.device)

    @property
    def moving(self) -> list[float]:
        """Seconds in which the bytes were moved."""
        return self.busy or self.total


@dataclass(frozen=True)
class Setting:
    """What all contenders of a comparison have in common."""

    shapes: Shapes
    optimizer: str
    situation: str
    dtype: str
    device: str

    @property
    def reference(self) -> str:
        name, _ = OPTIMIZERS[self.optimizer]
        return reference_of(name)

    def clock(self, contender: str) -> Clock:
        situation = SITUATIONS[self.situation]
        name, options = OPTIMIZERS[self.optimizer]
        if name.startswith("Adam"):
            options = options | situation.options

        def make(params: list[torch.nn.Parameter], ours: dict[str, Any]) -> Optimizer:
            added = ours if CONTENDERS[contender].package == "fastopt" else {}
            return CONTENDERS[contender].make(params, name, **options, **added)

        return Clock(situation(self.shapes, make, DTYPES[self.dtype], self.device), self.device)


def measure(
    setting: Setting, contenders: Sequence[str], seconds: float, patience: float
) -> Iterator[Row]:
    """The figures of each contender. The reference steps beside ours alone, then again beside
    others, as many at a time as fit into memory."""
    need = BYTES_PER_ELEMENT * elements(setting.shapes)
    beside = int(0.9 * machine.free_bytes(setting.device) // need) - 1
    if beside < 1:
        for name in contenders:
            yield {"contender": name, "skipped": f"{TOO_LARGE}two need {2 * need / 1e9:.0f} GB"}
        return
    ours = [name for name in contenders if name == OURS]
    others = [name for name in contenders if name not in (OURS, setting.reference)]
    groups = [others[i : i + beside] for i in range(0, len(others), beside)]
    if ours or setting.reference in contenders:
        groups.insert(0, ours)
    for group in groups:
        rows = measure_together(setting, [*group, setting.reference], seconds, patience)
        gc.collect()  # optimizers hold themselves, and so their states, in cycles
        for row in rows:
            if row["contender"] in group or (
                group is groups[0] and setting.reference in contenders
            ):
                yield row


def measure_together(
    setting: Setting, contenders: list[str], seconds: float, patience: float
) -> list[Row]:
    clocks: dict[str, Clock] = {}
    skipped: list[Row] = []
    for name in contenders:
        try:
            with time_limit(patience):
                clock = setting.clock(name)
                clock.warm_up()
        except Exception as error:  # a rival's own: whatever it is, the others go on
            skipped.append({"contender": name, "skipped": reason(error)})
        else:
            clocks[name] = clock
    reference = clocks.get(setting.reference)
    limit = memory_limit(setting, reference)
    limits = []
    end = time.perf_counter() + seconds
    rounds = 0
    while clocks and (rounds < LEAST_ROUNDS or time.perf_counter() < end):
        for clock in clocks.values():
            clock.turn()
        if limit is not None:
            limits.append(limit.bytes_moved / limit.seconds())
        rounds += 1
    rows = [
        {"contender": name, **figures(clock, reference, limits)} for name, clock in clocks.items()
    ]
    return rows + skipped


def memory_limit(setting: Setting, reference: Clock | None) -> ceiling.Stream | ceiling.Copy | None:
    if reference is None or moved_bytes(reference.situation) < CACHES:
        return None
    if setting.device == "cuda":
        return ceiling.Copy()
    states = state_bytes(reference.situation.optimizers) // (4 * elements(setting.shapes))
    return ceiling.Stream(setting.shapes, min(2, states))


def figures(clock: Clock, reference: Clock | None, limits: list[float]) -> Row:
    """A contender's columns, from the times of its rounds and the others' in the same rounds."""
    moved = moved_bytes(clock.situation)
    kept = state_bytes(clock.situation.optimizers)
    p20, median, p80 = percentiles(clock.total)
    row = {
        "rounds": str(len(clock.total)),
        "median_ms": milliseconds(median),
        "p20_ms": milliseconds(p20),
        "p80_ms": milliseconds(p80),
        "host_ms": milliseconds(statistics.median(clock.host)),
        "device_ms": milliseconds(statistics.median(clock.busy)) if clock.busy else "",
        "gb_per_s": f"{moved / statistics.median(clock.moving) / 1e9:.1f}",
        "state_bytes_per_param": f"{kept / clock.situation.numel:.2f}",
    }
    if limits:
        shares = [moved / t / limit for t, limit in zip(clock.moving, limits, strict=True)]
        row["ceiling_gb_per_s"] = f"{statistics.median(limits) / 1e9:.1f}"
        row["ceiling_share"] = f"{statistics.median(shares):.2f}"
    if reference is not None:
        ratios = [r / t for r, t in zip(reference.total, clock.total, strict=True)]
        low, ratio, high = (f"{value:.2f}" for value in percentiles(ratios))
        row |= {"ratio": ratio, "ratio_p20": low, "ratio_p80": high}
    clock.situation.before()
    peak = machine.extra_bytes(clock.situation.turn, clock.device)
    return row | {"step_peak_mb": f"{peak / 1e6:.1f}"}


def percentiles(values: list[float]) -> tuple[float, float, float]:
    _, p20, *_, p80, _ = statistics.quantiles(values, n=10)
    return p20, statistics.median(values), p80


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4f}"


def moved_bytes(situation: Plain) -> int:
    """What a step reads and writes at least: all but the gradient is both."""
    params = sum(p.nbytes for p in situation.params)
    return (
        2 * params + sum(g.nbytes for g in situation.grads) + 2 * state_bytes(situation.optimizers)
    )


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Of all states that are no single numbers; one that several parameters share counts once."""
    found = {id(t): t for o in optimizers for t in tensors_in(dict(o.state))}
    return sum(t.nbytes for t in found.values() if t.dim())


def tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor) and hasattr(state, "__tensor_flatten__"):  # quantised, say
        names, _ = state.__tensor_flatten__()
        state = [getattr(state, name) for name in names]
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError: some rivals compile for minutes before their first step."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: what is raised within a callback of the interpreter's is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: BaseException) -> str:
    """In one line."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:160]


def refuse_fallbacks() -> None:
    """Have our classes raise where torch makes their step, which is not ours to measure."""
    warnings.filterwarnings("error", message=".* steps through torch.optim")


class Results:
    """Rows, written to a CSV as they come: what ends the program loses none of them."""

    def __init__(self, file: Path | None, device: str, append: bool = False) -> None:
        self.rows: list[Row] = []
        self.facts = {
            "device": device,
            "machine": machine.device_name(device),
            "torch": torch.__version__,
            "commit": machine.commit(),
        }
        self.sink = file.open("a" if append else "w", newline="") if file else None
        if self.sink and not self.sink.tell():
            csv.DictWriter(self.sink, COLUMNS).writeheader()

    def add(self, workload: str, setting: Setting, row: Row) -> None:
        described = {
            "workload": workload,
            "tensors": str(len(setting.shapes)),
            "elements": str(elements(setting.shapes)),
            "optimizer": setting.optimizer,
            "situation": setting.situation,
            "dtype": setting.dtype,
            "reference": setting.reference,
            "version": CONTENDERS[row["contender"]].version(),
        }
        full = dict.fromkeys(COLUMNS, "") | self.facts | described | row
        self.rows.append(full)
        if self.sink:
            csv.DictWriter(self.sink, COLUMNS).writerow(full)
            self.sink.flush()


def measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row["skipped"]]


def table(rows: Sequence[Row]) -> str:
    lines = [SHOWN, *([row[column] for column in SHOWN] for row in measured(rows))]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    aligned = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    why_not = {f"skipped {row['contender']}: {row['skipped']}" for row in rows if row["skipped"]}
    return "\n".join([*aligned, *sorted(why_not)])


def regressions(rows: Iterable[Row], old: Iterable[Row]) -> list[str]:
    """Where ours is slower than it was, to the same reference, by more than both spreads."""
    before = {tuple(row[column] for column in KEY): row for row in measured(old)}
    found = []
    for row in measured(rows):
        was = before.get(tuple(row[column] for column in KEY))
        if row["contender"] != OURS or was is None or not was["ratio_p20"]:
            continue
        if float(row["ratio_p80"]) < float(was["ratio_p20"]):
            found.append(
                "{workload} {optimizer} {situation} {dtype}: ".format_map(row)
                + "{ratio}x {reference}, was ".format_map(row)
                + "{ratio}x ({ratio_p20} to {ratio_p80})".format_map(was)
            )
    return found


def read(file: Path) -> list[Row]:
    with file.open(newline="") as source:
        return list(csv.DictReader(source))


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    uncompiled = [name for name, contender in CONTENDERS.items() if not contender.compiles]

    def choice(flag: str, choices: Iterable[str], default: Sequence[str], text: str) -> None:
        parser.add_argument(
            flag,
            choices=list(choices),
            default=default,
            nargs="+",
            metavar="NAME",
            help=f"default: {text}",
        )

    choice("--workload", WORKLOADS, list(WORKLOADS), "all of them")
    choice("--contender", CONTENDERS, uncompiled, "all that do not compile at the first step")
    choice("--optimizer", OPTIMIZERS, ["adamw", "sgd-momentum"], "adamw and sgd-momentum")
    choice("--situation", SITUATIONS, ["plain"], "plain")
    choice("--dtype", DTYPES, ["float32"], "float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=4, help="of rounds for each comparison; %(default)s"
    )
    parser.add_argument(
        "--patience", type=float, default=100, help="seconds of warm-up at most; %(default)s"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="exit code 1 if ours is slower than in it"
    )
    args = parser.parse_args(argv)
    if "graph" in args.situation and args.device == "cpu":
        parser.error("--situation graph needs --device cuda")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_options(argv)
    refuse_fallbacks()
    old = read(args.compare) if args.compare else []
    results = Results(args.csv, args.device, args.append)
    print("{machine}, torch {torch}, commit {commit}".format_map(results.facts))
    comparisons = itertools.product(args.optimizer, args.situation, args.dtype, args.workload)
    with tqdm(list(comparisons), unit="comparison") as bar:
        for optimizer, situation, dtype, workload in bar:
            bar.set_description(f"{workload} {optimizer} {situation}")
            setting = Setting(
                WORKLOADS[workload].shapes(), optimizer, situation, dtype, args.device
            )
            for row in measure(setting, args.contender, args.seconds, args.patience):
                results.add(workload, setting, row)
    print(table(results.rows))
    slower = regressions(results.rows, old)
    for line in slower:
        print(f"slower: {line}")
    failed = [
        row
        for row in results.rows
        if row["contender"] == OURS and row["skipped"] and not row["skipped"].startswith(TOO_LARGE)
    ]
    return 1 if slower or failed else 0


if __name__ == "__main__":
    sys.exit(main())
