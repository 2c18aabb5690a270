"""Temporal predictive coding: the closed form, Kalman's filter, descent by autograd, and what it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FULL, assert_near, assert_trees_near, generator
from scipy.linalg import solve_discrete_are
from torch import Tensor

import pctt
from pctt import (
    SGD,
    Adam,
    Block,
    Categorical,
    Dense,
    Gaussian,
    Inference,
    InferenceDiverged,
    Linear,
    Step,
    TemporalFilter,
)
from pctt.layers import Add, Function

N, M, K, B, T = 4, 5, 2, 3, 5
RELAXED = Inference(1500, 0.08)
SEEN = (0.5, 1.0, 2.0, 0.25, 1.5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


A, BU, C = 0.4 * randn(N, N, seed=1), randn(N, K, seed=2), 0.5 * randn(M, N, seed=3)
Y, U, X0 = randn(T, B, M, seed=4), randn(T, B, K, seed=5), randn(B, N, seed=6)


def model(
    activation: str = "identity",
    controls: int = 0,
    inference: Inference = RELAXED,
    prior: Any = FULL,
    seen: Any = SEEN,
    **others: Any,
) -> TemporalFilter:
    state = {"weight": A.mT} if not controls else {"weight.previous": A.mT, "weight.control": BU.mT}
    return TemporalFilter(
        Dense(N, activation, False, "input", Gaussian(prior)),
        Dense(M, activation, False, "input", Gaussian(seen)),
        controls,
        inference=inference,
        weights={"state": state, "observation": {"weight": C.mT}},
        **others,
    )


# --- linear: what is known exactly --------------------------------------------------------------------------


@pytest.mark.parametrize("controls", [0, K])
def test_a_relaxed_state_is_the_closed_form(controls: int) -> None:
    """E12 with precisions: (P + C'RC)^-1 (P (A x + B u) + C'R y)."""
    prior, seen = torch.tensor(FULL, dtype=torch.float64), torch.diag(torch.tensor(SEEN, dtype=torch.float64))
    filtering = model(controls=controls)
    controlled = U if controls else None
    states = filtering.filter(Y, controlled, X0)
    forecasts = filtering.forecast(Y, controlled, X0)
    state = X0
    for moment in range(T):
        expected = state @ A.mT + (U[moment] @ BU.mT if controls else 0.0)
        assert_near(forecasts[moment], expected @ C.mT, 1e-9)
        drive = expected @ prior + Y[moment] @ seen @ C
        state = torch.linalg.solve(prior + C.mT @ seen @ C, drive.mT).mT
        assert_near(states[moment], state, 1e-10)


def test_unit_covariances() -> None:
    states = model(prior=1.0, seen=1.0).filter(Y[:1], initial=X0)
    drive = X0 @ A.mT + Y[0] @ C
    assert_near(states[0], torch.linalg.solve(torch.eye(N) + C.mT @ C, drive.mT).mT, 1e-10)


def test_it_is_kalmans_update_where_the_precision_is_that_of_the_predicted_covariance() -> None:
    before, noise = (
        torch.eye(N, dtype=torch.float64),
        torch.diag(1.0 / torch.tensor(SEEN, dtype=torch.float64)),
    )
    predicted = A @ before @ A.mT + 0.3 * torch.eye(N)
    gain = predicted @ C.mT @ torch.linalg.inv(C @ predicted @ C.mT + noise)
    expected = X0 @ A.mT + (Y[0] - X0 @ A.mT @ C.mT) @ gain.mT
    prior = torch.linalg.inv(predicted)
    prior = 0.5 * (prior + prior.mT)
    filtering = model(prior=tuple(map(tuple, prior.tolist())), inference=Inference(6000, 0.05))
    assert_near(filtering.filter(Y[:1], initial=X0)[0], expected, 1e-10)
    assert (model().filter(Y[:1], initial=X0)[0] - expected).abs().max() > 0.01


def test_it_is_kalmans_filter_once_that_has_settled() -> None:
    noise = np.diag(1.0 / np.array(SEEN))
    settled = torch.tensor(solve_discrete_are(A.numpy().T, C.numpy().T, 0.3 * np.eye(N), noise))
    gain = settled @ C.mT @ torch.linalg.inv(C @ settled @ C.mT + torch.tensor(noise))
    prior = torch.linalg.inv(settled)
    prior = 0.5 * (prior + prior.mT)
    states = model(prior=tuple(map(tuple, prior.tolist())), inference=Inference(6000, 0.05)).filter(Y)
    state = torch.zeros(B, N, dtype=torch.float64)
    for moment in range(T):
        state = state @ A.mT
        state = state + (Y[moment] - state @ C.mT) @ gain.mT
        assert_near(states[moment], state, 1e-10)


# --- other layers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_states_and_learning_are_descent_of_the_energy_of_the_moment(activation: str) -> None:
    """|x_t - A f(x_{t-1}) - B u_t|^2 + |y_t - C f(x_t)|^2, by autograd, with what came before fixed."""
    steps, rate, eta = 20, 0.1, 0.05
    filtering = model(activation, K, Inference(steps, rate), learning=SGD(eta))
    errors = filtering.learn(Y, U, initial=X0)
    f = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation]
    prior, seen = torch.tensor(FULL, dtype=torch.float64), torch.tensor(SEEN, dtype=torch.float64)
    leaves = [weight.clone().requires_grad_() for weight in (A, BU, C)]

    def energy(state: Tensor, before: Tensor, moment: int) -> Tensor:
        a, b, c = leaves
        prediction = f(before) @ a.mT + U[moment] @ b.mT
        error, residual = state - prediction, Y[moment] - f(state) @ c.mT
        return 0.5 * ((error @ prior * error).sum() + (seen * residual.square()).sum())

    state, squares = X0, []
    for moment in range(T):
        before = state
        state = f(before) @ leaves[0].detach().mT + U[moment] @ leaves[1].detach().mT
        squares.append((Y[moment] - f(state) @ leaves[2].detach().mT).square().mean())
        for _ in range(steps):
            state = state.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(state, before, moment), state)
            state = (state - rate * slope).detach()
        slopes = torch.autograd.grad(energy(state, before, moment) / B, leaves)
        with torch.no_grad():
            for leaf, slope in zip(leaves, slopes, strict=True):
                leaf -= eta * slope
    a, b, c = (leaf.detach() for leaf in leaves)
    expected = {
        "state": {"weight.previous": a.mT, "weight.control": b.mT},
        "observation": {"weight": c.mT},
    }
    assert_trees_near(filtering.weights, expected, 1e-12)
    assert errors == [pytest.approx(torch.stack(squares).mean().item(), rel=1e-12)]
    assert filtering.steps == T


def test_activations_at_the_output_and_blocks_of_two_sources() -> None:
    dense = TemporalFilter(Dense(N, "tanh"), Dense(M, "sigmoid"), K)
    drive = [
        Step(Linear(N), (0,), "previous"),
        Step(Linear(N, False), (1,), "control"),
        Step(Add(), (-2, -1)),
    ]
    block = TemporalFilter(
        Block([*drive, Function("tanh")]), Block([Linear(M), "sigmoid"]), K, N, weights=dense.weights
    )
    assert torch.equal(dense.filter(Y, U), block.filter(Y, U))
    assert dense.filter(Y.float(), U.float()).dtype == torch.float32


def test_sequences_of_a_batch_do_not_touch_each_other() -> None:
    filtering = model("tanh", inference=Inference(20, 0.1))
    together = filtering.filter(Y)
    alone = torch.cat([filtering.filter(Y[:, row : row + 1]) for row in range(B)], 1)
    assert_near(together, alone, 1e-13)


# --- learning -----------------------------------------------------------------------------------------------

TURN = 0.3
TRUE_A = 0.97 * torch.tensor(
    [[math.cos(TURN), math.sin(TURN)], [-math.sin(TURN), math.cos(TURN)]], dtype=torch.float64
)


def oscillations(length: int, count: int, seed: int) -> Tensor:
    """A damped oscillator, seen through four noisy channels."""
    source, seen = generator(seed), randn(4, 2, seed=9)
    state, found = 2.0 * torch.randn(count, 2, generator=source, dtype=torch.float64), list[Tensor]()
    for _ in range(length):
        state = state @ TRUE_A.mT + 0.1 * torch.randn(count, 2, generator=source, dtype=torch.float64)
        noise = 0.1 * torch.randn(count, 4, generator=source, dtype=torch.float64)
        found.append(state @ seen.mT + noise)
    return torch.stack(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_learning_finds_the_motion_of_a_damped_oscillator(seed: int) -> None:
    """A is known up to a change of the state's basis, so its eigenvalues are compared."""
    layers = Dense(2, bias=False), Dense(4, bias=False, energy=Gaussian(10.0))
    single = TemporalFilter(*layers, seed=seed)
    weights = {
        name: {key: value.double() for key, value in layer.items()} for name, layer in single.weights.items()
    }
    filtering = TemporalFilter(*layers, inference=Inference(20, 0.02), learning=Adam(1e-2), weights=weights)
    unseen = oscillations(50, 16, seed=2)
    before = (filtering.forecast(unseen) - unseen).square().mean()
    errors = filtering.learn(oscillations(60, 16, seed=1), epochs=12)
    after = (filtering.forecast(unseen) - unseen).square().mean()
    assert after < 0.12 * before and errors[-1] < 0.2 * errors[0]
    found = torch.linalg.eigvals(filtering.weights["state"]["weight"])
    expected = torch.linalg.eigvals(TRUE_A)
    assert (found.abs() - expected.abs()).abs().max() < 0.03
    assert (found.angle().abs() - TURN).abs().max() < 0.03


# --- what does not fit --------------------------------------------------------------------------------------


def test_a_rate_that_is_too_large_ends_filtering() -> None:
    with pytest.raises(InferenceDiverged, match=r"moment 1: .*lower the rate of inference \(5\)"):
        model(inference=Inference(50, 5.0)).filter(Y)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: TemporalFilter("dense", Dense(2)), "transition must be"),  # type: ignore
        (lambda: TemporalFilter(Dense(2), None), "observation must be"),  # type: ignore
        (lambda: TemporalFilter(Dense(2), Dense(2), -1), "controls must be"),
        (lambda: TemporalFilter(Dense(2), Dense(2), states=3), "states=3, but the transition predicts 2"),
        (lambda: TemporalFilter(Block([Linear(2)]), Dense(2)), "give states"),
        (lambda: TemporalFilter(Block([Linear(2)]), Dense(2), states=3), "predicts 2 units from 3"),
        (
            lambda: TemporalFilter(Dense(2, "softmax", energy=Categorical()), Dense(2)),
            "its energy must be Gaussian",
        ),
        (lambda: TemporalFilter(Dense(2, scale=0.5), Dense(2), 1), "do not go with controls"),
        (lambda: model().filter(Y[0]), r"observations must be a tensor \[T, B, 5\]"),
        (lambda: model().filter(Y * torch.nan), "observations hold NaN"),
        (lambda: model().filter(Y, U), "takes no controls"),
        (lambda: model(controls=K).filter(Y), r"takes controls \[T, B, 2\]"),
        (lambda: model(controls=K).filter(Y, U[:2]), "controls must be as many as observations"),
        (lambda: model().filter(Y, initial=X0[:, :1]), r"initial must be \[3, 4\]"),
        (lambda: model().learn(Y, epochs=-1), "epochs must be"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


def test_it_is_exported() -> None:
    assert {"TemporalFilter", "Stream", "unroll", "LSTMCell", "GRUCell", "RNNCell"} <= set(pctt.__all__)
