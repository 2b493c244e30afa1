"""Has all contenders of a setting step in turn, and makes figures of their times."""

from __future__ import annotations

import gc
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import machine

from . import ceiling
from .clock import Clock
from .memory import moved_bytes, state_bytes
from .rivals import CONTENDERS, OURS, reference_of
from .situations import SITUATIONS
from .workloads import Shapes, elements

# The tests' table of cases names the options of every optimizer: what is tested can be timed.
sys.path.append(str(machine.ROOT / "tests"))
from cases import OPTIONS

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    name.lower() + ("" if options == "default" else f"-{options}"): (name, kwargs)
    for name, table in OPTIONS.items()
    for options, kwargs in table.items()
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row = dict[str, str]

LEAST_ROUNDS = 7
# Bytes a step must move to be bound by memory, not by the caches. Streaming the arrays of a smaller
# one beside it would only push them out.
CACHES = 256e6
TOO_LARGE = "does not fit: "


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
        if CONTENDERS[contender].offloads:
            if situation.by_itself is None:
                raise ValueError("it is for --situation offloaded")
            situation = situation.by_itself
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
    situation = SITUATIONS[setting.situation]
    need = situation.bytes_per_element * elements(setting.shapes)
    shared = situation.shared_bytes_per_element * elements(setting.shapes)
    beside = int((0.9 * machine.free_bytes(setting.device) - shared) // need) - 1
    if beside < 1:
        two = (shared + 2 * need) / 1e9
        for name in contenders:
            yield {"contender": name, "skipped": f"{TOO_LARGE}two need {two:.0f} GB"}
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
    limits = Limits(setting, clocks, reference)
    end = time.perf_counter() + seconds
    rounds = 0
    while clocks and (rounds < LEAST_ROUNDS or time.perf_counter() < end):
        for clock in clocks.values():
            clock.turn()
        limits.turn()
        rounds += 1
    rows = [
        {"contender": name, **figures(clock, reference, limits.of(name))}
        for name, clock in clocks.items()
    ]
    return rows + skipped


class Limits:
    """What memory allows, measured in the rounds of the contenders: on a GPU of each one's own
    tensors, on a CPU of the reference's for all."""

    def __init__(self, setting: Setting, clocks: dict[str, Clock], reference: Clock | None) -> None:
        self.rates: dict[str, list[float]] = {}  # bytes a second
        self.streams: dict[str, ceiling.Stream | ceiling.DeviceStream] = {}
        self.is_shared = setting.device == "cpu"
        if self.is_shared:
            stream = host_stream(setting, reference)
            self.streams = {} if stream is None else {"": stream}
        elif setting.situation != "offloaded":  # its bound is a bus
            for name, clock in clocks.items():
                stream = device_stream(clock)
                if stream is not None:
                    self.streams[name] = stream

    def turn(self) -> None:
        for name, stream in self.streams.items():
            self.rates.setdefault(name, []).append(stream.rate())

    def of(self, contender: str) -> list[float]:
        return self.rates.get("" if self.is_shared else contender, [])


def device_stream(clock: Clock) -> ceiling.DeviceStream | None:
    if moved_bytes(clock.situation) < CACHES:
        return None
    clock.situation.before()
    try:
        stream = ceiling.DeviceStream(clock.situation)
        stream.rate()  # warms up
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        print(f"no ceiling: {reason(error)}", file=sys.stderr)
        return None
    return stream


def host_stream(setting: Setting, reference: Clock | None) -> ceiling.Stream | None:
    if reference is None or moved_bytes(reference.situation) < CACHES:
        return None
    states = state_bytes(reference.situation.optimizers) // (4 * elements(setting.shapes))
    kept = min(2, states)
    if 4 * (2 + kept) * elements(setting.shapes) > 0.9 * machine.free_bytes("cpu"):
        return None
    return ceiling.Stream(setting.shapes, kept)


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
    peak = machine.peak_bandwidth(clock.situation.params[0].device.type)
    if peak:
        row["peak_share"] = f"{moved / statistics.median(clock.moving) / peak:.2f}"
    if reference is not None:
        ratios = [r / t for r, t in zip(reference.total, clock.total, strict=True)]
        low, ratio, high = (f"{value:.2f}" for value in percentiles(ratios))
        row |= {"ratio": ratio, "ratio_p20": low, "ratio_p80": high}
    clock.situation.before()
    extra = machine.extra_bytes(clock.situation.turn, clock.device)
    return row | {"step_peak_mb": f"{extra / 1e6:.1f}"}


def percentiles(values: list[float]) -> tuple[float, float, float]:
    _, p20, *_, p80, _ = statistics.quantiles(values, n=10)
    return p20, statistics.median(values), p80


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4f}"


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
