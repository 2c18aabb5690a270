"""The doctor on machines of every kind: what it says is there, what is missing, and that it survives.

A stand-in for ttnn, a package of a few lines, plays the devices that this machine does not have.
"""

import importlib.machinery
import subprocess
from pathlib import Path

import pytest

from pctt import doctor
from pctt.backends import devices

VARIABLES = (
    "TT_METAL_SIMULATOR",
    "TT_METAL_MOCK_CLUSTER_DESC_PATH",
    "TT_METAL_CACHE",
    "TT_METAL_SLOW_DISPATCH_MODE",
    "TT_METAL_DISABLE_SFPLOADMACRO",
)

TTNN = """
import os, signal, sys, time
from types import SimpleNamespace

BufferType = SimpleNamespace(L1="L1")
MathFidelity = SimpleNamespace(HiFi3=3, HiFi4=4)
DispatchCoreType = SimpleNamespace(WORKER="worker")
DispatchCoreConfig = str
device = SimpleNamespace(get_memory_view=lambda device, kind: SimpleNamespace(total_bytes_per_bank=1234567))


class Device:
    def compute_with_storage_grid_size(self):
        return SimpleNamespace(x=7, y=5)

    def arch(self):
        return "Arch.BLACKHOLE"


def init_device_compute_kernel_config(*arguments, **settings):
    return None


def close_device(device):
    pass


def open_device(**settings):
    print("a line of the driver's own")
    open("generated", "w").close()
    {opening}
"""
MESSAGE = "TT_FATAL @ /a/b.cpp:3: chips > 0\ninfo:\nNo chips detected.\nbacktrace:\n --- x"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ttnn, no device, nothing set, whatever this machine has."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "cards", list)
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name == "ttnn" else find(name)
    )


@pytest.fixture
def ttnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a stand-in for ttnn whose device opens with the given statement, and its compiler."""

    def install(opening: str, compiler: bool = True) -> None:
        package = tmp_path / "packages" / "ttnn"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(TTNN.replace("{opening}", opening))
        if compiler:
            program = package / "runtime" / "sfpi" / doctor.COMPILER
            program.parent.mkdir(parents=True)
            program.touch()
        monkeypatch.syspath_prepend(package.parent)
        spec = importlib.machinery.PathFinder.find_spec("ttnn", [str(package.parent)])
        monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)

    return install


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards, for this process and for the one that opens a device."""
    monkeypatch.setattr(devices, "cards", lambda: [Path("/dev/tenstorrent/0"), Path("/dev/tenstorrent/1")])
    plug_in = "from pctt.backends import devices\ndevices.cards = lambda: ['a card']\ntry:"
    monkeypatch.setattr(doctor, "OPEN", doctor.OPEN.replace("try:", plug_in, 1))


@pytest.fixture
def simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    library = tmp_path / "simulator" / "libttsim.so"
    library.parent.mkdir()
    library.touch()
    (library.parent / "soc_descriptor.yaml").write_text("grid:\n  x_size: 10\narch_name: WORMHOLE_B0\n")
    monkeypatch.setenv("TT_METAL_SIMULATOR", str(library))
    monkeypatch.setenv("TT_METAL_DISABLE_SFPLOADMACRO", "1")
    monkeypatch.setenv("TT_METAL_CACHE", str(tmp_path / "kernels"))
    return library


def found() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor._tenstorrent()}


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("a device was opened")

    monkeypatch.setattr(subprocess, "run", refuse)


def test_where_there_is_nothing_no_device_is_opened_and_every_gap_has_a_remedy(monkeypatch):
    forbid_processes(monkeypatch)
    findings = found()
    assert set(findings) == {"ttnn", "device", "tenstorrent"}
    assert not any(finding.ok for finding in findings.values())
    assert "3.10 or 3.12" in findings["ttnn"].detail and "pctt[tt]" in findings["ttnn"].fix
    assert "TT_METAL_SIMULATOR" in findings["device"].fix
    assert "ttnn, device" in findings["tenstorrent"].detail
    assert "--backend emulated" in findings["tenstorrent"].fix


@pytest.mark.parametrize(("version", "fits"), [((3, 10), True), ((3, 11), False), ((3, 12), True)])
def test_another_python_is_part_of_the_remedy_only_where_ttnn_has_no_wheel(monkeypatch, version, fits):
    monkeypatch.setattr(doctor.sys, "version_info", (*version, 1, "final", 0))
    assert ("environment of Python" in found()["ttnn"].fix) is not fits


def test_a_card_is_opened_and_its_chip_grid_and_memory_are_shown(ttnn, card, tmp_path, monkeypatch):
    """The figures are the device's own: a 7x5 grid is that of no chip in the table."""
    monkeypatch.chdir(tmp_path)
    ttnn("return Device()")
    findings = found()
    assert all(finding.ok for finding in findings.values()), findings
    assert findings["device"].detail == "2 card(s): /dev/tenstorrent/0, /dev/tenstorrent/1"
    assert findings["opening"].detail.startswith("blackhole, 7x5 cores, 1,234,567 bytes of L1 on each")
    assert "fast dispatch" in findings["tenstorrent"].detail
    assert not (tmp_path / "generated").exists(), "what the device leaves behind"


def test_slow_dispatch_is_said(ttnn, card, monkeypatch):
    monkeypatch.setenv("TT_METAL_SLOW_DISPATCH_MODE", "1")
    ttnn("return Device()")
    assert "slow dispatch" in found()["tenstorrent"].detail


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("sys.exit('UnsupportedFunctionality: sfpu')", "failed: UnsupportedFunctionality: sfpu"),
        (f"raise RuntimeError({MESSAGE!r})", "could not open device 0: No chips detected"),
        ("time.sleep(600)", "not opened in 3 s"),
    ],
)
def test_a_device_that_does_not_open_is_a_finding_and_no_crash(ttnn, card, monkeypatch, opening, words):
    monkeypatch.setattr(doctor, "OPEN_TIMEOUT_S", 3.0 if "sleep" in opening else 600.0)
    ttnn(opening)
    findings = found()
    assert not findings["opening"].ok and words in findings["opening"].detail
    assert "tt-smi -r" in findings["opening"].fix
    assert not findings["tenstorrent"].ok and "opening" in findings["tenstorrent"].detail


def test_a_missing_compiler_is_named_with_the_version_that_ttnn_asks_for(ttnn, card, tmp_path, monkeypatch):
    forbid_processes(monkeypatch)
    ttnn("return Device()", compiler=False)
    monkeypatch.setattr(doctor, "COMPILER", "compiler/bin/no-such-compiler")
    version = tmp_path / "packages" / "ttnn" / "tt_metal" / "sfpi-version"
    version.parent.mkdir()
    version.write_text("# sfpi\nsfpi_version='7.8.9'\n")
    findings = found()
    assert not findings["sfpi"].ok and "sfpi package 7.8.9" in findings["sfpi"].fix


def test_the_chip_of_a_simulator_is_read_from_beside_it(ttnn, simulator):
    ttnn("return Device()")
    findings = found()
    assert findings["device"].detail == f"simulator of a wormhole_b0, {simulator}"
    assert findings["device"].ok and findings["opening"].ok


def test_what_a_simulator_lacks_is_named_with_the_command_that_adds_it(ttnn, simulator, monkeypatch):
    forbid_processes(monkeypatch)
    ttnn("return Device()")
    monkeypatch.delenv("TT_METAL_CACHE")
    assert "export TT_METAL_CACHE=" in found()["kernel cache"].fix
    monkeypatch.delenv("TT_METAL_DISABLE_SFPLOADMACRO")
    assert found()["device"].fix == "export TT_METAL_DISABLE_SFPLOADMACRO=1"
    description = simulator.parent / "soc_descriptor.yaml"
    description.unlink()
    assert found()["device"].fix.startswith("cp ") and str(description) in found()["device"].fix
    simulator.unlink()
    assert f"TT_METAL_SIMULATOR={simulator} does not exist" in found()["device"].detail


def test_a_cache_that_cannot_be_written_is_a_finding(simulator, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TT_METAL_CACHE", str(tmp_path / "file" / "kernels"))
    assert "cannot be written" in found()["kernel cache"].detail


def test_a_mock_device_opens_but_is_not_offered_for_training(ttnn, tmp_path, monkeypatch):
    description = tmp_path / "n150.yaml"
    monkeypatch.setenv("TT_METAL_MOCK_CLUSTER_DESC_PATH", str(description))
    monkeypatch.setenv("TT_METAL_CACHE", str(tmp_path / "kernels"))
    ttnn("return Device()")
    assert f"{description} does not exist" in found()["device"].detail
    description.touch()
    findings = found()
    assert findings["device"].detail == f"mock, {description}" and findings["opening"].ok
    assert not findings["tenstorrent"].ok and "computes nothing" in findings["tenstorrent"].detail
