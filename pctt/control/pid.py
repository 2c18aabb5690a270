"""PID controllers as active inference."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pctt._checks import require_between, require_count, require_finite_positive
from pctt.energies import Gaussian
from pctt.engine import Engine
from pctt.inference import Inference
from pctt.layers.block import Block, Step
from pctt.layers.maps import Add, Linear
from pctt.wiring import graph


class PIDAgent:
    """A PID controller as active inference (Baltieri & Buckley 2019). `pid_agent` makes one.

    Sensations in generalised coordinates, y, dy/dt and d2y/dt2, are predicted to be the goal's. The belief
    that they are is held to (its own precision is infinite), and that action moves each of them one to one is
    all the agent knows of the world. Then da/dt = -dF/da has one term per coordinate:

        F = 1/2 [ki (v - y)^2 + kp (v' - y')^2 + kd (v'' - y'')^2],   dy^(i)/da = 1
        a(t) = ki int (v - y) dt + kp (v - y) + kd d(v - y)/dt

    The precision of the sensation itself is the integral gain, that of its velocity the proportional one,
    that of its acceleration the derivative one. One act is one inference step of rate dt on the engine.
    `energy` is what the last act left.

    gains: (ki, kp, kd), each at least 0.    dt: seconds per step.    batch_size: plants beside each other.
    dtype: of actions and observations.
    """

    def __init__(self, gains: Sequence[float], dt: float, batch_size: int, dtype: torch.dtype) -> None:
        self.dt, self.batch_size, self.dtype = dt, batch_size, dtype
        # A precision is above 0: a coordinate without a gain is one that the agent does not sense.
        self._orders = [order for order, gain in enumerate(gains) if gain > 0.0]
        units = len(self._orders)
        energy = Gaussian(tuple(gains[order] for order in self._orders))
        moved = Block([Step(Linear(units, bias=False), (0,)), Step(Add(), (1, 2))], energy)
        self.network = graph({"action": 1, "measured": units}, {"sensation": (moved, "action", "measured")})
        self._effect = torch.ones(1, units, dtype=dtype)
        self._engine = Engine(
            self.network,
            {"sensation": {"weight": self._effect}},
            Inference(num_steps=1, rate=dt),
            ("measured", "sensation"),
            ("action",),
        )
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the action is 0, and so were all errors."""
        nothing = torch.zeros(self.batch_size, 1, dtype=self.dtype)
        self.action = nothing
        self._seen = [nothing, nothing]
        self._wanted = [nothing, nothing]
        self.energy = 0.0

    def act(self, observation: Tensor, goal: Tensor) -> Tensor:
        """The action after the observation [B, 1], where `goal` [B, 1] is preferred; [B, 1]."""
        for name, values in (("observation", observation), ("goal", goal)):
            if tuple(values.shape) != (self.batch_size, 1):
                raise ValueError(f"{name} must be [{self.batch_size}, 1], got {list(values.shape)}.")
        sensation = self._generalised(observation.to(self.dtype), self._seen)
        preferred = self._generalised(goal.to(self.dtype), self._wanted)
        # What is predicted is the sensation measured, plus what a change of the action would add to it.
        measured = sensation - self.action @ self._effect
        relaxation = self._engine.relax({"measured": measured, "sensation": preferred, "action": self.action})
        self.energy = sum(relaxation.energies)
        self.action = self._engine.read_activity("action")
        return self.action.clone()

    def _generalised(self, now: Tensor, before: list[Tensor]) -> Tensor:
        """(y, dy/dt, d2y/dt2) by backward differences, of the coordinates that have a gain."""
        last, earlier = before
        velocity = (now - last) / self.dt
        acceleration = (now - 2.0 * last + earlier) / self.dt**2
        before[:] = [now, last]
        return torch.cat([(now, velocity, acceleration)[order] for order in self._orders], 1)


def pid_agent(
    kp: float,
    ki: float,
    kd: float,
    dt: float,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float64,
) -> PIDAgent:
    """An active inference agent that is the PID controller of these gains.

    u_t = kp e_t + ki dt (e_0 + ... + e_t) + kd (e_t - e_{t-1}) / dt with e = goal - observation, e_{-1} = 0.

    dt: seconds per step.    batch_size: plants beside each other.    dtype: of actions and observations.

    Raises ValueError for negative gains (change the sign of the action instead) and where all are 0.

    >>> agent = pid_agent(kp=2.0, ki=0.0, kd=0.0, dt=0.1)
    >>> float(agent.act(torch.tensor([[1.0]]), goal=torch.tensor([[4.0]])))
    6.0
    """
    for name, gain in (("kp", kp), ("ki", ki), ("kd", kd)):
        require_between(name, gain, 0.0, math.inf)
    require_finite_positive("dt", dt)
    require_count("batch_size", batch_size, least=1)
    if kp == ki == kd == 0.0:
        raise ValueError("all gains are 0, so nothing would move the action; give one of them.")
    return PIDAgent((ki, kp, kd), dt, batch_size, dtype)
