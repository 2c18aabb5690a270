"""Images in folders, one folder per class, read through pillow."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pctt._checks import require_count

# Only these are tried; one of pillow's other formats starts a program, Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26  # 8192 x 8192 in one image; more is a mistake or meant to fill the memory
DEEP_MODES = ("I", "F")  # and "I;16" and its relatives: more than 8 bits per channel
PART_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}

Part = tuple[np.ndarray, np.ndarray]


def read_image_folder(
    root: str | os.PathLike[str],
    size: tuple[int, int] | None = None,
    gray: bool = False,
    test: float = 0.2,
    seed: int = 0,
) -> tuple[Part, Part, tuple[str, ...]]:
    """The images under `root`, as (training, test, names of the classes), a part being (images, labels).

    Returns: images uint8 [N, 3, H, W], or [N, H, W] with `gray`; labels int64 [N], the place of the class
    among the names. Arguments and errors are those of `load_image_folder`.
    """
    _check_settings(size, test)
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'images in folders are read by pillow, which is missing; pip install "pctt[data]"'
        ) from error

    folders = _class_folders(Path(root).expanduser())
    paths = [_image_files(folder) for folder in folders]
    images = _read_all([path for files in paths for path in files], size, gray, Image)
    labels = np.repeat(np.arange(len(paths), dtype=np.int64), [len(files) for files in paths])
    is_test = _held_out([len(files) for files in paths], test, seed)
    train, held_out = ((images[rows], labels[rows]) for rows in (~is_test, is_test))
    return train, held_out, tuple(folder.name for folder in folders)


def _check_settings(size: tuple[int, int] | None, test: float) -> None:
    if not 0 < test < 1:
        raise ValueError(f"test must be between 0 and 1, got {test}; 0.2 holds out a fifth of each class.")
    if size is None:
        return
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ValueError(f"size must be (height, width), got {size!r}.")
    for name, value in zip(("height", "width"), size, strict=True):
        require_count(name, value, 1)
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"size must have at most {MAX_PIXELS} pixels, got {size}; choose a smaller one.")


def _class_folders(root: Path) -> list[Path]:
    layout = "give a folder that holds one folder of images per class"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; {layout}.")
    folders = sorted(
        (entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")),
        key=lambda folder: folder.name,
    )
    if not folders:
        raise ValueError(f"{root} holds no folders; {layout}.")
    if {folder.name.lower() for folder in folders} <= PART_NAMES:
        names = ", ".join(folder.name for folder in folders)
        raise ValueError(f"{root} holds {names}, which are no classes; {layout}, such as {folders[0]}.")
    return folders


def _image_files(folder: Path) -> list[Path]:
    """All files under a class's folder but hidden ones, in an order that no file system decides."""
    files = [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    ]
    if len(files) < 2:
        raise ValueError(
            f"{folder} holds {len(files)} images, and a class needs 2, one to train on and one to test; "
            "add images or remove the folder."
        )
    return sorted(files)


def _read_all(paths: list[Path], size: tuple[int, int] | None, gray: bool, pillow: Any) -> np.ndarray:
    """All images in one array, uint8 [N, 3, H, W] or [N, H, W]."""
    first = _read_image(paths[0], size, gray, pillow)
    images = np.empty((len(paths), *first.shape), np.uint8)
    for row, path in enumerate(paths):
        image = _read_image(path, size, gray, pillow)
        if image.shape != first.shape:
            (height, width), expected = image.shape[:2], first.shape[:2]
            raise ValueError(
                f"{path} is {height} x {width} (height x width) and {paths[0]} is {expected[0]} x "
                f"{expected[1]}; bring all to one size, or give load_image_folder size=(height, width)."
            )
        images[row] = image
    return images if gray else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _read_image(path: Path, size: tuple[int, int] | None, gray: bool, pillow: Any) -> np.ndarray:
    """One image, uint8 [H, W, 3] or [H, W]."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file that can be read; remove it or repair the link.")
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pillow warns of what is refused below, and of odd metadata
        try:
            with pillow.open(file, formats=FORMATS) as image:
                return _pixels(image, size, gray, pillow)
        except _RefusedError as error:
            raise ValueError(f"{path} {error}.") from None
        except pillow.DecompressionBombError as error:
            raise ValueError(f"{path} has more than {MAX_PIXELS} pixels; make it smaller.") from error
        except Exception as error:  # on damaged files, pillow's decoders raise whatever they stumble over
            raise ValueError(
                f"{path} is no image, or a truncated or corrupt one ({type(error).__name__}: {error}); "
                f"remove it or get it again (what can be read: {', '.join(FORMATS)})."
            ) from error


class _RefusedError(Exception):
    """An image that is whole and not accepted; the message follows the file's name."""


def _pixels(image: Any, size: tuple[int, int] | None, gray: bool, pillow: Any) -> np.ndarray:
    """The pixels of an opened image, whose header alone has been read so far."""
    if image.width * image.height > MAX_PIXELS:
        raise _RefusedError(f"has more than {MAX_PIXELS} pixels; make it smaller")
    if image.mode.split(";")[0] in DEEP_MODES:
        raise _RefusedError(f'has more than 8 bits per channel (mode "{image.mode}"); convert it to 8')
    image = image.convert("L" if gray else "RGB")
    if size is not None:
        image = image.resize((size[1], size[0]), pillow.Resampling.BILINEAR)
    return np.asarray(image)


def _held_out(counts: list[int], test: float, seed: int) -> np.ndarray:
    """Which rows are for testing, bool [sum(counts)]: of each class its share, at least 1, and never all."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[torch.Tensor] = []
    for count in counts:
        num_test = min(max(round(test * count), 1), count - 1)
        parts.append(torch.randperm(count, generator=generator) < num_test)
    return torch.cat(parts).numpy()
