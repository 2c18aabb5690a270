"""Predictive coding in NumPy, written down from its equations: the oracle of the benchmark's comparisons, and
the adapter of a peer that is not installed.

FAULTS are what a peer may get wrong; one of them is planted by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RUNTIME = ("numpy",)
FAULTS = (
    "one step too few",
    "rate 1 % too large",
    "learning rate 1 % too large",
    "tanh on the other side",
    "nodes one after the other",
    "last weights from old errors",
    "sign of the biases",
    "one row of weights forgotten",
)


class Network:
    """activate: "output" for mu = tanh(x W + b), "input" for mu = tanh(x) W + b with the input as it is."""

    def __init__(self, work: dict[str, Any], activate: str = "output", fault: str = "") -> None:
        self.work, self.activate, self.fault = work, activate, fault
        self.weights = [[np.array(w, dtype="f4"), np.array(b, dtype="f4")] for w, b in work["weights"]]
        self.moments = [[np.zeros_like(each) for each in layer] for layer in self.weights]
        self.squares = [[np.zeros_like(each) for each in layer] for layer in self.weights]
        self.learning_steps = 0
        self.x: list[np.ndarray] = []

    def predict(self, layer: int, below: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """mu, and its derivative by the drive z."""
        weight, bias = self.weights[layer]
        if self.activate == "input":
            z = (np.tanh(below) if layer else below) @ weight + bias
            return z, np.ones_like(z)
        z = below @ weight + bias
        if layer == len(self.weights) - 1:
            return z, np.ones_like(z)
        mu = np.tanh(z)
        return mu, 1 - mu * mu

    def errors(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """e = x - mu, and v = f'(z) e."""
        pairs = [self.predict(layer, self.x[layer]) for layer in range(len(self.weights))]
        errors = [x - mu for x, (mu, _) in zip(self.x[1:], pairs, strict=True)]
        return errors, [e * slope for e, (_, slope) in zip(errors, pairs, strict=True)]

    def infer_step(self) -> None:
        rate = self.work["rate"] * (1.01 if "rate 1 %" == self.fault[:8] else 1)
        errors, v = self.errors()
        incremental = self.work["algorithm"] == "ipc"
        old = [weight.copy() for weight, _ in self.weights]
        if incremental:
            self.learn(v)
        moved = list(self.x)
        for layer in range(1, len(self.weights)):
            if self.fault == "nodes one after the other":
                self.x = moved
                errors, v = self.errors()
            back = v[layer] @ old[layer].T
            if self.activate == "input":
                back = back * (1 - np.tanh(self.x[layer]) ** 2)
            moved[layer] = self.x[layer] + rate * (back - errors[layer - 1])
        self.x = moved

    def learn(self, v: list[np.ndarray]) -> None:
        """One step of Adam on the energy's mean over the batch."""
        rate = self.work["learning_rate"] * (1.01 if "learning rate" == self.fault[:13] else 1)
        self.learning_steps += 1
        t, size = self.learning_steps, self.work["batch_size"]
        for layer, parameters in enumerate(self.weights):
            below = np.tanh(self.x[layer]) if self.activate == "input" and layer else self.x[layer]
            for kind, g in enumerate((-(below.T @ v[layer]) / size, -v[layer].sum(0) / size)):
                if kind and self.fault == "sign of the biases":
                    g = -g
                if not kind and self.fault == "one row of weights forgotten":
                    g[0] = 0
                m, s = self.moments[layer][kind], self.squares[layer][kind]
                m[...] = 0.9 * m + 0.1 * g
                s[...] = 0.999 * s + 0.001 * g * g
                step = rate * (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)
                parameters[kind] -= step

    def train(self) -> None:
        self.x = [self.work["inputs"]]
        for layer in range(len(self.weights)):
            self.x.append(self.predict(layer, self.x[layer])[0])
        self.x[-1] = self.work["targets"]
        v = self.errors()[1]
        for _ in range(self.work["num_steps"] - (self.fault == "one step too few")):
            v = self.errors()[1]
            self.infer_step()
        if self.work["algorithm"] != "ipc":
            self.learn(v if self.fault == "last weights from old errors" else self.errors()[1])

    def look(self) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        return self.x[1:-1], self.weights


def backprop_step(work: dict[str, Any]) -> list[list[np.ndarray]]:
    """Weights after one step of Adam on the loss of the feedforward sweep: the chain rule, written down."""
    net = Network(work)
    net.x = [work["inputs"]]
    slopes = list[np.ndarray]()
    for layer in range(len(net.weights)):
        mu, slope = net.predict(layer, net.x[layer])
        net.x.append(mu)
        slopes.append(slope)
    v = [np.zeros(0)] * len(net.weights)
    delta = work["targets"] - net.x[-1]
    for layer in reversed(range(len(net.weights))):
        v[layer] = delta * slopes[layer]
        delta = v[layer] @ net.weights[layer][0].T
    net.learn(v)
    return net.weights


def prepare(work: dict[str, Any], fault: str = "") -> Any:
    """What an adapter of `pctt bench` offers; the module `serve` is there where this runs as one."""
    from serve import Prepared

    net = Network(work, "input" if fault == "tanh on the other side" else "output", fault)
    return Prepared(net.train, net.look)
