"""What learning writes: weight gradients, their means over samples, and the rule that applies them."""

from __future__ import annotations

from collections.abc import Callable

from pctt.energies import Gaussian
from pctt.program import PER_SAMPLE, Instruction
from pctt.state import AbstractState


def gradients(at: AbstractState) -> None:
    """dF/dW of all layers."""
    at.written.clear()
    for index in at.indices:
        _gradient(at, index)


def _gradient(at: AbstractState, index: int) -> None:
    layer = at.net.rule(index)
    if index in at.reach.charged:
        if at.time >= at.inference.num_steps:
            at.set_error(index, at.node("error", index))  # may have been written from outside
        layer.gradient(at, index)
    else:
        for name in layer.trained:
            slot, addend = at.gradient(name, index)
            if addend is None:
                at.emit("fill", slot, scale=0.0)
    if layer.learns_variance:
        error = at.node("error", index)
        squares = at.emit("multiply", at.node("squares", index), error, error)
        at.column_sum(at.layer("variance_target", index), squares, 1.0, PER_SAMPLE)


def gradient_at_anchor(at: AbstractState, index: int) -> None:
    """The gradient of one layer whose source has not left its anchor yet."""
    at.at_anchor = True
    _gradient(at, index)
    at.at_anchor = False


def begin_samples(at: AbstractState) -> None:
    """Means over no samples yet."""
    _over_samples(at, lambda role, index: at.emit("fill", at.layer(f"mean_{role}", index), scale=0.0))


def add_sample(at: AbstractState) -> None:
    """Adds the gradients at this sample to their mean over all samples."""
    gradients(at)
    share = 1.0 / (at.inference.num_steps - at.inference.burn_in)

    def write(role: str, index: int) -> None:
        mean = at.layer(f"mean_{role}", index)
        at.add(mean, mean, at.layer(role, index), share)

    _over_samples(at, write)


def end_samples(at: AbstractState) -> None:
    """The means stand for the gradients."""
    _over_samples(at, lambda role, index: at.copy(at.layer(role, index), at.layer(f"mean_{role}", index)))


def keep(at: AbstractState) -> None:
    """Puts the gradients of the first of two relaxations aside."""
    _over_gradients(at, lambda role, index: at.copy(at.layer(f"kept_{role}", index), at.layer(role, index)))


def combine(at: AbstractState) -> None:
    """Adds them to those of the second, whose nudge has the other sign."""

    def write(role: str, index: int) -> None:
        gradient = at.layer(role, index)
        at.add(gradient, gradient, at.layer(f"kept_{role}", index))

    _over_gradients(at, write)


def _over_gradients(at: AbstractState, write: Callable[[str, int], object]) -> None:
    for index in at.net.owners:
        for name in at.net.rule(index).trained:
            write(f"{name}_gradient", index)


def _over_samples(at: AbstractState, write: Callable[[str, int], object]) -> None:
    """All that is averaged over the samples of Langevin dynamics."""
    _over_gradients(at, write)
    for index in at.indices:
        if at.net.layer(index).learns_variance:
            write("variance_target", index)


def update(at: AbstractState) -> None:
    """The learning step: the rule on what it trains, and learned variances."""
    assert at.learning is not None
    at.learning.write(at)
    for index in at.indices:
        layer = at.net.rule(index)
        if layer.learns_variance:
            assert isinstance(layer.energy, Gaussian)
            options = (
                ("adaptation", layer.energy.adaptation),
                ("scalar", float(layer.energy.learned == "scalar")),
            )
            out, target = (
                (at.layer("variance", index), at.precision(index)),
                at.layer("variance_target", index),
            )
            at.code.append(Instruction("variance", out, (target,), options=options))
