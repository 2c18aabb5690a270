"""What training reads: checked pairs of inputs and labels, and the data sets known by name."""

import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import digits, idx

DATASET_NAMES = ("digits", *idx.SOURCES)


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs [N, D], finite floating point, and their class labels [N], int64 and not negative.

    `load` gives float32 in [0, 1]; other ranges are allowed, since standardised inputs are common.
    Raises ValueError, naming the first offending row, for anything else.
    """

    inputs: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        _check_inputs(self.inputs)
        _check_labels(self.labels)
        if len(self.inputs) != len(self.labels):
            raise ValueError(
                f"inputs have {len(self.inputs)} rows, labels {len(self.labels)}; give each row one label."
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of one classification task.

    num_classes: labels are 0 to num_classes - 1. image_shape: (height, width), whose product is D.
    Raises ValueError where a split contradicts either.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    image_shape: tuple[int, int]

    def __post_init__(self) -> None:
        for part, split in (("train", self.train), ("test", self.test)):
            width = split.inputs.shape[1]
            if width != math.prod(self.image_shape):
                raise ValueError(
                    f"{part} inputs are {width} wide and image_shape is {self.image_shape}; "
                    "flatten each image into one row."
                )
            wrong = split.labels >= self.num_classes
            if wrong.any():
                row = _first(wrong)
                raise ValueError(
                    f"{part} labels must be below num_classes = {self.num_classes}, "
                    f"got {int(split.labels[row])} at row {row}; correct the label or raise num_classes."
                )


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """The data set called `name`, one of DATASET_NAMES, as float32 inputs in [0, 1].

    data_dir: folder of the IDX files of mnist and fashion_mnist, or its parent; else the environment variable
    PCTT_DATA. digits comes with scikit-learn and needs none.
    Raises ValueError for an unknown name or a damaged file, FileNotFoundError for a missing one,
    ModuleNotFoundError for digits without scikit-learn.
    """
    if name not in DATASET_NAMES:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(DATASET_NAMES)}.")
    if name == "digits":
        if data_dir is not None:
            warnings.warn("data_dir has no effect on digits, which comes with scikit-learn", stacklevel=2)
        parts, max_pixel = digits.read_digits(), digits.MAX_PIXEL
    else:
        parts, max_pixel = idx.read_image_set(name, data_dir), 255
    train, test = (_to_split(images, labels, max_pixel) for images, labels in parts)
    height, width = parts[0][0].shape[1:]
    return Dataset(name, train, test, num_classes=10, image_shape=(height, width))


def split_validation(split: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """A split in two by a seeded permutation: (training, validation), the last `fraction` of it held out.

    fraction: in [0, 1), rounded to whole rows; with 0 the split comes back as it is, beside None.
    Raises ValueError for any other fraction, or one that leaves either part empty.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be in [0, 1), got {fraction}; 0 holds nothing out.")
    if fraction == 0:
        return split, None
    num_held_out = round(fraction * len(split))
    if not 0 < num_held_out < len(split):
        raise ValueError(
            f"fraction {fraction} of {len(split)} rows leaves one part empty; choose another, or 0 for none."
        )
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    kept, held_out = order[:-num_held_out], order[-num_held_out:]
    return (
        Split(split.inputs[kept], split.labels[kept]),
        Split(split.inputs[held_out], split.labels[held_out]),
    )


def _to_split(images: np.ndarray, labels: np.ndarray, max_pixel: int) -> Split:
    """Images [N, H, W] with pixels 0 to max_pixel, flattened and scaled."""
    inputs = torch.from_numpy(images).reshape(len(images), -1).to(torch.float32).div_(max_pixel)
    return Split(inputs, torch.from_numpy(labels).to(torch.int64))


def _check_inputs(inputs: Tensor) -> None:
    if not isinstance(inputs, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"inputs must be a torch tensor, got {type(inputs).__name__}; use torch.from_numpy.")
    if inputs.ndim != 2:
        raise ValueError(
            f"inputs must be [N, D], got {list(inputs.shape)}; flatten each sample into one row."
        )
    if inputs.numel() == 0:
        raise ValueError(f"inputs are empty, {list(inputs.shape)}; give at least one row and one column.")
    if not inputs.is_floating_point():
        raise ValueError(
            f"inputs must be floating point, got {inputs.dtype}; scale to [0, 1] as torch.float32."
        )
    wrong = ~inputs.isfinite().all(dim=1)
    if wrong.any():
        raise ValueError(f"inputs have NaN or Inf, first in row {_first(wrong)}; clean or drop such rows.")


def _check_labels(labels: Tensor) -> None:
    if not isinstance(labels, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"labels must be a torch tensor, got {type(labels).__name__}; use torch.from_numpy.")
    if labels.ndim != 1:
        raise ValueError(
            f"labels must be [N], got {list(labels.shape)}; give class numbers, not one-hot rows."
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be torch.int64, got {labels.dtype}; call labels.long().")
    wrong = labels < 0
    if wrong.any():
        row = _first(wrong)
        raise ValueError(
            f"labels must be 0 or more, got {int(labels[row])} at row {row}; number classes from 0."
        )


def _first(wrong: Tensor) -> int:
    """Index of the first True in a boolean tensor [N] that has one."""
    return int(wrong.nonzero()[0, 0])
