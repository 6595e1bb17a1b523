"""Let the processes that torchrun started work together; without torchrun there is one.

In a single process everything here does nothing, or the obvious.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from threading import Timer
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dmoe_var.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long processes wait for another: the main process alone may measure fidelity for hours."""
MEETING = timedelta(minutes=5)
"""How long processes wait for each other at the start."""
SILENCE = 10
"""Seconds of MEETING after which the main process says what it waits for."""
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets together; only some of them are left over from something else."""
BUCKET = 2**25
"""Elements that are summed over processes in one call."""


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Say whether this process is the one that writes files, logs and shows progress."""
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process on its machine, which is its GPU's."""
    return _number("LOCAL_RANK", 0) if launched_processes() > 1 else 0


def launched_processes() -> int:
    """Count the processes that torchrun started, 1 without it; InputError for bad variables."""
    if not all(os.environ.get(name) for name in TORCHRUN):
        return 1
    processes, number, _ = _number("WORLD_SIZE", 1), _number("RANK", 0), _number("MASTER_PORT", 1)
    if number >= processes:
        raise InputError(
            f"RANK={number}: allowed with WORLD_SIZE={processes}: 0 to {processes - 1}; unset both "
            "to run without torchrun"
        )
    return processes


def launched_as_main() -> bool:
    """Say whether this process is, or will be, the main one."""
    return os.environ.get("RANK", "0") == "0" or not all(map(os.environ.get, TORCHRUN))


def _number(name: str, least: int) -> int:
    value = os.environ.get(name) or "0"
    if not (value.isascii() and value.isdecimal()) or int(value) < least:
        raise InputError(
            f"{name}={value} (environment): torchrun sets a whole number, at least {least}; unset "
            "it to run without torchrun"
        )
    return int(value)


def start(device: torch.device) -> None:
    """Join the other processes that torchrun started: NCCL between GPUs, gloo between CPUs.

    Raises InputError if they are not all there after MEETING, or cannot be reached.
    """
    processes = launched_processes()
    if processes == 1 or dist.is_initialized():
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    about = f"WORLD_SIZE={processes}, RANK={os.environ['RANK']}"
    waiting = f"waiting for {processes} processes at {place} ({about})"
    timer = Timer(SILENCE, print, (waiting,), {"file": sys.stderr, "flush": True})
    if launched_as_main():
        timer.start()
    try:
        store, number, _ = next(rendezvous("env://", timeout=MEETING))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{about}: the {processes} processes did not meet at {place} ({reason}); to run "
            "without torchrun, unset WORLD_SIZE"
        ) from error
    finally:
        timer.cancel()
    store.set_timeout(PATIENCE)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default_pg", store),
        rank=number,
        world_size=processes,
        timeout=PATIENCE,
    )


def stop() -> None:
    """Leave the group of processes, at the end of a script."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_main(value: T) -> T:
    """Return the main process's value, which must be picklable, in every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: T) -> list[T]:
    """Return every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Add up each tensor over the processes, in place, many tensors per call."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
