"""How work is shown while it goes on: by bars in a terminal, by callbacks, or not at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nas.contracts import Progress, Trial
from nas.engine.runner import Conductor

if TYPE_CHECKING:
    from nas.engine.cluster import Workers


class Bar(Protocol):
    """Shows one search; told of each closed trial."""

    def begin(self, conductor: Conductor) -> None: ...

    def __call__(self, trial: Trial) -> None: ...

    def end(self) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, conductor: Conductor) -> None: ...

    def __call__(self, trial: Trial) -> None: ...

    def end(self) -> None: ...


class Called:
    """Tells somebody of each closed trial, and of which search it is one, beside another bar."""

    def __init__(self, name: str, on_trial: Callable[[str, Trial], None], bar: Bar) -> None:
        self._name, self._on_trial, self._bar = name, on_trial, bar

    def begin(self, conductor: Conductor) -> None:
        self._bar.begin(conductor)

    def __call__(self, trial: Trial) -> None:
        self._bar(trial)
        self._on_trial(self._name, trial)

    def end(self) -> None:
        self._bar.end()


def to_its_end(ticks: Iterator[Progress]) -> Any:
    """What a generator of them returns."""
    if not hasattr(ticks, "send"):
        deque(ticks, maxlen=0)
        return None
    while True:
        try:
            next(ticks)
        except StopIteration as end:
            return end.value


@dataclass(frozen=True)
class Show:
    """How progress is shown, ticks and searches by name; on which workers searches run; and who is told, by a ledger's name, of whom it waits for."""

    follow: Callable[[Iterator[Progress]], Any] = to_its_end
    bar: Callable[[str], Bar] = lambda name: Silent()
    workers: Workers | None = None
    waiting: Callable[[str], Callable[[str], None]] = lambda ledger: lambda holder: None
