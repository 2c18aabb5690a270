"""What theory says about a network: its equilibrium in closed form, the curvature that decides which rates of
inference are stable and how far so many steps relax it, and how near its gradients are to others.

In plain torch and fp64 whatever comes in, beside the engine and not through it. Precisions are those of the
weights given: learned ones stand still. docs/theory.md has the equations and examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pctt import backprop
from pctt._checks import require_count, require_finite_positive, require_one_of
from pctt.energies import Categorical, Gaussian
from pctt.layers.dense import Dense
from pctt.network import INPUT, Network, Weights, check_weights
from pctt.queries import check_distribution

FIRST_WAVE = 0.1
"""Relaxed fraction below which errors still are those of the first wave (see `regime`)."""
SETTLED = 0.95
"""Relaxed fraction above which a mode counts as being at equilibrium."""

Verdict = Literal["backprop-like", "in between", "equilibrium", "unstable"]


@dataclass(frozen=True)
class Equilibrium:
    """Where inference ends, in fp64: [B, units] by node name; errors of every node but the input.

    activities, errors: {node: [B, units]}.    energy: [L], batch mean per layer.    total: their sum.
    """

    activities: dict[str, Tensor]
    errors: dict[str, Tensor]
    energy: Tensor
    total: Tensor


@dataclass(frozen=True)
class Spectrum:
    """The largest and the smallest eigenvalue of the Hessian of the energy that any sample has.

    residual: how exact they are: each has a true eigenvalue within this distance (|H v - eigenvalue v| of the
    unit vector v it came with; Parlett 1998, theorem 4.5.1).
    """

    largest: float
    smallest: float
    residual: float = 0.0

    def __post_init__(self) -> None:
        if not -math.inf < self.smallest <= self.largest < math.inf:
            raise ValueError(
                "a spectrum needs finite eigenvalues, the smallest at most the largest, got "
                f"smallest={self.smallest!r} and largest={self.largest!r}."
            )


@dataclass(frozen=True)
class Regime:
    """How far inference goes, in a word and in a sentence.

    verdict: the word, explained at `regime`.    sentence: with figures, and with what would change it.
    slowest, fastest: relaxed fraction of the modes of the smallest and of the largest eigenvalue: 0 at the
        start, 1 at equilibrium, above 1 after an overshoot, below 0 where a mode moves away.
    """

    verdict: Verdict
    slowest: float
    fastest: float
    sentence: str


@dataclass(frozen=True)
class Alignment:
    """How near two gradients of a layer are.

    cosine: of the angle between them, NaN where one is zero.    norm_ratio: norm of the first over that of
        the second.
    """

    cosine: float
    norm_ratio: float


def energy(net: Network, weights: Weights, activities: Mapping[str, Tensor]) -> Tensor:
    """The total energy of each sample, [B] in fp64 (docs/mathematics.md, "Energy").

    net, weights: as for `pctt.infer`.
    activities: {node: [B, units]} of every node; of a categorical output a distribution. Autograd can
    differentiate the result by activities and weights. Raises ValueError where they do not fit, and for NaN.
    """
    doubles, nodes = _read(net, weights, activities)
    return torch.stack(_energies(net, doubles, nodes)).sum(0)


def linear_equilibrium(net: Network, weights: Weights, inputs: Tensor, targets: Tensor) -> Equilibrium:
    """The minimum of the energy of a linear network with clamped input and output, in closed form.

    With J_l = W_{l+1} ... W_L, J_L = I and r = targets - (output of the forward pass), errors lead to the
    targets if the sum over l of e_l J_l is r. The cheapest of these are

        e_l = r S^-1 J_l' P_l^-1,    S = sum over l = 1 .. L of J_l' P_l^-1 J_l,
        F = 1/2 r S^-1 r' - 1/2 sum over l of log|P_l|

    (Innocenti et al. 2024, with biases and precisions added; there P_l = I). A layer with a scale or a skip
    has s W, or s W + I, for W.

    inputs: [B, input].    targets: [B, units of the output].    `total` can be differentiated by the weights:
    its gradient is that of learning at equilibrium. Raises ValueError for a network that is not linear or not
    Gaussian, wrong shapes, or NaN.
    """
    layers = net.dense_layers("the closed form")
    check_weights(net, weights)
    _check_nodes(net, {INPUT: inputs, net.output: targets})
    for name, layer in zip(net.names, layers, strict=True):
        if layer.activation != "identity" or not isinstance(layer.energy, Gaussian):
            raise ValueError(
                f"the closed form needs identity activations and Gaussian energies, but layer {name!r} is "
                f"{layer.activation} with {layer.energy}; relax this network with pctt.infer."
            )
    doubles = _to_fp64(weights)
    output = inputs.to(torch.float64)
    for index in range(1, len(net.nodes)):
        output = _prediction(net, doubles, index, output)

    spread = output.new_zeros(output.shape[1], output.shape[1])  # S
    to_output = torch.eye(output.shape[1], dtype=torch.float64, device=output.device)  # J_l
    to_error: list[Tensor] = []  # J_l' P_l^-1, from L to 1
    for name, layer in zip(net.names[::-1], layers[::-1], strict=True):
        precision = _precision(layer, doubles[name])
        inverse = 1.0 / precision if precision.dim() == 1 else torch.linalg.inv(precision)
        to_error.append(_times(to_output.T, inverse))
        spread = spread + to_error[-1] @ to_output
        below = layer.scale * doubles[name]["weight"] @ to_output
        to_output = below + to_output if layer.skip else below
    multiplier = torch.linalg.solve(spread, (targets.to(torch.float64) - output).T).T  # r S^-1
    errors = [multiplier @ matrix for matrix in reversed(to_error)]

    nodes = [inputs.to(torch.float64)]
    for index, error in enumerate(errors, start=1):
        nodes.append(_prediction(net, doubles, index, nodes[-1]) + error)
    costs = torch.stack(_energies(net, doubles, nodes)).mean(-1)
    by_node = dict(zip(net.nodes, nodes, strict=True))
    return Equilibrium(by_node, dict(zip(net.names, errors, strict=True)), costs, costs.sum())


def hessian_spectrum(
    net: Network,
    weights: Weights,
    activities: Mapping[str, Tensor],
    clamped: Collection[str],
    variables: str = "states",
    num_iterations: int = 200,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> Spectrum:
    """The extreme eigenvalues of the second derivative of a sample's energy, over the samples of a batch.

    activities: {node: [B, units]} of every node, as `pctt.infer` returns them; where the Hessian is taken.
    clamped: the nodes that are held; the others are free. A free categorical output is neither: it follows
        its prediction, at no energy.
    variables: "states" are the free activities, in which inference descends. "errors" are the errors of the
        free nodes, x_l = mu_l(x_{l-1}) + e_l from the input on, from which those of clamped nodes follow
        (Goemaere et al. 2025); a free input, which has no error, stands for itself.
    num_iterations, tolerance: an iteration multiplies the Hessian of every sample with a vector of its own,
        by differentiating twice. It ends when |H v - eigenvalue v| <= tolerance times the largest absolute
        eigenvalue at both ends of every sample, looked at every tenth time, or after num_iterations;
        `residual` says how near it came. As many as there are free units leave only rounding errors.
    seed: of the random first vectors.

    The power method, but all powers are kept and their best combination taken (Lanczos 1950), as the last one
    alone is slow to find the smallest eigenvalue. That needs num_iterations times the memory of the free
    activities. At a kink, as relu has, the derivative is autograd's.

    Raises ValueError for weights or activities that do not fit, unknown nodes, or when nothing is free.
    """
    require_one_of("variables", variables, ("states", "errors"))
    require_count("num_iterations", num_iterations, least=1)
    require_finite_positive("tolerance", tolerance)
    require_count("seed", seed)
    doubles, nodes = _read(net, weights, activities)
    held, last = {net.node_index(name) for name in clamped}, len(net.layers)
    floats = isinstance(net.layers[-1].energy, Categorical) and last not in held
    free = [i for i in range(last + 1) if i not in held and not (floats and i == last)]
    if not free or (floats and last == 1):
        raise ValueError(
            "no free node has an energy to descend; clamp fewer nodes, or the categorical output."
        )
    derived = {i for i in free if i > 0} if variables == "errors" else set[int]()

    def summed_energy(values: Tensor) -> Tensor:
        moved = dict(zip(free, values.split([net.widths[i] for i in free], -1), strict=True))
        placed: list[Tensor] = []
        for i, node in enumerate(nodes):
            value = moved.get(i, node)
            placed.append(value + _prediction(net, doubles, i, placed[-1]) if i in derived else value)
        return torch.stack(_energies(net, doubles, placed)[: last - floats]).sum()

    with torch.enable_grad():
        start = [
            nodes[i] - _prediction(net, doubles, i, nodes[i - 1]) if i in derived else nodes[i] for i in free
        ]
        point = torch.cat(start, -1).detach().requires_grad_()
        (slope,) = torch.autograd.grad(summed_energy(point), point, create_graph=True)

    # Samples do not meet in the energy, so one product serves them all.
    def multiply(vectors: Tensor) -> Tensor:
        return torch.autograd.grad(slope, point, vectors, retain_graph=True, materialize_grads=True)[0]

    vectors = torch.randn(point.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    smallest, largest, residual = _extremes(multiply, vectors.to(point.device), num_iterations, tolerance)
    return Spectrum(float(largest.max()), float(smallest.min()), float(residual.max()))


def _extremes(
    multiply: Callable[[Tensor], Tensor], start: Tensor, num_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest eigenvalue and the larger residual of each sample, [B], by Lanczos' method with
    full orthogonalisation (Parlett 1998, chapter 13). start: [B, N].
    """
    limit = min(num_iterations, start.shape[1])
    basis = start.new_zeros(len(start), limit + 1, start.shape[1])
    basis[:, 0] = start / start.norm(dim=-1, keepdim=True)
    diagonal, beside = start.new_zeros(len(start), limit), start.new_zeros(len(start), limit)
    alive = start.new_ones(len(start), dtype=torch.bool)
    for k in range(limit):
        product, known = multiply(basis[:, k]), basis[:, : k + 1]
        # A sample whose powers lead in no new direction goes on with zero vectors. Its diagonal then repeats
        # the first entry, which lies between the extremes and changes neither.
        diagonal[:, k] = torch.where(alive, (product * basis[:, k]).sum(-1), diagonal[:, 0])
        rest = product
        for _ in range(2):  # the second time removes what rounding left (Parlett 1998, section 6.9)
            rest = rest - torch.einsum("bk,bkn->bn", torch.einsum("bkn,bn->bk", known, rest), known)
        length = rest.norm(dim=-1)
        alive = alive & (length > 1e-13 * product.norm(dim=-1))
        beside[:, k] = torch.where(alive, length, 0.0)
        basis[:, k + 1] = torch.where(alive[:, None], rest / length[:, None], 0.0)
        if (k + 1) % 10 == 0 or k + 1 == limit:
            off = torch.diag_embed(beside[:, :k], 1)
            values, vectors = torch.linalg.eigh(torch.diag_embed(diagonal[:, : k + 1]) + off + off.mT)
            residual = (beside[:, k, None] * vectors[:, -1, [0, -1]]).abs().amax(-1)
            if k + 1 == limit or (residual <= tolerance * values.abs().amax(-1)).all():
                return values[:, 0], values[:, -1], residual
    raise AssertionError("the last iteration returns")


def largest_stable_rate(spectrum: Spectrum) -> float:
    """2 / largest. From this rate on a mode of Euler inference does not shrink: 1 - rate largest <= -1.

    Raises ValueError where no eigenvalue is above 0.
    """
    if spectrum.largest <= 0:
        raise ValueError(
            f"the largest eigenvalue is {spectrum.largest!r}: nothing pulls back and no rate is stable; take "
            "the spectrum elsewhere."
        )
    return 2.0 / spectrum.largest


def suggest_rate(spectrum: Spectrum) -> float:
    """2 / (largest + smallest), the optimal rate of Richardson's iteration (Saad 2003, section 4.2.1): the
    worst mode shrinks most per step, to (largest - smallest) / (largest + smallest) of itself.

    A smallest eigenvalue below 0 counts as 0. Then this is the bound of stability, at which the fastest mode
    keeps its size: take less. Raises as `largest_stable_rate` does.
    """
    largest_stable_rate(spectrum)  # raises where there is none
    return 2.0 / (spectrum.largest + max(spectrum.smallest, 0.0))


def regime(spectrum: Spectrum, rate: float, num_steps: int) -> Regime:
    """Whether so many Euler steps end near backpropagation, near equilibrium or in between.

    A mode of eigenvalue lambda covers the relaxed fraction 1 - (1 - rate lambda)^num_steps of its way to
    equilibrium; exactly in a linear network, near the place of the spectrum in others.

    "unstable": rate >= 2 / largest.
    "backprop-like": the fastest mode has relaxed by less than FIRST_WAVE. After T steps a node k layers from
        the output has, for precisions of 1, binomial(T, k) rate^k times the error of backpropagation (E2 of
        docs/mathematics.md is T = k) and other terms, smaller by about the relaxed fraction. So each layer's
        gradient is within some 10 % of a multiple of backpropagation's. In the variables "errors" the
        multiple is T rate in every layer but the last, which has 1.
    "equilibrium": the slowest mode has relaxed by more than SETTLED, and none is further off by overshooting.
    "in between": neither.

    Raises ValueError for a rate not above 0, less than one step, or no eigenvalue above 0.
    """
    require_finite_positive("rate", rate)
    require_count("num_steps", num_steps, least=1)
    bound, best = largest_stable_rate(spectrum), suggest_rate(spectrum)
    factors = torch.tensor([spectrum.smallest, spectrum.largest], dtype=torch.float64).mul(-rate).add(1.0)
    slowest, fastest = (1.0 - factors**num_steps).tolist()  # tensors: infinite where Python's power raises
    gentle = (1.0 - (1.0 - FIRST_WAVE) ** (1.0 / num_steps)) / spectrum.largest
    sentence = (
        f"after {num_steps} steps of rate {rate:.3g} the slowest mode has relaxed by {slowest:.1%}, "
        f"the fastest by {fastest:.1%}."
    )
    backwards = f"As many steps of a rate below {gentle:.2g} are backprop-like."
    onwards = "The slowest mode does not pull back, so more steps need not reach an equilibrium."
    if spectrum.smallest > 0 and rate < bound:
        onwards = f"Equilibrium takes {_steps_to_settle(spectrum, rate)} steps of this rate"
        onwards += f", or {_steps_to_settle(spectrum, best)} of rate {best:.3g}."
    if rate >= bound:
        growth = f"the fastest mode is multiplied by {float(factors[1]):.3g} in every step."
        return Regime("unstable", slowest, fastest, f"Unstable: {growth} Take a rate below {bound:.3g}.")
    if rate * spectrum.largest < 1 and fastest < FIRST_WAVE and slowest > -FIRST_WAVE:
        return Regime("backprop-like", slowest, fastest, f"Backprop-like: {sentence} {onwards}")
    if max(abs(1.0 - slowest), abs(1.0 - fastest)) < 1.0 - SETTLED:
        return Regime("equilibrium", slowest, fastest, f"At equilibrium: {sentence} {backwards}")
    return Regime("in between", slowest, fastest, f"In between: {sentence} {onwards} {backwards}")


def _steps_to_settle(spectrum: Spectrum, rate: float) -> int:
    """Steps after which the worst mode has less than 1 - SETTLED of its way left."""
    # Lost per step, of what is left; a difference that rounds to 0 counts as the unit of rounding.
    lost = min(rate * spectrum.smallest, max(2.0 - rate * spectrum.largest, 1e-16))
    return math.floor(math.log(1.0 - SETTLED) / math.log1p(-lost)) + 1 if lost < 1 else 1


def alignment(gradients: Weights, reference: Weights) -> dict[str, Alignment]:
    """How near two gradients are, by layer; weight and bias of a layer count as one vector.

    gradients, reference: trees as `pctt.weight_gradients` and `pctt.backprop.gradients` return them, of any
        dtype.

    Raises ValueError where their names or shapes differ.
    """
    shapes, expected = (
        {name: {key: tuple(value.shape) for key, value in layer.items()} for name, layer in tree.items()}
        for tree in (gradients, reference)
    )
    if shapes != expected:
        raise ValueError(
            f"gradients of {shapes} and {expected} are not of one network; compare two that are."
        )
    found: dict[str, Alignment] = {}
    for name, layer in gradients.items():
        ours, other = (
            torch.cat([tree[name][key].detach().cpu().double().flatten() for key in layer])
            for tree in (gradients, reference)
        )
        cosine = (ours / ours.norm()) @ (other / other.norm())
        found[name] = Alignment(float(cosine), float(ours.norm() / other.norm()))
    return found


def _prediction(net: Network, weights: Weights, index: int, source: Tensor) -> Tensor:
    """mu_l of layer `index`, 1 to L, from x_{l-1}; of a categorical layer its logits."""
    return backprop.predict(net.dense_layers("theory")[index - 1], weights[net.names[index - 1]], source)


def _precision(layer: Dense, parameters: Mapping[str, Tensor]) -> Tensor:
    """P_l in fp64: [units] where it is diagonal, else [units, units]."""
    assert isinstance(layer.energy, Gaussian)
    if layer.learns_variance:
        return 1.0 / parameters["variance"]
    return layer.energy.matrix(layer.units).to(parameters["weight"].device)


def _times(rows: Tensor, precision: Tensor) -> Tensor:
    return rows * precision if precision.dim() == 1 else rows @ precision


def _energies(net: Network, weights: Weights, nodes: list[Tensor]) -> list[Tensor]:
    """F_l of each sample, [B], of layer 1 to L at the activities of node 0 to L."""
    costs: list[Tensor] = []
    for index, layer in enumerate(net.dense_layers("theory"), start=1):
        prediction, activity = _prediction(net, weights, index, nodes[index - 1]), nodes[index]
        if isinstance(layer.energy, Categorical):
            logs = torch.log_softmax(prediction, -1)
            costs.append((torch.xlogy(activity, activity) - activity * logs).sum(-1))
        else:
            precision, error = _precision(layer, weights[net.names[index - 1]]), activity - prediction
            determinant = precision.log().sum() if precision.dim() == 1 else torch.logdet(precision)
            costs.append(0.5 * ((_times(error, precision) * error).sum(-1) - determinant))
    return costs


def _read(net: Network, weights: Weights, activities: Mapping[str, Tensor]) -> tuple[Weights, list[Tensor]]:
    """Weights, and the activities of node 0 to L, in fp64."""
    net.dense_layers("theory")
    check_weights(net, weights)
    if set(activities) != set(net.nodes):
        raise ValueError(
            f"activities are of {', '.join(activities)}; give them for {', '.join(net.nodes)} and no other."
        )
    _check_nodes(net, activities)
    return _to_fp64(weights), [activities[name].to(torch.float64) for name in net.nodes]


def _to_fp64(weights: Weights) -> Weights:
    return {name: {key: v.to(torch.float64) for key, v in layer.items()} for name, layer in weights.items()}


def _check_nodes(net: Network, given: Mapping[str, Tensor]) -> None:
    for name, values in given.items():
        units = net.widths[net.node_index(name)]
        if not isinstance(values, Tensor) or values.dim() != 2 or values.shape[1] != units or not len(values):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"{name!r} must be a tensor of shape [batch, {units}], got {got}.")
        if not torch.isfinite(values).all():
            raise ValueError(f"{name!r} holds NaN or infinite values; clean the data first.")
        if name == net.output and isinstance(net.layers[-1].energy, Categorical):
            check_distribution(name, values)
    sizes = {name: len(values) for name, values in given.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all nodes must have the same number of samples, got {sizes}.")
