"""Workloads have the shapes of the models they are named after."""

import pytest

from throughput import workloads


def test_models_have_their_published_sizes():
    published = {"bert-base": (201, 109.5e6), "resnet50": (161, 25.6e6), "minilm": (103, 22.7e6)}
    published |= {"gpt2-xl": (580, 1.558e9), "llama-1b": (146, 1.236e9)}
    for name, (tensors, elements) in published.items():
        shapes = workloads.WORKLOADS[name].shapes()
        assert len(shapes) == tensors
        assert workloads.elements(shapes) == pytest.approx(elements, rel=2e-3)


def test_lora_adds_two_factors_to_each_linear_layer():
    # Llama-7B: q, k, v and o of 32 layers, 4096 wide.
    shapes = workloads.WORKLOADS["lora-llama-7b"].shapes()
    assert len(shapes) == 2 * 4 * 32
    assert set(shapes) == {(8, 4096), (4096, 8)}
