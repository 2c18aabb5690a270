"""Agents that perceive, learn and act by predictive coding, on gymnasium's classic control tasks.

For each task and seed: transitions of random actions are gathered, the agent's forward model is learnt from
them by local rules, and the agent then plans its actions by relaxing (`pctt.control`). Beside it act a random
agent, a PID controller (an active inference agent too, `pctt.pid_agent`) and, where there is one, the LQR of
the task's known linearisation. Each agent and seed is a line of JSON in --out. Needs gymnasium (pip install
"pctt[control]") and scipy, for the picture matplotlib. `rates` learns the pendulum's model with several rates
of inference, and does not act.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pctt
from pctt.control import ControlModel, Planning, PredictiveController, environment, pid_agent

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Task:
    """A task and how the agent meets it.

    scale, shift: observations minus `shift` over `scale` are what the model sees.    goal: in these units.
    repeat: steps of the environment per action.    sticky: random actions are held for up to so many actions.
    discrete: actions are 0 and 1, from the sign of the agent's.    bound: of the action.
    data: transitions.    fit, batch, rate: learning steps, transitions per step, first learning rate.
    """

    name: str
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    goal: tuple[float, ...]
    model: ControlModel
    planning: Planning
    repeat: int = 1
    sticky: int = 1
    discrete: bool = False
    data: int = 10_000
    fit: int = 5000
    batch: int = 128
    rate: float = 1e-2

    @property
    def bound(self) -> float:
        return self.model.bound or 1.0

    def seen(self, observations: Array) -> Tensor:
        return torch.from_numpy((observations - np.array(self.shift)) / np.array(self.scale)).float()


def adam(steps: int, rate: float) -> pctt.Inference:
    return pctt.Inference(num_steps=steps, rate=rate, dynamics="adam", betas=(0.9, 0.99))


TASKS = {
    "cartpole": Task(
        name="CartPole-v1",
        scale=(1.0, 1.0, 0.2, 1.0),
        shift=(0.0,) * 4,
        goal=(0.0,) * 4,
        model=ControlModel(
            state=4,
            action=1,
            observation=4,
            residual=True,
            change=0.2,
            state_precision=20.0,
            observation_precision=1000.0,
            goal_precision=(0.3, 0.05, 1.0, 0.05),
            bound=1.0,
        ),
        planning=Planning(30, adam(20, 0.05), corrections=1, first=5),
        discrete=True,
        data=2000,
        fit=3000,
    ),
    "pendulum": Task(
        name="Pendulum-v1",
        scale=(1.0, 1.0, 8.0),
        shift=(0.0,) * 3,
        goal=(1.0, 0.0, 0.0),
        model=ControlModel(
            state=3,
            action=1,
            observation=3,
            hidden=(64,),
            residual=True,
            change=0.2,
            state_precision=200.0,
            observation_precision=1000.0,
            goal_precision=(0.3, 0.3, 0.03),
            effort=0.001,
            bound=2.0,
        ),
        planning=Planning(20, adam(50, 0.02), corrections=1, first=20),
        repeat=2,
        sticky=15,
    ),
    "mountaincar": Task(
        name="MountainCarContinuous-v0",
        scale=(0.9, 0.07),
        shift=(-0.3, 0.0),
        goal=(0.8 / 0.9, 0.0),
        model=ControlModel(
            state=2,
            action=1,
            observation=2,
            hidden=(32,),
            residual=True,
            change=0.2,
            state_precision=200.0,
            observation_precision=1000.0,
            goal_precision=(0.3, 0.001),
            effort=0.001,
            bound=1.0,
        ),
        planning=Planning(30, adam(100, 0.02), corrections=1, first=10),
        repeat=5,
        sticky=6,
        data=6000,
        fit=3000,
    ),
}


# --- the worlds ---------------------------------------------------------------------------------------------


def progress(steps: Iterable[int], what: str) -> Iterable[int]:
    """With a bar where someone looks on."""
    if not sys.stderr.isatty():
        return steps
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return steps
    return tqdm(steps, desc=what, leave=False)


class Worlds:
    """Episodes of one task beside each other; those that have ended stand still."""

    def __init__(self, task: Task, episodes: int, seed: int) -> None:
        self.task = task
        self.envs = [environment(task.name) for _ in range(episodes)]
        starts = [env.reset(seed=1000 * (seed + 1) + number)[0] for number, env in enumerate(self.envs)]
        self.observations: Array = np.stack(starts).astype(np.float64)
        self.live = np.ones(episodes, bool)
        self.returns = np.zeros(episodes)

    def step(self, actions: Array) -> None:
        """actions: [episodes, 1], within the task's bound."""
        for number, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            for _ in range(self.task.repeat if self.live[number] else 0):
                self.observations[number], reward, ended, cut, _ = env.step(command(self.task, action))
                self.returns[number] += float(reward)
                if ended or cut:
                    self.live[number] = False
                    break


def command(task: Task, action: Array) -> Any:
    if task.discrete:
        return int(action[0] > 0.0)
    return np.clip(action, -task.bound, task.bound).astype(np.float32)


def gather(task: Task, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(states, actions, next states) of random actions."""
    env, generator = environment(task.name), np.random.default_rng(seed)
    rows: list[tuple[Array, float, Array]] = []
    observation, _ = env.reset(seed=seed)
    held, action = 0, 0.0
    while len(rows) < count:
        if held == 0:
            action = float(generator.uniform(-task.bound, task.bound))
            action = task.bound * float(np.sign(action)) if task.discrete else action
            held = int(generator.integers(1, task.sticky + 1))
        held -= 1
        before, over = observation, False
        for _ in range(task.repeat):
            observation, _, ended, cut, _ = env.step(command(task, np.array([action])))
            over = bool(ended or cut)
            if over:
                break
        rows.append((before, action, observation))
        if over:
            observation, _ = env.reset()
            held = 0
    before, after = (task.seen(np.array([row[at] for row in rows], np.float64)) for at in (0, 2))
    return before, torch.tensor([[row[1]] for row in rows]), after


# --- who acts -----------------------------------------------------------------------------------------------

Policy = Callable[[Array], Array]
"""observations [episodes, D] -> actions [episodes, 1]"""


def learnt(task: Task, seed: int, inference: pctt.Inference | None = None) -> PredictiveController:
    """An agent whose forward model has been learnt from random data by the local rules."""
    agent = PredictiveController(
        task.model,
        None,
        task.planning,
        learning=pctt.Adam(task.rate),
        learning_inference=inference,
        seed=seed,
    )
    states, actions, after = gather(task, task.data, seed)
    generator = torch.Generator().manual_seed(seed)
    for step in progress(range(task.fit), "learning"):
        rows = torch.randint(len(states), (task.batch,), generator=generator)
        rate = task.rate * (1.0 - step / task.fit)
        agent.learn(states[rows], actions[rows], after[rows], rate=rate)
    return agent


def prediction_error(task: Task, agent: PredictiveController, seed: int) -> list[float]:
    """Root mean square error of the next state over that of its change, per unit, on other random data."""
    states, actions, after = gather(task, 1000, 10_000 + seed)
    error = (agent.predict(states, actions) - after).square().mean(0)
    return (error / (after - states).square().mean(0)).sqrt().tolist()


def random_policy(task: Task, seed: int) -> Policy:
    generator = np.random.default_rng(seed)
    return lambda seen: generator.uniform(-task.bound, task.bound, (len(seen), 1))


def pid_policy(key: str, episodes: int) -> Policy:
    """Gains by hand. CartPole: pushes towards the side that the pole falls to. Pendulum: angle from upright.
    MountainCar: position from the flag.
    """
    kp, ki, kd, dt = {
        "cartpole": (10.0, 1.0, 2.0, 0.02),
        "pendulum": (10.0, 1.0, 2.0, 0.1),
        "mountaincar": (10.0, 1.0, 0.0, 1.0),
    }[key]
    agent = pid_agent(kp, ki, kd, dt, episodes)

    def act(seen: Array) -> Array:
        if key == "cartpole":
            error = seen[:, 2:3]  # a push to the right turns the pole to the left
        elif key == "pendulum":
            error = -np.arctan2(seen[:, 1:2], seen[:, :1])
        else:
            error = 0.45 - seen[:, :1]
        goal = torch.from_numpy(error.copy())
        return agent.act(torch.zeros_like(goal), goal).numpy()

    return act


def lqr_policy(key: str) -> Policy | None:
    """Of the linearisation about the upright pole, by the discrete algebraic Riccati equation."""
    from scipy.linalg import solve_discrete_are

    if key == "cartpole":
        dt, gravity, mass, total, length = 0.02, 9.8, 0.1, 1.1, 0.5
        inertia = length * (4.0 / 3.0 - mass / total)
        turn = gravity / inertia
        a, b = np.zeros((4, 4)), np.zeros((4, 1))
        a[0, 1] = a[2, 3] = 1.0
        a[3, 2], b[3, 0] = turn, -10.0 / total / inertia
        a[1, 2], b[1, 0] = (
            -mass * length / total * turn,
            10.0 / total * (1.0 + mass * length / total / inertia),
        )
        q = np.diag([0.1, 0.05, 25.0, 0.05])
    elif key == "pendulum":
        dt = 0.05
        a, b = np.array([[0.0, 1.0], [15.0, 0.0]]), np.array([[0.0], [3.0]])
        q = np.diag([1.0, 0.1])
    else:
        return None
    a, b = np.eye(len(a)) + dt * a, dt * b
    r = np.array([[0.01]])
    cost = solve_discrete_are(a, b, q, r)
    k = np.linalg.solve(r + b.T @ cost @ b, b.T @ cost @ a)

    def act(seen: Array) -> Array:
        state = seen if key == "cartpole" else np.stack([np.arctan2(seen[:, 1], seen[:, 0]), seen[:, 2]], 1)
        return -state @ k.T

    return act


def along_the_velocity(seen: Array) -> Array:
    return np.sign(seen[:, 1:2])


# --- runs ---------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What the picture shows.

    path: observations over the actions, [T, episodes, D].    energy, gap: of the plans, by action.
    relaxation: energies per layer, of `layers`, over the inference steps of the first plan's last relaxation.
    """

    path: list[Array]
    energy: list[float]
    gap: list[float]
    relaxation: Array | None = None
    layers: tuple[str, ...] = ()


def follow(task: Task, policy: Policy, episodes: int, seed: int, num_actions: int) -> tuple[Array, Trace]:
    worlds = Worlds(task, episodes, seed)
    trace = Trace([worlds.observations.copy()], [], [])
    for _ in range(num_actions):
        worlds.step(policy(worlds.observations))
        trace.path.append(np.where(worlds.live[:, None], worlds.observations, np.nan))
        if not worlds.live.any():
            break
    return worlds.returns, trace


def control(
    task: Task, agent: PredictiveController, episodes: int, seed: int, num_actions: int
) -> tuple[Array, Trace]:
    """The agent in all episodes at once."""
    worlds = Worlds(task, episodes, seed)
    trace = Trace([worlds.observations.copy()], [], [])
    goal = torch.tensor(task.goal).repeat(episodes, 1)
    agent.reset(task.seen(worlds.observations))
    for step in progress(range(num_actions), "acting"):
        actions = agent.act(goal, record=step == 0)
        assert agent.plan is not None
        if agent.plan.trajectory is not None:
            # Less -1/2 log|P|, which a precision adds and no activity changes.
            constants = [
                -0.5 * layer.energy.log_determinant(units)
                for layer, units in zip(agent.network.layers, agent.network.widths[-3:], strict=True)
                if isinstance(layer.energy, pctt.Gaussian)
            ]
            trace.relaxation = agent.plan.trajectory.numpy() - np.array(constants)
            trace.layers = agent.network.names
        trace.energy.append(float(agent.plan.energy[torch.from_numpy(worlds.live)].mean()))
        trace.gap.append(agent.plan.gap)
        done = task.bound * actions.sign() if task.discrete else actions
        worlds.step(done.double().numpy())
        trace.path.append(np.where(worlds.live[:, None], worlds.observations, np.nan))
        if not worlds.live.any():
            break
        agent.perceive(task.seen(worlds.observations), done)
    return worlds.returns, trace


def limit(task: Task) -> int:
    steps = {"CartPole-v1": 500, "Pendulum-v1": 200, "MountainCarContinuous-v0": 999}[task.name]
    return -(-steps // task.repeat)


def run(key: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], Trace]:
    """(a record per agent and seed, the trace of the first seed's agent)."""
    task, episodes = TASKS[key], options.episodes
    records: list[dict[str, Any]] = []
    shown: Trace | None = None

    def note(who: str, seed: int, returns: Array, **more: Any) -> None:
        records.append({"task": key, "agent": who, "seed": seed, "returns": returns.tolist(), **more})
        print(
            f"{key:>12} {who:<28} seed {seed}: {returns.mean():9.1f} ± {returns.std():.1f}  {more}",
            flush=True,
        )
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")

    for seed in range(options.first_seed, options.first_seed + options.seeds):
        others: dict[str, Policy | None] = {
            "random": random_policy(task, seed),
            "PID": pid_policy(key, episodes),
            "LQR": lqr_policy(key),
            "along the velocity": along_the_velocity if key == "mountaincar" else None,
        }
        single = replace(task, repeat=1)  # who does not learn may act at every step
        for who, policy in others.items():
            if policy is not None:
                note(who, seed, follow(single, policy, episodes, seed, limit(single))[0])
        began = time.perf_counter()
        agent = learnt(task, seed)
        learning = round(time.perf_counter() - began, 1)
        error = [round(value, 4) for value in prediction_error(task, agent, seed)]
        for corrections in (task.planning.corrections, *((0,) if options.ablate else ())):
            planning = task.planning
            if corrections != planning.corrections:  # as many inference steps per action
                steps = planning.inference.num_steps * (planning.corrections + 1)
                planning = replace(
                    planning, corrections=0, inference=replace(planning.inference, num_steps=steps)
                )
            actor = PredictiveController(task.model, agent.weights(), planning, seed=seed)
            began = time.perf_counter()
            returns, trace = control(task, actor, episodes, seed, limit(task))
            acting = round(time.perf_counter() - began, 1)
            shown = shown or trace
            who = "predictive coding" if corrections else "predictive coding, uncorrected"
            note(who, seed, returns, error=error, learning=learning, acting=acting)
    assert shown is not None
    return records, shown


def table(records: list[dict[str, Any]]) -> str:
    """Mean over the episodes of all seeds, their standard deviation, and that of the means of the seeds."""
    lines = [
        "| task | agent | return | sd over episodes | sd over seeds | episodes |",
        "|---|---|---|---|---|---|",
    ]
    pairs = dict.fromkeys((record["task"], record["agent"]) for record in records)
    for key, who in sorted(pairs, key=lambda pair: list(TASKS).index(pair[0])):
        found = [np.array(r["returns"]) for r in records if (r["task"], r["agent"]) == (key, who)]
        every, means = np.concatenate(found), np.array([returns.mean() for returns in found])
        over = f"{means.std():.1f}" if len(means) > 1 else ""
        lines.append(
            f"| {TASKS[key].name} | {who} | {every.mean():.1f} | {every.std():.1f} | {over} | {len(every)} |"
        )
    return "\n".join(lines)


def rates(options: argparse.Namespace) -> None:
    """Prediction errors of the pendulum's model after learning with several rates of inference."""
    task = TASKS["pendulum"]
    print("| inference steps | rate | relative error of cos, sin, velocity |\n|---|---|---|")
    for steps, rate in ((2, 0.005), (5, 0.02), (20, 0.02), (2, 0.2), (10, 0.2)):
        agent = learnt(task, options.first_seed, pctt.Inference(num_steps=steps, rate=rate))
        errors = ", ".join(f"{value:.1%}" for value in prediction_error(task, agent, options.first_seed))
        print(f"| {steps} | {rate:g} | {errors} |", flush=True)


def draw(traces: dict[str, Trace], path: Path) -> None:
    """Per task: what the episodes do, the energy of the plans, and how the first plan relaxed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(traces), 3, figsize=(11, 2.7 * len(traces)), squeeze=False)
    for (key, trace), line in zip(traces.items(), axes, strict=True):
        task, path_of = TASKS[key], np.array(trace.path)
        what, unit = {
            "cartpole": ("angle of the pole", 2),
            "pendulum": ("cosine of the angle", 0),
            "mountaincar": ("position", 0),
        }[key]
        values = path_of[:, :, unit]
        times = task.repeat * np.arange(len(values))
        line[0].plot(times, values[:, :8], linewidth=0.8)
        line[0].set_ylabel(f"{task.name}\n{what}", fontsize=8)
        line[1].plot(times[: len(trace.energy)], trace.energy, color="#0072B2", label="energy")
        line[1].plot(times[: len(trace.gap)], trace.gap, color="#D55E00", label="gap to the dynamics")
        line[1].set_yscale("log")
        line[1].legend(fontsize=7)
        if trace.relaxation is not None:
            for name, energies in zip(trace.layers, trace.relaxation.T, strict=True):
                line[2].plot(energies, linewidth=1.0, label=name)
            line[2].set_yscale("log")
            line[2].legend(fontsize=7)
    for axis, title in zip(
        axes[0], ("eight episodes", "plans, mean", "first plan: energy by layer"), strict=True
    ):
        axis.set_title(title, fontsize=9)
    for axis, label in zip(axes[-1], ("step of the environment",) * 2 + ("inference step",), strict=True):
        axis.set_xlabel(label, fontsize=8)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}, rates; default all tasks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--episodes", type=int, default=20, help="per seed")
    parser.add_argument("--ablate", action="store_true", help="also without corrections of the plans")
    parser.add_argument("--out", type=Path, help="append a line of JSON per agent and seed")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the table of such files")
    parser.add_argument("--picture", type=Path, help="a .png to draw seed 0 into")
    options = parser.parse_args()
    unknown = sorted(set(options.tasks) - {*TASKS, "rates"})
    if unknown:
        parser.error(f"no task is called {unknown[0]!r}; there are {', '.join(TASKS)} and rates")
    torch.set_num_threads(1)
    if options.table:
        lines = [line for file in options.table for line in file.read_text(encoding="utf-8").splitlines()]
        print(table([json.loads(line) for line in lines]))
        return 0
    records: list[dict[str, Any]] = []
    traces: dict[str, Trace] = {}
    for key in options.tasks or list(TASKS):
        if key == "rates":
            rates(options)
            continue
        found, traces[key] = run(key, options)
        records += found
    if records:
        print(table(records))
    if options.picture is not None and traces:
        draw(traces, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
