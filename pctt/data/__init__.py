"""Data sets as plain tensors: scikit-learn's digits, MNIST, Fashion-MNIST, or one's own `Split`."""

from .dataset import DATASET_NAMES, Dataset, Split, load, split_validation
from .idx import find_folder, read_idx

__all__ = ["DATASET_NAMES", "Dataset", "Split", "find_folder", "load", "read_idx", "split_validation"]
