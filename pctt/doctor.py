"""What this machine can do: one finding per thing that pctt can use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pctt.backends import devices
from pctt.data import find_cifar10, find_folder
from pctt.data.idx import SOURCES

EXTRAS = (
    ("tyro", "cli", "the command line"),
    ("tqdm", "cli", "progress bars"),
    ("sklearn", "data", "the digits data set"),
    ("matplotlib", "plot", "pictures of the curves"),
    ("tensorboard", "log", "the tensorboard mirror"),
)

COMPILER = "compiler/bin/riscv-tt-elf-g++"
OPEN_TIMEOUT_S = 120.0  # a simulator takes 3 to 15 s; the first time, firmware is compiled too


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
    """What the tenstorrent backend needs; a device is opened only where all of that is there."""
    found = [_ttnn(), _compiler(), _device(), _kernel_cache()]
    found = [finding for finding in found if finding is not None]
    yield from found
    missing = [finding.name for finding in found if not finding.ok]
    if not missing:
        opened = _opened()
        yield opened
        missing = [] if opened.ok else [opened.name]
    if missing:
        yield Finding(
            "tenstorrent",
            False,
            f"not ready: {', '.join(missing)}, see above",
            "a card on the CPU needs none of it: --backend emulated",
        )
    elif devices.mode() == "mock":
        yield Finding(
            "tenstorrent",
            False,
            "the mock device builds programs but computes nothing, so nothing can be trained on it",
            "unset TT_METAL_MOCK_CLUSTER_DESC_PATH",
        )
    else:
        yield Finding("tenstorrent", True, f"{_dispatch()}: --backend tenstorrent")


def _ttnn() -> Finding:
    if importlib.util.find_spec("ttnn") is None:
        fits = sys.version_info[:2] in devices.TTNN_PYTHONS
        where = "" if fits else f" in an environment of Python {_ttnn_pythons()}"
        python = f"Python {platform.python_version()}"
        detail = f"not installed; it has wheels for Python {_ttnn_pythons()}, and this is {python}"
        return Finding("ttnn", False, detail, f'pip install "pctt[tt]"{where}')
    try:
        version = importlib.metadata.version("ttnn")
    except importlib.metadata.PackageNotFoundError:
        version = "built from source"
    tested = "" if version == devices.TTNN_TESTED else f"; pctt is tested with {devices.TTNN_TESTED}"
    return Finding("ttnn", True, version + tested)


def _ttnn_pythons() -> str:
    return " or ".join(f"{major}.{minor}" for major, minor in devices.TTNN_PYTHONS)


def _ttnn_folder() -> Path | None:
    spec = importlib.util.find_spec("ttnn")
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(folders))) if folders else None


def _compiler() -> Finding | None:
    """The compiler of the card's kernels, which a wheel of ttnn does not hold."""
    ttnn = _ttnn_folder()
    if ttnn is None:
        return None
    places = (ttnn / "runtime" / "sfpi", Path("/opt/tenstorrent/sfpi"))  # where ttnn looks, in this order
    for place in places:
        if (place / COMPILER).is_file():
            return Finding("sfpi", True, f"{place}: the compiler of the card's kernels")
    version = re.search(r"^sfpi_version='?([\d.]+)", _text(ttnn / "tt_metal" / "sfpi-version"), re.MULTILINE)
    return Finding(
        "sfpi",
        False,
        f"no compiler of the card's kernels in {places[0]} or {places[1]}",
        f"install the sfpi package{f' {version[1]}' if version else ''} from "
        "https://github.com/tenstorrent/sfpi/releases",
    )


def _device() -> Finding:
    mode = devices.mode()
    if mode == "simulator":
        return _simulator(Path(os.environ["TT_METAL_SIMULATOR"]))
    if mode == "mock":
        path = os.environ["TT_METAL_MOCK_CLUSTER_DESC_PATH"]
        if Path(path).exists():
            return Finding("device", True, f"mock, {path}")
        detail = f"TT_METAL_MOCK_CLUSTER_DESC_PATH={path} does not exist"
        return Finding("device", False, detail, "correct the path or unset it")
    if mode == "card":
        cards = devices.cards()
        return Finding("device", True, f"{len(cards)} card(s): {', '.join(map(str, cards))}")
    return Finding(
        "device",
        False,
        "no card in /dev/tenstorrent, and TT_METAL_SIMULATOR is not set",
        "install the Tenstorrent kernel driver (tt-kmd) if there is a card, or set TT_METAL_SIMULATOR to the "
        "libttsim.so of a Wormhole or Blackhole",
    )


def _simulator(path: Path) -> Finding:
    if not path.exists():
        detail = f"TT_METAL_SIMULATOR={path} does not exist"
        return Finding("device", False, detail, "correct the path or unset it")
    description = path.parent / "soc_descriptor.yaml"
    arch = re.search(r"^arch_name: *(\w+)", _text(description), re.MULTILINE)
    if arch is None:
        ttnn = _ttnn_folder() or Path("TTNN")
        source = ttnn / "tt_metal" / "soc_descriptors" / "wormhole_b0_80_arch.yaml"
        return Finding(
            "device",
            False,
            f"simulator {path} without the description of its chip, {description.name}",
            f"cp {source} {description}, or blackhole_140_arch.yaml for a Blackhole",
        )
    detail = f"simulator of a {arch[1].lower()}, {path}"
    if not os.environ.get("TT_METAL_DISABLE_SFPLOADMACRO"):
        fix = "export TT_METAL_DISABLE_SFPLOADMACRO=1"
        return Finding("device", False, f"{detail}; it ends the process at SFPLOADMACRO instructions", fix)
    return Finding("device", True, detail)


def _kernel_cache() -> Finding | None:
    """Where compiled kernels are kept. Their names say neither compiler nor chip."""
    mode = devices.mode()
    if mode == "nothing":
        return None
    chosen = os.environ.get("TT_METAL_CACHE")
    if chosen is None:
        if mode == "card":
            return Finding("kernel cache", True, "ttnn's own, ~/.cache/tt-metal-cache")
        return Finding(
            "kernel cache",
            False,
            f"TT_METAL_CACHE is not set, so a card would later run the kernels compiled for the {mode}",
            "export TT_METAL_CACHE=FOLDER, one for each chip and mode of dispatch",
        )
    place = Path(chosen)
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        detail = f"TT_METAL_CACHE={place} cannot be written"
        return Finding("kernel cache", False, detail, "set it to a folder of your own")
    return Finding("kernel cache", True, str(place))


def _dispatch() -> str:
    if os.environ.get("TT_METAL_SLOW_DISPATCH_MODE") is None:
        return "fast dispatch, batches are replayed as traces"
    return "slow dispatch (TT_METAL_SLOW_DISPATCH_MODE is set), so no traces"


OPEN = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import torch
from pctt.backends.operations import BackendUnavailable
from pctt.backends.devices import close_devices
from pctt.backends.tenstorrent import Tenstorrent
try:
    backend = Tenstorrent(torch.float32)
    ttnn, (across, down) = backend.ttnn, backend.grid
    l1 = ttnn.device.get_memory_view(backend.device, ttnn.BufferType.L1).total_bytes_per_bank
    answer = {"chip": backend.chip.name, "arch": backend.chip.arch, "grid": f"{across}x{down}", "l1": l1}
    close_devices()
except BackendUnavailable as error:
    answer = {"error": str(error)}
print("\\n" + json.dumps(answer))
"""


def _opened() -> Finding:
    """The device as a process of its own opens it, since a bad one can end the process or never answer."""
    if devices.mode() == "card":
        repair = "end what uses it (fuser -v /dev/tenstorrent/*), or reset it with tt-smi -r"
    else:
        repair = "empty the folder of TT_METAL_CACHE, in case it holds kernels of another chip or compiler"
    with tempfile.TemporaryDirectory() as folder:  # ttnn leaves files in the current one
        try:
            child = subprocess.run(
                [sys.executable, "-c", OPEN, json.dumps([str(Path(path).absolute()) for path in sys.path])],
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=OPEN_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return Finding("opening", False, f"the device has not opened in {OPEN_TIMEOUT_S:g} s", repair)
    answer = next((line for line in child.stdout.splitlines() if line.startswith("{")), None)
    if answer is None:
        how = f"was ended by signal {-child.returncode}" if child.returncode < 0 else "failed"
        said = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Finding("opening", False, f"the process that opened the device {how}: {said}", repair)
    found = json.loads(answer)
    if "error" in found:
        return Finding("opening", False, found["error"], repair)
    memory = f"{found['l1']:,} bytes of L1 on each"
    detail = f"{found['arch']}, {found['grid']} cores, {memory}; planned for as {found['chip']}"
    return Finding("opening", True, detail)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _data(data_dir: str | None) -> Iterator[Finding]:
    finders = {name: partial(find_folder, name) for name in SOURCES} | {"cifar10": find_cifar10}
    for name, find in finders.items():
        try:
            yield Finding(name, True, str(find(data_dir)))
        except FileNotFoundError as error:
            yield Finding(name, False, str(error))
