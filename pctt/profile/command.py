"""`pctt profile`: where the time of a training step goes."""

from __future__ import annotations

import json as json_module
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pctt.backends import BackendUnavailable
from pctt.backends.devices import is_mock
from pctt.config import RunConfig
from pctt.engine import Engine
from pctt.folders import new_folder, whole_folder
from pctt.initialisers import init
from pctt.network import Network
from pctt.profile.measuring import measure
from pctt.profile.picture import draw_profile
from pctt.profile.result import Profile
from pctt.report import print_json, say_error
from pctt.typed import OK, SHAPES, UsageError, assignments, configuration, elsewhere, load_data, override

DEVICE_LOG = Path(".logs") / "profile_log_device.csv"
"""What TT-Metalium's own profiler writes, below its folder."""


def profile(
    what: str,
    /,
    *,
    backend: str | None = None,
    device: str | None = None,
    fused: bool = False,
    batch_size: int | None = None,
    batches: int = 10,
    set: tuple[str, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Where the time of a training step goes: by section, by operation and by layer.

    Args:
        what: A preset (digits, mnist) or the path of a TOML configuration, as for `pctt train`. The samples
            are random, so no data files are needed.
        backend: Where to run: reference (torch), emulated (a card, on the CPU) or tenstorrent.
        device: Device of the backend, as for `pctt train`.
        fused: The fused kernel on a card: what every core does when, predicted.
        batch_size: Samples per learning step.
        batches: Training steps that medians are over.
        set: Any other setting, e.g. --set inference.num_steps=10 (values as in TOML).
        out: Folder for profile.json, trace.json and profile.svg; else runs/profile-NAME-1, -2, ...
        json: Print one JSON object instead of text.
    """
    config = _asked(what, backend, device, fused, batch_size, set)
    if batches < 1:
        raise UsageError(f"--batches must be at least 1, got {batches}.")
    folder = new_folder(out, f"profile-{Path(what).stem}")
    with whole_folder(folder) as staging:
        engine, batch = _engine(config)
        found = measure(engine, batch, batches)
        advice = _device_profiler(engine)
        _write(found, staging)
    if json:
        print_json("profile", {**found.to_dict(), "folder": str(folder)})
        return OK
    print(found.as_text())
    for line in advice:
        print(line)
    print(f"{folder}: profile.json, trace.json for ui.perfetto.dev, profile.svg")
    return OK


def _asked(
    what: str,
    backend: str | None,
    device: str | None,
    fused: bool,
    batch_size: int | None,
    settings: tuple[str, ...],
) -> RunConfig:
    config = configuration(what)
    values = {"training.batch_size": batch_size, **assignments(settings)}
    config = override(config, values)
    config = elsewhere(config, backend, device)
    config = override(config, {"training.fused": fused or None})
    if config.training.algorithm != "pc":
        raise UsageError(
            "a profile is of predictive coding; drop training.algorithm=backprop, or see `pctt bench`."
        )
    return config


def _engine(config: RunConfig) -> tuple[Engine, dict[str, Tensor]]:
    """The engine that `pctt train` would run, and a batch of random samples."""
    settings = config.training
    if settings.backend == "tenstorrent" and is_mock():
        raise BackendUnavailable(
            "ttnn's mock device computes nothing, so there is nothing to time; unset "
            "TT_METAL_MOCK_CLUSTER_DESC_PATH to use a card, or use --backend emulated."
        )
    shape = SHAPES.get(config.data.name)
    if shape is None:
        shape = load_data(config).shape
    try:
        net = config.network(shape)
    except ValueError as error:
        raise UsageError(str(error)) from None
    engine = Engine(
        net,
        init(net, settings.seed, config.init.scheme, config.init.gain),
        config.inference,
        tuple(config.clamp) if config.clamp is not None else (net.input_name, net.output),
        learning=config.learning,
        backend=settings.backend,
        device=settings.device,
        precision=config.precision,
        batch_size=settings.batch_size,
        fused=settings.fused,
        cores_per_layer=settings.cores_per_layer,
    )
    return engine, _batch(config, net, engine.clamped)


def _batch(config: RunConfig, net: Network, clamped: tuple[str, ...]) -> dict[str, Tensor]:
    """Pixels between 0 and 1, and one class of each sample."""
    size, batch = config.training.batch_size, dict[str, Tensor]()
    generator = torch.Generator().manual_seed(config.training.seed)
    for name in clamped:
        units = net.widths[net.node_index(name)]
        if name == config.node_of("labels", net):
            classes = torch.randint(0, units, (size,), generator=generator)
            batch[name] = torch.nn.functional.one_hot(classes, units).float()
        elif config.clamp is not None and config.clamp[name] == "zeros":
            batch[name] = torch.zeros(size, units)
        else:
            batch[name] = torch.rand(size, units, generator=generator)
    return batch


def _device_profiler(engine: Engine) -> list[str]:
    """Where TT-Metalium's own profiler, if it is on, has written the time of every processor on the card."""
    if engine.backend.name != "tenstorrent" or not os.environ.get("TT_METAL_DEVICE_PROFILER"):
        return []
    card: Any = engine.backend
    if not hasattr(card.ttnn, "ReadDeviceProfiler"):
        return ["TT_METAL_DEVICE_PROFILER is set, and this ttnn has no ReadDeviceProfiler to read it."]
    card.ttnn.ReadDeviceProfiler(card.device)
    home = Path(os.environ.get("TT_METAL_HOME") or ".")
    log = Path(os.environ.get("TT_METAL_PROFILER_DIR") or home / "generated" / "profiler") / DEVICE_LOG
    return [f"cycles on the card: {log}" if log.is_file() else f"cycles on the card: expected in {log}"]


# --- files --------------------------------------------------------------------------------------------------


def _write(found: Profile, folder: Path) -> None:
    for name, values in (("profile.json", found.to_dict()), ("trace.json", found.trace())):
        (folder / name).write_text(json_module.dumps(values) + "\n", encoding="utf-8")
    try:
        draw_profile(found, folder / "profile.svg")
    except ImportError as error:
        say_error(f"no picture of the profile: {error}")
