"""What this machine can do: one finding per thing that pctt can use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pctt.data import find_folder
from pctt.data.idx import SOURCES

EXTRAS = (
    ("tyro", "cli", "the command line"),
    ("tqdm", "cli", "progress bars"),
    ("sklearn", "data", "the digits data set"),
    ("matplotlib", "plot", "pictures of the curves"),
    ("tensorboard", "log", "the tensorboard mirror"),
)


@dataclass(frozen=True)
class Finding:
    """name: of what was looked for.
    ok: it is there and usable.
    detail: what was found.
    fix: the command or step that would add it, else empty.
    needed: without it `pctt train digits` cannot run."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    needed: bool = False


def examine(data_dir: str | None = None) -> list[Finding]:
    """Everything that pctt can use on this machine, needed things first."""
    return [*_python(), *_extras(), *_gpu(), *_tenstorrent(), *_data(data_dir)]


def _python() -> Iterator[Finding]:
    import torch

    version = platform.python_version()
    yield Finding("python", sys.version_info >= (3, 10), version, needed=True)
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    yield Finding("torch", True, f"{torch.__version__}, {threads}", needed=True)


def _extras() -> Iterator[Finding]:
    for module, extra, purpose in EXTRAS:
        if importlib.util.find_spec(module) is None:
            fix = f'pip install "pctt[{extra}]"'
            yield Finding(
                module, False, f"not installed: no {purpose}", fix, needed=module in ("tyro", "sklearn")
            )
        else:
            name = "scikit-learn" if module == "sklearn" else module
            yield Finding(module, True, f"{importlib.metadata.version(name)}: {purpose}")


def _gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        yield Finding("cuda", True, f"{torch.cuda.get_device_name()}: --device cuda")
    elif torch.version.cuda is None:
        yield Finding(
            "cuda", False, "this torch was built without CUDA", "install a CUDA build of torch to use a GPU"
        )
    else:
        yield Finding("cuda", False, "torch sees no GPU", "check the driver with nvidia-smi")


def _tenstorrent() -> Iterator[Finding]:
    if importlib.util.find_spec("ttnn") is None:
        fits = sys.version_info[:2] in ((3, 10), (3, 12))
        fix = 'pip install "pctt[tt]"' + (
            "" if fits else " in an environment of Python 3.10 or 3.12, the ones ttnn has wheels for"
        )
        yield Finding("ttnn", False, f"not installed (Python {platform.python_version()})", fix)
    else:
        yield Finding("ttnn", True, importlib.metadata.version("ttnn"))
    cards = sorted(Path("/dev/tenstorrent").glob("*")) if Path("/dev/tenstorrent").is_dir() else []
    if cards:
        yield Finding("card", True, f"{len(cards)} Tenstorrent device(s): {', '.join(map(str, cards))}")
    else:
        yield Finding(
            "card",
            False,
            "no /dev/tenstorrent",
            "install the Tenstorrent kernel driver (tt-kmd) if there is a card",
        )
    simulator = os.environ.get("TT_METAL_SIMULATOR")
    if not simulator:
        yield Finding(
            "simulator",
            False,
            "TT_METAL_SIMULATOR is not set",
            "set it to the libttsim.so of a Wormhole or Blackhole",
        )
    elif not Path(simulator).exists():
        yield Finding(
            "simulator",
            False,
            f"TT_METAL_SIMULATOR={simulator} does not exist",
            "correct the path or unset it",
        )
    else:
        yield Finding("simulator", True, simulator)


def _data(data_dir: str | None) -> Iterator[Finding]:
    for name in SOURCES:
        try:
            yield Finding(name, True, str(find_folder(name, data_dir)))
        except FileNotFoundError as error:
            yield Finding(name, False, str(error))
