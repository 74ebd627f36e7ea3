"""The few collective operations the system needs. Without torchrun every one of them is the identity.

It does not know what is reduced or why. Call `init` once, before anything asks for a rank.
"""

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def init(device: torch.device, *, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group that torchrun's environment describes: nccl on cuda, gloo on CPU. Twice is once.

    `timeout` must outlast the longest thing one rank does alone (tokenising a corpus); a rank that *dies* is noticed at
    once by torchrun, which stops the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or _is_up():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def local_rank() -> int:
    """Return this process's number on its machine, as torchrun gave it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """Return this process's number in the group, 0 without one."""
    return dist.get_rank() if _is_up() else 0


def world_size() -> int:
    """Return the number of processes in the group, 1 without one."""
    return dist.get_world_size() if _is_up() else 1


def is_main() -> bool:
    """Whether this is the one process that writes files and talks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has come here."""
    if _is_up():
        dist.barrier(device_ids=[torch.cuda.current_device()] if _is_nccl() else None)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place, and return it. Under nccl a CPU tensor travels over the GPU."""
    if not _is_up():
        return tensor
    if _is_nccl() and not tensor.is_cuda:
        travelling = tensor.cuda()
        dist.all_reduce(travelling)
        return tensor.copy_(travelling)
    dist.all_reduce(tensor)
    return tensor


def broadcast_object(x: T) -> T:
    """Return rank 0's `x` on every process (pickled between our own processes; never from a file)."""
    if not _is_up():
        return x
    box: list[T] = [x]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(x: T) -> list[T]:
    """Return every process's `x`, in rank order."""
    if not _is_up():
        return [x]
    gathered: list[T] = [x] * world_size()
    dist.all_gather_object(gathered, x)
    return gathered


def shutdown() -> None:
    """Leave the process group. On success call `barrier` before: a rank that leaves early takes the store with it."""
    if _is_up():
        dist.destroy_process_group()


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_nccl() -> bool:
    return dist.get_backend() == "nccl"
