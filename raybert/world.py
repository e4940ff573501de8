"""The world: this rank among all ranks. The only module that knows torch.distributed."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

CPU = torch.device("cpu")
HOST_BYTES = 64  # of a name, which POSIX does not let be longer


@dataclass(frozen=True)
class World:
    """Ranks that train together.

    Args:
        rank: of this process, from 0.
        size: number of ranks; at 1 no process group is needed.
        device: this rank's.
        control: group of the same ranks whose messages stay on the host, so that asking waits for no device.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    control: dist.ProcessGroup | None = None

    @classmethod
    def current(cls, device: torch.device, timeout_s: float = 180.0) -> World:
        """The initialised process group, or a world of one; all ranks call it.

        Args:
            device: this rank's.
            timeout_s: seconds after which an unanswered question (`any`) is an error.
        """
        if not dist.is_initialized():
            return cls(device=device)
        control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size(), device, control)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes checkpoints and metrics."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks; a new tensor."""
        total = values.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def min(self, value: int) -> int:
        """The smallest of all ranks' values; all ranks call it."""
        smallest = torch.tensor(value)
        if self.size > 1:
            dist.all_reduce(smallest, dist.ReduceOp.MIN, self.control)
        return int(smallest)

    def any(self, mine: bool) -> Callable[[], bool]:
        """Ask whether any rank says yes, which every rank must ask; see `vote`."""
        answers = self.vote(mine)
        return lambda: answers()[0]

    def vote(self, *mine: bool) -> Callable[[], list[bool]]:
        """Ask for each of some questions whether any rank says yes; every rank must ask as many.

        The answers are ready when they are called for: what is done between hides the time that the messages take.
        """
        if self.size == 1:
            return lambda: list(mine)
        votes = torch.tensor(mine, dtype=torch.int64)
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, self.control, async_op=True)
        assert work is not None

        def answers() -> list[bool]:
            work.wait()
            return [bool(vote) for vote in votes]

        return answers

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """[size, ...] a tensor of the same shape from every rank, in rank order."""
        if self.size == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.stack(parts)

    def hosts(self) -> list[str]:
        """The host of every rank, in rank order; all ranks call it."""
        name = socket.gethostname().encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
        names = self.gather(torch.tensor(list(name), dtype=torch.uint8, device=self.device)).tolist()
        return [bytes(name).rstrip(b"\0").decode(errors="replace") for name in names]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over ranks in every backward; the model itself in a world of one."""
        if self.size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Backward without averaging over ranks, for all micro-batches of a step but the last."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
