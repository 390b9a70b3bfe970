"""How far work is, for people: bars in a terminal, a line now and then in log files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nas.cli.terminal import duration, notes
from nas.contracts import Progress as Tick

if TYPE_CHECKING:
    from nas.contracts import Trial
    from nas.engine.runner import Conductor


class SearchBar:
    """The progress bar of one search: closed trials, best so far."""

    def __init__(self, bars: Progress | Lines, name: str, objective: str) -> None:
        self._bars = bars
        self._name = name
        self._objective = objective
        self._best = float("inf")

    def begin(self, conductor: Conductor) -> None:
        """Shows what the ledger already holds."""
        self._conductor = conductor
        self._task = self._bars.add_task(self._name, total=None, detail="")
        for trial in conductor.ledger.finished:
            self._note(trial)
        self._update()

    def __call__(self, trial: Trial) -> None:
        self._note(trial)
        self._update()

    def end(self) -> None:
        done = self._conductor.ledger.closed
        self._bars.update(self._task, completed=done, total=done)

    def _note(self, trial: Trial) -> None:
        if trial.scored and all(excess <= 0 for excess in trial.violations.values()):
            self._best = min(self._best, trial.objectives((self._objective,))[0])

    def _update(self) -> None:
        done = self._conductor.ledger.closed
        detail = f"best {self._objective} {self._best:.4g}" if self._best < float("inf") else ""
        self._bars.update(self._task, completed=done, total=max(done, self._conductor.planned), detail=detail)


class Lines:
    """What `progress_bars` shows where nobody looks at a terminal, in log files of clusters and CI: a line where a stage begins and ends, and one in every half
    a minute between."""

    EVERY = 30.0

    def __init__(
        self, quiet: bool, print_line: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quiet = quiet
        self._print = print_line
        self._clock = clock
        self._stages: dict[TaskID, _Stage] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        for stage in self._stages.values():
            if stage.said != stage.done:
                self._say(stage)

    def add_task(self, description: str, total: float | None = None, detail: str = "") -> TaskID:
        task = TaskID(len(self._stages))
        now = self._clock()
        self._stages[task] = _Stage(description, now)
        return task

    def update(self, task: TaskID, completed: float = 0, total: float | None = None, detail: str = "") -> None:
        """As of a bar."""
        stage = self._stages[task]
        new = stage.done is None
        if stage.first is None:
            stage.first = completed
        stage.done, stage.total, stage.detail = completed, stage.total if total is None else total, detail
        ended = stage.total is not None and completed >= stage.total and stage.said != completed
        if new or ended or self._clock() - stage.last >= self.EVERY:
            self._say(stage)

    def _say(self, stage: _Stage) -> None:
        now = self._clock()
        stage.last, stage.said = now, stage.done
        if self._quiet or stage.done is None:
            return
        words = f"{stage.name}: {stage.done:,.0f}" + (f" of {stage.total:,.0f}" if stage.total is not None else "")
        more, passed = stage.done - (stage.first or 0), now - stage.began
        if more > 0 and passed > 0:
            rate = more / passed
            words += f", {rate:.3g}/s"
            if stage.total is not None and stage.total > stage.done:
                words += f", {duration((stage.total - stage.done) / rate)} left"
        self._print(words + (f"  {stage.detail}" if stage.detail else ""))


class _Stage:
    """What `Lines` knows of one stage: when it began and was last spoken of, and how far it is, was at first, and was when it was spoken of."""

    def __init__(self, name: str, now: float) -> None:
        self.name, self.began, self.last, self.detail = name, now, now, ""
        self.first: float | None = None
        self.done: float | None = None
        self.total: float | None = None
        self.said: float | None = None


class _Rate(ProgressColumn):
    """Units a second, lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s", style="progress.data.speed")


def progress_bars(quiet: bool) -> Progress | Lines:
    """Bars in a terminal, lines now and then elsewhere."""
    if not notes.is_terminal:
        return Lines(quiet, lambda line: notes.print(line, highlight=False, soft_wrap=True, markup=False))
    return Progress(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _Rate(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=notes,
        disable=quiet,
    )


def follow(bars: Progress | Lines, ticks: Iterator[Tick], at_first: Callable[[], None] = lambda: None) -> Any:
    """One bar for each kind of work that the ticks name. Returns what a generator of them returns. Work that is interrupted is closed, so
    that it keeps what it has. `at_first`: is called before the first tick is shown."""
    tasks: dict[str, Any] = {}
    try:
        while True:
            try:
                tick = next(ticks)
            except StopIteration as end:
                return end.value
            if not tasks:
                at_first()
            if tick.what not in tasks:
                tasks[tick.what] = bars.add_task(tick.what, total=tick.total, detail="")
            values = "  ".join(f"{name} {value:.3f}" for name, value in sorted(tick.values.items()))
            bars.update(tasks[tick.what], completed=tick.done, total=tick.total, detail=values)
    finally:
        close = getattr(ticks, "close", None)
        if close is not None:
            close()


class Naming:
    """Follows ticks; before the first of all, when nothing has refused the folder, it says which that is."""

    def __init__(self, bars: Any, folder: Path | None) -> None:
        self._bars, self._folder = bars, folder

    def __call__(self, ticks: Iterator[Tick]) -> Any:
        return follow(self._bars, ticks, self._name)

    def _name(self) -> None:
        if self._folder is not None:
            notes.print(f"run folder: {self._folder}", highlight=False, soft_wrap=True)
            self._folder = None
