"""Data as plain tensors: digits, MNIST, Fashion-MNIST, CIFAR-10, image folders, text, one's own `Split`."""

from .cifar import find_cifar10
from .dataset import DATASET_NAMES, Dataset, Split, load, load_image_folder, split_validation
from .idx import find_folder, read_idx
from .text import Text, excerpts, load_text, windows

__all__ = [
    "DATASET_NAMES",
    "Dataset",
    "Split",
    "Text",
    "excerpts",
    "find_cifar10",
    "find_folder",
    "load",
    "load_image_folder",
    "load_text",
    "read_idx",
    "split_validation",
    "windows",
]
