"""The Tenstorrent devices of this machine: which there are, and what ttnn needs to open one, or several."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from pctt.backends.mesh import parse_device
from pctt.backends.operations import BackendUnavailable, DeviceLost

Place: TypeAlias = "tuple[int, int]"
"""Number of the first chip, number of chips."""

TTNN_PYTHONS = ((3, 10), (3, 12))
"""The Python versions that ttnn has wheels for."""

TTNN_TESTED = "0.81.1"
"""The version of ttnn that this backend is tested with."""

_open: dict[Place, Any] = {}  # devices of this process, kept open: opening one takes seconds


@contextmanager
def device_at_work() -> Generator[None]:
    """Turns what ttnn raises into DeviceLost. Every call that a device at work must answer is in one."""
    try:
        yield
    except DeviceLost:
        raise
    except RuntimeError as error:
        raise DeviceLost(f"ttnn failed on the device: {reason(error)}") from error


def reason(error: Exception) -> str:
    """The line of ttnn's message that says why; around it stand a source line and a stack of frames."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines.index("info:") + 1 if "info:" in lines else 0
    return lines[after].rstrip(".") if after < len(lines) else type(error).__name__


# --- which there are ----------------------------------------------------------------------------------------


def mode() -> str:
    """What ttnn opens here: simulator, mock or card, in its own order of preference, or nothing."""
    if os.environ.get("TT_METAL_SIMULATOR"):
        return "simulator"
    if os.environ.get("TT_METAL_MOCK_CLUSTER_DESC_PATH"):
        return "mock"
    return "card" if cards() else "nothing"


def cards() -> list[Path]:
    """The Tenstorrent devices that the driver shows."""
    return sorted(Path("/dev/tenstorrent").glob("*"))


def is_mock() -> bool:
    return mode() == "mock"


def dispatches_fast() -> bool:
    """Whether cores of the device dispatch, not the host alone."""
    return os.environ.get("TT_METAL_SLOW_DISPATCH_MODE") is None


def load_ttnn() -> Any:
    """The module ttnn. Raises BackendUnavailable where it is not installed."""
    if importlib.util.find_spec("ttnn") is None:
        fits = sys.version_info[:2] in TTNN_PYTHONS
        where = "" if fits else " in an environment of Python 3.10 or 3.12, the ones ttnn has wheels for"
        raise BackendUnavailable(
            f'the tenstorrent backend needs ttnn: pip install "pctt[tt]"{where}; without a card, '
            "backend='emulated' computes the same on the CPU."
        )
    os.environ.setdefault("TT_METAL_LOGGER_LEVEL", "FATAL")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # or its import prints its settings
    import ttnn  # pyright: ignore[reportMissingImports]

    return ttnn


# --- opening and closing ------------------------------------------------------------------------------------


def place_of(device: str | int | None) -> Place:
    """(number of the first chip, number of chips) of a card, such as 0, or of a mesh, such as "mesh:2"."""
    name, num_chips = parse_device(device)
    number = 0 if name is None else int(name) if name.isascii() and name.isdigit() else -1
    if number < 0 or (num_chips > 1 and name is not None):
        raise ValueError(
            "device of the tenstorrent backend must be a number such as 0, or mesh:2 for two chips, got "
            f"{device!r}."
        )
    return number, num_chips


def open_device(device: str | int | None = None) -> Any:
    """The card of that number, or the mesh of so many chips, opened once per process.

    Raises BackendUnavailable where there is none.
    """
    place = number, num_chips = place_of(device)
    if place in _open:
        return _open[place]
    simulator = os.environ.get("TT_METAL_SIMULATOR")
    if simulator and not Path(simulator).exists():
        raise BackendUnavailable(
            f"TT_METAL_SIMULATOR={simulator} does not exist; correct the path, or unset it to use a card."
        )
    mock = os.environ.get("TT_METAL_MOCK_CLUSTER_DESC_PATH")
    if mock and not Path(mock).exists():
        raise BackendUnavailable(
            f"TT_METAL_MOCK_CLUSTER_DESC_PATH={mock} does not exist; correct the path, or unset it."
        )
    ttnn = load_ttnn()
    if mode() == "nothing":
        raise BackendUnavailable(
            "there is no Tenstorrent device (/dev/tenstorrent is empty); install the driver if there is a "
            "card, set TT_METAL_SIMULATOR to simulate one, or use backend='emulated'."
        )
    if _open and (num_chips > 1 or any(chips > 1 for _, chips in _open)):
        raise BackendUnavailable(
            "a process has one mesh open, or cards, not both; call pctt.backends.devices.close_devices() "
            "before you open another."
        )
    options: dict[str, Any] = {}
    if dispatches_fast():
        # Where Ethernet cores dispatch, as they do on an n300 by default, ttnn 0.81.1 reports a row of cores
        # more than its elementwise operations accept.
        options["dispatch_core_config"] = ttnn.DispatchCoreConfig(ttnn.DispatchCoreType.WORKER)
        # The chips of an n300 have not the cores for a second queue beside the Ethernet between them.
        options["num_command_queues"] = 2 if num_chips == 1 else 1
        if not mock:
            options["trace_region_size"] = 32 << 20
    try:
        if num_chips == 1:
            _open[place] = ttnn.open_device(device_id=number, **options)
        else:
            _open[place] = _open_mesh(ttnn, num_chips, options)
    except BackendUnavailable:
        raise
    except Exception as error:
        what = f"device {number}" if num_chips == 1 else f"a mesh of {num_chips} chips"
        raise BackendUnavailable(f"ttnn could not open {what}: {reason(error)}") from error
    return _open[place]


def _open_mesh(ttnn: Any, num_chips: int, options: Mapping[str, Any]) -> Any:
    """All chips in one line, which the Ethernet between them joins."""
    found = ttnn.get_num_devices()
    if found < num_chips:
        raise BackendUnavailable(
            f"ttnn sees {found} chip{'s' if found != 1 else ''} here, too few for mesh:{num_chips}; ask for "
            "fewer, or use backend='emulated'."
        )
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_1D)
    return ttnn.open_mesh_device(mesh_shape=ttnn.MeshShape(1, num_chips), **options)


def release_trace(place: Place, trace: Any) -> None:
    """If the device that it was captured on is still open."""
    if place in _open:
        load_ttnn().release_trace(_open[place], trace)


def close_devices() -> None:
    """Closes every device that this process has opened."""
    while _open:
        (_, num_chips), device = _open.popitem()
        ttnn = load_ttnn()
        if num_chips == 1:
            ttnn.close_device(device)
        else:
            ttnn.close_mesh_device(device)
            ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)
