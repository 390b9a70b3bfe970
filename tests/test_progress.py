"""What people see while work goes on: lines now and then in log files, and a status that knows what is being prepared."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from nas.cli.progress import Lines, Naming, follow, progress_bars
from nas.contracts import Progress
from nas.engine.session import open_session
from nas.engine.working import FILE, noted, working_on
from nas.results.report import Run
from nas.study import Study

ODD = (os.cpu_count() or 1) + 1
"""A number of threads that nobody would take by themselves."""


def ticks(count: int, what: str = "training") -> Iterator[Progress]:
    for done in range(count + 1):
        yield Progress(what, done, count, {"loss": 1.0 / (done + 1)})


def lines_of(seconds_each: float, *works: Iterator[Progress], quiet: bool = False) -> list[str]:
    clock = itertools.count()
    said: list[str] = []
    with Lines(quiet, said.append, lambda: next(clock) * seconds_each) as lines:
        for work in works:
            follow(lines, work)
    return said


def test_a_log_has_a_line_at_each_end_of_a_stage_and_now_and_then_between() -> None:
    said = lines_of(1.0, ticks(100), ticks(3, "features"))
    assert said[0].startswith("training: 0 of 100")
    assert any(line.startswith("training: 100 of 100") for line in said)
    assert said[-1].startswith("features: 3 of 3")
    between = [line for line in said if line.startswith("training") and "left" in line]
    assert 1 <= len(between) <= 100 * 2 / Lines.EVERY
    assert "/s" in between[0]
    assert "loss 0." in between[0]


def test_work_without_an_end_yet_says_where_it_stands() -> None:
    said: list[str] = []
    with Lines(False, said.append) as lines:
        task = lines.add_task("search", total=None)
        lines.update(task, completed=1)
        lines.update(task, completed=7)
    assert said == ["search: 1", "search: 7, " + said[1].partition(", ")[2]]


def test_quiet_is_quiet() -> None:
    assert lines_of(60.0, ticks(10), quiet=True) == []


def test_what_is_under_way_is_noted_and_gone_when_it_is_done(tmp_path: Path) -> None:
    working = noted(ticks(5), tmp_path)
    next(working)
    found = working_on(tmp_path)
    assert found is not None
    assert (found["stage"], found["done"], found["total"]) == ("training", 0, 5)
    assert found["seconds_ago"] < 60
    assert [tick.done for tick in working] == [1, 2, 3, 4, 5]
    assert working_on(tmp_path) is None


def test_who_stops_the_work_stops_what_is_noted_and_the_note_stays(tmp_path: Path) -> None:
    closed = []

    def work() -> Iterator[Progress]:
        try:
            yield from ticks(5)
        finally:
            closed.append(True)

    working = noted(work(), tmp_path)
    next(working)
    working.close()  # type: ignore[attr-defined]
    assert closed == [True]
    assert working_on(tmp_path) is not None
    (tmp_path / FILE).write_text("{")
    assert working_on(tmp_path) is None


def test_the_rate_tells_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(1000.0, 10.0)
    monkeypatch.setattr(time, "time", lambda: next(now))
    working = noted(ticks(10), tmp_path)
    for _ in range(4):
        next(working)
    kept = json.loads((tmp_path / FILE).read_text())
    assert kept["per_second"] == pytest.approx(0.1)
    assert kept["seconds_left"] == pytest.approx((10 - kept["done"]) / 0.1)


@pytest.mark.long
def test_status_tells_of_a_training_under_way(tiny_study: Study, tmp_path: Path) -> None:
    with open_session(tiny_study, tmp_path / "run") as session:
        ticks = session.prepare(threads=1)
        seen = set()
        for tick in ticks:
            found = Run.open(tmp_path / "run").status()["working"]
            seen.add(found["stage"])
            assert found["total"] >= tick.done
    assert {"features", "supernet"} <= seen
    assert Run.open(tmp_path / "run").status()["working"] is None


@pytest.mark.parametrize(("asked", "given"), [(0, ODD), (2, 2)])
def test_training_takes_as_many_threads_as_torch_has_or_as_are_asked_for(
    asked: int, given: int, tiny_study: Study, tmp_path: Path
) -> None:
    """So that `OMP_NUM_THREADS`, by which a cluster says how many are one's own, is heard."""
    before = torch.get_num_threads()
    torch.set_num_threads(ODD)
    try:
        with open_session(tiny_study, tmp_path) as session:
            preparing = session.prepare(asked)
            next(preparing)
            assert torch.get_num_threads() == given
            del preparing
    finally:
        torch.set_num_threads(before)


def test_what_work_comes_to_is_handed_on_by_who_names_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> Generator[Progress, None, str]:
        yield Progress("working", 1, 1)
        return "found"

    with progress_bars(True) as bars:
        naming = Naming(bars, tmp_path)
        assert [naming(work()), naming(work())] == ["found", "found"]
        assert naming(iter(())) is None
    assert capsys.readouterr().err.replace("\n", "").count(f"run folder: {tmp_path}") == 1
