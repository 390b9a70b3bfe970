"""Measured times beside scores."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluators.device import wait
from evaluators.frechet import Frechet
from evaluators.images import Digits
from evaluators.latency import FILE, Latency, Timed, Timer
from evaluators.proxies import TeacherDistance
from evaluators.scoring import Scores
from nas.contracts import Schedule, Step, UserError
from nas.engine.session import open_session
from nas.genomes.genetics import cheapest, dearest, exact_cost
from nas.genomes.timed import TimedSpace, calls, key, timed
from nas.results.plots import draw_scores
from nas.results.report import Run
from nas.results.trials import best_within, cost_in_words
from nas.study import Study
from nas.testing import check_evaluator
from search_spaces.intervals import uniform
from search_spaces.options import Options
from search_spaces.patterns import Every, Only
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from tests.conftest import TINY
from tests.test_reuse import DEEP_NET

SETTINGS = Latency(batch=8, repeats=5, warmup=1)


def test_it_is_one_of_several_scores() -> None:
    """Of the same samples, as any other."""
    timed = Timed(Frechet(Digits(), rungs=(32, 64), reuse_precision="bfloat16"), SETTINGS)
    both = Scores((timed, TeacherDistance(Digits(), rungs=(32, 64), reuse_precision="bfloat16")))
    assert both.reuse_precision == "bfloat16"
    assert Scores((both,)).metrics == both.metrics
    with pytest.raises(UserError, match="reuse_precision bfloat16 and float32"):
        Scores((timed, TeacherDistance(Digits(), rungs=(32, 64))))


def test_timed_scores_keep_the_laws(tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    evaluator = Timed(Frechet(Digits(), rungs=(32, 64)), SETTINGS)
    check_evaluator(evaluator, tiny_study.supernet, tiny_study.space, tmp_path)


def test_a_schedules_time_is_the_sum_of_its_steps_each_measured_once(
    tiny_net: Elastic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_net.initial(0)
    timer = Timer(SETTINGS, net, tmp_path)
    measured: list[Step] = []
    real = Timer._measure

    def noted(self: Timer, step: Step) -> list[float]:
        measured.append(step)
        return real(self, step)

    monkeypatch.setattr(Timer, "_measure", noted)
    small, full = tiny_net.uniform(0.25), tiny_net.uniform(1.0)
    schedule = Schedule((Step(900, full), Step(600, small), Step(300, full), Step(50, small)))
    value, replicates = timer.of_schedule(schedule)
    assert [step.arch for step in measured] == [full, small]
    kept = json.loads((tmp_path / FILE).read_text())
    [times] = kept.values()
    assert value == pytest.approx(2 * sum(sorted(each)[2] for each in times.values()))
    assert len(replicates) == 5
    again = Timer(SETTINGS, tiny_net.initial(0), tmp_path).of_schedule(schedule)
    assert again == (value, replicates)
    assert len(measured) == 2
    Timer(replace(SETTINGS, batch=4), net, tmp_path).of_schedule(schedule)
    assert len(measured) == 4  # other settings, other times


def test_a_step_that_runs_nothing_takes_no_time_and_reuse_is_timed_apart(tmp_path: Path) -> None:
    net, full = DEEP_NET.initial(0), DEEP_NET.uniform(1.0)
    timer = Timer(SETTINGS, net, tmp_path)
    blocks = net.blocks(full)
    assert timer.of_step(Step(5, full, tuple(blocks))) == [0.0] * 5
    timer.of_step(Step(5, full, tuple(blocks[:-1])))
    timer.of_step(Step(5, full))
    [times] = json.loads((tmp_path / FILE).read_text()).values()
    assert len(times) == 2


def test_timing_leaves_the_network_in_the_form_that_it_found(tmp_path: Path) -> None:
    net, full = DEEP_NET.initial(0), DEEP_NET.uniform(1.0)
    net.run_as(True, False)
    Timer(SETTINGS, net, tmp_path).of_step(Step(5, full))
    assert net.run_as(False, False) == (True, False)
    reusing = Schedule((Step(9, full), Step(5, full, ("d0",))))
    with pytest.raises(UserError, match="are not compiled"):
        Timer(replace(SETTINGS, compiled=True), net, tmp_path).of_schedule(reusing)


def test_latency_is_an_objective_of_a_search(tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    evaluator = Timed(tiny_study.evaluator, Latency(batch=64, repeats=5))
    study = replace(tiny_study, evaluator=evaluator, objectives=("fd", "latency_ms"))
    torch.set_num_threads(1)
    with open_session(study, tmp_path) as session:
        conductor = session.conductor("evolution", trials=6)
        session.run(conductor)
        uniform = session.conductor("uniform")
        session.run(uniform)
    times = {t.genome: t.objectives(("latency_ms",))[0] for t in uniform.ledger.trials if t.scored}
    assert all(t.objectives(("latency_ms",))[0] > 0 for t in conductor.ledger.trials if t.scored)
    [known] = json.loads((tmp_path / FILE).read_text()).values()
    for genome in (cheapest(study.space), dearest(study.space)):
        steps = study.space.decode(genome).steps
        expected = sum(sorted(known[json.dumps([step.arch, step.reuse])])[2] for step in steps)
        assert times[genome] == pytest.approx(expected)


@pytest.fixture
def limited(tiny_study: Study, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study under a limit on time, prepared in `tmp_path`, its three calls given times: a busy machine may measure anything."""
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    torch.set_num_threads(1)
    study = replace(tiny_study, evaluator=Timed(tiny_study.evaluator, SETTINGS), limits={"latency_ms": 1e-6})
    with open_session(study, tmp_path) as session:
        ticks = [tick for tick in session.prepare(threads=1) if tick.what == "timing calls"]
        assert ticks[-1].total == 3  # one for each width
        with pytest.raises(UserError, match="cannot be met: the cheapest schedule"):
            session.conductor("random")
    kept = json.loads((tmp_path / "times.json").read_text())
    assert all(time > 0 for time in kept["milliseconds"].values())
    times = {call: float(4 ** json.loads(call)[0][0][0]) for call in kept["milliseconds"]}
    (tmp_path / "times.json").write_text(json.dumps({**kept, "milliseconds": times}))
    monkeypatch.setattr(Timer, "_measure", lambda self, step: pytest.fail("measured already"))
    most = len(study.space.timesteps) * max(times.values())  # type: ignore[attr-defined]
    study = replace(study, limits={"latency_ms": 0.6 * most})
    with open_session(study, tmp_path) as session:
        for _ in session.prepare(threads=1):
            pass
    return study


@pytest.mark.parametrize("searcher", ["evolution", "random"])
def test_a_search_keeps_to_a_limit_on_time(limited: Study, tmp_path: Path, searcher: str) -> None:
    with open_session(limited, tmp_path) as session:
        conductor = session.conductor(searcher, trials=6)
        session.run(conductor)
        ledger = session.conductor(searcher, trials=6).ledger
    times, limit = json.loads((tmp_path / "times.json").read_text())["milliseconds"], limited.limits["latency_ms"]
    scored = [trial for trial in ledger.trials if trial.scored]
    assert len(scored) >= 6
    assert all(trial.cost["latency_ms"] <= limit and trial.violations["latency_ms"] <= 0 for trial in scored)
    for trial in scored:
        archs = [step.arch for step in limited.space.decode(trial.genome).steps]
        assert cost_in_words(trial).endswith(f"{trial.cost['latency_ms']:.3g} ms an image")
        assert trial.cost["latency_ms"] == pytest.approx(sum(times[json.dumps([arch, []])] for arch in archs), abs=1e-5)


def test_searches_under_a_limit_on_time_are_compared_by_time(limited: Study, tmp_path: Path) -> None:
    with open_session(limited, tmp_path) as session:
        for name in ("uniform", "random"):
            session.run(session.conductor(name, trials=6))
    run = Run.open(tmp_path)
    full = max(trial.cost["latency_ms"] for _, trials in run.ledgers for trial in trials)
    found = run.compare()
    assert found["compared_by"] == "time"
    for (_, trials), row in zip(run.ledgers, found["searchers"], strict=True):
        for share, best in row["best_within"].items():
            within = [t for t in trials if t.status == "complete" and t.cost["latency_ms"] <= float(share) * full]
            assert (best is None) == (not within)
            if best is not None:
                assert best["fd"] == min(t.objectives(("fd",))[0] for t in within)
                assert best["latency_share"] == pytest.approx(best["latency_ms"] / full)
    ledgers = {row["searcher"]: trials for row, (_, trials) in zip(found["searchers"], run.ledgers, strict=True)}
    draw_scores(ledgers, run.facts, run.scale, "FD", tmp_path / "front.svg")
    texts = re.findall(r"<text[^>]*>([^<]*)<", (tmp_path / "front.svg").read_text())
    assert {"share of the full network's time", "limit", "full network"} <= set(texts)


def test_the_best_within_a_time_is_found_measured_or_limited(tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    torch.set_num_threads(1)
    study = replace(tiny_study, evaluator=Timed(tiny_study.evaluator, SETTINGS))
    with open_session(study, tmp_path) as session:
        conductor = session.conductor("uniform")
        session.run(conductor)
    done = [t for t in conductor.ledger.trials if t.status == "complete"]
    # As measured, a dearer network may be the faster one; the study's own limit is kept all the same.
    verified = {t.objectives(("latency_ms",))[0]: t for t in done if t.cost["macs_share"] <= 0.6}
    for limit in verified:
        allowed = [trial for time, trial in verified.items() if time <= limit]
        expected = min(allowed, key=lambda trial: trial.objectives(("fd",)))
        assert best_within(conductor.ledger.trials, "latency_ms", limit, "fd") == expected
    fastest = verified[min(verified)]
    assert best_within(conductor.ledger.trials, "latency_ms", min(verified), "fd") == fastest
    with pytest.raises(UserError, match="no verified trial keeps latency_ms<="):
        best_within(conductor.ledger.trials, "latency_ms", 1e-9, "fd")
    members = Run.open(tmp_path).compare()["searchers"][0]["front"]
    assert {member["latency_ms"] for member in members} <= set(verified)


def test_a_schedule_costs_what_its_calls_take() -> None:
    space = Stepwise(DEEP_NET, uniform(6), (6,), Options((1.0,)), patterns=(Every(1), Every(2), Every(3)))
    times = {key(step): 1.0 if not step.reuse else 0.9 for step in calls(space)}
    known = TimedSpace(space, times)
    for genome in ((0,), (1,), (2,)):
        running = sum(times[key(step)] for step in space.decode(genome).steps)
        assert exact_cost(known, genome) == round(running * 1e6)
        assert exact_cost(space, genome) == space.cost(genome)["macs"]


def test_what_an_interval_of_one_step_predicts_may_be_held_by_the_next() -> None:
    """Though no later one runs its subnet."""
    net, options = Elastic(dict(TINY), (0.5, 1.0)), (Options((1.0,)), Options((0.5,)))
    space = Stepwise(net, uniform(4), (1, 3), options, patterns=(Every(1), Only(())), deterministic=False)
    known = TimedSpace(space, {key(step): 1.0 for step in calls(space)})
    for genome in itertools.product(*(range(len(choice.options)) for choice in space.choices)):
        assert known.cost(genome)["latency_ms"] > 0


@pytest.mark.parametrize("left", ["{", "[]", '{"device": "cpu"}', '{"device": 3, "milliseconds": {}}'])
def test_a_damaged_file_of_times_is_told_in_a_line(left: str, tmp_path: Path) -> None:
    space = Stepwise(DEEP_NET, uniform(6), (6,), Options((1.0,)), patterns=(Every(1), Every(2)))
    (tmp_path / "times.json").write_text(left)
    with pytest.raises(UserError, match=r"times.json .*delete it"):
        timed(space, tmp_path)


def test_times_of_calls_that_a_space_never_makes_are_nothing_to_it() -> None:
    """They lie in its run folder behind a search that was refused there."""
    space = Stepwise(DEEP_NET, uniform(6), (6,), Options((1.0,)), patterns=(Every(1), Every(2)))
    further = Stepwise(DEEP_NET, uniform(6), (6,), Options((0.5, 1.0)), patterns=(Every(1), Every(2), Every(3)))
    times = {key(step): float(number + 1) for number, step in enumerate(calls(space))}
    more = {**times, **{key(step): 2.0 for step in calls(further) if key(step) not in times}}
    assert len(more) > len(times)
    assert TimedSpace(space, more).describe() == TimedSpace(space, times).describe()
    assert TimedSpace(space, more).former()["times"] != TimedSpace(space, more).describe()["times"], (
        "as it was once told"
    )
    assert TimedSpace(space, times).former() == TimedSpace(space, times).describe()
    other = {**times, key(calls(space)[0]): 9.0}
    assert TimedSpace(space, other).describe() != TimedSpace(space, times).describe()


def test_times_of_another_device_are_not_mixed(tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    for part in ("supernet", "features"):
        (tmp_path / part).symlink_to(tiny_run / part)
    study = replace(tiny_study, evaluator=Timed(tiny_study.evaluator, SETTINGS), limits={"latency_ms": 1e9})
    with open_session(study, tmp_path) as session:
        with pytest.raises(UserError, match="measures what calls take"):
            session.conductor("random")
        for _ in session.prepare(threads=1):
            pass
    kept = json.loads((tmp_path / "times.json").read_text())
    kept["milliseconds"].popitem()
    (tmp_path / "times.json").write_text(json.dumps({**kept, "device": "another one"}))
    with open_session(study, tmp_path) as session, pytest.raises(UserError, match="holds times of another one"):
        for _ in session.prepare(threads=1):
            pass


def test_wrong_settings_are_refused(tiny_study: Study) -> None:
    with pytest.raises(UserError, match="repeats=0"):
        Latency(repeats=0)
    with pytest.raises(UserError, match="needs measured times; use evaluator=Timed"):
        replace(tiny_study, limits={"latency_ms": 1.0})
    timed = replace(tiny_study, evaluator=Timed(tiny_study.evaluator, Latency()))
    both = replace(timed, limits={"latency_ms": 1.0, "macs": 1e9, "params": 1e6})
    assert set(both.limits) == {"latency_ms", "macs", "params"}
    with pytest.raises(UserError, match="'watts' is not one that a search can keep to"):
        replace(tiny_study, limits={"watts": 1.0})


def test_every_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls return when work is queued; here there is none to queue it on."""
    waited = []
    for module in (torch.cuda, torch.mps):
        monkeypatch.setattr(module, "synchronize", lambda *_, name=module.__name__: waited.append(name))
    for kind in ("cpu", "cuda", "mps"):
        wait(torch.device(kind))
    assert waited == ["torch.cuda", "torch.mps"]
