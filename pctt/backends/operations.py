"""The operations a backend must have, and the whole of what the rest of pctt asks of it.

Tensors are slices [n, B, D] of stacked buffers, one entry per node or layer; weights are [n, in, out], biases
[n, 1, out]. Below, s is `scale` times the named scalar of the instruction. An `out` may be one of the inputs
where the operation is elementwise, or the addend.

    fill                out = scale
    copy                out = s a
    add                 out = a + s b
    multiply            out = a . b                     b may be one row, [1, 1, D], or one column, [1, B, 1]
    noise               out = a + s n                   n drawn from N(0, 1); option node: whose draws
    activate            out = f(a)
    derivative          out = J_f(z)' v                 inputs v, z, y = f(z)
    product             out = addend + s a W            the addend may be missing; a bias row is broadcast
    product_transposed  out = addend + s a W'           likewise
    outer               out = addend + s a' b           sums over the batch; the addend may be missing
    column_sum          out = addend + s (sum of a over the batch)
    inner               out[n] = sum of a . b over batch and units
    cross_entropy       out[n] = sum of KL(a || softmax(z)) over the batch
    clip                every out scaled so that their joint norm, per layer, is at most `scale`
    sgd, adam, adamw    outs (weight, state ...) updated from the input (gradient): see learning/rules.py
    step_control        outs (factor, accepted), [1, B, 1]: see inference/dynamics.py, heun_acceptance
    variance            outs (v, P): v += adaptation (mean square - v), P = 1 / v: see energies.py

Those of the maps of graphs, on tensors of one entry. Samples are flat; their shapes, windows and axes stand
in the options. Where an addend is named it may be missing.

    product, product_transposed, outer, column_sum      with option positions: a sample is so many rows
    activate, derivative, cross_entropy                 with option last: softmax over rows of so many
    convolve            out = addend + s (a convolved with W); a bias row goes to all pixels of its channel
    convolve_transposed, convolve_outer                 its products with respect to a and to W
    pool_max, unpool_max, pool_mean, unpool_mean        windows, and v spread back over them
    take, put           out = addend + s (entries start to start + length of one axis), and its transpose
    permute             out = addend + s (the axes of a in another order)
    shift               out = a + s
    add_channels        out = a + s w                   a as [B, outer, channels, inner], w per channel
    scale_channels, divide_channels                     out = addend + s a w, addend + s a / sqrt(w + epsilon)
    channel_sum, channel_inner                          out = addend + s (sum of a, of a . b), per channel
    normalise, normalise_pull                           (a - mean) / deviation over a region, and its J'v
    embed, embed_outer  rows of a table by number, and their sums
    attend, attend_pull scaled dot-product attention, and its J'v for queries, keys and values
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pctt._checks import require_one_of
from pctt.backends.mesh import parse_device
from pctt.backends.precision import PrecisionPolicy
from pctt.groups import Layout
from pctt.network import Network
from pctt.program import Instruction, Program, Slot


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says what would make it run."""


class DeviceLost(RuntimeError):
    """A device failed while it was at work. What lay on it is lost or in doubt; the message says why."""


class Backend(Protocol):
    """One way to run programs. Buffers are the backend's own; only `write` and `read` cross to the host."""

    name: str
    uniform: bool
    """Whether inference steps that serve every layer run better than ones that skip layers not yet reached.
    """
    whole_steps: bool
    """Whether a training step runs best as one sequence, relaxation and learning together."""

    @property
    def planned_rows(self) -> int | None:
        """Rows of the batches that memory was planned for; None where any number will do."""
        ...

    def compile(
        self, net: Network, grouped: bool, write: Callable[[Layout], Program], batch_size: int
    ) -> tuple[Layout, Program]:
        """A layout of `net`, and the program that `write` gives for it, in the backend's own operations.

        batch_size: of the largest batches to come.

        Raises ValueError naming what the backend cannot run, or which layer does not fit its memory.
        """
        ...

    def rows(self, batch_size: int) -> int:
        """Rows to allocate for a batch, at least `batch_size`; batches of equal rows share their buffers."""
        ...

    def begin(self, buffers: Mapping[str, Any], batch_size: int) -> None:
        """Called before each batch; rows from `batch_size` on must not count."""
        ...

    def allocate(self, buffer: Any, batch_size: int) -> Any:
        """A buffer full of zeros."""
        ...

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, Any], scalars: Mapping[str, float]
    ) -> Callable[[], None]:
        """The instructions, ready to run on these buffers; scalars are looked up at each run."""
        ...

    def sequence(self, calls: list[Callable[[], None]]) -> Callable[[], None]:
        """Bound sections as one call, which is always run whole."""
        ...

    def write(self, buffer: Any, slot: Slot, values: Tensor) -> None:
        """Host to buffer; shape [D] or [B, D] or [in, out] goes to a slot of one entry, 0 around it."""
        ...

    def send_ahead(self, buffer: Any, slot: Slot, values: Tensor) -> Callable[[], None]:
        """Starts to carry values towards a buffer that is still in use; the call it returns writes them."""
        ...

    def read(self, buffer: Any, slot: Slot) -> Tensor:
        """A copy on the host of the entries of a slot, with the first axis and all padding."""
        ...

    def seed(self, seed: int) -> None:
        """Makes the draws that follow a function of `seed`, of the node and of how many it has had."""
        ...

    def synchronise(self) -> None:
        """Returns when everything asked for has run; for timing."""
        ...


def one_after_the_other(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls as one."""

    def run() -> None:
        for call in calls:
            call()

    return run


BACKENDS = ("reference", "emulated", "tenstorrent")


def backend(
    name: str,
    dtype: torch.dtype,
    device: str | int | None = None,
    precision: PrecisionPolicy | None = None,
    fused: bool = False,
    cores_per_layer: int | None = None,
) -> Backend:
    """The backend called `name`, opened on `device`.

    device: reference: a torch device; emulated: a chip such as "n150", or several, "n300:2"; tenstorrent: the
        number of a card; emulated, tenstorrent: "mesh:2" for two chips that share out each batch (mesh.py).
    precision: formats on the card; the reference computes in `dtype`.
    fused: on a card, run each step in one program (docs/kernels.md).    cores_per_layer: its cores for each
        layer, None for as few as memory allows.

    Raises ValueError for an unknown name, BackendUnavailable where it cannot run.
    """
    require_one_of("backend", name, BACKENDS)
    if fused:
        if name == "reference":
            raise ValueError(
                "fused=True is a way of running on a card; use backend='tenstorrent' or 'emulated'."
            )
        if parse_device(device)[1] > 1:
            raise ValueError(
                f"fused=True runs on one chip, and device {device!r} is several; drop one of the two."
            )
        if name == "emulated":
            from pctt.backends.fused_emulated import FusedEmulation

            return FusedEmulation(dtype, device, precision, cores_per_layer)
        from pctt.backends.fused import Fused

        return Fused(dtype, device, precision, cores_per_layer)
    if cores_per_layer is not None:
        raise ValueError("cores_per_layer is of the fused kernel; add fused=True.")
    if name == "emulated":
        from pctt.backends.emulated import Emulated

        return Emulated(dtype, device, precision)
    if name == "tenstorrent":
        from pctt.backends.tenstorrent import Tenstorrent

        return Tenstorrent(dtype, device, precision)
    from pctt.backends.reference import Reference

    if precision is not None:
        raise ValueError(
            "precision has no effect on the reference backend, which computes in the dtype of the weights; "
            "drop it, or choose backend='emulated' or 'tenstorrent'."
        )
    return Reference(dtype, device)
