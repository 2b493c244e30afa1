"""Models small enough to train within a test, saved as `from_pretrained` wants them.

A module that trains them imports the fixture `small_run`, too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = {
    "metal": ["iron", "copper", "zinc", "smelter", "ore", "rust", "alloy", "ingot"],
    "music": ["violin", "chord", "tenor", "sonata", "drum", "choir", "flute", "encore"],
    "weather": ["rain", "cloud", "gale", "frost", "thunder", "sleet", "drizzle", "fog"],
}
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture(autouse=True)
def small_run():
    """One thread, for tensors this small; and torch as it was afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def rows(count=20):
    """`count` different texts of each class, every one naming its class's words."""
    return [
        (f"{words[n % 8]} and {words[(3 * n + 1) % 8]} of {n}", label)
        for label, words in WORDS.items()
        for n in range(count)
    ]


def vocabulary(*special):
    words = [*special, "and", "of", *WORDS, *(word for words in WORDS.values() for word in words)]
    words += [*"0123456789", *(f"##{digit}" for digit in range(10))]
    return {token: number for number, token in enumerate(words)}


def save_tokenizer(folder):
    numbered = vocabulary("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = BertTokenizer(vocab=numbered, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_bert(folder):
    """A BERT with random weights; its dropout is on."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=save_tokenizer(folder),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def save_chat_model(folder):
    """A Llama with random weights that knows how a conversation is written."""
    torch.manual_seed(0)
    numbered = vocabulary("<unk>", "<s>", "</s>", "user", "system", "assistant")
    words = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(numbered),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def in_two_processes(program: Path, *arguments: str) -> str:
    """What they print, on one thread each."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, program, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def report_in(folder: Path):
    return json.loads((folder / "out" / "report.json").read_text())


def losses(report):
    return [run["losses"] for run in report["runs"]]
