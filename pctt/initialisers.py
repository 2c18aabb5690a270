"""Initial weights, drawn by torch.nn.init from a generator that the caller seeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pctt._checks import require_finite_positive, require_one_of
from pctt.activations import activation

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
