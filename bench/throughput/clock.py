"""Times what a contender does, in turn with the others."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import machine

from .situations import Plain

WARM_UP = 3  # steps
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
            self.situation.before()
            self.busy.append(device_seconds(self.situation.turn, self.host[-1]))

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.situation.before()
            self.situation.turn()
        machine.synchronize(self.device)

    @property
    def moving(self) -> list[float]:
        """Seconds in which the bytes were moved."""
        return self.busy or self.total


def device_seconds(turn: Callable[[], None], host_seconds: float) -> float:
    """Of what `turn` enqueues in about so many seconds, during which the device sleeps."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(1.5 * host_seconds * CYCLES_PER_SECOND))
    begin.record()
    turn()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3
