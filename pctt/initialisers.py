"""Initial weights, drawn from a seeded generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pctt._checks import require_finite_positive, require_one_of
from pctt.activations import activation
from pctt.energies import Gaussian
from pctt.layers.block import Expression
from pctt.layers.dense import Dense
from pctt.layers.maps import Embedding, Linear
from pctt.network import Network, Weights

SCHEMES = ("xavier", "kaiming", "orthogonal", "normal")


def initialise_weight(
    fan_in: int,
    fan_out: int,
    activation_name: str,
    scheme: str,
    gain: float | None,
    generator: torch.Generator,
) -> Tensor:
    """One weight matrix [in, out], float64. Raises ValueError for an unknown scheme or a gain that is not
    above 0.
    """
    require_one_of("scheme", scheme, SCHEMES)
    if gain is not None:
        require_finite_positive("gain", gain)
    weight = torch.empty(fan_out, fan_in, dtype=torch.float64)  # torch.nn.init reads [out, in]
    if scheme == "xavier":
        nn.init.xavier_uniform_(weight, gain or 1.0, generator=generator)
    elif scheme == "kaiming":
        nn.init.normal_(
            weight, 0.0, (gain or activation(activation_name).gain) / fan_in**0.5, generator=generator
        )
    elif scheme == "orthogonal":
        nn.init.orthogonal_(weight, gain or 1.0, generator=generator)
    else:
        nn.init.normal_(weight, 0.0, gain or 0.05, generator=generator)
    return weight.T.contiguous()


def initialise(
    shape: tuple[int, ...],
    fan_in: int,
    fan_out: int,
    activation_name: str,
    scheme: str,
    gain: float | None,
    generator: torch.Generator,
) -> Tensor:
    """The weight of a map, float64: a matrix [in, out], or a kernel, whose fans count its window."""
    if len(shape) == 2:
        return initialise_weight(*shape, activation_name, scheme, gain, generator)
    require_one_of("scheme", scheme, SCHEMES)
    if gain is not None:
        require_finite_positive("gain", gain)
    weight = torch.empty(shape, dtype=torch.float64)
    if scheme == "xavier":
        bound = (gain or 1.0) * (6.0 / (fan_in + fan_out)) ** 0.5
        return weight.uniform_(-bound, bound, generator=generator)
    if scheme == "kaiming":
        factor = gain or activation(activation_name).gain
        return weight.normal_(0.0, factor / fan_in**0.5, generator=generator)
    if scheme == "orthogonal":
        return nn.init.orthogonal_(weight, gain or 1.0, generator=generator)
    return weight.normal_(0.0, gain or 0.05, generator=generator)


def init(
    net: Network,
    seed: int = 0,
    scheme: str = "xavier",
    gain: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """Seeded initial weights of `net`; biases are zero.

    scheme: "xavier" (uniform, Glorot & Bengio 2010), "kaiming" (normal, fan-in, He et al. 2015), "orthogonal"
        (Saxe et al. 2014) or "normal" (standard deviation = gain).
    gain: factor on the scheme's own scale; by default 1, for kaiming the activation's gain, for normal 0.05.
    dtype: drawn in float64 and rounded, so float32 and float64 networks of one seed agree.

    Returns {layer name: {"weight": [in, out], "bias": [out]}}; of other maps than dense ones the weights have
    torch's shapes, fan-in is what one output reads, scales start at 1, and embeddings at N(0, 1).
    Raises ValueError for an unknown scheme, or a gain that is not above 0.

    >>> from pctt import Dense, chain
    >>> init(chain(4, [Dense(3)]))["dense1"]["weight"].shape
    torch.Size([4, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for part in net.chains:
        for index in part.owners:
            rule, name = part.rule(index), part.nodes[index]
            if isinstance(rule, Dense):
                fan_in = part.widths[index - 1]
                weight = initialise_weight(fan_in, rule.units, rule.activation, scheme, gain, generator)
                weights[name] = {"weight": weight.to(dtype)}
                if rule.bias:
                    weights[name]["bias"] = torch.zeros(rule.units, dtype=dtype)
            elif rule.weight_shapes():
                layer = part.layer(index)
                function = layer.activation if isinstance(layer, Dense) else None
                drawn = _start(rule, function, scheme, gain, generator)
                weights[name] = {key: values.to(dtype) for key, values in drawn.items()}
            if rule.learns_variance and isinstance(rule.energy, Gaussian):
                weights[name]["variance"] = (1.0 / rule.energy.matrix(rule.units)).to(dtype)
    return weights


def _start(
    rule: Expression, function: str | None, scheme: str, gain: float | None, generator: torch.Generator
) -> dict[str, Tensor]:
    """Initial weights of a block: matrices and kernels by the scheme, scales and variances 1, the rest 0.

    function: the activation of a dense layer, before or after its product; else the one that follows a map.
    """
    weights: dict[str, Tensor] = {}
    for map_, shapes, keys, following in rule.weighted_maps():
        for key, shape in map_.weight_shapes(shapes).items():
            if key != "weight" or len(shape) == 1:
                value = 1.0 if key in ("weight", "running_var") else 0.0
                weights[keys[key]] = torch.full(shape, value, dtype=torch.float64)
                continue
            fan_in, fan_out = map_.fans(shapes)
            if isinstance(map_, Embedding):
                drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
                weights[keys[key]] = drawn if gain is None else gain * drawn
                continue
            weights[keys[key]] = initialise(
                shape, fan_in, fan_out, function or following, scheme, gain, generator
            )
            if isinstance(map_, Linear) and map_.mask is not None:
                weights[keys[key]] *= map_.drawn_mask(shape)
    return weights
