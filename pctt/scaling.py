"""Scaling of the weights so that widths and depths nearly share their best rates (docs/results/depth.md)."""

from __future__ import annotations

from dataclasses import replace

from pctt.network import Network


def mupc(net: Network) -> Network:
    """`net` with the scales of muPC (Innocenti, Achour & Buckley 2025) for weights drawn from N(0, 1).

        first layer   1 / sqrt(inputs)
        hidden        1 / sqrt(units below), with a skip 1 / sqrt(units below * layers)
        last layer    1 / units below

    Draw the weights with `init(net, scheme="normal", gain=1.0)`. Scales that the layers had are replaced.

    >>> from pctt import Dense, chain
    >>> [layer.scale for layer in mupc(chain(4, [Dense(16), Dense(16), Dense(2)])).layers]
    [0.5, 0.25, 0.0625]
    """
    dense = net.dense_layers("mupc")
    depth = len(dense)

    def scale(number: int) -> float:
        fan_in = net.widths[number - 1]
        if number == depth and depth > 1:
            return 1.0 / fan_in
        return (fan_in * (depth if dense[number - 1].skip else 1)) ** -0.5

    layers = (replace(layer, scale=scale(number)) for number, layer in enumerate(dense, start=1))
    return replace(net, layers=tuple(layers))
