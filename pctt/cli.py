"""The command line: pctt train, eval, generate, recall, plan, profile, bench, dashboard, doctor.

Exit code 0: done; 1: it failed; 2: it was asked for wrongly. On a terminal there is a progress bar, in a pipe
plain lines, and with --json one JSON object a line on standard output and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from pctt import ask, checkpoint, plots, record
from pctt.backends import DeviceLost
from pctt.bench.command import bench
from pctt.config import RunConfig, from_dict, to_dict
from pctt.dashboard.command import dashboard
from pctt.data import Dataset, Split, split_validation
from pctt.describe import where
from pctt.doctor import examine
from pctt.engine import Status
from pctt.folders import free_folder
from pctt.inference import Inference
from pctt.initialisers import init
from pctt.network import Network
from pctt.placement.boxes import BOXES
from pctt.placement.chips import CHIPS
from pctt.placement.draw import SUFFIXES, save_picture
from pctt.placement.fused_cost import fused_placement
from pctt.placement.fused_report import FusedReport
from pctt.placement.plan import plan as make_plan
from pctt.placement.scaling import scaling
from pctt.profile.command import profile
from pctt.report import CURVES, Asking, Reporter, draw, print_json, say_error
from pctt.run import CHECKPOINT, FitResult, Trainer
from pctt.run import load as load_run
from pctt.typed import (
    FAILED,
    OK,
    SHAPES,
    USAGE,
    UsageError,
    assignments,
    configuration,
    elsewhere,
    load_data,
    override,
)
from pctt.variants import VARIANTS

try:
    from tyro.conf import arg as _ARG  # pyright: ignore[reportAssignmentType]
except ModuleNotFoundError:  # said by `main`

    def _ARG(**settings: Any) -> Any:
        return settings


CONFIG = "config.json"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        import tyro
    except ModuleNotFoundError:
        say_error('the pctt command needs tyro: pip install "pctt[cli]".')
        return FAILED
    commands = {
        "train": train,
        "eval": evaluate,
        "generate": generate,
        "recall": recall,
        "plan": plan,
        "profile": profile,
        "bench": bench,
        "dashboard": dashboard,
        "doctor": doctor,
    }
    try:
        _refuse_repeated(sys.argv[1:] if arguments is None else arguments)
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="pctt",
            description="Neural networks trained by predictive coding.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
        )
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        sys.stdout = open(os.devnull, "w")  # or the interpreter complains when it flushes
        return FAILED
    except UsageError as error:
        say_error(str(error))
        return USAGE
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        say_error(str(error))
        return FAILED


def _refuse_repeated(arguments: Sequence[str]) -> None:
    """Of an option that stands there twice only the last would count."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    for option, count in Counter(options).items():
        if count > 1:
            raise UsageError(
                f"{option} stands there {count} times; give it once, with all its values behind it."
            )


def train(
    what: str,
    /,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    algorithm: str | None = None,
    variant: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    set: tuple[str, ...] = (),
    out: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    fused: bool = False,
    json: bool = False,
) -> int:
    """Train a network; leaves config, metrics, checkpoint and curves in a run folder.

    Args:
        what: A preset (digits, digits_generative, digits_pcgraph, mnist, mnist_cnn, mnist_pcgraph) or the
            path of a TOML configuration.
        data: Data set to use instead of the configured one: digits, mnist, fashion_mnist.
        data_dir: Folder of the data files; else the environment variable PCTT_DATA.
        algorithm: pc, or backprop for the same network trained by backpropagation.
        variant: Settings of inference by name: pc, fixed, exact, zil, ipc, epc, gauss-seidel, nudge+, nudge-,
            nudge+-, ep, momentum, adam, heun, langevin, boosted; --set overrides them.
        backend: Where to run: reference (torch), emulated (a card, on the CPU) or tenstorrent.
        device: For reference a torch device such as cuda:0, for emulated a chip such as n150, for tenstorrent
            the number of a card; for the last two also mesh:2, two chips that share out each batch.
        epochs: Epochs of the whole run.
        batch_size: Samples per learning step.
        seed: Of weights, validation split and batch order.
        set: Any other setting, e.g. --set inference.rate=0.05 learning.rate=5e-4 (values as in TOML).
        out: Run folder; else runs/NAME-1, runs/NAME-2, ...
        resume: Go on with the run in --out, bit for bit as if it had never stopped.
        tensorboard: Mirror the metrics to tensorboard files in the run folder.
        fused: On a card, run every training step as one program of our own.
        json: Print JSON lines instead of text.
    """
    config = override(
        configuration(what),
        {
            "data.name": data,
            "data.data_dir": data_dir,
            **_variant_settings(variant),
            "training.algorithm": algorithm,
            "training.backend": backend,
            "training.device": device,
            "training.epochs": epochs,
            "training.batch_size": batch_size,
            "training.seed": seed,
            "training.tensorboard": tensorboard or None,
            "training.fused": fused or None,
            **assignments(set),
        },
    )
    folder = _run_folder(out, Path(what).stem, resume)
    report = Reporter(json)
    try:
        with ExitStack() as held:
            if resume and folder.is_dir():
                held.enter_context(checkpoint.hold(folder))
            if resume:
                config = _resumed_configuration(folder, config)
            dataset = load_data(config)
            trainer, is_new = _trainer(config, dataset, folder, resume)
            if is_new and not resume:  # the folder is made no earlier, so that a refusal leaves none
                checkpoint.make_folder(folder)
                held.enter_context(checkpoint.hold(folder))
                _refuse_used(folder)  # by a run that has begun, and ended, since it was chosen
            if is_new:
                _write_configuration(folder / CONFIG, config)
                trainer.save(folder)
            return _train(config, dataset, trainer, folder, report, is_new)
    except checkpoint.FolderInUse as error:
        raise UsageError(str(error)) from None
    except KeyboardInterrupt:  # training itself takes it as a request
        known = (folder / CONFIG).is_file()
        say_error("interrupted; " + (f"--resume goes on with {folder}." if known else "no run had begun."))
        return FAILED


def _variant_settings(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in VARIANTS:
        raise UsageError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}.")
    return {f"inference.{key}": to_dict(value) for key, value in VARIANTS[name].settings.items()}


def _train(
    config: RunConfig, dataset: Dataset, trainer: Trainer, folder: Path, report: Reporter, is_new: bool
) -> int:
    training, validation = split_validation(dataset.train, config.data.validation, config.training.seed)
    report.start(config, dataset, trainer, folder, len(training), is_new)
    metrics = folder / record.FILE_NAME
    if is_new and metrics.is_file():
        raise ValueError(
            f"{folder / CHECKPOINT} is gone and its record is not, so this run cannot be resumed; begin "
            "another one."
        )
    already = record.read(metrics)[-1:] if metrics.is_file() else []
    if already and already[0]["kind"] == "result" and trainer.progress.epoch >= config.training.epochs:
        if not _draw(folder, config):  # again, as it may have been killed while it drew
            return FAILED
        report.end(already[0], folder / CURVES, "this run was complete already")
        return OK
    # A run that was killed before its first record has the checkpoint of batch 0 and no file.
    begins = trainer.progress.step == 0 and not metrics.is_file()
    resume_after = None if begins else trainer.progress.step
    if resume_after is not None and not metrics.is_file():
        raise ValueError(f"{metrics} is gone, so this run cannot be resumed; begin another one.")
    with (
        record.Recorder(folder, config.training.tensorboard, resume_after) as recorder,
        _stop_on_signals(trainer),
    ):
        _record_place(recorder, trainer)
        validates = validation is not None and _classifies(config, trainer.net)
        outcome = trainer.fit(
            _clamped(config, trainer.net, training),
            config.training.epochs,
            _clamped(config, trainer.net, validation) if validation is not None and validates else None,
            callbacks=[recorder.log_record, report.event, _say_setback],
            save_to=folder,
            save_every=config.training.checkpoint_every,
        )
        result: dict[str, Any] = {}
        if outcome.status.ok:
            outcome, result = _tested(config, trainer, dataset, outcome)
        if result:
            recorder.log("result", **result)
        elif outcome.status is not Status.STOPPED:
            failed = {"status": outcome.status.name, "message": outcome.message}
            recorder.log("failed", step=outcome.steps + 1, **failed)
    drawn = _draw(folder, config)
    if not outcome.status.ok:
        report.failed(outcome, folder)
    if not outcome.status.ok or not drawn:
        return FAILED
    report.end(result, folder / CURVES if (folder / CURVES).is_file() else None, None)
    return OK


def _draw(folder: Path, config: RunConfig) -> bool:
    """Whether the picture could be written, where there is something to draw it with."""
    try:
        draw(folder, config)
        return True
    except OSError as error:
        with suppress(OSError):
            (folder / CURVES).unlink()  # half of it, if any
        reason = error.strerror or str(error)
        say_error(
            f"{folder / CURVES} was not written ({reason}); {checkpoint.remedy(error)}; the run is kept."
        )
        return False


def _say_setback(kind: str, fields: dict[str, Any]) -> None:
    if kind in ("skipped", "halved"):
        fault = (
            f"batch {fields['step']}: {Status[fields['status']].value}, worst in layer {fields['layer']!r}"
        )
        done = (
            "skipped" if kind == "skipped" else f"inference.rate is {fields['inference_rate']:g} from now on"
        )
        say_error(f"{fault}; {done}.")


def _record_place(recorder: record.Recorder, trainer: Trainer) -> None:
    """A record "backend" where the run begins, and where it goes on elsewhere."""
    place = trainer.place()
    known = [entry for entry in record.read(recorder.path) if entry["kind"] == "backend"]
    if not known or any(known[-1].get(name) != value for name, value in place.items()):
        recorder.log("backend", step=trainer.progress.step + 1, **place)


def _tested(
    config: RunConfig, trainer: Trainer, dataset: Dataset, outcome: FitResult
) -> tuple[FitResult, dict[str, Any]]:
    """The outcome and the result of a fit that ended well; no result if the device fails now."""
    try:
        accuracy = _accuracy(config, trainer, dataset.test)
    except DeviceLost as error:
        return replace(outcome, status=Status.DEVICE_LOST, message=f"evaluating: {error}."), {}
    return outcome, {
        "test_accuracy": accuracy,
        "test_samples": len(dataset.test),
        "epochs": outcome.epochs,
        "step": outcome.steps,
    }


def evaluate(
    run: Path,
    /,
    *,
    data_dir: str | None = None,
    backend: str | None = None,
    device: str | None = None,
    json: bool = False,
) -> int:
    """Accuracy of a trained run on the test data of its data set.

    Args:
        run: Run folder that `pctt train` wrote.
        backend: Where to run: reference, emulated or tenstorrent; else that of the run.
        device: Device of the backend, as for `pctt train`; else that of the run if the backend is too.
        data_dir: Folder of the data files; else the one of the run, else PCTT_DATA.
        json: Print one JSON object instead of text.
    """
    config = override(_saved_configuration(run), {"data.data_dir": data_dir})
    config = elsewhere(config, backend, device)
    trainer = _loaded(run, config)
    dataset = load_data(config)
    accuracy = _accuracy(config, trainer, dataset.test)
    if accuracy is None:
        raise ValueError(
            f"{run} has learned pictures without their classes, so there is nothing to be right about; try "
            f"`pctt generate {run}` or `pctt recall {run}`."
        )
    fields = {
        "test_accuracy": accuracy,
        "test_samples": len(dataset.test),
        "data": dataset.name,
        "epochs": trainer.progress.epoch,
        "step": trainer.progress.step,
        **trainer.place(),
    }
    if json:
        print_json("result", fields)
    else:
        print(
            f"{run}: test accuracy {accuracy:.2%} on {len(dataset.test)} samples of {dataset.name}, "
            f"after {trainer.progress.epoch} epochs; {where(trainer)}."
        )
    return OK


def generate(
    run: Path,
    /,
    *,
    classes: str | None = None,
    prior: bool = False,
    langevin: bool = False,
    count: int = 10,
    steps: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Pictures that a trained run predicts: of classes, or of no class in particular.

    Args:
        run: Run folder that `pctt train` wrote, of a network that predicts pictures.
        classes: Numbers of classes, such as 0,1,2; else all, where the network has learned classes.
        prior: No class: what the network expects by itself; where classes are causes, classes at random.
        langevin: Draw samples by Langevin dynamics instead of the most probable picture.
        count: Pictures of each class; with --prior pictures in all.
        steps: Inference steps; else 500, with --langevin 1000.
        seed: Of the noise and of classes drawn at random.
        data_dir: Folder of the data files; else the one of the run, else PCTT_DATA.
        out: The .png to draw; else generated.png in the run folder.
        json: Print one JSON object instead of text.
    """
    config, trainer, dataset, roles = _asked(run, data_dir)
    out = _picture_path(out, run / "generated.png")
    _at_least_one("count", count)
    ask.refuse_unless_generative(trainer.net, roles)
    if prior and classes is not None:
        raise UsageError("--prior and --classes exclude each other; drop one.")
    wanted = _classes(classes, prior, count, seed, config, trainer.net, dataset)
    num_columns = min(count, 10) if prior or wanted is None else count
    num_steps = steps if steps is not None else (1000 if langevin else 500)
    rate = trainer.inference.rate
    asking = (
        Inference(num_steps, rate, dynamics="langevin")
        if langevin
        else Inference(num_steps, rate, dynamics="momentum", momentum=0.9)
    )
    total = count if wanted is None else len(wanted)
    with Asking(total, run.name, json) as progress:
        pictures = ask.generate(
            trainer.net, trainer.weights, roles, wanted, total, asking, seed, progress.update
        )
    distances = torch.cdist(pictures, dataset.train.inputs.to(pictures.dtype)).amin(-1)
    rows = pictures.split(num_columns)
    names = [""] * len(rows)
    if wanted is not None and not prior:
        names = [str(int(wanted[number * num_columns])) for number in range(len(rows))]
    plots.draw_pictures(out, list(zip(names, rows, strict=True)), dataset.shape)
    fields = {
        "pictures": total,
        "classes": None if wanted is None else sorted(set(wanted.tolist())),
        "dynamics": asking.dynamics,
        "steps": num_steps,
        "nearest_squared_error": float(distances.square().mean()) / pictures.shape[1],
        "out": str(out),
    }
    if json:
        print_json("result", fields)
    else:
        print(
            f"{total} pictures in {out}; squared error per pixel to the nearest training picture "
            f"{fields['nearest_squared_error']:.4f}"
        )
    return OK


def recall(
    run: Path,
    /,
    *,
    from_: Annotated[str, _ARG(name="from")] = "upper",
    count: int = 10,
    noise: float = 0.3,
    steps: int = 500,
    seed: int = 0,
    training: bool = False,
    data_dir: str | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """What a trained run makes of a part of a picture, or of a noisy one.

    Args:
        run: Run folder that `pctt train` wrote, of a network that predicts pictures.
        from_: What is given: noise, upper, lower, left, right, or a file with a mask: .npy, or a .png whose
            bright pixels are known.
        count: Pictures, from the test data.
        noise: Standard deviation of the noise.
        steps: Inference steps.
        seed: Of the noise.
        training: Take pictures that were trained on.
        data_dir: Folder of the data files; else the one of the run, else PCTT_DATA.
        out: The .png to draw: original, given, recalled; else recalled.png in the run folder.
        json: Print one JSON object instead of text.
    """
    config, trainer, dataset, roles = _asked(run, data_dir)
    out = _picture_path(out, run / "recalled.png")
    _at_least_one("count", count)
    if not noise >= 0.0:
        raise UsageError(f"--noise must be at least 0, got {noise}.")
    ask.refuse_unless_generative(trainer.net, roles)
    known = None if from_ == "noise" else _mask(from_, dataset.shape)
    split = dataset.test
    if training:
        split, _ = split_validation(dataset.train, config.data.validation, config.training.seed)
    originals = split.inputs[:count]
    if known is None:
        draws = torch.randn(originals.shape, generator=torch.Generator().manual_seed(seed))
        given = originals + noise * draws
    else:
        given = originals * known
    asking = Inference(steps, trainer.inference.rate, dynamics="momentum", momentum=0.9)
    with Asking(len(originals), run.name, json) as progress:
        recalled = ask.complete(
            trainer.net, trainer.weights, roles, given, known, asking, seed, progress.update
        )
    mean = dataset.train.inputs.mean(0).expand_as(originals)
    if known is not None:
        mean = torch.where(known, originals, mean)

    def error(pictures: Tensor) -> float:
        return float((pictures - originals).square().mean())

    fields = {
        "pictures": len(originals),
        "from": from_,
        "steps": steps,
        "given_squared_error": error(given),
        "recalled_squared_error": error(recalled),
        "mean_picture_squared_error": error(mean),
        "out": str(out),
    }
    rows = [("original", originals), ("given", given), ("recalled", recalled)]
    plots.draw_pictures(out, rows, dataset.shape)
    if json:
        print_json("result", fields)
    else:
        print(
            f"squared error per pixel: given {error(given):.4f}, recalled {error(recalled):.4f}, with the "
            f"mean picture {error(mean):.4f}; {len(originals)} pictures in {out}"
        )
    return OK


def _asked(run: Path, data_dir: str | None) -> tuple[RunConfig, Trainer, Dataset, ask.Roles]:
    config = override(_saved_configuration(run), {"data.data_dir": data_dir})
    trainer = load_run(run)
    return config, trainer, load_data(config), _roles(config, trainer.net)


def _picture_path(asked: Path | None, otherwise: Path) -> Path:
    path = asked or otherwise
    if path.suffix.lower() != ".png":
        raise UsageError(f"a picture's name must end in .png, got {path.name!r}; rename it.")
    return path


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"--{name} must be at least 1, got {value}.")


def _classes(
    asked: str | None,
    prior: bool,
    count: int,
    seed: int,
    config: RunConfig,
    net: Network,
    dataset: Dataset,
) -> Tensor | None:
    """The class of each picture to generate, or None for no class."""
    labels = config.node_of("labels", net)
    if prior and labels is not None and labels not in net.names:
        return torch.randint(dataset.num_classes, (count,), generator=torch.Generator().manual_seed(seed))
    if prior or (labels is None and asked is None):
        return None
    if labels is None:
        raise UsageError("this run has not learned classes; use --prior.")
    words = [str(number) for number in range(dataset.num_classes)] if asked is None else asked.split(",")
    if not all(word.strip().isdigit() and int(word) < dataset.num_classes for word in words):
        raise UsageError(
            f"--classes takes numbers from 0 to {dataset.num_classes - 1}, such as 0,1,2; got {asked!r}."
        )
    return torch.tensor([int(word) for word in words]).repeat_interleave(count)


def _mask(name: str, shape: tuple[int, int, int]) -> Tensor:
    """bool [units], True where a pixel is known."""
    if name in ("upper", "lower", "left", "right"):
        return ask.parts_known(name, shape)
    path = Path(name)
    if path.suffix not in (".npy", ".png"):
        raise UsageError(
            "--from must be noise, upper, lower, left, right or the path of a .npy or .png mask, got "
            f"{name!r}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"no mask {path}; give the path of a .npy or .png file.")
    if path.suffix == ".npy":
        values = np.load(path, allow_pickle=False) > 0
    else:
        from PIL import Image

        values = np.asarray(Image.open(path).convert("L")) > 127
    channels, height, width = shape
    units = channels * height * width
    if values.size not in (units, height * width):
        raise UsageError(f"{path} has {values.size} pixels, pictures have {height} x {width}.")
    known = torch.from_numpy(values.copy()).flatten()
    return known if known.numel() == units else known.repeat(channels)


def plan(
    what: str,
    /,
    *,
    chip: Annotated[str, _ARG(help=f"{', '.join(CHIPS)}; no card is needed.")] = "n150",
    box: Annotated[str | None, _ARG(help=f"Several chips, in the fused kernel: {', '.join(BOXES)}.")] = None,
    batch_size: int | None = None,
    set: tuple[str, ...] = (),
    picture: Path | None = None,
    fused: bool = False,
    json: bool = False,
) -> int:
    """Where the layers of a network go on a chip, whether they fit, and the times predicted for it.

    Args:
        what: A preset (digits, mnist) or the path of a TOML configuration, as for `pctt train`.
        chip: One of the chips that plans are made for; no card is needed.
        box: Several chips instead of one: how many the network needs, and what a step would take on them.
        batch_size: Samples per learning step.
        set: Any other setting, e.g. --set inference.num_steps=10 (values as in TOML).
        picture: An .svg or .png to draw the plan into.
        fused: As one program of our own would run it, not as operations of TT-NN.
        json: Print one JSON object instead of text.
    """
    config = override(configuration(what), {"training.batch_size": batch_size, **assignments(set)})
    if chip not in CHIPS:
        raise UsageError(f"chip must be one of {', '.join(CHIPS)}, got {chip!r}.")
    if box is not None and box not in BOXES:
        raise UsageError(f"box must be one of {', '.join(BOXES)}, got {box!r}.")
    if box is not None and picture is not None:
        raise UsageError("a picture shows one chip; drop --box or --picture.")
    if picture is not None and picture.suffix.lower() not in SUFFIXES:
        raise UsageError(f"a picture's name must end in .svg or .png, got {picture.name!r}; rename it.")
    net = config.network(SHAPES.get(config.data.name) or load_data(config).shape)
    size, rules = config.training.batch_size, (config.inference, config.learning, config.precision)
    if box is not None:
        planned = scaling(net, box, size, *rules)
        if json:
            print_json("plan", planned.to_dict())
        else:
            print(planned.as_text(), end="")
        return OK
    if fused:
        placement = fused_placement(net, chip, config.training.cores_per_layer, size, *rules)
        planned = FusedReport(net, placement, placement.cost(), size, config.inference.num_steps)
    else:
        planned = make_plan(net, chip, size, *rules)
    if picture is not None:
        save_picture(planned.floor_plan(), picture)
    if json:
        print_json("plan", planned.to_dict())
    else:
        print(planned.as_text(), end="")
        if picture is not None:
            print(f"picture in {picture}")
    return OK


def doctor(*, data_dir: str | None = None, json: bool = False) -> int:
    """What this machine can do, what is missing, and the command that would add it.

    Args:
        data_dir: Folder to look for data in; else the environment variable PCTT_DATA.
        json: Print one JSON object a line.
    """
    findings = examine(data_dir)
    for finding in findings:
        if json:
            print_json("finding", finding.__dict__)
        else:
            print(f"{'ok     ' if finding.ok else 'missing'}  {finding.name:<14} {finding.detail}")
            if finding.fix:
                print(f"{'':23}{finding.fix}")
    return OK if all(finding.ok for finding in findings if finding.needed) else FAILED


# --- configuration ------------------------------------------------------------------------------------------


def _write_configuration(path: Path, config: RunConfig) -> None:
    text = json.dumps(to_dict(config), indent=2) + "\n"
    checkpoint.replace_file(path, text.encode(), "configuration")


def _saved_configuration(folder: Path) -> RunConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no run ({CONFIG} is missing); give the folder that `pctt train` wrote."
        )
    try:
        return from_dict(RunConfig, checkpoint.parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {checkpoint.one_line(error)}") from None


FREE_ON_RESUME = (
    "data.data_dir",
    "training.epochs",
    "training.backend",
    "training.device",
    "training.tensorboard",
    "training.fused",
    "training.cores_per_layer",
    "training.on_divergence",
    "precision",
)
"""Settings that may differ when a run goes on: where it runs, how long, what it reports, and whether it stops
where it diverges.
"""


def _resumed_configuration(folder: Path, asked: RunConfig) -> RunConfig:
    """The configuration of the run in `folder`, which must be the one asked for but for FREE_ON_RESUME."""
    saved, wanted = to_dict(_saved_configuration(folder)), to_dict(asked)
    for key in FREE_ON_RESUME:
        table, _, name = key.rpartition(".")
        kept, asked_for = (saved[table], wanted[table]) if table else (saved, wanted)
        kept.pop(name, None)
        if name in asked_for:
            kept[name] = asked_for[name]
    if saved != wanted:
        place, then, now = _first_difference(saved, wanted)
        raise UsageError(
            f"the run in {folder} has {place} = {then!r}, not {now!r}; give the settings it was begun with, "
            "or choose another --out."
        )
    return from_dict(RunConfig, saved)


def _first_difference(a: Any, b: Any, place: str = "") -> tuple[str, Any, Any]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *b]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{place}.{key}" if place else key)
    return place, a, b


def _run_folder(out: Path | None, name: str, resume: bool) -> Path:
    if out is None:
        if resume:
            raise UsageError("--resume goes on with the run in --out; name that folder.")
        return free_folder(name)
    if not resume:
        _refuse_used(out)
    return out


def _refuse_used(folder: Path) -> None:
    """What a run leaves that was killed before it had a configuration does not count."""
    if not folder.exists():
        return
    own = re.compile(rf"{re.escape(checkpoint.LOCK)}|\.{re.escape(CONFIG)}\.\d+\.tmp")
    if not folder.is_dir() or any(not own.fullmatch(entry.name) for entry in folder.iterdir()):
        raise UsageError(
            f"{folder} exists already; add --resume to go on with the run in it, or choose another --out."
        )


def _loaded(folder: Path, config: RunConfig) -> Trainer:
    """The trainer of a run, where its configuration says."""
    where = config.training
    return load_run(folder, where.backend, where.device, config.precision, where.fused, where.cores_per_layer)


def _trainer(config: RunConfig, dataset: Dataset, folder: Path, resume: bool) -> tuple[Trainer, bool]:
    """The trainer of a run, and whether the run begins here."""
    settings = config.training
    if resume and (folder / CHECKPOINT).is_file():
        trainer = _loaded(folder, config)
        trainer.on_divergence = settings.on_divergence
        if trainer.progress.epoch > settings.epochs:
            done = trainer.progress.epoch
            raise UsageError(f"the run in {folder} has done {done} epochs; give --epochs of at least {done}.")
        return trainer, False
    try:
        net = config.network(dataset.shape, dataset.num_classes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    _check_roles(config, net, dataset)
    trainer = Trainer(
        net,
        config.inference,
        config.learning,
        weights=init(net, settings.seed, config.init.scheme, config.init.gain),
        backend=settings.backend,
        device=settings.device,
        seed=settings.seed,
        batch_size=settings.batch_size,
        algorithm=settings.algorithm,
        precision=config.precision,
        clamped=tuple(config.clamp) if config.clamp is not None else None,
        fused=settings.fused,
        cores_per_layer=settings.cores_per_layer,
        on_divergence=settings.on_divergence,
    )
    return trainer, True


# --- which node holds what ----------------------------------------------------------------------------------


def _roles(config: RunConfig, net: Network) -> ask.Roles:
    images, labels = config.node_of("images", net), config.node_of("labels", net)
    assert images is not None
    zeros = tuple(name for name, role in (config.clamp or {}).items() if role == "zeros")
    return ask.Roles(images, labels, zeros)


def _check_roles(config: RunConfig, net: Network, dataset: Dataset) -> None:
    roles = _roles(config, net)
    widths = dict(zip(net.nodes, net.widths, strict=True))
    if roles.labels is not None and widths[roles.labels] != dataset.num_classes:
        what = "the last layer" if config.clamp is None else f"node {roles.labels!r}"
        raise UsageError(
            f"{what} has {widths[roles.labels]} units, {dataset.name} has {dataset.num_classes} classes."
        )
    pixels = dataset.train.inputs.shape[1]
    if widths[roles.images] != pixels:
        raise UsageError(
            f"node {roles.images!r} has {widths[roles.images]} units, pictures of {dataset.name} have "
            f"{pixels} pixels."
        )


def _clamped(config: RunConfig, net: Network, split: Split) -> Split | dict[str, Tensor]:
    """What training clamps."""
    if config.clamp is None:
        return split
    values = {
        "images": split.inputs,
        "labels": split.labels,
        "zeros": torch.zeros(len(split), 1),
    }
    given = {name: values[role] for name, role in config.clamp.items()}
    roles = _roles(config, net)
    if roles.labels is not None:
        classes = net.widths[net.node_index(roles.labels)]
        given[roles.labels] = torch.nn.functional.one_hot(split.labels, classes).float()
    return given


def _classifies(config: RunConfig, net: Network) -> bool:
    """Whether the trainer by itself measures accuracy: pictures at its input, classes at its output."""
    roles = _roles(config, net)
    return (roles.images, roles.labels) == (net.input_name, net.output)


def _accuracy(config: RunConfig, trainer: Trainer, split: Split) -> float | None:
    """Fraction of right classes; None where the network has learned none."""
    net = trainer.net
    if _classifies(config, net):
        return trainer.evaluate(_clamped(config, net, split))
    roles = _roles(config, net)
    if roles.labels is None:
        return None
    asking = Inference(200, trainer.inference.rate, dynamics="momentum", momentum=0.9)
    found = ask.classify(net, trainer.weights, roles, split.inputs, asking)
    return float((found.argmax(-1) == split.labels).double().mean())


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Generator[None]:
    """Ctrl-C and SIGTERM end the run after the batch it is at, with a checkpoint; a second one, of either
    kind, ends it at once.
    """

    def request(number: int, frame: object) -> None:
        trainer.stop()
        for either in (signal.SIGINT, signal.SIGTERM):
            signal.signal(either, signal.SIG_DFL)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
