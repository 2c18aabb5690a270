"""The agent that perceives, plans and learns by relaxing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pctt._checks import require_between, require_count
from pctt.control.model import (
    ControlModel,
    default_perception,
    model_network,
    trajectory_network,
    trajectory_weights,
)
from pctt.describe import Concise
from pctt.energies import Gaussian
from pctt.engine import Engine, Status
from pctt.inference import Inference
from pctt.initialisers import init
from pctt.learning import Adam, Learning
from pctt.network import Weights, check_weights
from pctt.queries import InferenceDiverged

MOST_DRIVE = 1.5
"""What a bounded action begins with at most, in front of the tanh: nine tenths of the bound."""


@dataclass(frozen=True)
class Planning(Concise):
    """How a plan is made.

    horizon: steps that it looks ahead, H.
    inference: of states and actions. The default copes with curvatures that differ by orders of magnitude, as
        those of precise dynamics and cheap actions do.
    corrections: how many times, per action, a plan is relaxed once more with its own deviations from the
        dynamics held against it: what the states lacked, -e, is added to the prediction. In the end states
        follow the dynamics exactly although their precision is finite (the method of multipliers, Hestenes
        1969: the multiplier is P_x times that offset). 0 leaves plans optimistic.
    first: relaxations of the first plan before those that every plan gets, without corrections: later plans
        begin where the one before ended, the first one from nothing.
    starts: plans per situation, of which the one of least energy is followed: the first goes on from the plan
        before, the others from that with noise on its actions. For energies with several minima.
    spread: standard deviation of that noise, before the bound.
    """

    horizon: int = 20
    inference: Inference = field(
        default_factory=lambda: Inference(num_steps=100, rate=0.05, dynamics="adam", betas=(0.9, 0.99))
    )
    corrections: int = 0
    first: int = 0
    starts: int = 1
    spread: float = 0.5

    def __post_init__(self) -> None:
        require_count("horizon", self.horizon, least=1)
        require_count("corrections", self.corrections)
        require_count("first", self.first)
        require_count("starts", self.starts, least=1)
        require_between("spread", self.spread, 0.0, math.inf)
        if self.inference.weights_at != "end" or self.inference.variables != "states":
            raise ValueError(
                "a plan relaxes states, with weights that stand still; leave those settings out."
            )


@dataclass(frozen=True)
class Plan:
    """What an agent expects to happen. All are copies.

    states: [B, H, state].    actions: [B, H, action], within the bound.
    energy: [B], without the constants of the precisions.
    gap: root mean square of what the states deviate from the dynamics by; what the agent counts on and its
        model does not promise.
    trajectory: energies per layer at every inference step of the last relaxation, batch mean, where asked
        for; the layers are those of `PredictiveController.network`.
    status: how the last relaxation ended.
    """

    states: Tensor
    actions: Tensor
    energy: Tensor
    gap: float
    status: Status
    trajectory: Tensor | None = None

    def __repr__(self) -> str:
        situations, horizon, units = self.actions.shape
        return (
            f"Plan: {self.status.name}, {situations} situations, {horizon} actions of {units} units ahead, "
            f"energy {float(self.energy.mean()):.4g}, gap {self.gap:.3g}"
        )


class PredictiveController:
    """An agent that perceives, acts and learns by one energy. B situations run beside each other.

    model: what it believes about the world.    planning: how it looks ahead.
    weights: {layer: {"weight": [in, out], "bias": [out]}} of `model_network(model)`, e.g. from
        `linear_weights`; None draws them, to be learnt.
    perception: inference of the belief. By default gradient descent at the best rate for the observation
        layer as it is at the start, to within 1e-6 of the way.
    learning, learning_inference: rule of `learn`, and how the hidden activities relax in it.
    seed: of the weights and of the starts of plans.    dtype: of weights that are drawn.

    >>> from pctt import linear_weights
    >>> model = ControlModel(state=2, action=1, observation=2)
    >>> a, b = torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.0], [0.1]])
    >>> agent = PredictiveController(model, linear_weights(model, a, b), Planning(horizon=5))
    >>> agent.reset(torch.tensor([[1.0, 0.0]]))
    >>> agent.act(torch.zeros(1, 2)).shape
    torch.Size([1, 1])
    """

    def __init__(
        self,
        model: ControlModel,
        weights: Weights | None = None,
        planning: Planning | None = None,
        perception: Inference | None = None,
        learning: Learning | None = None,
        learning_inference: Inference | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.planning = model, planning or Planning()
        net = model_network(model)
        weights = init(net, seed, dtype=dtype) if weights is None else weights
        self.dtype = check_weights(net, weights)
        self._learning = learning or Adam(1e-3)
        inference = learning_inference or Inference(num_steps=5, rate=0.02)
        clamped = ["previous", "action", "state", "observation"]
        clamped = [name for name in clamped if name in net.nodes]
        self._learner = Engine(net, weights, inference, clamped, learning=self._learning)
        self._steps_learnt = 0
        mapped = trajectory_weights(model, weights)
        self._perception_net = trajectory_network(model, 1, planning=False)
        self._filter = Engine(
            self._perception_net,
            mapped,
            perception or default_perception(model, weights),
            ("start", "action", "observation"),
            ("state",),
        )
        corrected = self.planning.corrections > 0
        self.network = trajectory_network(model, self.planning.horizon, corrected=corrected)
        self._given = ["start", "observation"]
        self._given += ["effort"] if model.effort is not None else []
        self._given += ["offset"] if corrected else []
        self._planner = Engine(
            self.network, mapped, self.planning.inference, self._given, ("state", "action")
        )
        self._stale = False
        self._generator = torch.Generator().manual_seed(seed)
        self.belief: Tensor | None = None
        """[B, state]"""
        self.plan: Plan | None = None
        self._drives: Tensor | None = None  # what the plan's actions are squashed from
        self._offset: Tensor | None = None
        self._taken: Tensor | None = None

    # --- acting ---------------------------------------------------------------------------------------------

    def reset(self, belief: Tensor) -> None:
        """Begins anew, believing in the states `belief`, [B, state]."""
        self.belief = self._checked("belief", belief, self.model.state)
        self.plan = self._drives = self._offset = self._taken = None

    def act(self, goal: Tensor, record: bool = False) -> Tensor:
        """The actions to take now, [B, action]; the plan they begin is in `plan`.

        goal: the observations preferred, [B, observation] at all times or [B, H, observation].
        record: keep the energies of every inference step.
        Raises InferenceDiverged where the energy is no number any more; a rate that is too high is the usual
        reason.
        """
        if self.belief is None:
            raise ValueError("an agent begins with a belief; call reset first.")
        model, horizon, starts = self.model, self.planning.horizon, self.planning.starts
        batch = len(self.belief)
        goal = goal[:, None].expand(-1, horizon, -1) if goal.dim() == 2 else goal
        if tuple(goal.shape) != (batch, horizon, model.observation):
            raise ValueError(
                f"goal must be [{batch}, {model.observation}] or [{batch}, {horizon}, {model.observation}], "
                f"got {list(goal.shape)}."
            )
        states, drives, offset = self._begin_plan(batch)
        if starts > 1:
            noise = torch.randn(batch, starts, *drives.shape[1:], generator=self._generator, dtype=self.dtype)
            noise[:, 0] = 0.0
            drives = (drives[:, None] + self.planning.spread * noise).flatten(0, 1)
        given = {
            "start": _each(self.belief, starts),
            "observation": _each(goal.to(self.dtype).flatten(1), starts),
        }
        if model.effort is not None:
            given["effort"] = torch.zeros(batch * starts, horizon * model.action, dtype=self.dtype)
        activities = {
            **given,
            "state": _each(states.flatten(1), starts),
            "action": drives.flatten(1),
        }
        offset = _each(offset.flatten(1), starts)
        self._refresh()
        corrections = self.planning.corrections
        relaxations = corrections + 1 + (self.planning.first if self.plan is None else 0)
        while True:
            relaxations -= 1
            if "offset" in self._given:
                activities["offset"] = offset
            relaxation = self._planner.relax(activities, record=record and relaxations == 0)
            if relaxation.status is Status.NON_FINITE:
                raise InferenceDiverged(
                    f"{relaxation.status.value}; lower the rate of planning ({self.planning.inference.rate})."
                )
            for name in ("state", "action"):
                activities[name] = self._planner.read_activity(name)
            error = self._planner.read_error("state")
            gap = error + offset if "offset" in self._given else error
            if relaxations <= corrections:
                offset = -error
            if relaxations == 0:
                break
        energy = self._energy().view(batch, starts)
        best = energy.argmin(1)

        def chosen(values: Tensor, units: int) -> Tensor:
            return values.view(batch, starts, horizon, units)[torch.arange(batch), best]

        self._drives = chosen(activities["action"], model.action)
        self._offset = chosen(offset, model.state)
        self.plan = Plan(
            states=chosen(activities["state"], model.state),
            actions=self._squashed(self._drives),
            energy=energy.gather(1, best[:, None])[:, 0],
            gap=float(chosen(gap, model.state).square().mean().sqrt()),
            status=relaxation.status,
            trajectory=None
            if relaxation.trajectory is None
            else torch.tensor(relaxation.trajectory, dtype=self.dtype),
        )
        self._taken = self.plan.actions[:, 0]
        return self._taken.clone()

    def _begin_plan(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """States, actions before the bound, and offsets to begin with: those of the plan before, moved on."""
        model, horizon = self.model, self.planning.horizon
        assert self.belief is not None
        if self.plan is None or self._drives is None or self._offset is None:
            nothing = torch.zeros(batch, horizon, model.action, dtype=self.dtype)
            states = self.belief[:, None].expand(-1, horizon, -1)
            return states, nothing, torch.zeros(batch, horizon, model.state, dtype=self.dtype)

        def moved_on(values: Tensor) -> Tensor:
            return torch.cat([values[:, 1:], values[:, -1:]], 1)

        drives = moved_on(self._drives)
        if model.bound is not None:  # where tanh has a slope left, so that an action can leave the bound
            drives = drives.clamp(-MOST_DRIVE, MOST_DRIVE)
        return moved_on(self.plan.states), drives, moved_on(self._offset)

    def _energy(self) -> Tensor:
        """Of each plan, from the errors that the last relaxation left."""
        total = torch.zeros((), dtype=self.dtype)
        for name, layer in zip(self.network.names, self.network.layers, strict=True):
            error = self._planner.read_error(name)
            assert isinstance(layer.energy, Gaussian)
            matrix = layer.energy.matrix(error.shape[1]).to(self.dtype)
            weighted = error @ matrix if matrix.dim() == 2 else error * matrix
            total = total + 0.5 * (weighted * error).sum(1)
        return total

    def _squashed(self, drives: Tensor) -> Tensor:
        return drives.clone() if self.model.bound is None else self.model.bound * drives.tanh()

    # --- perceiving and learning ----------------------------------------------------------------------------

    def perceive(self, observation: Tensor, action: Tensor | None = None) -> Tensor:
        """The new belief after an observation [B, observation], [B, state].

        action: [B, action], what was done if it was not what `act` said.
        """
        if self.belief is None:
            raise ValueError("an agent begins with a belief; call reset first.")
        if action is not None:
            self._taken = self._checked("action", action, self.model.action)
        if self._taken is None:
            raise ValueError("perceive follows an action; call act first, or tell the action.")
        observation = self._checked("observation", observation, self.model.observation)
        self._refresh()
        relaxation = self._filter.relax(
            {
                "start": self.belief,
                "action": self._taken,
                "observation": observation,
                "state": self.belief,
            }
        )
        if not relaxation.status.ok:
            raise InferenceDiverged(f"{relaxation.status.value}; lower the rate of perception.")
        self.belief = self._filter.read_activity("state")
        return self.belief.clone()

    def learn(
        self,
        previous: Tensor,
        action: Tensor,
        state: Tensor,
        observation: Tensor | None = None,
        rate: float | None = None,
    ) -> float:
        """One learning step by the local rules on a batch of transitions; the energy before it, batch mean.

        previous, state: [B, state], beliefs before and after `action`, [B, action].
        observation: [B, observation], where it is not the state.
        rate: learning rate, by default that of the rule.
        """
        given = {
            "previous": self._checked("previous", previous, self.model.state),
            "action": self._checked("action", action, self.model.action),
            "state": self._checked("state", state, self.model.state),
        }
        if not self.model.observed:
            if observation is None:
                raise ValueError("the observation layer learns too; give the observations.")
            given["observation"] = self._checked("observation", observation, self.model.observation)
        if len({len(values) for values in given.values()}) != 1:
            sizes = ", ".join(f"{name} {len(values)}" for name, values in given.items())
            raise ValueError(f"all must have the same number of transitions, got {sizes}.")
        relaxation = self._learner.relax(given)
        if not relaxation.status.ok:
            raise InferenceDiverged(f"{relaxation.status.value}; lower the rate of learning_inference.")
        self._steps_learnt += 1
        self._learner.learn(self._learning.rate if rate is None else rate, self._steps_learnt)
        self._stale = True
        return sum(relaxation.energies)

    def predict(self, state: Tensor, action: Tensor) -> Tensor:
        """The state that the model expects after `action`, [B, state]."""
        given = {
            "previous": self._checked("previous", state, self.model.state),
            "action": self._checked("action", action, self.model.action),
        }
        self._learner.sweep(given)
        return self._learner.read_node("anchor", "state")

    def weights(self) -> Weights:
        """A copy of the model's weights."""
        return self._learner.weights()

    def load_weights(self, weights: Weights) -> None:
        """Replaces the model's weights. Raises ValueError where they do not fit."""
        self._learner.load_weights(weights)
        self._stale = True

    def _refresh(self) -> None:
        """Perception and plans use what has been learnt."""
        if self._stale:
            mapped = trajectory_weights(self.model, self._learner.weights())
            self._filter.load_weights(mapped)
            self._planner.load_weights(mapped)
            self._stale = False

    def _checked(self, name: str, values: Tensor, units: int) -> Tensor:
        if not isinstance(values, Tensor) or values.dim() != 2 or values.shape[1] != units:
            got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{name} must be a tensor [batch, {units}], got {got}.")
        return values.detach().to(self.dtype)


def _each(values: Tensor, times: int) -> Tensor:
    """Every sample so many times, one after the other."""
    return values if times == 1 else values.repeat_interleave(times, 0)
