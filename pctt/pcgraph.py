"""PC graphs: nodes that predict each other by W f(x) + b, all to all or by a list of connections (Salvatori
et al. 2022, "Learning on Arbitrary Graph Topologies via Predictive Coding").

    mu_t = sum over sources s of f(x_s) W_st + b_t

All nodes together are one big layer of units that predicts itself, with a matrix of weights of which W_st are
the blocks, and whose diagonal is left out where a node is among its own sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pctt.energies import Energy, Gaussian
from pctt.layers.block import Block, Step
from pctt.layers.maps import Add, Bias, Flatten, Function, Linear, Reshape
from pctt.network import Network
from pctt.wiring import graph

Connections = str | Sequence[tuple[str, str]]


def pc_graph(
    nodes: Mapping[str, int | Sequence[int]],
    connections: Connections = "all",
    activation: str = "tanh",
    energy: Energy | Mapping[str, Energy] | None = None,
    bias: bool = True,
    input: str | None = None,
    output: str | None = None,
) -> Network:
    """A network of nodes of any mutual predictions; ask it by clamping any of them.

    nodes: {name: units or shape}, in the order in which a feedforward start visits them.
    connections: "all": every node predicts every node, itself included but for the diagonal of its weights;
        "forward", "backward": each node predicts the next, or the one before; or pairs (source, target). A
        node that is no target is predicted by nothing.
    activation: f, of every source.
    energy: of every node, or of each by name; default Gaussian of precision 1.
    bias: whether every predicted node has a b_t.
    input, output: the nodes that a `Trainer` puts inputs and targets at; by default the first and the last.

    Raises ValueError for unknown names, a pair given twice, and nodes without any connection.

    >>> pc_graph({"image": 4, "hidden": 3, "label": 2}).sources_ahead == frozenset({0, 1, 2})
    True
    >>> pc_graph({"image": 4, "label": 2}, [("label", "image")], input="label", output="image").nodes
    ('label', 'image')
    """
    names = list(nodes)
    if len(names) < 1 or not all(names):
        raise ValueError("a PC graph needs nodes, {name: units}, got none.")
    shapes = {name: (size,) if isinstance(size, int) else tuple(size) for name, size in nodes.items()}
    sources = _sources(names, connections)
    idle = [name for name in names if not sources[name] and not any(name in of for of in sources.values())]
    if idle:
        raise ValueError(f"node {idle[0]!r} has no connection; add one, or drop the node.")
    energies = dict(energy) if isinstance(energy, Mapping) else dict.fromkeys(names, energy or Gaussian())
    for name in energies:
        if name not in shapes or (isinstance(energy, Mapping) and not sources[name]):
            raise ValueError(f"energy has {name!r}, which is no node that another one predicts.")
    layers = {
        name: (_block(name, of, shapes, activation, energies.get(name) or Gaussian(), bias), *of)
        for name, of in sources.items()
        if of
    }
    roots = {name: shapes[name] for name in names if not sources[name]}
    return graph(roots, layers, input or names[0], output or names[-1])


def _sources(names: Sequence[str], connections: Connections) -> dict[str, tuple[str, ...]]:
    """Of each node, the nodes that it is predicted from."""
    if connections == "all":
        return {name: tuple(names) for name in names}
    if connections in ("forward", "backward"):
        order = list(names) if connections == "forward" else list(reversed(names))
        before = dict(zip(order[1:], order, strict=False))
        return {name: (before[name],) if name in before else () for name in names}
    if isinstance(connections, str):
        raise ValueError(
            f"connections must be 'all', 'forward', 'backward' or pairs of names, got {connections!r}."
        )
    found: dict[str, list[str]] = {name: [] for name in names}
    for pair in connections:
        if len(pair) != 2 or any(name not in found for name in pair):
            raise ValueError(
                f"a connection is a pair (source, target) of nodes {', '.join(names)}, got {pair!r}."
            )
        source, target = pair
        if source in found[target]:
            raise ValueError(f"the connection {pair!r} stands there twice; drop one.")
        found[target].append(source)
    return {name: tuple(of) for name, of in found.items()}


def _block(
    target: str,
    sources: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    activation: str,
    energy: Energy,
    bias: bool,
) -> Block:
    units = 1
    for size in shapes[target]:
        units *= size
    steps: list[Step] = []
    parts: list[int] = []
    count = len(sources)
    for number, source in enumerate(sources):
        at = number
        if len(shapes[source]) > 1:
            steps.append(Step(Flatten(), (at,)))
            at = count + len(steps) - 1
        if activation != "identity":
            steps.append(Step(Function(activation), (at,)))
            at = count + len(steps) - 1
        mask = "off_diagonal" if source == target else None
        name = source if count > 1 else ""
        steps.append(Step(Linear(units, bias=bias and count == 1, mask=mask), (at,), name))
        parts.append(count + len(steps) - 1)
    if count > 1:
        steps.append(Step(Add(), tuple(parts)))
        if bias:
            steps.append(Step(Bias()))
    if len(shapes[target]) > 1:
        steps.append(Step(Reshape(shapes[target])))
    return Block(steps, energy, target)
