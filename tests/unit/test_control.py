"""Control: plans against Riccati recursions, beliefs against the filter in closed form, PID against its
textbook.

Tolerances. A relaxation with momentum 0.8 shrinks what is left by more than sqrt(0.8) per step at the end, so
400 steps leave nothing and 25 corrections of 40 less than 1e-8; 1e-6 is the bound of the claim. PID: sums of
300 terms of order 1 in fp64, off by less than 300 roundings of order 10, 1e-12; the plant feeds them back, so
1e-10.
"""

import sys
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from pctt import SGD, Adam, Gaussian, Inference, InferenceDiverged, backprop, chain
from pctt.control import (
    ControlModel,
    Planning,
    PredictiveController,
    environment,
    linear_weights,
    model_network,
    pid_agent,
    trajectory_network,
)
from pctt.layers import Dense

F64 = torch.float64
A = np.array([[1.0, 0.2], [0.1, 1.0]])
B = np.array([[0.0], [0.5]])
Q = np.array([[2.0, 0.3], [0.3, 1.0]])
R = np.array([[0.5]])
STATES = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.0, 0.0]], dtype=F64)


def matrix(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())


def gain(a: np.ndarray, b: np.ndarray, r: np.ndarray, last: np.ndarray, horizon: int) -> np.ndarray:
    """K of u_0 = -K x_0 for the cost 1/2 sum_k x_k' Q x_k + u_k' r u_k, k = 1 .. H; `last` is Q at H."""
    cost = last
    for _ in range(horizon - 1):
        k = np.linalg.solve(r + b.T @ cost @ b, b.T @ cost @ a)
        cost = Q + a.T @ cost @ (a - b @ k)
    return np.linalg.solve(r + b.T @ cost @ b, b.T @ cost @ a)


def linear_agent(
    precision: float, planning: Planning, final: np.ndarray | None = None, **settings: Any
) -> PredictiveController:
    model = ControlModel(
        2,
        1,
        2,
        state_precision=precision,
        goal_precision=matrix(Q),
        final_precision=None if final is None else matrix(final),
        effort=matrix(R),
        **settings,
    )
    weights = linear_weights(model, torch.from_numpy(A), torch.from_numpy(B))
    agent = PredictiveController(model, weights, planning, dtype=F64)
    agent.reset(STATES)
    return agent


def momentum(steps: int, rate: float, momentum: float) -> Inference:
    return Inference(num_steps=steps, rate=rate, dynamics="momentum", momentum=momentum)


# --- plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2, 6])
@pytest.mark.parametrize("residual", [False, True])
def test_a_relaxed_plan_is_that_of_the_lqr_with_process_noise_as_a_second_control(
    horizon: int, residual: bool
) -> None:
    """Deviations from the dynamics cost 1/2 w' P_x w, as a control that acts on every state would. A wrong
    sign of the feedback through time, or a state that does not feel its neighbours, gives other actions.
    """
    extra = {"residual": True, "change": 0.5} if residual else {}
    agent = linear_agent(4.0, Planning(horizon, momentum(400, 0.05, 0.8)), **extra)
    actions = agent.act(torch.zeros(3, 2, dtype=F64))
    both = gain(A, np.hstack([B, np.eye(2)]), scipy.linalg.block_diag(R, 4.0 * np.eye(2)), Q, horizon)
    torch.testing.assert_close(actions, -STATES @ torch.from_numpy(both[:1]).T, rtol=0, atol=1e-8)
    assert agent.plan is not None and agent.plan.gap > 0.01  # it counts on luck


@pytest.mark.parametrize("horizon", [1, 3, 6])
def test_a_corrected_plan_is_the_finite_horizon_lqr(horizon: int) -> None:
    """The whole plan, not only its first action, and the dynamics hold exactly."""
    agent = linear_agent(40.0, Planning(horizon, momentum(40, 0.008, 0.8), corrections=25))
    agent.act(torch.zeros(3, 2, dtype=F64))
    assert agent.plan is not None and agent.plan.gap < 1e-7
    state = STATES.numpy()
    for step in range(horizon):
        action = -state @ gain(A, B, R, Q, horizon - step).T
        state = state @ A.T + action @ B.T
        np.testing.assert_allclose(agent.plan.actions[:, step], action, rtol=0, atol=1e-6)
        np.testing.assert_allclose(agent.plan.states[:, step], state, rtol=0, atol=1e-6)


def test_with_the_cost_to_go_at_the_end_any_horizon_gives_the_infinite_horizon_lqr() -> None:
    """scipy's solution of the discrete algebraic Riccati equation, as `final_precision`."""
    cost = scipy.linalg.solve_discrete_are(A, B, Q, R)
    k = np.linalg.solve(R + B.T @ cost @ B, B.T @ cost @ A)
    for horizon in (1, 3):
        planning = Planning(horizon, momentum(60, 0.008, 0.8), corrections=25)
        # The same symmetric matrix to the bit, which a precision must be.
        agent = linear_agent(40.0, planning, final=(cost + cost.T) / 2)
        actions = agent.act(torch.zeros(3, 2, dtype=F64))
        np.testing.assert_allclose(actions, -STATES.numpy() @ k.T, rtol=0, atol=1e-6)


def test_the_next_plan_begins_where_this_one_ended() -> None:
    """With so few inference steps per action that a plan from nothing is far from the LQR, one that goes on
    from its predecessors, offsets included, is near.
    """
    planning = Planning(6, momentum(40, 0.008, 0.8), corrections=1)
    agent, state = linear_agent(40.0, planning), STATES.clone()
    for _ in range(6):
        action = agent.act(torch.zeros(3, 2, dtype=F64))
        exact = -state @ torch.from_numpy(gain(A, B, R, Q, 6)).T
        fresh = linear_agent(40.0, planning)
        fresh.reset(state)
        alone = fresh.act(torch.zeros(3, 2, dtype=F64))
        state = state @ torch.from_numpy(A).T + action @ torch.from_numpy(B).T
        agent.belief = state
    assert (action - exact).abs().max() < 0.3 * (alone - exact).abs().max()


def test_actions_keep_within_the_bound_and_meet_it_where_the_lqr_asks_for_more() -> None:
    agent = linear_agent(4.0, Planning(3, momentum(400, 0.05, 0.8)), bound=0.25)
    actions = agent.act(torch.zeros(3, 2, dtype=F64))
    assert agent.plan is not None and agent.plan.actions.abs().max() <= 0.25
    assert actions[1] < -0.2 and actions[2].abs() < 1e-12


def test_a_goal_may_change_over_the_horizon_and_each_situation_plans_alone() -> None:
    agent = linear_agent(4.0, Planning(4, momentum(300, 0.05, 0.8)))
    goal = torch.randn(3, 4, 2, dtype=F64)
    together = agent.act(goal)
    for row in range(3):
        agent.reset(STATES[row : row + 1])
        torch.testing.assert_close(agent.act(goal[row : row + 1])[0], together[row], rtol=0, atol=1e-10)


def test_of_several_starts_the_plan_of_least_energy_is_followed() -> None:
    """With too few steps to converge the starts end in different plans; the first is that without noise."""
    few = momentum(5, 0.05, 0.5)
    one = linear_agent(4.0, Planning(4, few))
    many = linear_agent(4.0, Planning(4, few, starts=40, spread=0.5))
    goal = torch.zeros(3, 2, dtype=F64)
    one.act(goal)
    many.act(goal)
    assert one.plan is not None and many.plan is not None
    assert (many.plan.energy <= one.plan.energy + 1e-12).all()
    assert (many.plan.energy < one.plan.energy - 1e-6).any()
    torch.testing.assert_close(many.plan.actions[2], one.plan.actions[2])  # at the goal, noise only harms
    # The energy that decides, once more from the plan itself.
    x, u = many.plan.states, many.plan.actions
    before = torch.cat([STATES[:, None], x[:, :-1]], 1)
    error = x - before @ torch.from_numpy(A).T - u @ torch.from_numpy(B).T
    cost = 4.0 * error.square().sum((1, 2)) + torch.einsum("bhi,ij,bhj->b", x, torch.from_numpy(Q), x)
    cost = 0.5 * (cost + 0.5 * u.square().sum((1, 2)))
    torch.testing.assert_close(many.plan.energy, cost, rtol=1e-10, atol=1e-12)


def test_a_rate_that_is_too_high_raises() -> None:
    agent = linear_agent(4.0, Planning(4, Inference(num_steps=400, rate=10.0)))
    with pytest.raises(InferenceDiverged, match="lower the rate of planning"):
        agent.act(torch.ones(3, 2, dtype=F64))


# --- perception ---------------------------------------------------------------------------------------------


def test_perception_is_the_linear_filter() -> None:
    """x = (P_x + C' P_y C)^-1 (P_x (A x' + B u) + C' P_y y): temporal predictive coding in closed form."""
    px, py = np.array([[3.0, 0.5], [0.5, 2.0]]), np.array([[4.0]])
    c = np.array([[1.0, -0.5]])
    model = ControlModel(
        2, 1, 1, observed=False, state_precision=matrix(px), observation_precision=matrix(py)
    )
    weights = linear_weights(model, *map(torch.from_numpy, (A, B, c)))
    agent = PredictiveController(model, weights, Planning(2), dtype=F64)
    agent.reset(STATES)
    x, generator = STATES.numpy(), np.random.default_rng(0)
    for _ in range(4):
        action, seen = generator.normal(size=(3, 1)), generator.normal(size=(3, 1))
        belief = agent.perceive(torch.from_numpy(seen), torch.from_numpy(action))
        prior = x @ A.T + action @ B.T
        x = np.linalg.solve(px + c.T @ py @ c, (prior @ px + seen @ py @ c).T).T
        np.testing.assert_allclose(belief, x, rtol=0, atol=1e-5)


# --- learning -----------------------------------------------------------------------------------------------


def test_a_linear_model_is_learnt_from_transitions() -> None:
    """Local steps on data of a linear plant end at its matrices, and plans then use them."""
    model = ControlModel(2, 1, 2, residual=True, change=0.5)
    agent = PredictiveController(model, None, Planning(3), learning=SGD(0.1), dtype=F64)
    x, u = torch.randn(64, 2, dtype=F64), torch.randn(64, 1, dtype=F64)
    after = x @ torch.from_numpy(A).T + u @ torch.from_numpy(B).T
    agent.reset(STATES)
    first = agent.act(torch.zeros(3, 2, dtype=F64))
    before, energy = agent.learn(x, u, after), 0.0
    for _ in range(400):
        energy = agent.learn(x, u, after)
    assert energy < before - 0.01
    exact = linear_weights(model, torch.from_numpy(A), torch.from_numpy(B))
    torch.testing.assert_close(
        agent.weights()["state"]["weight"], exact["state"]["weight"], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(agent.predict(x, u), after, rtol=0, atol=1e-5)
    agent.reset(STATES)
    learnt = agent.act(torch.zeros(3, 2, dtype=F64))
    assert not torch.allclose(first, learnt)
    same = PredictiveController(model, exact, Planning(3), dtype=F64)
    same.reset(STATES)
    torch.testing.assert_close(same.act(torch.zeros(3, 2, dtype=F64)), learnt, rtol=0, atol=1e-4)


def test_one_learning_step_from_the_prediction_is_that_of_backpropagation_in_the_last_layer() -> None:
    """Without inference steps only the state has an error, whose gradient is that of half its square."""
    model = ControlModel(2, 1, 2, hidden=(5,))
    agent = PredictiveController(
        model, None, Planning(2), learning=SGD(1.0), learning_inference=Inference(num_steps=0), dtype=F64
    )
    twin = chain(3, [Dense(5, "tanh"), Dense(2)])
    start = agent.weights()
    weights = {"dense1": start["hidden1"], "dense2": start["state"]}
    x, u, after = (torch.randn(8, units, dtype=F64) for units in (2, 1, 2))
    gradients, _ = backprop.gradients(twin, weights, torch.cat([x, u], 1), after)
    agent.learn(x, u, after)
    moved = agent.weights()
    for key in ("weight", "bias"):
        torch.testing.assert_close(
            start["state"][key] - moved["state"][key], gradients["dense2"][key], rtol=1e-12, atol=1e-13
        )
        assert torch.equal(start["hidden1"][key], moved["hidden1"][key])


def test_the_trajectory_predicts_what_the_model_of_one_transition_does() -> None:
    """Hidden layers, the residual and the scale mean the same in both graphs."""
    model = ControlModel(2, 1, 2, hidden=(5, 4), residual=True, change=0.3, bound=0.7)
    agent = PredictiveController(model, None, Planning(3, Inference(num_steps=0)), learning=Adam(), dtype=F64)
    agent.reset(STATES)
    agent.act(torch.zeros(3, 2, dtype=F64))
    # Nothing has moved: states are the belief, actions 0; what is left is the change under no action.
    expected = STATES - agent.predict(STATES, torch.zeros(3, 1, dtype=F64))
    errors = agent._planner.read_error("state").view(3, 3, 2)
    for step in range(3):
        torch.testing.assert_close(errors[:, step], expected, rtol=1e-12, atol=1e-14)


def test_the_models_graphs_have_the_nodes_they_promise() -> None:
    model = ControlModel(2, 1, 3, hidden=(4,), observed=False, bound=1.0)
    assert model_network(model).nodes == ("previous", "action", "hidden1", "state", "observation")
    net = trajectory_network(model, 5, corrected=True)
    assert set(net.nodes) == {"start", "action", "offset", "state", "observation", "effort"}
    assert net.shapes[net.node_index("state")] == (5, 2)
    assert net.shapes[net.node_index("observation")] == (5, 3)


# --- PID ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kp, ki, kd", [(2.0, 1.5, 0.3), (2.0, 0.0, 0.0), (0.0, 0.8, 0.0), (3.0, 0.0, 0.4)])
def test_the_pid_agent_is_the_textbook_pid_controller(kp: float, ki: float, kd: float) -> None:
    """Beside each other on a mass with friction, two goals and a disturbance that sets in; each controls a
    plant of its own, so that a difference would grow.
    """
    dt, steps = 0.05, 300
    agent = pid_agent(kp, ki, kd, dt, batch_size=2)
    position, velocity = np.zeros((2, 2, 1)), np.zeros((2, 2, 1))  # [controller, plant, 1]
    integral, last, largest = np.zeros((2, 1)), np.zeros((2, 1)), 0.0
    for step in range(steps):
        goal = np.array([[1.0], [np.sin(0.05 * step)]])
        disturbance = 0.5 if step > 100 else 0.0
        action = agent.act(torch.from_numpy(position[0].copy()), torch.from_numpy(goal)).numpy()
        error = goal - position[1]
        integral = integral + error * dt
        textbook = kp * error + ki * integral + kd * (error - last) / dt
        last = error
        np.testing.assert_allclose(action, textbook, rtol=0, atol=1e-10)
        force = np.stack([action, textbook]) - disturbance
        velocity = velocity + dt * (force - 0.8 * velocity)
        position = position + dt * velocity
        largest = max(largest, float(np.abs(textbook).max()))
    assert largest > 0.1


def test_the_precisions_of_the_pid_agent_are_its_gains() -> None:
    """Of y, dy/dt and d2y/dt2 in this order; a gain of 0 is a coordinate that is not sensed."""
    assert pid_agent(kp=2.0, ki=1.5, kd=0.3, dt=0.1).network.layers[0].energy == Gaussian((1.5, 2.0, 0.3))
    assert pid_agent(kp=2.0, ki=0.0, kd=0.3, dt=0.1).network.layers[0].energy == Gaussian((2.0, 0.3))


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ControlModel(2, 1, 3), "observed=False"),
        (lambda: ControlModel(2, 1, 2, bound=-1.0), "bound must be"),
        (lambda: ControlModel(2, 1, 2, change=0.1), "residual=True"),
        (lambda: ControlModel(2, 1, 2, goal_precision=(1.0, 2.0, 3.0)), "goal_precision"),
        (lambda: ControlModel(2, 1, 2, effort=0.0), "effort"),
        (lambda: Planning(0), "horizon"),
        (lambda: Planning(inference=Inference(variables="errors")), "a plan relaxes states"),
        (lambda: pid_agent(0.0, 0.0, 0.0, 0.1), "all gains are 0"),
        (lambda: pid_agent(-1.0, 0.0, 0.0, 0.1), "kp must be"),
        (lambda: linear_weights(ControlModel(2, 1, 2), torch.eye(3), torch.ones(2, 1)), "a must be"),
        (
            lambda: linear_weights(ControlModel(2, 1, 2, hidden=(3,)), torch.eye(2), torch.ones(2, 1)),
            "hidden",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_an_agent_asks_for_what_it_needs() -> None:
    agent = PredictiveController(ControlModel(2, 1, 2), planning=Planning(2))
    with pytest.raises(ValueError, match="call reset first"):
        agent.act(torch.zeros(1, 2))
    agent.reset(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="perceive follows an action"):
        agent.perceive(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="goal must be"):
        agent.act(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="same number of transitions"):
        agent.learn(torch.zeros(2, 2), torch.zeros(3, 1), torch.zeros(2, 2))


# --- gymnasium ----------------------------------------------------------------------------------------------


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pctt\[control\]"'):
        environment("CartPole-v1")


def test_a_learnt_linear_model_balances_the_pole() -> None:
    """Longer than twice what random actions reach, which is about 22 steps."""
    pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    env = environment("CartPole-v1")
    scale = torch.tensor([1.0, 1.0, 0.2, 1.0])
    model = ControlModel(
        4,
        1,
        4,
        residual=True,
        change=0.2,
        state_precision=20.0,
        observation_precision=1000.0,
        goal_precision=(0.1, 0.05, 1.0, 0.05),
        bound=1.0,
    )
    inference = Inference(num_steps=20, rate=0.05, dynamics="adam", betas=(0.9, 0.99))
    agent = PredictiveController(model, None, Planning(15, inference, corrections=1), learning=Adam(1e-2))
    generator = np.random.default_rng(0)
    rows: list[tuple[Any, float, Any]] = []
    state, _ = env.reset(seed=0)
    for _ in range(500):
        action = int(generator.integers(2))
        after, _, done, _, _ = env.step(action)
        rows.append((state, 2.0 * action - 1.0, after))
        state = env.reset()[0] if done else after
    x, after = (torch.from_numpy(np.array([row[at] for row in rows])) / scale for at in (0, 2))
    u = torch.tensor([[row[1]] for row in rows])
    for step in range(200):
        agent.learn(x, u, after, rate=2e-2 * (1.0 - step / 200))
    state, _ = env.reset(seed=1)
    agent.reset(torch.from_numpy(state)[None] / scale)
    for step in range(50):
        push = float(agent.act(torch.zeros(1, 4))) > 0.0
        state, _, done, _, _ = env.step(int(push))
        assert not done, f"the pole fell after {step} steps"
        agent.perceive(torch.from_numpy(state)[None] / scale, torch.tensor([[1.0 if push else -1.0]]))
