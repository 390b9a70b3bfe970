"""What the engine costs per trial, apart from the evaluation: locally, under Ray, with long genomes, and after very many trials; how many
Ray clusters a run starts, what of them can be reached, and what two runs on one database do twice.

The evaluator sleeps one second and returns a formula; ledger, searcher, runner and Ray are the real ones.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import Benchmark, Target
from benchmarks.postgres import installed, server
from nas.contracts import ImageSet, Progress, Schedule, Score
from nas.engine.session import open_session
from nas.results.report import Run
from nas.searchers.evolution import Evolution
from nas.study import Study
from nas.testing import TableSpace, toy_score


@dataclass(frozen=True)
class Sleeper:
    """An evaluator that sleeps, and everything else that a study needs to be one."""

    seconds: float = 1.0
    rungs: tuple[int, ...] = (1,)
    metrics: tuple[str, ...] = ("fd",)

    def describe(self) -> dict[str, Any]:
        return {"class": "Sleeper"}

    def prepare(self, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def run(self, supernet: Any, images: Any, folder: Path, seed: int, device: str) -> Iterator[Progress]:
        yield from ()

    def digest(self, folder: Path) -> str:
        return "none"

    def load(self, *where: Any) -> Any:
        return self

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        time.sleep(self.seconds)
        genome = tuple(gene for step in schedule.steps for gene in step.arch)
        return replace(toy_score(genome), spent={"seconds": self.seconds})

    def sample(self, schedule: Schedule, count: int, seed: int) -> Any:
        raise RuntimeError("a sleeper has no images")


@dataclass(frozen=True)
class NoImages:
    def load(self) -> ImageSet:
        return ImageSet(np.zeros((16, 1, 2, 2), np.float32), None, "zeros")


def study(genes: int, trials: int, seconds: float) -> Study:
    part: Any = Sleeper(seconds)
    table = (tuple((j + 1) ** 2 for j in range(4)),) * genes
    return Study(
        name="engine",
        space=TableSpace(table),
        supernet=part,
        images=NoImages(),
        training=part,
        evaluator=part,
        searchers={"evolution": Evolution()},
        limits={"macs_share": 0.6},
        trials=trials,
    )


def local(folder: Path, trials: int, seconds: float) -> dict[str, float]:
    shutil.rmtree(folder, ignore_errors=True)
    with open_session(study(10, trials, seconds), folder) as session:
        conductor = session.conductor("evolution")
        started = time.perf_counter()
        session.run(conductor)
        wall = time.perf_counter() - started
    return {"trials": trials, "wall_s": wall, "overhead_ms": (wall / trials - seconds) * 1e3}


def under_ray(folder: Path, trials: int, seconds: float, workers: int) -> dict[str, float]:
    """Start-up (Ray, Tune, the workers' imports) is what lies before the first trial is settled, less its second."""
    from nas.engine.cluster import Workers

    shutil.rmtree(folder, ignore_errors=True)
    settled: list[float] = []
    with open_session(study(10, trials, seconds), folder) as session:
        conductor = session.conductor("evolution", on_settled=lambda trial: settled.append(time.perf_counter()))
        started = time.perf_counter()
        session.run(conductor, workers=Workers(workers))
        ended = time.perf_counter()
    warm = max(settled[workers - 1], settled[0])
    steady = (settled[-1] - warm) / (trials - workers)
    return {
        "trials": trials,
        "workers": workers,
        "wall_s": ended - started,
        "start_up_s": warm - started - seconds,
        "shut_down_s": ended - settled[-1],
        "overhead_ms": (steady - seconds / workers) * 1e3,
    }


def long_genomes(folder: Path, trials: int) -> dict[str, float]:
    """Ask, write-ahead, close and tell at 1,000 genes; nothing is evaluated."""
    shutil.rmtree(folder, ignore_errors=True)
    with open_session(study(1000, trials, 0.0), folder) as session:
        conductor = session.conductor("evolution")
        started = time.perf_counter()
        session.run(conductor)
        wall = time.perf_counter() - started
    return {"trials": trials, "wall_s": wall, "per_trial_ms": wall / trials * 1e3}


def growth(folder: Path, trials: int) -> dict[str, float]:
    """CPU milliseconds of a trial in the engine at the end of a long search, and at a twentieth of it: means of the trials before."""
    shutil.rmtree(folder, ignore_errors=True)
    spent: list[float] = []
    with open_session(study(10, trials, 0.0), folder) as session:
        session.run(session.conductor("evolution", on_settled=lambda trial: spent.append(time.process_time())))
    early = trials // 20
    window = max(early // 2, 10)
    at = {f"at_{n}_ms": (spent[n - 1] - spent[n - 1 - window]) / window * 1e3 for n in (early, trials)}
    return {"trials": trials, **at, "growth": at[f"at_{trials}_ms"] / at[f"at_{early}_ms"]}


COMPARE = "import sys, time; from pathlib import Path; from nas.library import compared; from nas.results.report import Run; t = time.process_time(); compared(Run.open(Path(sys.argv[1]))); print(time.process_time() - t)"


def compared(long: Path, short: Path, trials: int) -> dict[str, float]:
    """CPU seconds of `nas compare` on a long run, and on one of a tenth of its trials."""
    growth(short, trials // 10)
    seconds = {
        name: float(
            subprocess.run(
                [sys.executable, "-c", COMPARE, str(folder)], check=True, capture_output=True, text=True
            ).stdout
        )
        for name, folder in (("long_s", long), ("short_s", short))
    }
    return {"trials": trials, **seconds, "growth": seconds["long_s"] / seconds["short_s"]}


TOY = """
from benchmarks.engine import study as made
from dataclasses import replace
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.searchers.rounds import Rounds
from nas.searchers.ddsm import DDSM
study = replace(made(6, {trials}, 0.05), searchers={{"evolution": Evolution(), "random": Random(), "rounds": Rounds(), "ddsm": DDSM(population=8)}})
"""


def on_workers(folder: Path, trials: int) -> dict[str, Any]:
    """A run of four searchers on two workers, watched from outside: how many clusters it starts, and which of its sockets answer on an outer
    address of this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "toy.py").write_text(TOY.format(trials=trials))
    outer = [
        one.address
        for ones in psutil.net_if_addrs().values()
        for one in ones
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    ]
    with tempfile.TemporaryDirectory(prefix="nas-ray-") as temporary:
        command = [
            sys.executable,
            "-m",
            "nas.cli",
            "run",
            str(folder / "toy.py"),
            "--searcher",
            "all",
            "--workers",
            "2",
            "--out",
            str(folder / "run"),
            "-q",
        ]
        run = subprocess.Popen(command, env={**os.environ, "RAY_TMPDIR": temporary})
        opened, tried = set(), set()
        while run.poll() is None:
            for port in _listening(run.pid):
                tried.add(port)
                opened |= {(address, port) for address in outer if _answers(address, port)}
            time.sleep(0.5)
        starts = len([path for path in Path(temporary).glob("**/session_*") if path.is_dir() and not path.is_symlink()])
    return {
        "rc": run.returncode,
        "ray_starts": starts,
        "sockets": len(tried),
        "outer_addresses": len(outer),
        "open_ports": len(opened),
    }


def _listening(root: int) -> set[int]:
    found = set()
    try:
        for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
            found |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    except psutil.Error:  # one that ended meanwhile
        pass
    return found


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def shared_database(folder: Path, trials: int) -> dict[str, Any]:
    """Two runs of one study in folders of their own, at once, on one PostgreSQL: trials of a ledger that were scored twice."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "toy.py").write_text(TOY.format(trials=trials))
    with server(folder / "server") as url:
        runs = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "nas.cli",
                    "run",
                    str(folder / "toy.py"),
                    "--searcher",
                    "random",
                    "--seed",
                    str(seed),
                    "--storage",
                    url,
                    "--out",
                    str(folder / f"run{seed}"),
                    "-q",
                ]
            )
            for seed in (0, 1)
        ]
        codes = [run.wait() for run in runs]
        ledgers = Run.open(folder / "run0", url).ledgers
    scored = [(info.name, trial.genome, trial.rung) for info, trials in ledgers for trial in trials]
    return {"codes": codes, "ledgers": len(ledgers), "trials": len(scored), "doubled": len(scored) - len(set(scored))}


def main() -> None:
    bench = Benchmark(
        "engine",
        __doc__ or "",
        (
            "nas/engine/journal.py",
            "nas/engine/ladder.py",
            "nas/engine/ledger.py",
            "nas/engine/cluster.py",
            "nas/engine/ray_runner.py",
            "nas/engine/runner.py",
            "nas/engine/writers.py",
        ),
    )
    trials, seconds, genes_trials = (10, 0.2, 30) if bench.quick else (100, 1.0, 200)
    genes = bench.row("1,000 genes", lambda: long_genomes(bench.folder / "genes", genes_trials))
    here = bench.row("local", lambda: local(bench.folder / "local", trials, seconds))
    ray = bench.row("ray, 2 workers", lambda: under_ray(bench.folder / "ray", trials, seconds, 2))
    assert math.isfinite(ray["overhead_ms"])
    many = 400 if bench.quick else 20_000
    grown = bench.row("growth", lambda: growth(bench.folder / "long", many))
    compare = bench.row("compare", lambda: compared(bench.folder / "long", bench.folder / "short", many))
    watched = bench.row(
        "four searchers on workers", lambda: on_workers(bench.folder / "workers", 6 if bench.quick else 20)
    )
    doubled: dict[str, Any] = {"doubled": None}
    if installed() is not None:
        doubled = bench.row(
            "one PostgreSQL", lambda: shared_database(bench.folder / "postgres", 6 if bench.quick else 20)
        )
    bench.finish(
        [
            Target(
                "local_overhead_ms", "milliseconds per trial outside the evaluator, in process", 20, here["overhead_ms"]
            ),
            Target("ray_overhead_ms", "the same under Ray with 2 workers, start-up apart", 60, ray["overhead_ms"]),
            Target("genes_1000_ms", "ask, ledger and tell at 1,000 genes", 100, genes["per_trial_ms"]),
            Target(
                "trial_cost_growth",
                f"CPU of a trial in the engine at {many:,} trials / at {many // 20:,}",
                1.5,
                grown["growth"],
            ),
            Target(
                "compare_growth", f"CPU of `nas compare` at {many:,} trials / at {many // 10:,}", 13, compare["growth"]
            ),
            Target(
                "ray_starts", "Ray clusters started in a run of four searchers on workers", 1, watched["ray_starts"]
            ),
            Target("open_ports", "sockets of that run that answer on an outer address", 0, watched["open_ports"]),
            Target("doubled_trials", "trials scored twice by two runs on one PostgreSQL", 0, doubled["doubled"]),
        ]
    )


if __name__ == "__main__":
    main()
