"""The driver: goes over the data, asks the engine for one batch after the other, records, stops, saves and
resumes.

A run is determined by its configuration and seed. The order of the batches of an epoch is drawn from (seed,
epoch), so that the counters in `Progress` are all that a resumed run needs beside weights and learning state
to continue bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pctt import backprop, checkpoint, describe
from pctt._checks import require_count, require_one_of
from pctt.backends import BackendUnavailable, DeviceLost
from pctt.backends.devices import mode
from pctt.backends.placed import Placed
from pctt.backends.precision import PrecisionPolicy
from pctt.backends.reference import Reference
from pctt.config import ALGORITHMS, ON_DIVERGENCE, from_dict, to_dict
from pctt.engine import Engine, Relaxation, Status
from pctt.feed import Batch, Data, Feed, Reader, batch_order, derived_seed, feed
from pctt.inference import Inference
from pctt.inference.settings import noise_scale
from pctt.initialisers import init
from pctt.learning import Adam, Learning
from pctt.network import Network, Weights, check_weights
from pctt.program import INFERENCE_RATE, NOISE

CHECKPOINT = "checkpoint.safetensors"
EVALUATION_BATCH = 1000
MOST_HALVINGS = 10  # a thousandth of the rate: what diverges there has another cause
MOST_STEPS = 1_000_000  # each takes some memory, and a file may claim any number
MOST_SKIPPED = 100  # in a row, or a whole epoch of fewer batches

Callback = Callable[[str, dict[str, Any]], None]


@dataclass
class Progress:
    """Where a run is.

    epoch: epochs done.    batch: batches done of the next one.    step: learning steps done.
    energy: summed total energy of the samples of the epoch under way.    samples: their number.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    energy: float = 0.0
    samples: int = 0

    def __post_init__(self) -> None:
        for name in ("epoch", "batch", "step", "samples"):
            require_count(name, getattr(self, name))


@dataclass
class Setbacks:
    """What a run has done about batches that went wrong.

    halvings: of the inference rate.    skipped: batches, in all.    in_a_row: skipped since the last one that
    was learnt from.
    """

    halvings: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def __post_init__(self) -> None:
        for name in ("halvings", "skipped", "in_a_row"):
            require_count(name, getattr(self, name))
        if self.halvings > MOST_HALVINGS:
            raise ValueError(f"halvings must be at most {MOST_HALVINGS}, got {self.halvings}.")


@dataclass(frozen=True)
class FitResult:
    """How a fit ended.

    status: ok, or what stopped it.    message: that in a sentence, with advice.
    epochs, steps: done in all.    validation_accuracy: after the last epoch, fraction of 1, or None.
    """

    status: Status
    message: str
    epochs: int
    steps: int
    validation_accuracy: float | None

    def __repr__(self) -> str:
        return describe.fit_result(self)


class Trainer:
    """Trains a network, by predictive coding or as its backprop twin.

    net, inference, learning: what, how activities move, how weights move.
    weights: initial ones, else `init(net, seed)`.
    backend, device: where.    seed: of weights and batch order.    batch_size: samples per learning step.
    algorithm: "pc" or "backprop".    grouped: stack equal layers; the numbers are the same.
    precision: formats of the tensors on a card.
    fused: on a card, every training step is one program (docs/kernels.md).    cores_per_layer: its cores for
        each layer, None for as few as memory allows.
    clamped: the nodes that data are clamped to, by default the input and the output of the network. Others
        take data by name, `fit({node: values})`: of a generative model the images alone, say.
    on_divergence: what a batch does that diverges or is not finite: "stop" the run, "skip_batch" without
        learning from it, or "halve_rate" of inference for good and try it again.

    Raises ValueError for what does not fit together or does not fit the chip, BackendUnavailable where the
    backend cannot run. On ttnn's mock device, which computes nothing, an `Engine` can be built, no Trainer.

    >>> trainer = Trainer(net, Inference(num_steps=20, rate=0.1), Adam(1e-3))  # doctest: +SKIP
    >>> trainer.fit((inputs, labels), epochs=5)  # doctest: +SKIP
    """

    def __init__(
        self,
        net: Network,
        inference: Inference | None = None,
        learning: Learning | None = None,
        *,
        weights: Weights | None = None,
        backend: str = "reference",
        device: str | int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        algorithm: str = "pc",
        grouped: bool = True,
        precision: PrecisionPolicy | None = None,
        clamped: Sequence[str] | None = None,
        fused: bool = False,
        cores_per_layer: int | None = None,
        on_divergence: str = "stop",
    ) -> None:
        require_count("seed", seed)
        require_count("batch_size", batch_size, least=1)
        require_one_of("algorithm", algorithm, ALGORITHMS)
        require_one_of("on_divergence", on_divergence, ON_DIVERGENCE)
        if algorithm == "backprop" and any(layer.learns_variance for layer in net.layers):
            raise ValueError(
                "a learned variance follows the errors of predictive coding, and algorithm='backprop' has "
                "none; give its layer a precision without `learned`."
            )
        if algorithm == "backprop" and net.backward is not None:
            raise ValueError("backpropagation trains no backward layers; drop them, or use PC.")
        if algorithm == "pc" and inference is not None and inference.initial == "carried":
            raise ValueError(
                "initial='carried' goes on from the samples of the batch before, and a Trainer shuffles "
                "them; use an Engine for streams, or another initial."
            )
        if backend == "tenstorrent" and mode() == "mock":
            raise BackendUnavailable(
                "ttnn's mock device computes nothing, so it can neither train nor evaluate; unset "
                "TT_METAL_MOCK_CLUSTER_DESC_PATH to use a card, or use backend='emulated'."
            )
        self.net = net
        self.inference = inference or Inference()
        self.learning = learning or Adam()
        self.seed = seed
        self.batch_size = batch_size
        self.algorithm = algorithm
        self.progress = Progress()
        self.clamped = tuple(clamped) if clamped is not None else (net.input_name, net.output)
        if algorithm == "backprop" and (
            net.sources_ahead or not set(net.nodes[: net.num_roots]) <= set(self.clamped)
        ):
            raise ValueError(
                "backpropagation goes from clamped inputs to clamped outputs through a graph without cycles; "
                "clamp all inputs, or use PC."
            )
        weights = weights if weights is not None else init(net, seed)
        self.engine = Engine(
            net,
            weights,
            self.inference if algorithm == "pc" else Inference(num_steps=0),
            clamped=self.clamped,
            learning=self.learning,
            backend=backend,
            device=device,
            grouped=grouped,
            precision=precision,
            batch_size=batch_size,
            fused=fused,
            cores_per_layer=cores_per_layer,
        )
        self._stop_requested = False
        self._spoilt = False  # whether the weights have moved by the batch that went wrong
        self._asking: Engine | None = None  # relaxes with the input alone clamped
        self.on_divergence = on_divergence
        self.setbacks = Setbacks()
        self._check_on_divergence()

    def __repr__(self) -> str:
        return describe.trainer(self)

    @property
    def weights(self) -> Weights:
        """A copy of the weights."""
        return self.engine.weights()

    def place(self) -> dict[str, Any]:
        """Where it computes, as the record says it: backend, device in words, and on a card the precision."""
        backend = self.engine.backend
        if isinstance(backend, Placed):
            across, down = backend.grid
            device = f"{backend.chip.name} with {across}x{down} cores"
            if backend.num_chips > 1:
                device = f"{backend.num_chips} chips, each {device}"
            if backend.name == "tenstorrent":
                device = f"{mode()}, {device}"
            precision = {**to_dict(backend.policy), "fidelity": backend.fidelity}
            return {"backend": backend.name, "device": device, "precision": precision}
        device = str(backend.device) if isinstance(backend, Reference) else None
        return {"backend": backend.name, "device": device, "precision": None}

    @property
    def _in_whole_steps(self) -> bool:
        """Whether inference and learning are one sequence on the backend, judged after both."""
        inference = self.inference
        judged_between = inference.tolerance is not None or inference.weights_at == "every_step"
        return self.engine.backend.whole_steps and not judged_between

    def _check_on_divergence(self) -> None:
        """Raises ValueError where a batch cannot be undone or there is no rate to halve."""
        if self.on_divergence == "stop":
            return
        if self.algorithm == "backprop":
            if self.on_divergence == "halve_rate":
                raise ValueError(
                    "on_divergence='halve_rate' halves the rate of inference, and algorithm='backprop' has "
                    "none; use skip_batch or stop."
                )
            return
        moving = "with weights_at='every_step'" if self.inference.weights_at == "every_step" else None
        moving = "in the fused kernel" if self._in_whole_steps else moving
        if moving is not None:
            raise ValueError(
                f"on_divergence={self.on_divergence!r} needs weights that wait until a batch is judged, and "
                f"{moving} they have moved by then; use on_divergence='stop'."
            )

    # --- training -------------------------------------------------------------------------------------------

    def fit(
        self,
        train_data: Data,
        epochs: int,
        validation: Data | None = None,
        callbacks: Sequence[Callback] = (),
        save_to: str | Path | None = None,
        save_every: int | None = None,
    ) -> FitResult:
        """Trains until `epochs` epochs have been done in all; a trainer that has done some goes on from
        there.

        train_data, validation: a Split or (inputs [N, D], labels [N] or targets [N, units]), tensors or
        arrays; or {node: [N, units] or [N, *shape]} of all clamped nodes.
        callbacks: called as callback(kind, fields) with the records "batch", "epoch" and "trajectory", and
        where `on_divergence` says so "skipped" and "halved", of docs/runs.md.
        save_to: folder for a checkpoint after every epoch, and after every `save_every` batches.

        Divergence and NaN end the run before they reach the weights, unless `on_divergence` has it go on;
        look at the result's status. Weights that an update made NaN or infinite end it before they reach a
        checkpoint. A device that fails ends it too, with DEVICE_LOST: what this trainer held there is gone,
        the checkpoint is not.
        Raises ValueError for data that do not fit the network.
        """
        require_count("epochs", epochs)
        data = self._feed(train_data)
        held_out = self._feed(validation) if validation is not None else None
        try:
            return self._fit(data, held_out, epochs, callbacks, save_to, save_every)
        except DeviceLost as error:
            lost = "what was learnt since the last checkpoint is lost"
            message = f"after batch {self.progress.step}: {error}; {lost}."
            return self._result(Status.DEVICE_LOST, message, None)
        finally:
            self._stop_requested = False  # and not before: a stop asked for while data are prepared counts

    def _fit(
        self,
        data: Feed,
        held_out: Feed | None,
        epochs: int,
        callbacks: Sequence[Callback],
        save_to: str | Path | None,
        save_every: int | None,
    ) -> FitResult:
        num_batches = data.num_batches
        progress, setbacks, accuracy, names = self.progress, self.setbacks, None, self.net.layer_names
        self._check_on_divergence()  # once more, since `load` sets it afterwards
        if progress.epoch < epochs and progress.batch >= max(1, num_batches):
            raise ValueError(
                f"this run stopped after batch {progress.batch} of an epoch, and these data make only "
                f"{num_batches}; give it the data that it was begun with."
            )

        def emit(kind: str, **fields: Any) -> None:
            for callback in callbacks:
                callback(kind, fields)

        while progress.epoch < epochs:
            started = time.perf_counter()
            for batch, upcoming in _with_next(data.epoch(progress.epoch, progress.batch)):
                record = progress.batch == 0
                rate = self.learning.rate * self.learning.schedule.factor(progress.step, epochs * num_batches)
                self.engine.set_nudge(progress.step / max(1, epochs * num_batches - 1))
                relaxation = self._train_batch(batch.nodes, upcoming, rate, record)
                while not relaxation.status.ok and self._may_halve():
                    setbacks.halvings += 1
                    self._set_inference_rate()
                    fault = self._fault(relaxation)
                    emit("halved", step=progress.step + 1, **fault, inference_rate=self._inference_rate)
                    relaxation = self._train_batch(batch.nodes, upcoming, rate, record)
                learnt = relaxation.status.ok
                if not learnt and not self._may_skip(num_batches):
                    return self._failed(relaxation)
                progress.batch += 1
                progress.step += 1
                if learnt:
                    setbacks.in_a_row = 0
                    progress.energy += sum(relaxation.energies) * len(batch)
                    progress.samples += len(batch)
                    if record and relaxation.trajectory is not None:
                        emit(
                            "trajectory", step=progress.step, layers=list(names), energy=relaxation.trajectory
                        )
                    emit(
                        "batch",
                        step=progress.step,
                        epoch=progress.epoch + 1,
                        energies=dict(zip(names, relaxation.energies, strict=True)),
                        error_norms=dict(zip(names, relaxation.error_norms, strict=True)),
                        inference_steps=relaxation.num_steps,
                        learning_rate=rate,
                    )
                else:
                    setbacks.skipped += 1
                    setbacks.in_a_row += 1
                    emit("skipped", step=progress.step, epoch=progress.epoch + 1, **self._fault(relaxation))
                at_end = progress.batch == num_batches
                due = save_every is not None and progress.step % save_every == 0
                saving = save_to is not None and not at_end and (due or self._stop_requested)
                broken = _not_finite(self.engine.weights()) if saving or at_end else None
                if broken is not None:
                    where = f"after batch {progress.step} the weights of layer {broken!r} are NaN or infinite"
                    advice = f"lower learning.rate (now {self.learning.rate:g})"
                    message = f"{where}; go back to the last checkpoint, and {advice}."
                    return self._result(Status.NON_FINITE, message, None)
                if saving and save_to is not None:
                    self.save(save_to)
                if self._stop_requested and not at_end:
                    return self._result(Status.STOPPED, Status.STOPPED.value, accuracy)
            train_energy = progress.energy / progress.samples
            progress.epoch, progress.batch, progress.energy, progress.samples = progress.epoch + 1, 0, 0.0, 0
            accuracy = None
            if held_out is not None and self._classifies:
                accuracy = self._accuracy(held_out)
            emit(
                "epoch",
                epoch=progress.epoch,
                step=progress.step,
                train_energy=train_energy,
                validation_accuracy=accuracy,
                seconds=time.perf_counter() - started,
            )
            if save_to is not None:
                self.save(save_to)
            if self._stop_requested:
                return self._result(Status.STOPPED, Status.STOPPED.value, accuracy)
        return self._result(Status.COMPLETED, f"{progress.epoch} epochs done", accuracy)

    def stop(self) -> None:
        """Asks a running `fit`, or else the next one, to save and return after the batch it is at; for signal
        handlers and callbacks.
        """
        self._stop_requested = True

    def evaluate(self, data: Data) -> float:
        """Fraction of the samples whose largest predicted output is at their label (or at the largest
        target); of an output with positions the fraction of these.

        Raises ValueError where nothing can be right or wrong: the input or the output is not clamped.
        """
        if not self._classifies:
            raise ValueError(
                f"accuracy needs the data of {self.net.input_name!r} and {self.net.output!r}; this run "
                f"clamps {', '.join(self.clamped)}."
            )
        return self._accuracy(self._feed(data))

    def predict(self, inputs: Tensor) -> Tensor:
        """The output predicted from `inputs` [N, D] alone, [N, units]: one feedforward sweep; where the
        graph has none from the input, the output's activity after inference with the input clamped.
        """
        size = self.engine.backend.planned_rows or EVALUATION_BATCH
        return torch.cat([self._predict(part) for part in inputs.split(size)])

    def _predict(self, inputs: Tensor) -> Tensor:
        net = self.net
        if not net.sources_ahead and net.nodes[: net.num_roots] == (net.input_name,):
            return self.engine.predict(inputs)
        if self._asking is None:
            asking = replace(self.inference, nudge=None, weights_at="end", rate=self._inference_rate)
            self._asking = Engine(net, self.engine.weights(), asking, (net.input_name,))
        self._asking.load_weights(self.engine.weights())
        self._asking.relax({net.input_name: inputs})
        return self._asking.read_activity(net.output)

    def _train_batch(
        self, batch: dict[str, Tensor], upcoming: dict[str, Tensor] | None, rate: float, record: bool
    ) -> Relaxation:
        """One learning step. batch: {node: activities}.    upcoming: the next batch, to be sent ahead."""
        if self.algorithm == "backprop":
            gradients, losses, norms = backprop.differentiate(self.net, self.engine.weights(), batch)
            status = Status.COMPLETED if math.isfinite(sum(losses.values())) else Status.NON_FINITE
            names = self.net.layer_names  # of which the hidden ones have no error of their own
            energies, norms = ([part.get(name, 0.0) for name in names] for part in (losses, norms))
            relaxation = Relaxation(status, energies, norms, 0)
            self.engine.load_gradients(gradients)
        else:
            self.engine.set_learning(rate, self._learning_step)
            seed = derived_seed(self.seed, self.progress.step) if self.inference.is_random else 0
            whole = self._in_whole_steps and not record
            self._spoilt = whole or self.inference.weights_at == "every_step"
            relaxation = self.engine.relax(batch, record, upcoming, seed, learn=whole)
            if relaxation.status.ok and not whole:
                self.engine.learn(rate, self._learning_step)
            return relaxation
        if relaxation.status.ok:
            self.engine.update(rate, self._learning_step)
        return relaxation

    # --- batches that go wrong ------------------------------------------------------------------------------

    @property
    def _learning_step(self) -> int:
        """The number of the next learning step; Adam's counts no batches that were skipped."""
        return self.progress.step + 1 - self.setbacks.skipped

    @property
    def _inference_rate(self) -> float:
        return self.inference.rate * 0.5**self.setbacks.halvings

    def _set_inference_rate(self) -> None:
        """The halved rate for the engines, and the noise that goes with it."""
        halved = replace(self.inference, rate=self._inference_rate)
        for engine in (self.engine, self._asking):
            if engine is not None:
                engine.scalars.update({INFERENCE_RATE: halved.rate, NOISE: noise_scale(halved)})

    def _may_halve(self) -> bool:
        allowed = self.on_divergence == "halve_rate" and self.setbacks.halvings < MOST_HALVINGS
        return allowed and _not_finite(self.engine.weights()) is None

    def _may_skip(self, num_batches: int) -> bool:
        """Not a whole epoch, which would be no training and have no mean energy."""
        allowed = self.on_divergence == "skip_batch"
        allowed = allowed and self.setbacks.in_a_row + 1 < min(MOST_SKIPPED, num_batches)
        return allowed and _not_finite(self.engine.weights()) is None

    def _fault(self, relaxation: Relaxation) -> dict[str, str]:
        """What went wrong and where, for the record."""
        energies = dict(zip(self.net.layer_names, relaxation.energies, strict=True))
        worst = max(energies, key=lambda name: math.inf if math.isnan(energies[name]) else energies[name])
        return {"status": relaxation.status.name, "layer": worst}

    def _order(self, num_samples: int, epoch: int) -> Tensor:
        return batch_order(self.seed, epoch, num_samples)

    def _feed(self, data: Data) -> Feed:
        read = Reader(self.net, self.clamped, self.engine.dtype)
        return feed(data, read, self.batch_size, self.seed, self._order)

    @property
    def _classifies(self) -> bool:
        """Whether data have inputs and labels, so that there is something to be right about."""
        net = self.net
        return {net.input_name, net.output} <= set(self.clamped) and net.output_index in net.indices

    def _accuracy(self, data: Feed) -> float:
        right = total = 0
        last = self.net.shapes[self.net.output_index][-1]
        for batch in data.once():
            assert batch.labels is not None
            predicted = self.predict(batch.nodes[self.net.input_name])
            labels = predicted.view(len(batch), -1, last).argmax(-1).cpu()
            right += int((labels == batch.labels.view(labels.shape)).sum())
            total += labels.numel()
        return right / total

    def _result(self, status: Status, message: str, accuracy: float | None) -> FitResult:
        return FitResult(status, message, self.progress.epoch, self.progress.step, accuracy)

    def _failed(self, relaxation: Relaxation) -> FitResult:
        worst, broken = self._fault(relaxation)["layer"], _not_finite(self.engine.weights())
        advice = f"lower inference.rate (now {self._inference_rate:g})" + (
            "" if relaxation.status is Status.DIVERGED else f" or learning.rate (now {self.learning.rate:g})"
        )
        if self._spoilt:
            state = "the weights have moved with it, so go back to the last checkpoint"
        elif broken is not None:
            state = (
                f"the weights of {broken!r} were NaN or infinite before, so go back to the last checkpoint"
            )
        else:
            state = "the weights are those before this batch, and no checkpoint was written since"
        tried = ""
        if self.on_divergence == "halve_rate" and self.setbacks.halvings:
            tried = f", after {self.setbacks.halvings} halvings of the rate"
        if self.on_divergence == "skip_batch" and self.setbacks.in_a_row:
            tried = f", after {self.setbacks.in_a_row} batches in a row that were skipped"
        message = (
            f"batch {self.progress.step + 1}: {relaxation.status.value}, worst in layer {worst!r}{tried}; "
            f"{state}; {advice}."
        )
        return self._result(relaxation.status, message, None)

    # --- storage --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the weights, {"layer.key": tensor}, flat as torch's modules have theirs. Progress and the
        learning rule's moments are not in it; `save` writes those too.
        """
        trees = self.weights.items()
        return {f"{layer}.{key}": values for layer, tree in trees for key, values in tree.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the weights by what `state_dict` gave, of a network of the same layers and shapes.

        Raises ValueError for names that are missing or too many, shapes that do not fit, NaN.
        """
        trees = self.net.weight_shapes().items()
        names = {f"{layer}.{key}": (layer, key) for layer, tree in trees for key in tree}
        for what, odd in (("lacks", names.keys() - state.keys()), ("has", state.keys() - names.keys())):
            if odd:
                expected = "which this network has" if what == "lacks" else "which this network does not have"
                raise ValueError(f"the state {what} {min(odd)!r}, {expected}; give that of the same network.")
        weights: Weights = {}
        for name, (layer, key) in names.items():
            weights.setdefault(layer, {})[key] = torch.as_tensor(state[name])
        check_weights(self.net, weights)
        broken = _not_finite(weights)
        if broken is not None:
            raise ValueError(f"the weights of layer {broken!r} are NaN or infinite; give another state.")
        self.engine.load_weights(weights)

    def save(self, folder: str | Path) -> Path:
        """Writes weights, learning state and progress to `folder`; the file there before survives any
        failure.

        Raises CheckpointError where that cannot be written, ValueError for weights that are NaN or infinite.
        """
        path = Path(folder) / CHECKPOINT
        state = {"weights": self.engine.weights(), "learning": self.engine.learning_state()}
        broken = _not_finite(state["weights"])
        if broken is not None:
            raise ValueError(
                f"the weights of layer {broken!r} are NaN or infinite, so they are not written to {path}; "
                "load the last checkpoint."
            )
        checkpoint.make_folder(path.parent)
        tensors = checkpoint.flatten({name: tree for name, tree in state.items() if tree})
        counters = {"progress": asdict(self.progress), "setbacks": asdict(self.setbacks)}
        checkpoint.write(path, tensors, {**self._description(), **counters})
        return path

    def _description(self) -> dict[str, Any]:
        return {
            "network": to_dict(self.net),
            "inference": to_dict(self.inference),
            "learning": to_dict(self.learning),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "algorithm": self.algorithm,
            "clamped": list(self.clamped),
            "on_divergence": self.on_divergence,
        }


def load(
    folder: str | Path,
    backend: str = "reference",
    device: str | int | None = None,
    precision: PrecisionPolicy | None = None,
    fused: bool = False,
    cores_per_layer: int | None = None,
) -> Trainer:
    """The trainer that `save` wrote, ready to go on; on any backend, since a checkpoint does not depend on
    the one that wrote it.

    folder: what `Trainer.save` was given.
    backend, device, precision, fused, cores_per_layer: as of `Trainer`.

    Raises CheckpointError for a missing or damaged file or one of another layout, and what `Trainer` raises.
    """
    path = Path(folder) / CHECKPOINT
    tensors, description = checkpoint.read(path)

    def refused(error: Exception) -> checkpoint.CheckpointError:
        reason = checkpoint.one_line(error).rstrip(".")
        return checkpoint.CheckpointError(f"{path} does not hold a run of this version of pctt: {reason}.")

    try:
        tree = checkpoint.unflatten(tensors)
        net = from_dict(Network, description["network"], "network")
        check_weights(net, tree["weights"])
        broken = _not_finite(tree["weights"])
        if broken is not None:
            raise ValueError(f"the weights of layer {broken!r} are NaN or infinite")
        inference = from_dict(Inference, description["inference"], "inference")
        if inference.num_steps > MOST_STEPS:
            raise ValueError(f"inference.num_steps is {inference.num_steps}; at most {MOST_STEPS} are loaded")
        learning = from_dict(Learning, description["learning"], "learning")
        progress = from_dict(Progress, description["progress"], "progress")
        settings = {name: description[name] for name in ("seed", "batch_size", "algorithm")}
        require_count("seed", settings["seed"])
        require_count("batch_size", settings["batch_size"], least=1)
        require_one_of("algorithm", settings["algorithm"], ALGORITHMS)
        # Of files from before there was a choice these are absent.
        settings["clamped"] = from_dict(tuple[str, ...] | None, description.get("clamped"), "clamped")
        for name in settings["clamped"] or ():
            net.node_index(name)
        setbacks = from_dict(Setbacks, description.get("setbacks", {}), "setbacks")
        on_divergence = description.get("on_divergence", "stop")
        require_one_of("on_divergence", on_divergence, ON_DIVERGENCE)
    except MemoryError:
        raise
    except Exception as error:  # hostile values reach every class of a description, hence any exception
        raise refused(error) from None
    trainer = Trainer(
        net,
        inference,
        learning,
        weights=tree["weights"],
        backend=backend,
        device=device,
        precision=precision,
        fused=fused,
        cores_per_layer=cores_per_layer,
        **settings,
    )
    try:
        trainer.engine.load_learning_state(tree.get("learning", {}))
    except (TypeError, ValueError) as error:
        raise refused(error) from None
    trainer.progress, trainer.setbacks = progress, setbacks
    trainer.on_divergence = (
        on_divergence  # not earlier: where it could not train, a run can still be evaluated
    )
    if setbacks.halvings:
        trainer._set_inference_rate()  # pyright: ignore[reportPrivateUsage]
    return trainer


def _not_finite(weights: Weights) -> str | None:
    """The first layer whose weights are NaN or infinite."""
    for name, layer in weights.items():
        if not all(bool(torch.isfinite(values).all()) for values in layer.values()):
            return name
    return None


def _with_next(batches: Iterator[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor] | None]]:
    """Each batch with the nodes of the one after it, None after the last."""
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch, None if following is None else following.nodes
        batch = following
