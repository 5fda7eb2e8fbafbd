"""The processes that train one network together, one per GPU, and what they tell each other on the host.

    rank r of N    takes rows r::N of every batch, and the mean of all gradients (reduction.py)
    rank 0         decides what hangs on its clock, and alone reads and writes files and prints

Whoever starts them (runners/processes.py, torchrun, Slurm) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. A process that was started alone is a world of one, without a group of processes: nothing is sent.

What is told here is small and goes from host to host by gloo, so it never waits for a GPU. Gradients go by NCCL between
GPUs. Each function must be called by all processes, in the same order.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from runners.config import GpuConfig
from runners.errors import Busy, LostProcess, UserError, classify

Value = TypeVar("Value")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets."""

_launchers_store: list[Store] = []
"""One, while this process has joined others; torch elastic's outlives them."""


@dataclass(frozen=True)
class World:
    """The processes that train together."""

    rank: int = 0
    """Number of this process."""
    size: int = 1
    """Number of processes."""

    @property
    def is_first(self) -> bool:
        """Whether this process reads and writes the files of the run, and prints."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def largest(self, *values: int) -> list[int]:
        """Return the largest of the processes' values, one by one."""
        found: list[int] = torch.stack(self.gather(torch.tensor(values))).amax(0).tolist()
        return found

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of each process, by rank.

        Args:
            rows: on the CPU, of one dtype and shape on all processes.
        """
        if self.is_alone:
            return [rows]
        found = [torch.empty_like(rows) for _ in range(self.size)]
        distributed.all_gather(found, rows)
        return found

    def gather_uneven(self, rows: Tensor) -> list[Tensor]:
        """Return the rows [n, ...] of each process, by rank; their number may differ."""
        counts = [int(count) for count in self.gather(torch.tensor(len(rows)))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return [part[:count] for part, count in zip(self.gather(padded), counts, strict=True)]

    def gather_to_first(self, row: Tensor) -> Tensor | None:
        """Return the row of each process [N, ...] in the first process; None in the others.

        Args:
            row: on the CPU, of one dtype and shape on all processes.
        """
        found = [torch.empty_like(row) for _ in range(self.size)] if self.is_first else None
        distributed.gather(row, found)
        return None if found is None else torch.stack(found)

    def broadcast(self, value: Value) -> Value:
        """Return the first process's value, which can be pickled."""
        if self.is_alone:
            return value
        values = [value]
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def all_values(self, value: Value) -> list[Value]:
        """Return the value of each process, by rank; it can be pickled."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def note(self, name: str) -> None:
        """Note something for the processes that torch elastic starts after a failure of these."""
        if _launchers_store:
            _launchers_store[-1].set(name, "noted")

    def has_noted(self, name: str) -> bool:
        """Return whether these processes, or those that failed before them, have noted it."""
        return bool(_launchers_store) and bool(_launchers_store[-1].check([name]))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise the error of the first process that has one, in all of them.

        Raises:
            UserError: that of another process; its `is_shared` is set in all.
            Busy: the same.
            LostProcess: another process has another error.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.is_alone or isinstance(error, LostProcess):
                raise
            own = error
        failed = [one for one in self.all_values(None if own is None else _described(own, self.rank)) if one]
        for told in (own, *failed):
            if isinstance(told, UserError):
                told.is_shared = True
        if own is not None:
            raise own
        if failed:
            raise failed[0]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Check that all processes have the same values, by name.

        Raises:
            UserError: they differ; the message names the first that does.
        """
        for rank, others in enumerate(self.all_values(dict(values))):
            for name, value in values.items():
                if others.get(name) != value:
                    error = UserError(
                        f"{name} is {value} on rank {self.rank} and {others.get(name)} on rank {rank}: all "
                        "machines need the same settings and data"
                    )
                    error.is_shared = True
                    raise error


def _described(error: Exception, rank: int) -> Exception:
    """Return an error that another process can raise in its place."""
    if isinstance(error, UserError | Busy):
        return type(error)(str(error))
    return LostProcess(f"rank {rank}: {classify(error)[1]}")


def current() -> World:
    """Return the processes that this one belongs to."""
    if distributed.is_available() and distributed.is_initialized():
        return World(distributed.get_rank(), distributed.get_world_size())
    return World()


@contextmanager
def joined(gpu: GpuConfig) -> Iterator[World]:
    """Join the other processes, on the GPU of LOCAL_RANK where there are GPUs, and leave them at the end.

    Args:
        gpu: `device`; `timeout_minutes`, for which a process waits for the others.

    Raises:
        UserError: a variable is missing, or this machine has fewer GPUs than processes.
        LostProcess: another process ended, or did not answer in time.
    """
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(f"{', '.join(missing)} is not set: a launcher sets {', '.join(VARIABLES)}")
    on_cuda = gpu.device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(_gpu_of(int(os.environ["LOCAL_RANK"])))
    backend, timeout = "cpu:gloo,cuda:nccl" if on_cuda else "gloo", timedelta(minutes=gpu.timeout_minutes)
    with _lost_processes(gpu):
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        _launchers_store.append(store)
        # torch elastic keeps its store when it restarts processes: there would be the addresses of those that ended.
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            yield current()
        finally:
            _launchers_store.clear()
            distributed.destroy_process_group()


def _gpu_of(local_rank: int) -> int:
    """Return the number of this process's GPU: a launcher may show each process its own alone."""
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise UserError(f"LOCAL_RANK={local_rank}: this machine has {count} GPUs, and each process needs one")
    return local_rank if count > 1 else 0


@contextmanager
def _lost_processes(gpu: GpuConfig) -> Iterator[None]:
    """Make a LostProcess of an error of a collective."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_collective(error):
            raise
        lost = LostProcess("another process ended")
        if "imed out" in str(error) or "imeout" in str(error):
            lost = LostProcess(f"another process did not answer for gpu.timeout_minutes={gpu.timeout_minutes:g}")
            lost.has_waited = True
        raise lost from error


def is_of_collective(error: BaseException) -> bool:
    """Return whether an error is of a collective, which fails where another process has ended or hangs."""
    return isinstance(error, distributed.DistError) or "/gloo/" in str(error)
