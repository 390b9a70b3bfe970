"""Every searcher in one run: side by side, killed in the middle, somebody else's."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nas.contracts import Trial, UserError
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from nas.genomes.genetics import dearest
from nas.genomes.pareto import hypervolume
from nas.results.report import Run
from nas.results.samples import shrunk
from nas.results.trials import area, best_within, wall_seconds, with_error
from nas.study import Study
from nas.testing import check_searcher
from tests.test_cli import ROOT, nas, refused
from tests.toy import toy_study

THIRD_PARTY = Path(__file__).parent / "third_party"
# Gates learn from blocks of a real network, which the toy study has not; they have a kill test of their own.
REGISTERED = sorted(point.name for point in entry_points(group="nas.searchers") if point.name != "gates")

ALL = """
from importlib.metadata import entry_points
from tests.toy import toy_study
found = {point.name: point.load()() for point in entry_points(group="nas.searchers") if point.name != "gates"}
study = toy_study(space__genes=5, searchers=dict(sorted(found.items())), trials=24)
"""


@pytest.fixture(scope="module")
def all_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every registered searcher, three seeds each."""
    folder = tmp_path_factory.mktemp("all")
    (folder / "study.py").write_text(ALL)
    result = nas("run", folder / "study.py", "--searcher", "all", "--seeds", 3, "--out", folder / "run", "-q")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_all_searchers_run_under_equal_budgets_into_one_storage(all_run: Path) -> None:
    ledgers = {(info.searcher, info.seed): trials for info, trials in read_ledgers(open_storage(all_run))}
    assert set(ledgers) == {("uniform", 0), ("confirmed", 0)} | {
        (name, seed) for name in REGISTERED for seed in range(3)
    }
    for (name, _), trials in ledgers.items():
        if name not in ("uniform", "confirmed"):
            assert sum(trial.rung == 64 for trial in trials) == 24
            assert {trial.status for trial in trials} <= {"pruned", "complete"}


def test_curves_areas_and_spreads_follow_from_the_trials(all_run: Path) -> None:
    run = Run.open(all_run)
    found = run.compare()
    rows = {row["searcher"]: row for row in found["searchers"]}
    ledgers = {row["searcher"]: trials for row, (_, trials) in zip(found["searchers"], run.ledgers, strict=True)}

    def feasible(trials: Any) -> list[tuple[float, float]]:
        return [
            (t.score.values["fd"], t.cost["macs_share"]) for t in trials if t.rung == 64 and t.cost["macs_share"] <= 0.6
        ]

    worst = max(value for trials in ledgers.values() for value, _ in feasible(trials)) * 1.0001
    for name in ("evolution", "routing (seed 1)", "knapsack"):
        trials = ledgers[name]
        expected = [
            (
                sum(t.score.spent["macs"] for t in trials[: i + 1] if t.score),
                hypervolume(feasible(trials[: i + 1]), (worst, 1.0001)),
            )
            for i in range(len(trials))
        ]
        assert np.array(rows[name]["curve"]) == pytest.approx(np.array(expected))
        until = found["area_until_macs"]
        grid = (np.arange(200_000) + 0.5) / 200_000 * until
        spent, heights = np.array(expected).T
        steps = np.append(0.0, heights)[np.searchsorted(spent, grid, side="right")]
        assert rows[name]["area"] == pytest.approx(steps.mean(), rel=1e-3)
    assert found["area_until_macs"] == min(row["curve"][-1][0] for row in rows.values() if not row["baseline"])
    spread = next(row for row in found["over_seeds"] if row["searcher"] == "evolution")
    values = [rows[f"evolution{suffix}"]["hypervolume"] for suffix in ("", " (seed 1)", " (seed 2)")]
    assert spread["hypervolume"] == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1), "seeds": 3})
    # Of the best within a budget, on noises on which nothing was chosen.
    for share, told in spread["best_within"].items():
        members = [rows[f"evolution{suffix}"]["best_within"][share] for suffix in ("", " (seed 1)", " (seed 2)")]
        scores = [member["confirmed"]["fd"] for member in members if member]
        assert (told is None) == (not scores)
        assert told is None or (told["mean"], told["seeds"], told["confirmed"]) == (np.mean(scores), len(scores), True)


def test_the_comparison_is_tables_pictures_and_words(all_run: Path) -> None:
    result = nas("compare", all_run, "--json")
    found = json.loads(result.stdout)
    with Image.open(found["curves"]) as picture:
        assert picture.size[0] > 800
    text = nas("compare", all_run).stdout
    assert "mean ± standard deviation over seeds" in text
    assert "area: mean hypervolume on search samples" in text
    assert "answers of the proposer" in text
    assert all(name in text for name in REGISTERED)


def test_screening_that_is_switched_off_is_said(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(
        "from nas.searchers.evolution import Evolution\nfrom tests.toy import toy_study\n"
        "study = toy_study(searchers={'evolution': Evolution(population=6, screened=8, least_tau=1.01)})\n"
    )
    result = nas("run", tmp_path / "study.py", "--out", tmp_path / "run")
    assert (
        "24 of 24 offspring were not screened, the model's held-out Kendall tau being too low; it is 0."
        in result.stdout
    )


def test_several_searchers_may_be_named_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(ALL)
    arguments = ("run", tmp_path / "study.py", "--out", tmp_path / "run", "--trials", 5)
    assert nas(*arguments, "--searcher", "random,rounds").returncode == 0
    assert {info.searcher for info, _ in read_ledgers(open_storage(tmp_path / "run"))} == {
        "uniform",
        "confirmed",
        "random",
        "rounds",
    }
    refused(
        nas(*arguments, "--searcher", "random,annealing"), "no searcher is called 'annealing'; use one of .*routing"
    )


def test_the_best_within_one_budget_keeps_to_the_studys_other_limits(tmp_path: Path) -> None:
    """The baseline is scored whatever the limits are."""
    study = toy_study(limits={"macs_share": 0.6, "params": 2}, trials=20)
    with open_session(study, tmp_path) as session:
        for name in ("uniform", "random"):
            session.run(session.conductor(name))
    found = Run.open(tmp_path)
    every = [trial for _, trials in found.ledgers for trial in trials]
    assert any(t.cost["params"] > 2 and t.cost["macs_share"] <= 0.6 and t.status == "complete" for t in every)
    best = best_within(every, "macs_share", 0.6, "fd")
    assert best.cost["params"] <= 2
    beyond = replace(best, violations={**best.violations, "params": 1.0})
    with pytest.raises(
        UserError, match=r"no verified trial keeps macs_share<=0\.6.* it breaks the study's other limits"
    ):
        best_within([beyond], "macs_share", 0.6, "fd")
    assert best_within([beyond], "params", 9.0, "fd") == beyond
    dear = replace(best, violations={"macs_share": 0.2, "params": -1.0})
    assert best_within([dear], "macs", 1e9, "fd") == dear


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (103.42, 0.04, "103.42 ± 0.04"),
        (0.012345, 0.0021, "0.012 ± 0.002"),
        (1234.4, 38.0, "1234 ± 38"),
        (1.23456e-9, 2e-10, "1.23e-09 ± 2e-10"),
        (1.5, math.nan, "1.5"),
        (1.5, 0.0, "1.5"),
    ],
)
def test_a_value_has_the_decimals_that_its_error_has(value: float, error: float, shown: str) -> None:
    assert with_error(value, error) == shown


def test_large_samples_are_shown_smaller() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 300, 256)).astype(np.float32)
    found = shrunk(images, 128)
    assert found.shape == (2, 3, 100, 85)
    assert np.allclose(found[0, 0, 0, 0], images[0, 0, :3, :3].mean(), atol=1e-6)
    assert shrunk(images, 300) is images


def test_the_area_of_a_step_curve() -> None:
    assert area([(1.0, 2.0), (3.0, 4.0)], 4.0) == pytest.approx((2 * 2 + 4 * 1) / 4)
    assert area([(1.0, 2.0), (3.0, 4.0)], 2.0) == pytest.approx(1.0)
    assert area([], 2.0) == area([(1.0, 2.0)], 0.0) == 0.0


def test_pauses_do_not_count_as_wall_time() -> None:
    def at(start: float, stop: float) -> Trial:
        return Trial(0, (), "", 1, "pruned", clock=(start, stop))

    assert wall_seconds([at(0, 2), at(1, 3), at(10, 11), at(10.5, 10.6)]) == pytest.approx(4.0)
    assert wall_seconds([]) == 0.0


KILLED = """
import os, signal, sys
from pathlib import Path
from nas.engine.session import open_session
exec(compile(Path(os.environ["STUDY"]).read_text(), "study", "exec"))
for name in sys.argv[1:]:
    for settled in (3, 11, 7, None):
        if not (process := os.fork()):
            with open_session(study, Path(os.environ["RUN"])) as session:
                closed = []
                def note(trial):
                    closed.append(trial)
                    if len(closed) == settled:
                        os.kill(os.getpid(), signal.SIGKILL)
                session.run(session.conductor(name, on_settled=note))
                os._exit(0)
        _, status = os.waitpid(process, 0)
        assert (os.WTERMSIG(status) == signal.SIGKILL) if settled else status == 0, (name, settled, status)
"""


@pytest.mark.long
def test_every_searcher_killed_three_times_ends_as_if_it_had_not_been(all_run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "RUN": str(tmp_path / "killed"), "STUDY": str(all_run.parent / "study.py")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *REGISTERED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    killed = {info.searcher: trials for info, trials in read_ledgers(open_storage(tmp_path / "killed"))}
    # Alone in their storage: searchers of one run take scores from each other, and say from which trial.
    assert (
        nas("run", all_run.parent / "study.py", "--searcher", "all", "--out", tmp_path / "whole", "-q").returncode == 0
    )
    whole = {info.searcher: trials for info, trials in read_ledgers(open_storage(tmp_path / "whole"))}
    for name in REGISTERED:
        assert [(t.genome, t.rung, t.status) for t in killed[name]] == [
            (t.genome, t.rung, t.status) for t in whole[name]
        ], name
        assert [_own(t) for t in killed[name]] == [_own(t) for t in whole[name]], name


def _own(trial: Trial) -> dict[str, Any]:
    return {key: value for key, value in trial.origin.items() if key != "scored_by"}


def test_a_searcher_of_a_third_party_is_found_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.py").write_text("from tests.toy import toy_study\nstudy = toy_study()\n")
    arguments = ("run", tmp_path / "study.py", "--out", tmp_path / "run", "--searcher", "greedy")
    refused(nas(*arguments), "no searcher is called 'greedy'")
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    result = nas(*arguments)
    assert result.returncode == 0, result.stderr
    assert "greedy" in result.stdout
    from outsider import Greedy  # type: ignore[import-not-found]

    check_searcher(Greedy())
    ledgers = {info.searcher: trials for info, trials in read_ledgers(open_storage(tmp_path / "run"))}
    assert sum(trial.rung == 64 for trial in ledgers["greedy"]) == toy_study().trials


def test_the_full_network_is_not_whichever_is_slowest(all_run: Path) -> None:
    """A narrower one may take longer."""
    run = Run.open(all_run)
    name = run.facts["baseline"]

    def slow(trials: Any) -> list[Trial]:
        return [replace(t, cost={**t.cost, "latency_ms": 10 - 3 * t.cost["macs_share"]}) for t in trials]

    timed = replace(
        run,
        facts={**run.facts, "limits": {"latency_ms": 3.5}},
        ledgers=[(info, slow(trials)) for info, trials in run.ledgers],
    )
    uniform = next(trials for info, trials in timed.ledgers if info.searcher == name)
    assert max(t.cost["latency_ms"] for t in uniform) > 7
    assert (timed.scale.full, timed.scale.limit) == (7, 0.5)


def test_a_limit_in_multiply_adds_is_compared_as_a_share(tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    full = tiny_study.space.cost(dearest(tiny_study.space))["macs"]
    with open_session(replace(tiny_study, limits={"macs": 0.45 * full}), tmp_path) as session:
        for name in ("uniform", "random"):
            session.run(session.conductor(name, trials=6))
    run = Run.open(tmp_path)
    assert run.scale.limit == pytest.approx(0.45)
    for (_, trials), row in zip(run.ledgers, run.compare()["searchers"], strict=True):
        assert list(row["best_within"]) == ["0.25", "0.4", "0.45"]
        within = [t for t in trials if t.status == "complete" and t.cost["macs"] <= 0.45 * full]
        assert row["best_within"]["0.45"]["fd"] == min(t.objectives(("fd",))[0] for t in within)
