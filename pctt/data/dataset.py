"""What training reads: checked pairs of inputs and labels, and the data sets known by name."""

import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import cifar, digits, idx, images

DATASET_NAMES = ("digits", *idx.SOURCES, "cifar10")
FOLDER_PREFIX = "folder:"


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs [N, D], finite floating point, and their class labels [N], int64 and not negative.

    `load` gives float32 in [0, 1]; other ranges are allowed, since standardised inputs are common.
    Raises ValueError, naming the first offending row, for anything else.
    """

    inputs: Tensor
    labels: Tensor

    def __repr__(self) -> str:
        return f"Split: {len(self.labels):,} samples of {self.inputs.shape[1]} numbers, {self.inputs.dtype}"

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

    name: what `load` knows it by.    train, test: inputs [N, D] and labels [N].
    num_classes: labels are 0 to num_classes - 1.
    image_shape: (height, width) or (channels, height, width), whose product is D; inputs hold the channels
        one after the other, each row by row.
    class_names: one per class, or none at all.

    Raises ValueError where a split contradicts any of them.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    image_shape: tuple[int, int] | tuple[int, int, int]
    class_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return (
            f"Dataset: {self.name}, {self.num_classes} classes, {' x '.join(map(str, self.shape))}; "
            f"{len(self.train.labels):,} training and {len(self.test.labels):,} test samples"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width), with one channel where image_shape names none."""
        return (1, *self.image_shape) if len(self.image_shape) == 2 else self.image_shape

    def __post_init__(self) -> None:
        if len(self.image_shape) not in (2, 3) or any(size < 1 for size in self.image_shape):
            raise ValueError(
                "image_shape must be (height, width) or (channels, height, width), each at least 1, "
                f"got {self.image_shape}."
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"class_names must be one name per class, got {len(self.class_names)} for {self.num_classes} "
                "classes; give as many, or leave them out."
            )
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
    """The data set called `name`, as float32 inputs in [0, 1].

    name: one of DATASET_NAMES, or "folder:PATH" for images in one folder per class, as `load_image_folder`
        reads them.
    data_dir: folder of the files of mnist, fashion_mnist and cifar10, or its parent; else the environment
        variable PCTT_DATA. digits comes with scikit-learn and needs none.

    Raises ValueError for an unknown name or a damaged file, FileNotFoundError for a missing one,
    ModuleNotFoundError for digits without scikit-learn and for images without pillow.
    """
    if name.startswith(FOLDER_PREFIX) and name != FOLDER_PREFIX:
        if data_dir is not None:
            warnings.warn(f"data_dir has no effect on {name}, which names its own folder", stacklevel=2)
        return load_image_folder(name.removeprefix(FOLDER_PREFIX))
    if name not in DATASET_NAMES:
        raise ValueError(
            f"data set {name!r} is unknown; choose one of {', '.join(DATASET_NAMES)}, "
            f"or {FOLDER_PREFIX}PATH for a folder of images."
        )
    max_pixel, class_names = 255, ()
    if name == "digits":
        if data_dir is not None:
            warnings.warn("data_dir has no effect on digits, which comes with scikit-learn", stacklevel=2)
        parts, max_pixel = digits.read_digits(), digits.MAX_PIXEL
    elif name == "cifar10":
        parts, class_names = cifar.read_cifar10(data_dir), cifar.CLASS_NAMES
    else:
        parts = idx.read_image_set(name, data_dir)
    return _to_dataset(name, *parts, max_pixel, 10, class_names)


def load_image_folder(
    root: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    gray: bool = False,
    test: float = 0.2,
    seed: int = 0,
) -> Dataset:
    """Images in one folder per class, ROOT/CLASS/IMAGE, as float32 inputs in [0, 1], image_shape (3, H, W).

    Classes are numbered in the order of their names. All files under a class are read, also in further
    folders, but for hidden ones (.NAME). Transparency is dropped; of an animation the first picture counts.
    size: (height, width) to which every image is resized, bilinear; without it all must have one size.
    gray: one channel, and image_shape (H, W). test: share of each class that is held out by a permutation
    from `seed`, to the nearest image, at least one and never all.
    Raises FileNotFoundError where there is no such folder, ModuleNotFoundError without pillow, and
    ValueError, naming the file or folder, for one that is no image, truncated, of more than 2**26 pixels, of
    more than 8 bits per channel or of another size, and for a class of fewer than two images.
    """
    train, held_out, class_names = images.read_image_folder(root, size, gray, test, seed)
    name = FOLDER_PREFIX + os.fspath(root)
    return _to_dataset(name, train, held_out, 255, len(class_names), class_names)


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


def _to_dataset(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    max_pixel: int,
    num_classes: int,
    class_names: tuple[str, ...],
) -> Dataset:
    """From images [N, H, W] or [N, C, H, W] with pixels 0 to max_pixel, and labels [N]."""
    training, testing = (_to_split(pixels, labels, max_pixel) for pixels, labels in (train, test))
    *channels, height, width = train[0].shape[1:]
    image_shape = (channels[0], height, width) if channels else (height, width)
    return Dataset(name, training, testing, num_classes, image_shape, class_names)


def _to_split(pixels: np.ndarray, labels: np.ndarray, max_pixel: int) -> Split:
    """Each image flattened into one row and scaled to [0, 1]."""
    inputs = torch.from_numpy(pixels).reshape(len(pixels), -1).to(torch.float32).div_(max_pixel)
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
