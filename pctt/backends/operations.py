"""The operations a backend must have, and the whole of what the rest of pctt asks of it.

Tensors are slices [n, B, D] of stacked buffers, one entry per node or layer; weights are [n, in, out], biases
[n, 1, out]. Below, s is `scale` times the named scalar of the instruction. An `out` may be one of the inputs
where the operation is elementwise, or the addend.

    fill                out = scale
    copy                out = a
    add                 out = a + s b
    multiply            out = a . b                     b may be one row, [1, 1, D]
    activate            out = f(a)
    derivative          out = J_f(z)' v                 inputs v, z, y = f(z)
    product             out = addend + s a W            the addend may be missing; a bias row is broadcast
    product_transposed  out = addend + s a W'           likewise
    outer               out = s a' b                    sums over the batch
    column_sum          out = s (sum of a over the batch)
    inner               out[n] = sum of a . b over batch and units
    cross_entropy       out[n] = sum of KL(a || softmax(z)) over the batch
    clip                every out scaled so that their joint norm, per layer, is at most `scale`
    sgd, adam, adamw    outs (weight, state ...) updated from the input (gradient): see learning/rules.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pctt._checks import require_one_of
from pctt.program import Buffer, Instruction, Slot


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says what would make it run."""


class Backend(Protocol):
    """One way to run programs. Buffers are the backend's own; only `write` and `read` cross to the host."""

    name: str

    def allocate(self, buffer: Buffer, batch_size: int) -> Any:
        """A buffer full of zeros."""
        ...

    def bind(
        self, code: Iterable[Instruction], buffers: Mapping[str, Any], scalars: Mapping[str, float]
    ) -> Callable[[], None]:
        """The instructions, ready to run on these buffers; scalars are looked up at each run."""
        ...

    def write(self, buffer: Any, slot: Slot, values: Tensor) -> None:
        """Host to buffer; shape [D] or [B, D] or [in, out] goes to a slot of one entry."""
        ...

    def read(self, buffer: Any, slot: Slot) -> Tensor:
        """A copy on the host of the entries of a slot, with the first axis, in the buffer's dtype."""
        ...

    def synchronise(self) -> None:
        """Returns when everything asked for has run; for timing."""
        ...


BACKENDS = ("reference",)


def backend(name: str, dtype: torch.dtype, device: str | int | None = None) -> Backend:
    """The backend called `name`, opened on `device`.

    Raises ValueError for an unknown name, BackendUnavailable where it cannot run.
    """
    require_one_of("backend", name, BACKENDS)
    from pctt.backends.reference import Reference

    return Reference(dtype, device)
