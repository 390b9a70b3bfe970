"""The Ray runner on a real cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.contracts import Trial, UserError
from nas.engine.learning import learned_tensors
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from nas.study import Study, load_study
from tests.arithmetic import CALL
from tests.test_cli import ROOT
from tests.test_relaxation import warm
from tests.test_runner import killed_at_random
from tests.toy import facts, run, toy_study

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def run_on_ray(study: Study, folder: Path, searcher: str = "evolution", count: int = 2) -> list[Trial]:
    from nas.engine.cluster import Workers

    with open_session(study, folder) as session:
        conductor = session.conductor(searcher)
        session.run(conductor, workers=Workers(count))
        return conductor.ledger.trials


@pytest.mark.long
def test_two_nodes_share_a_search(ray_cluster: Any, tmp_path: Path) -> None:
    log = tmp_path / "calls"
    study = toy_study(trials=16, evaluator__log=str(log), evaluator__seconds=0.05)
    trials = run_on_ray(study, tmp_path)
    assert sum(t.rung == 64 for t in trials) == 16
    assert sum(t.status == "complete" for t in trials) >= 1
    assert {t.status for t in trials} <= {"pruned", "complete"}
    assert max(Counter(log.read_text().splitlines()).values()) == 1


def test_one_worker_repeats_the_local_run(ray_cluster: Any, tmp_path: Path) -> None:
    study = toy_study(trials=12)
    assert facts(run_on_ray(study, tmp_path / "ray", count=1)) == facts(run(study, tmp_path / "local"))


def test_failures_and_a_dying_worker_do_not_stop_the_search(ray_cluster: Any, tmp_path: Path) -> None:
    study = toy_study(
        trials=12,
        evaluator__log=str(tmp_path / "calls"),
        evaluator__failing=((1,) * 6,),
        evaluator__fatal=((0,) * 6,),
    )
    trials = run_on_ray(study, tmp_path)
    failed = {t.genome: t.reason for t in trials if t.status == "failed"}
    assert "was told to fail" in failed[(1,) * 6]
    assert "worker died" in failed[(0,) * 6]
    assert sum(t.genome == (1,) * 6 for t in trials) == 2
    assert [t.status for t in trials if t.genome == (0,) * 6 and t.rung == 64] == ["failed", "pruned"]
    assert sum(t.rung == 64 and t.status == "pruned" for t in trials) == 11


STUDY = """
from dataclasses import dataclass
from nas.searchers.random import Random
from tests.toy import ToyEvaluator, toy_study
from dataclasses import replace
from beside_a_study import Words

@dataclass(frozen=True)
class OnlyHere(ToyEvaluator):
    words: Words = Words()

    def __call__(self, schedule, rung, seed):
        score = super().__call__(schedule, rung, seed)
        return replace(score, labels={"fd": self.words.said})

study = replace(toy_study(trials=6), evaluator=OnlyHere())
"""


@pytest.mark.long
def test_classes_of_a_study_file_reach_the_workers(ray_cluster: Any, tmp_path: Path) -> None:
    """And those of a module beside it."""
    (tmp_path / "mine.py").write_text(STUDY)
    (tmp_path / "beside_a_study.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Words:\n    said: str = 'only here'\n"
    )
    trials = run_on_ray(load_study(tmp_path / "mine.py"), tmp_path / "run")
    assert {t.score.labels["fd"] for t in trials if t.score} == {"only here"}


@pytest.mark.long
def test_a_real_network_scores_the_same_on_a_worker(
    ray_cluster: Any, tiny_study: Study, tiny_run: Path, tmp_path: Path
) -> None:
    import shutil
    from dataclasses import replace

    for part in ("supernet", "features"):
        shutil.copytree(tiny_run / part, tmp_path / part)
    study = replace(tiny_study, trials=3)
    ours = {(t.digest, t.rung): t for _, trials in read_ledgers(open_storage(tiny_run)) for t in trials}
    for trial in run_on_ray(study, tmp_path):
        if (trial.digest, trial.rung) in ours:
            known = ours[trial.digest, trial.rung].score
            assert trial.score is not None
            assert known is not None
            assert trial.score.values["fd"] == pytest.approx(known.values["fd"], rel=CALL)


def test_an_audit_on_workers_has_the_rows_of_a_local_one(ray_cluster: Any, tmp_path: Path) -> None:
    from nas.engine.cluster import Workers
    from nas.results.audit import TABLE, measure, read_table
    from tests.toy import ToyEvaluator

    study = toy_study(proxies={"few": ToyEvaluator(rungs=(8,))})
    for name, workers in (("local", None), ("ray", Workers(2))):
        ticks = list(measure(study, tmp_path / name, 20, "cpu", workers))
        assert [tick.done for tick in ticks] == list(range(1, 21))
    local, ray = (read_table(tmp_path / name / "audit" / TABLE) for name in ("local", "ray"))
    assert ray == local


def test_a_shell_that_names_a_cluster_joins_it_only_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of this machine's own would not be closed to others."""
    from nas.cli.options import worker_pool

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert worker_pool(2, 0.0, None, "cpu") is not None
    assert "RAY_ADDRESS" not in os.environ


def test_fractions_of_a_gpu_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from nas.engine import cluster

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 1.0}}])
    for share in (0.1, 0.2, 0.5, 1.0):
        assert cluster.room_for({"cpu": 1.0, "gpu": share}) == round(1 / share)


def test_the_desk_sends_kin_the_same_way_and_waits_for_nobody_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio
    import time

    from nas.engine import ray_runner
    from tests.toy import ToySpace

    patience = 1.0
    monkeypatch.setattr(ray_runner, "PATIENCE", patience)
    space = ToySpace(4)

    def task(number: Any, genome: tuple[int, ...], seed: int = 0) -> Any:
        return ray_runner._Task(number, space.decode(genome).to_json(), 8, seed)

    async def play() -> None:
        desk = ray_runner._Desk.__ray_metadata__.modified_class(2)  # type: ignore[attr-defined]
        await desk.arrived("a")
        await desk.under_way(1)
        for number, genome in enumerate([(0, 0, 0, 0), (3, 3, 3, 3), (0, 0, 1, 1)]):
            await desk.put(task(number, genome))
        assert (await desk.take("a", "turn 1")).number == 0
        assert (await desk.take("a", "turn 2")).number == 2, "it has run the same first two steps"
        await desk.put(task(3, (0, 0, 0, 1), seed=1))
        assert (await desk.take("a", "turn 3")).number == 1, "other noise is no kin; the oldest job comes first"
        assert await desk.lost("turn 3") == 1
        assert await desk.lost("a turn that no worker took") == 3
        await desk.arrived("b")
        await desk.under_way(2)
        started = time.monotonic()
        await desk.passed()
        assert time.monotonic() - started > 0.9 * patience, "one of two trials still waits for a worker"
        started = time.monotonic()
        await desk.passed()
        assert time.monotonic() - started < 0.5 * patience, "whoever has not come is not waited for again"

    asyncio.run(play())


def test_impossible_workers_are_refused(ray_cluster: Any, tmp_path: Path) -> None:
    from nas.engine.cluster import Workers

    with pytest.raises(UserError, match="0 workers"):
        Workers(0)
    with open_session(toy_study(), tmp_path) as session, pytest.raises(UserError, match="no node of the Ray cluster"):
        session.run(session.conductor("evolution"), workers=Workers(1, gpus=0.5))


RAY = """
import os
from pathlib import Path
from tests.test_ray import run_on_ray
from tests.toy import toy_study
folder = Path(os.environ["RUN"])
run_on_ray(toy_study(evaluator__seconds=0.1, evaluator__log=str(folder / "calls"), trials=40), folder)
"""


@pytest.mark.long
def test_a_killed_ray_run_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    killed_at_random(RAY, tmp_path, kills=3, wait=(0.0, 1.0))
    [(info, trials)] = read_ledgers(open_storage(tmp_path))
    search = [t for t in trials if t.rung == info.rungs[0]]
    assert len(search) == 40
    assert {t.status for t in trials} == {"pruned", "complete"}
    assert len({(t.digest, t.rung) for t in trials}) == len(trials)
    calls = Counter((tmp_path / "calls").read_text().splitlines())
    assert sum(calls.values()) <= len(trials) + 2 * 3
    assert set(calls) == {f"{t.digest} {t.rung}" for t in trials}


def interrupted(arguments: list[str], ready: Callable[[], bool]) -> str:
    """Starts `nas`, presses Ctrl-C once it is ready, and gives what it then says. It must end with 130."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nas.cli", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # Tests that were started in the background hand on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 90
        while not ready() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on" in errors
    return errors


@pytest.mark.long
def test_ctrl_c_stops_a_ray_run_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "study.py").write_text(
        "from tests.toy import toy_study\nstudy = toy_study(trials=500, evaluator__seconds=0.2)\n"
    )
    run_folder = tmp_path / "run"

    def under_way() -> bool:
        if not (run_folder / "journal.log").exists():
            return False
        ledgers = {info.searcher: trials for info, trials in read_ledgers(open_storage(run_folder))}
        return sum(t.scored for t in ledgers.get("uniform", ())) >= 2

    interrupted(["run", str(tmp_path / "study.py"), "--workers", "2", "--out", str(run_folder)], under_way)
    assert "evolution" not in {info.searcher for info, _ in read_ledgers(open_storage(run_folder))}


@pytest.mark.long
def test_searchers_that_keep_state_share_two_workers(ray_cluster: Any, tmp_path: Path) -> None:
    """Answers come back out of order: nobody proposes what is pending, or waits where nothing is."""
    from nas.engine.cluster import Workers

    names = ("ddsm", "nevergrad", "optuna_sampler", "rounds", "routing")
    searchers = {point.name: point.load()() for point in entry_points(group="nas.searchers") if point.name in names}
    study = toy_study(trials=8, verified=2, searchers=searchers)
    with open_session(study, tmp_path) as session:
        session.run(*(session.conductor(name) for name in searchers), workers=Workers(2))  # side by side
    for info, trials in read_ledgers(open_storage(tmp_path)):
        first = [trial for trial in trials if trial.rung == info.rungs[0]]
        assert len({trial.genome for trial in first}) == len(first) == 8, info.searcher
        assert {trial.status for trial in trials} == {"pruned", "complete"}


@pytest.mark.long
def test_a_searcher_learns_on_a_worker(ray_cluster: Any, tiny_study: Study, tiny_run: Path, tmp_path: Path) -> None:
    from nas.engine.cluster import Workers

    study = warm(tiny_study)
    folders = {"here": None, "ray": Workers(1)}
    for name, workers in folders.items():
        (tmp_path / name).mkdir()
        for part in ("supernet", "features"):
            (tmp_path / name / part).symlink_to(tiny_run / part)
        with open_session(study, tmp_path / name) as session:
            ticks = list(session.learn("routing", 0, workers))
            assert ticks[-1].done == ticks[-1].total
            assert not list(session.learn("routing", 0, workers))
    info = study.ledger_info(tmp_path / "ray", "routing", 0)
    here, there = (learned_tensors(tmp_path / name, info) for name in folders)
    assert here is not None
    assert there is not None
    assert all(torch.equal(here[name], there[name]) for name in here)


SOCKETS = """
import json, os, socket, sys, threading, time
from pathlib import Path
import psutil
from nas.engine.cluster import Workers, cluster
from nas.engine.session import open_session
from tests.toy import toy_study

outer = [a.address for ones in psutil.net_if_addrs().values() for a in ones if a.family == socket.AF_INET and not a.address.startswith("127.")]
listening = set()

def look():
    for process in psutil.process_iter():
        try:
            mine = os.getpid() in [process.pid, *(parent.pid for parent in process.parents())]
            for found in process.net_connections("tcp") if mine else ():
                if found.status == psutil.CONN_LISTEN:
                    listening.add(found.laddr.port)
        except psutil.Error:
            continue

def answers(address, port):
    try:
        socket.create_connection((address, port), timeout=2).close()
        return True
    except OSError:
        return False

opened = set()
def settled(trial):
    look()
    opened.update((address, port) for port in listening for address in outer if answers(address, port))

with open_session(toy_study(trials=4, verified=1, evaluator__seconds=0.1), Path(sys.argv[1])) as session, cluster(Workers(2)):
    session.run(session.conductor("random", on_settled=settled), workers=Workers(2))
print(json.dumps({"outer": outer, "listening": len(listening), "opened": sorted(map(list, opened))}))
"""


@pytest.mark.long
def test_a_local_cluster_answers_on_loopback_alone(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    done = subprocess.run(
        [sys.executable, "-c", SOCKETS, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["listening"] >= 4
    if not found["outer"]:
        pytest.skip("this machine has no other address than loopback")
    assert found["opened"] == []


LONG = pytest.mark.long


@pytest.mark.parametrize("part", [pytest.param(part, marks=LONG) for part in ("raylet", "gcs_server", "_Desk")])
def test_a_dead_part_of_the_cluster_ends_the_run_in_a_line(part: str, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    (tmp_path / "study.py").write_text(
        "from tests.toy import toy_study\nstudy = toy_study(trials=500, evaluator__seconds=0.2)\n"
    )
    command = [
        sys.executable,
        "-m",
        "nas.cli",
        "run",
        str(tmp_path / "study.py"),
        "--workers",
        "2",
        "--out",
        str(tmp_path / "run"),
        "-q",
    ]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def scored() -> int:
        if not (tmp_path / "run" / "journal.log").exists():
            return 0
        return sum(t.scored for _, trials in read_ledgers(open_storage(tmp_path / "run")) for t in trials)

    deadline = time.monotonic() + 90
    while scored() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    victim = next(
        p for p in psutil.Process(run.pid).children(recursive=True) if part in p.name() or part in " ".join(p.cmdline())
    )
    victim.kill()
    _, said = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "Traceback" not in said, said
    [told] = [line for line in said.splitlines() if line.startswith("error: ")] or [said]
    assert "goes on from what is kept" in told
    kept = scored()
    assert kept >= 2


def test_an_address_where_nobody_listens_and_too_long_a_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nas.engine.cluster import Workers, check_workers

    for address, words in (
        ("127.0.0.1:9", "nobody listens at the Ray address"),
        ("nonsense", "is not HOST:PORT"),
        ("a:b:c", "is not HOST:PORT"),
    ):
        with pytest.raises(UserError, match=words):
            check_workers(Workers(1, address=address))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(UserError, match="too long a path for Ray's sockets"):
        check_workers(Workers(1))
    with pytest.raises(UserError, match=r"2 workers on cuda must say how much of a GPU .* --gpus-per-worker"):
        Workers(2, device="cuda")
    assert Workers(2, gpus=0.5, device="cuda").gpus == 0.5
