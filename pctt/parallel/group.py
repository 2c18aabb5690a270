"""The ranks of a run and what they send each other, counted."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from pctt.config import to_dict

TIMEOUT = 60.0
"""Seconds that a rank waits for another before it gives the run up."""


class PeerLost(RuntimeError):
    """Another rank ended or did not answer in time, so that this one cannot go on."""


@dataclass
class Traffic:
    """What this rank has sent: payload only, without what the transport adds.

    messages, message_bytes: to one other rank.    reductions, reduction_bytes: all_reduce calls, and the size
        of their buffers.
    """

    messages: int = 0
    message_bytes: int = 0
    reductions: int = 0
    reduction_bytes: int = 0


class Group:
    """All ranks of a run. Every method raises PeerLost where another rank is gone.

    rank, size: this rank, counted from 0, and their number.    device: of the tensors that are sent.
    timeout: seconds after which a rank that does not answer counts as lost.
    traffic: what was sent since the start, to be read or replaced.
    """

    def __init__(self, rank: int, size: int, device: torch.device, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.timeout = timeout
        self.traffic = Traffic()
        self._under_way: dict[Any, tuple[Tensor, Any]] = {}
        self._expected: dict[int, deque[tuple[Tensor, Any]]] = {}
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def all_reduce(self, values: Tensor) -> None:
        """Replaces `values` by their sum over the ranks, the same bits on all of them."""
        self._guarded("all_reduce", lambda: dist.all_reduce(values))
        self.traffic.reductions += 1
        self.traffic.reduction_bytes += values.nbytes

    def send(self, values: Tensor, to: int, key: object) -> None:
        """Sends a copy and does not wait. key: names the copy's place, which is free again once it was
        received.
        """
        kept, under_way = self._under_way.get(key, (None, None))
        if under_way is not None:
            self._guarded(f"rank {to}", under_way.wait)
        if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
            kept = torch.empty_like(values)
        kept.copy_(values)
        self._under_way[key] = kept, self._guarded(f"rank {to}", lambda: dist.isend(kept, to))
        self.traffic.messages += 1
        self.traffic.message_bytes += values.nbytes

    def expect(self, like: Tensor, source: int) -> None:
        """Says ahead that `source` will send a tensor like this one, in the order in which it will send them.

        Through gloo an expected message comes at once, where others first ask and are answered: there and
        back 0.7 ms instead of 5.2 ms (64 KiB, 2 cores that ten processes shared, 2026-11-29). Through nccl,
        whose messages between two ranks wait for each other, this does nothing.
        """
        if self.device.type == "cpu":
            free = self._free.setdefault((like.shape, like.dtype), [])
            place = free.pop() if free else torch.empty_like(like)
            work = self._guarded(f"rank {source}", lambda: dist.irecv(place, source))
            self._expected.setdefault(source, deque()).append((place, work))

    def receive(self, into: Tensor, source: int) -> None:
        """Waits for what `source` sends next."""
        expected = self._expected.get(source)
        if not expected:
            self._guarded(f"rank {source}", lambda: dist.recv(into, source))
            return
        place, work = expected.popleft()
        self._guarded(f"rank {source}", work.wait)
        into.copy_(place)
        self._free[place.shape, place.dtype].append(place)

    def agree(self, what: str, *values: object) -> None:
        """Raises ValueError on every rank unless `values` are the same on all: tensors to the bit, other
        things as a checkpoint describes them.
        """
        number = _digest(values)
        extremes = torch.tensor([number, -number], device=self.device)
        self._guarded("all_reduce", lambda: dist.all_reduce(extremes, dist.ReduceOp.MAX))
        if int(extremes[0]) != -int(extremes[1]):
            raise ValueError(f"{what} must be the same on all {self.size} ranks, and they differ.")

    def finish(self) -> None:
        """Waits until all that was sent has arrived and all ranks are here; before `close`, unless something
        has failed.
        """
        for _, under_way in self._under_way.values():
            self._guarded("another rank", under_way.wait)
        self._guarded("all_reduce", lambda: dist.all_reduce(torch.zeros(1, device=self.device)))

    def close(self) -> None:
        """Leaves the group; waits for nobody."""
        self._under_way.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _guarded(self, partner: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # what torch.distributed raises for a closed connection or a timeout
            who = "another rank" if partner == "all_reduce" else partner
            late = "timed out" in str(error).lower() or "timeout" in str(error).lower()
            why = f"did not answer within {self.timeout:g} s" if late else "has ended"
            raise PeerLost(f"{who} {why}, so rank {self.rank} of {self.size} ends too.") from error


def _digest(values: Sequence[object]) -> int:
    """A number of 56 bits. Not by what is printed: of large networks that is a part."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(json.dumps(to_dict(value)).encode())
    return int.from_bytes(digest.digest()[:7], "big")


def connect(
    device: str = "cpu",
    timeout: float = TIMEOUT,
    rank: int | None = None,
    size: int | None = None,
    rendezvous: str = "env://",
) -> Group:
    """Joins the run: where torchrun started this process, from its environment.

    device: "cpu" talks through gloo, "cuda" through nccl, each rank on the GPU of its LOCAL_RANK.
    timeout: seconds after which a rank that does not answer counts as lost.
    rank, size, rendezvous: without torchrun, `file:///path` that no other run uses.

    Raises ValueError where neither torchrun nor arguments say which rank this is, PeerLost where the others
    do not come.
    """
    if rank is None or size is None:
        if "RANK" not in os.environ:
            raise ValueError(
                "no rank: start this program with torchrun (docs/parallel.md), or give rank, size and "
                "rendezvous."
            )
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(place)
    group = Group(rank, size, place, timeout)
    try:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        raise PeerLost(f"not all {size} ranks came together within {timeout:g} s: {error}") from error
    return group
