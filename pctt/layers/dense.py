"""The dense layer and its local rules.

    t = f_in(x_{l-1}),   z = s t W + b,   mu_l = f_out(z)  (+ x_{l-1} with a skip)
    feedback to x_{l-1}:  f_in'(x_{l-1}) . (s v W')  (+ P e_l),   v = f_out'(z) . P e_l
    gradient:             dF/dW = -s t' v,   dF/db = -sum v

One of f_in and f_out is the identity: `activate="output"` is mu = f(x W + b) (Whittington-style networks in
torch, PCX), `activate="input"` is mu = f(x) W + b (Song et al., Bogacz; docs/mathematics.md, placements A and
P).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pctt._checks import require_count, require_finite_positive, require_one_of
from pctt.activations import activation
from pctt.describe import Concise
from pctt.energies import Categorical, Energy, Gaussian
from pctt.program import Slot

if TYPE_CHECKING:
    from pctt.state import AbstractState


@dataclass(frozen=True)
class Dense(Concise):
    """A fully connected layer that predicts `units` units, [B, units] from [B, in] by a weight [in, units].

    activation: identity, tanh, relu, leaky_relu, sigmoid, gelu, silu, hard_tanh; softmax at the last layer.
    bias: whether b is there.    activate: "output" for mu = f(x W + b), "input" for mu = f(x) W + b.
    energy: `Gaussian(...)` or, at the last layer, `Categorical()`, whose prediction is a softmax: with
        activate="output" name it (activation="softmax"), with activate="input" it is applied to f(x) W + b.
    scale: s, a constant factor on the weights, above 0 (`pctt.mupc` sets it).
    skip: add the activity below to the prediction; takes activate="input" and equal widths (He et al. 2016).
    name: of the layer and of the node it predicts; given by the network when None.

    Raises ValueError for values out of range; what contradicts the place in a network, `chain` refuses.
    """

    units: int
    activation: str = "identity"
    bias: bool = True
    activate: str = "output"
    energy: Energy = field(default_factory=Gaussian)
    scale: float = 1.0
    skip: bool = False
    name: str | None = None

    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        require_count("units", self.units, least=1)
        activation(self.activation)
        require_one_of("activate", self.activate, ("output", "input"))
        if not isinstance(self.energy, (Gaussian, Categorical)):
            raise ValueError(f"energy must be Gaussian(...) or Categorical(), got {self.energy!r}.")
        require_finite_positive("scale", self.scale)
        if not isinstance(self.skip, bool):
            raise ValueError(f"skip must be True or False, got {self.skip!r}.")
        if self.skip and (self.activate != "input" or isinstance(self.energy, Categorical)):
            raise ValueError(
                "skip adds the activity below to mu = f(x) W + b; use activate='input' and a Gaussian energy."
            )
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name must be a string, got {self.name!r}.")

    def check(self) -> None:
        """Raises ValueError where activation, placement and energy contradict each other."""
        if isinstance(self.energy, Categorical):
            if self.activate == "output" and self.activation != "softmax":
                raise ValueError(
                    "a categorical energy needs predictions that are distributions, got activation "
                    f"{self.activation!r}; use Dense({self.units}, 'softmax', energy=Categorical())."
                )
        else:
            self.energy.check(self.units)
        if self.activate == "input" and self.activation == "softmax":
            raise ValueError("softmax is a function of the last layer's output; use activate='output'.")

    @property
    def input_function(self) -> str:
        """Name of f_in, applied to the activity below."""
        return self.activation if self.activate == "input" else "identity"

    @property
    def output_function(self) -> str:
        """Name of f_out, applied to the drive x W + b."""
        if isinstance(self.energy, Categorical):
            return "softmax"
        return self.activation if self.activate == "output" else "identity"

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the weights that descend a gradient."""
        return ("weight", "bias") if self.bias else ("weight",)

    @property
    def learns_variance(self) -> bool:
        """Whether the variance of the node's error is learned."""
        return isinstance(self.energy, Gaussian) and self.energy.learned is not None

    def weight_shapes(self, fan_in: int) -> dict[str, tuple[int, ...]]:
        """Everything that learning changes: what descends a gradient, and a learned variance."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (fan_in, self.units)}
        if self.bias:
            shapes["bias"] = (self.units,)
        return {**shapes, "variance": (self.units,)} if self.learns_variance else shapes

    def anchor(self, at: AbstractState, index: int) -> None:
        """The prediction from the initial activities, which the deviations refer to."""
        activity = source = at.initial_activity(index - 1)
        if self.input_function != "identity":
            source = at.activate(at.node("anchor_source", index - 1), source, self.input_function)
        prediction = at.anchor(index)
        drive = prediction if self.output_function == "identity" else at.node("anchor_drive", index)
        bias = at.layer("bias", index) if self.bias else None
        at.product(drive, source, at.layer("weight", index), bias, self.scale)
        if self.output_function != "identity":
            at.activate(prediction, drive, self.output_function)
        if self.skip:
            at.add(prediction, prediction, activity)

    def predict(self, at: AbstractState, index: int, out: Slot, base: Slot, sign: float) -> Slot:
        """out = base + sign (mu - anchor): what the prediction has changed by since the anchor.

        With base d and sign -1 that is the error e = d - (mu - anchor); with base e and sign 1 the deviation
        that belongs to an error. Only the change of the source goes through the weights
        (docs/mathematics.md, "Low precision"). Returns the slot of mu, or `out` itself where one product
        gives that.
        """
        weight = at.layer("weight", index)
        if not at.has_moved(index - 1):  # only the weights have
            return self._predict_from_drift(at, index, out, base, sign)
        if self.input_function == "identity":
            change = at.change(index - 1)
        else:
            activity = at.add(
                at.node("activity", index - 1), at.anchor(index - 1), at.node("deviation", index - 1)
            )
            source = at.activate(at.node("source", index - 1), activity, self.input_function)
            anchor_source = at.node("anchor_source", index - 1)
            change = at.add(at.node("change", index - 1), source, anchor_source, scale=-1.0)
        if self.output_function == "identity":
            if at.drifting:
                shifted = at.product(at.node("shifted", index), change, weight, at.drift(index), self.scale)
                at.add(out, base, shifted, sign)
            else:
                at.product(out, change, weight, base, sign * self.scale)
            return at.add(out, out, at.shift(index - 1), sign) if self.skip else out
        drive = at.product(
            at.node("drive", index), change, weight, at.node("anchor_drive", index), self.scale
        )
        return self._activated(at, index, drive, out, base, sign)

    def _predict_from_drift(self, at: AbstractState, index: int, out: Slot, base: Slot, sign: float) -> Slot:
        if self.output_function == "identity":
            return at.add(out, base, at.drift(index), sign)
        return self._activated(at, index, at.drift(index), out, base, sign)

    def _activated(
        self, at: AbstractState, index: int, drive: Slot, out: Slot, base: Slot, sign: float
    ) -> Slot:
        prediction = at.activate(at.prediction(index), drive, self.output_function)
        if not at.floats(index):
            at.add(out, prediction, at.anchor(index), scale=-1.0)
            at.add(out, base, out, scale=sign)
        return prediction

    def feedback(
        self,
        at: AbstractState,
        index: int,
        source: int,
        into: Slot,
        addend: Slot | None,
        scale: float,
        scalar: str | None,
        signal: Slot | None = None,
    ) -> None:
        """into = addend + scale * scalars[scalar] * (vector-Jacobian product with respect to x_{l-1}).

        source: l - 1.    addend: `into` itself, or None for 0.
        signal: the vector, [B, units] of node l; None for P e_l.
        """
        del source
        signal = at.weighted_error(index) if signal is None else signal
        gated, weight = self.gate(at, index, signal), at.layer("weight", index)
        if self.input_function == "identity":
            at.product_transposed(into, gated, weight, addend, scale * self.scale, scalar)
            if self.skip:
                at.add(into, into, signal, scale, scalar)
            return
        drive, value = at.activity_and_source(index - 1)
        feedback = at.product_transposed(at.node("feedback", index - 1), gated, weight, None, self.scale)
        at.derivative(feedback, feedback, drive, value, self.input_function)
        if self.skip:
            at.add(feedback, feedback, signal)
        at.add_scaled(feedback, into, addend, scale, scalar)

    def gradient(self, at: AbstractState, index: int) -> None:
        """dF/dW and dF/db, averaged over the batch, into `weight_gradient` and `bias_gradient`."""
        gated = self.gate(at, index, at.weighted_error(index))
        if self.input_function == "identity":
            source = at.final_activity(index - 1)
        else:
            _, source = at.activity_and_source(index - 1)
        scalar = at.gradient_scalar
        at.outer(at.layer("weight_gradient", index), source, gated, scale=-self.scale, scalar=scalar)
        if self.bias:
            at.column_sum(at.layer("bias_gradient", index), gated, scale=-1.0, scalar=scalar)

    def logits(self, at: AbstractState, index: int) -> Slot:
        """z, which a softmax is taken of, where its current value stands."""
        drive, _ = at.drive_and_prediction(index)
        return drive

    def gate(self, at: AbstractState, index: int, signal: Slot) -> Slot:
        """v = f_out'(z) . signal; for a categorical energy dF/dz = -e already, so v = e."""
        if self.output_function == "identity" or isinstance(self.energy, Categorical):
            return signal
        drive, prediction = at.drive_and_prediction(index)
        return at.derivative(at.node("gated", index), signal, drive, prediction, self.output_function)
