"""The bench's modules are imported as its commands import them."""

import sys
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))


@pytest.fixture
def _no_process_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
