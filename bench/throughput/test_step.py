"""`pytest bench/`: pytest-benchmark's clock on our steps, to track them over time.

pytest bench/ --benchmark-autosave
pytest bench/ --benchmark-compare --benchmark-compare-fail=min:20%
"""

import pytest

from .measure import Setting
from .rivals import OURS
from .workloads import WORKLOADS


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum"])
@pytest.mark.parametrize("workload", ["one-tiny", "1000x16", "lora-bert", "minilm"])
def test_step(benchmark, workload, optimizer):
    setting = Setting(WORKLOADS[workload].shapes(), optimizer, "plain", "float32", "cpu")
    clock = setting.clock(OURS)
    clock.warm_up()
    benchmark(clock.situation.turn)
