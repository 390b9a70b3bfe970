"""Processes that train one supernet together, as `accelerate launch` starts them: each runs its share of every batch, and gradients are summed. All run the
same code on the same random numbers; the first alone writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from nas.contracts import Progress

T = TypeVar("T")

WORLD = "WORLD_SIZE"
"""By which a launcher says how many processes there are."""


PATIENCE = timedelta(days=7)
"""For which a process waits while the first reads images and encodes them; where one dies, the launcher ends all."""


@dataclass(frozen=True)
class Team:
    """`rank`: of this process, 0 the first. `size`: how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, parts: Iterable[T]) -> Iterator[T]:
        """This process's share."""
        return (part for place, part in enumerate(parts) if place % self.size == self.rank)

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Over all processes, in place."""
        if self.size > 1 and tensors:
            whole = torch.cat([tensor.reshape(-1) for tensor in tensors])
            torch.distributed.all_reduce(whole)
            for tensor, summed in zip(tensors, torch.split(whole, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(summed.reshape(tensor.shape))

    def sum_of(self, number: int, device: torch.device) -> int:
        """Multiply-adds of a long training are more than 64 bits hold, so that they are summed in two parts."""
        if self.size == 1:
            return number
        parts = torch.tensor(divmod(number, 2**31), device=device)
        self.sum([parts])
        high, low = parts.tolist()
        return int(high) * 2**31 + int(low)

    def agree(self, tensors: Iterable[torch.Tensor]) -> None:
        """All have the first's from now on, in place: what each has reckoned by itself may differ in the last bits."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def in_turn(self, work: Callable[[], Iterator[Progress]]) -> Iterator[Progress]:
        """The first makes what the others find there then."""
        if self.first:
            yield from work()
        self.wait()
        if not self.first:
            yield from work()

    def leave(self) -> None:
        """Ends it: what this process does from now on, and what it starts, is its own."""
        if self.size > 1:
            from accelerate.state import AcceleratorState

            self.wait()
            torch.distributed.destroy_process_group()
            os.environ[WORLD] = "1"
            for name in ("RANK", "LOCAL_RANK"):
                os.environ.pop(name, None)
            # It would still ask the others in what is trained later.
            AcceleratorState._reset_state(reset_partial_state=True)


def launched() -> bool:
    """Whether a launcher has started this process beside others."""
    return int(os.environ.get(WORLD, "1")) > 1


def helps() -> str | None:
    """The number among the machine's processes of one that is not the first of all; None for the first, or one alone."""
    return os.environ.get("LOCAL_RANK", "0") if launched() and os.environ.get("RANK", "0") != "0" else None


def team(device: str) -> Team:
    """That this process is of; it alone where no launcher has started it."""
    if not launched():
        return Team()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return Team(state.process_index, state.num_processes)
