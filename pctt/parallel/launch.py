"""Starting ranks: what a program under torchrun calls, and processes for programs that start their own."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pctt.parallel.group import TIMEOUT, Group, PeerLost, connect
from pctt.run import FitResult


def run(main: Callable[[Group], FitResult | None], device: str = "cpu", timeout: float = TIMEOUT) -> int:
    """Joins the ranks that torchrun started, calls `main`, and returns the exit status: 0, or 1 after one
    sentence on stderr.

    What all ranks know, a run that diverged, is said by rank 0; a lost rank by each of those that miss it,
    who cannot tell each other.

    main: of one rank.    device, timeout: as of `connect`.
    """
    try:
        group = connect(device, timeout)
        try:
            result = main(group)
            group.finish()
        finally:
            group.close()
    except (PeerLost, ValueError) as error:
        print(f"pctt: {error}", file=sys.stderr)
        return 1
    if result is None or result.status.ok:
        return 0
    if group.rank == 0:
        print(f"pctt: {result.message}", file=sys.stderr)
    return 1


class Ranks:
    """Processes on this machine, one thread each, that take one job after the other; for tests and
    measurements. Under a `with`; leaving it ends them.

    size: how many.

    >>> with Ranks(2) as ranks:  # doctest: +SKIP
    ...     answers = ranks.run(job, 3.0)  # [job(group, 3.0) of rank 0, of rank 1]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[BaseProcess, Connection] | None] = [None] * size
        self._jobs = 0

    def __enter__(self) -> Ranks:
        self._folder = tempfile.TemporaryDirectory()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            if worker is not None:
                worker[1].close()  # which a waiting rank sees, and returns
                worker[0].join(5.0)
                if worker[0].is_alive():
                    worker[0].kill()
                    worker[0].join()
        self._folder.cleanup()

    def run(
        self,
        job: Callable[..., Any],
        *arguments: Any,
        size: int | None = None,
        timeout: float = TIMEOUT,
    ) -> list[Any]:
        """job(group, *arguments) on the first `size` ranks: what each returned, the exception it raised, or
        None of one that died. The job must be importable by name.
        """
        size = size or self.size
        self._jobs += 1
        rendezvous = f"file://{Path(self._folder.name) / str(self._jobs)}"
        started = [rank for rank in range(size) if self._workers[rank] is None]
        workers = [self._worker(rank) for rank in range(size)]
        for rank in started:
            workers[rank][1].recv()  # ready: the timeout is for what ranks do, not for starting them
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((job, arguments, rank, size, rendezvous, timeout))
        return [self._answer(rank, pipe) for rank, (_, pipe) in enumerate(workers)]

    def _worker(self, rank: int) -> tuple[BaseProcess, Connection]:
        worker = self._workers[rank]
        if worker is None:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            worker = self._workers[rank] = process, ours
        return worker

    def _answer(self, rank: int, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            worker, self._workers[rank] = self._workers[rank], None
            assert worker is not None
            worker[0].join()
            pipe.close()
            return None


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(None)
    while True:
        try:
            job, arguments, rank, size, rendezvous, timeout = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            group = connect(timeout=timeout, rank=rank, size=size, rendezvous=rendezvous)
            try:
                answer = job(group, *arguments)
                group.finish()
            finally:
                group.close()
        except Exception as error:  # whatever it is, the one who asked shall see it
            answer = error
        pipe.send(answer)
