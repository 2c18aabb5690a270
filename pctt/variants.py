"""The algorithms of the literature by name, as settings of the one engine (docs/variants.md)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pctt._checks import require_one_of
from pctt.inference import Inference, Nudge


@dataclass(frozen=True)
class Variant:
    """What an algorithm's name stands for.

    summary: in a few words.    source: the paper.    settings: the fields of `Inference` that make it.
    """

    summary: str
    source: str
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "pc": Variant("inference learning, or strict predictive coding", "Whittington & Bogacz 2017"),
    "fixed": Variant(
        "fixed predictions: tends to backpropagation",
        "Millidge, Tschantz & Buckley 2022",
        {"prediction": "fixed"},
    ),
    "exact": Variant(
        "fixed predictions in one sweep down: backpropagation, exactly",
        "Rosenbaum 2022",
        {"prediction": "fixed", "sweep": "gauss_seidel", "rate": 1.0, "num_steps": 1},
    ),
    "zil": Variant(
        "each layer learns when its error arrives: backpropagation, exactly",
        "Song et al. 2020",
        {"weights_at": "staircase", "rate": 1.0},
    ),
    "ipc": Variant(
        "weights move at every inference step", "Salvatori et al. 2024", {"weights_at": "every_step"}
    ),
    "epc": Variant("descent in the errors", "Goemaere et al. 2025", {"variables": "errors"}),
    "gauss-seidel": Variant("nodes move one after the other", "", {"sweep": "gauss_seidel"}),
    "nudge+": Variant(
        "output drawn towards the target", "Pinchetti et al. 2025", {"nudge": Nudge(0.5, "positive")}
    ),
    "nudge-": Variant(
        "output pushed away from it", "Pinchetti et al. 2025", {"nudge": Nudge(0.5, "negative")}
    ),
    "nudge+-": Variant(
        "both, as a pair per batch", "Laborieux et al. 2021", {"nudge": Nudge(0.5, "centred")}
    ),
    "ep": Variant(
        "equilibrium propagation: a free output, centred pair",
        "Scellier & Bengio 2017",
        {"nudge": Nudge(0.1, "centred", "loss")},
    ),
    "momentum": Variant("heavy ball", "Polyak 1964", {"dynamics": "momentum", "momentum": 0.5}),
    "adam": Variant("Adam on the activities", "Kingma & Ba 2015", {"dynamics": "adam"}),
    "heun": Variant("second order, adaptive step per sample", "Innocenti et al. 2024", {"dynamics": "heun"}),
    "langevin": Variant(
        "samples of the posterior (Monte Carlo predictive coding)",
        "Oliviers, Bogacz & Meulemans 2024",
        {"dynamics": "langevin"},
    ),
    "boosted": Variant("errors balanced over depth", "Qi et al. 2025", {"wave_boost": 10.0}),
}


def variant(name: str, inference: Inference | None = None) -> Inference:
    """The settings of the algorithm called `name`, the others as in `inference`.

    Raises ValueError for an unknown name, and where the settings contradict those of `inference`.

    >>> variant("zil", Inference(num_steps=4)).weights_at
    'staircase'
    """
    require_one_of("variant", name, tuple(VARIANTS))
    return replace(inference or Inference(), **VARIANTS[name].settings)
