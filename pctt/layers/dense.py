"""The dense layer and its local rules.

    t = f_in(x_{l-1}),   z = t W + b,   mu_l = f_out(z)
    feedback to x_{l-1}:  f_in'(x_{l-1}) . (v W'),   v = f_out'(z) . P e_l
    gradient:             dF/dW = -t' v,   dF/db = -sum v

One of f_in and f_out is the identity: `activate="output"` is mu = f(x W + b) (Whittington-style networks in
torch, PCX), `activate="input"` is mu = f(x) W + b (Song et al., Bogacz; docs/mathematics.md, placements A and
P).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pctt._checks import require_count, require_one_of
from pctt.activations import activation
from pctt.energies import Categorical, Energy, Gaussian
from pctt.program import PER_SAMPLE, Slot

if TYPE_CHECKING:
    from pctt.assemble import Assembler


@dataclass(frozen=True)
class Dense:
    """A fully connected layer that predicts `units` units.

    activation: identity, tanh, relu, leaky_relu, sigmoid, gelu, silu, hard_tanh; softmax at the last layer.
    bias: whether b is there.    activate: "output" for mu = f(x W + b), "input" for mu = f(x) W + b.
    energy: `Gaussian(precision)` or, at the last layer, `Categorical()`, whose prediction is a softmax: with
    activate="output" name it (activation="softmax"), with activate="input" it is applied to f(x) W + b.
    name: of the layer and of the node it predicts; given by the network when None.
    """

    units: int
    activation: str = "identity"
    bias: bool = True
    activate: str = "output"
    energy: Energy = field(default_factory=Gaussian)
    name: str | None = None

    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        require_count("units", self.units, least=1)
        activation(self.activation)
        require_one_of("activate", self.activate, ("output", "input"))
        if not isinstance(self.energy, (Gaussian, Categorical)):
            raise ValueError(f"energy must be Gaussian(...) or Categorical(), got {self.energy!r}.")
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
        elif isinstance(self.energy.precision, tuple) and len(self.energy.precision) != self.units:
            raise ValueError(
                f"precision must be one number or {self.units} (one per unit), got "
                f"{len(self.energy.precision)}."
            )
        if self.activate == "input" and self.activation == "softmax":
            raise ValueError("softmax is a function of the last layer's output; use activate='output'.")

    @property
    def input_function(self) -> str:
        return self.activation if self.activate == "input" else "identity"

    @property
    def output_function(self) -> str:
        if isinstance(self.energy, Categorical):
            return "softmax"
        return self.activation if self.activate == "output" else "identity"

    def weight_shapes(self, fan_in: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"weight": (fan_in, self.units)}
        return {**shapes, "bias": (self.units,)} if self.bias else shapes

    def anchor(self, at: Assembler, index: int) -> None:
        """The prediction from the initial activities, which the deviations refer to."""
        source = at.initial_activity(index - 1)
        if self.input_function != "identity":
            source = at.activate(at.node("anchor_source", index - 1), source, self.input_function)
        prediction = at.anchor(index)
        drive = prediction if self.output_function == "identity" else at.node("anchor_drive", index)
        at.product(drive, source, at.layer("weight", index), at.layer("bias", index) if self.bias else None)
        if self.output_function != "identity":
            at.activate(prediction, drive, self.output_function)

    def predict(self, at: Assembler, index: int) -> Slot:
        """What the prediction has changed by since the anchor, as the error it leaves: e = d - (mu - anchor).

        Only the change of the source goes through the weights (docs/mathematics.md, "Low precision"). Returns
        the slot of mu, which is `error` itself where one product with the deviation as addend gives the
        error.
        """
        if self.input_function == "identity":
            change = at.change(index - 1)
        else:
            activity = at.add(
                at.node("activity", index - 1), at.anchor(index - 1), at.node("deviation", index - 1)
            )
            source = at.activate(at.node("source", index - 1), activity, self.input_function)
            anchor_source = at.node("anchor_source", index - 1)
            change = at.add(at.node("change", index - 1), source, anchor_source, scale=-1.0)
        weight, error, deviation = (
            at.layer("weight", index),
            at.node("error", index),
            at.node("deviation", index),
        )
        if self.output_function == "identity":
            return at.product(error, change, weight, deviation, scale=-1.0)
        drive = at.product(at.node("drive", index), change, weight, at.node("anchor_drive", index))
        prediction = at.activate(at.prediction(index), drive, self.output_function)
        if not at.floats(index):
            at.add(error, prediction, at.anchor(index), scale=-1.0)
            at.add(error, deviation, error, scale=-1.0)
        return prediction

    def feedback(self, at: Assembler, index: int, into: Slot, scale: float, scalar: str | None) -> None:
        """into += scale * scalars[scalar] * (vector-Jacobian product of P e_l with respect to x_{l-1})."""
        gated, weight = self.gate(at, index), at.layer("weight", index)
        if self.input_function == "identity":
            at.product_transposed(into, gated, weight, into, scale, scalar)
            return
        drive, source = at.activity_and_source(index - 1)
        feedback = at.product_transposed(at.node("feedback", index - 1), gated, weight)
        at.derivative(feedback, feedback, drive, source, self.input_function)
        at.add(into, into, feedback, scale, scalar)

    def gradient(self, at: Assembler, index: int) -> None:
        """dF/dW and dF/db, averaged over the batch, into `weight_gradient` and `bias_gradient`."""
        gated = self.gate(at, index)
        if self.input_function == "identity":
            source = at.final_activity(index - 1)
        else:
            _, source = at.activity_and_source(index - 1)
        at.outer(at.layer("weight_gradient", index), source, gated, scale=-1.0, scalar=PER_SAMPLE)
        if self.bias:
            at.column_sum(at.layer("bias_gradient", index), gated, scale=-1.0, scalar=PER_SAMPLE)

    def gate(self, at: Assembler, index: int) -> Slot:
        """v = f_out'(z) . P e; for a categorical energy dF/dz = -e already, so v = e."""
        error = at.weighted_error(index)
        if self.output_function == "identity" or isinstance(self.energy, Categorical):
            return error
        drive, prediction = at.drive_and_prediction(index)
        return at.derivative(at.node("gated", index), error, drive, prediction, self.output_function)
