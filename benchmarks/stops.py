"""A study that is stopped again and again on its way from nothing to trained networks: by signals, and by disks that run full."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Benchmark
from benchmarks.tiny_study import STUDY
from nas.base.files import tensors_digest
from nas.engine.ledger import read_ledgers
from nas.engine.storage import open_storage


def journey(folder: Path) -> list[list[str]]:
    """The commands of one study, from nothing to trained networks."""
    study, run, to = (str(folder / name) for name in ("study.py", "run", "exported"))
    return [
        ["run", study, "--searcher", "routing,evolution", "--out", run, "--threads", "1", "-q"],
        ["export", study, "--within", "macs_share=0.6", "--to", to, "--out", run],
        ["report", study, "--out", run, "-q"],
        ["train", to, "--images", "digits", "--steps", "60", "--batch", "8", "--study", study, "--out", run, "-q"],
    ]


def outcome(folder: Path) -> dict[str, Any]:
    """What a journey has come to, without times."""
    ledgers = {
        info.name: [
            (
                t.number,
                t.genome,
                t.rung,
                t.status,
                t.score and dict(t.score.values),
                {k: v for k, v in t.origin.items() if k != "weights"},
            )
            for t in trials
        ]
        for info, trials in read_ledgers(open_storage(folder / "run"))
    }
    weights = {
        str(path.relative_to(folder)): tensors_digest(path)
        for where in ("run/supernet", "run/features", "run/learned", "exported")
        for path in sorted((folder / where).rglob("*.safetensors"))
        if not path.name.startswith(".") and "snapshot" not in path.name
    }
    return {"ledgers": ledgers, "weights": weights, "report": (folder / "run" / "report" / "index.html").exists()}


def killed(
    folder: Path, kills: int, number: signal.Signals, seed: int, times: list[tuple[float, float]]
) -> dict[str, Any]:
    """The journey, stopped about so many times at moments spread over its commands; each command is given again until it ends by itself.

    `times`: of each command, the seconds from nothing, and of those the seconds that it also takes when all is done.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(STUDY.format(steps=120))
    draw = random.Random(seed)
    whole = sum(seconds for seconds, _ in times)
    happened, left, wrong = 0, 0.0, []
    for arguments, (seconds, idle) in zip(journey(folder), times, strict=True):
        left += kills * seconds / whole
        step = 2 * max(seconds - idle, 0.1 * seconds) / max(round(left), 1)
        while left >= 0.5:
            run = subprocess.Popen(
                [sys.executable, "-m", "nas.cli", *arguments],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            # The imports take a while in which there is nothing to lose.
            time.sleep(0.8 * idle + draw.uniform(0, step))
            run.send_signal(number)
            _, said = run.communicate()
            if run.returncode == 0 or "is not empty" in said:
                break
            happened, left = happened + 1, left - 1
            expected = -signal.SIGKILL if number == signal.SIGKILL else 143
            if run.returncode not in (expected, -number) or "Traceback" in said:
                wrong.append([arguments[0], run.returncode, _last_line(said)])
        end = subprocess.run([sys.executable, "-m", "nas.cli", *arguments], capture_output=True, text=True, check=False)
        already = arguments[0] == "export" and "is not empty" in end.stderr
        if end.returncode and not already:
            wrong.append([arguments[0], end.returncode, _last_line(end.stderr)])
            break
    return {"kills": happened, "wrong": wrong, **outcome(folder)}


def uninterrupted(folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(STUDY.format(steps=120))
    times = []
    for arguments in journey(folder):
        both = []
        for again in (False, True):
            started = time.monotonic()
            command_line = [sys.executable, "-m", "nas.cli", *arguments]
            subprocess.run(command_line, check=not again, capture_output=True)
            both.append(time.monotonic() - started)
        times.append((both[0], min(both)))
    return {"times": times, "replicates": outcome(folder)}


def kills(bench: Benchmark) -> dict[str, Any]:
    """Journeys until so many stops have happened, two side by side."""
    expected = bench.row("uninterrupted", lambda: json.loads(json.dumps(uninterrupted(bench.folder / "whole"))))
    rows = []
    for number, wanted in (
        ((signal.SIGKILL, 2), (signal.SIGTERM, 2)) if bench.quick else ((signal.SIGKILL, 100), (signal.SIGTERM, 40))
    ):
        done: list[dict[str, Any]] = []
        while (missing := wanted - sum(row["kills"] for row in done)) > 0 and len(done) < 20:
            seeds = [len(done), len(done) + 1] if missing > 20 else [len(done)]

            def one(seed: int, number: signal.Signals = number, count: int = min(missing, 20)) -> dict[str, Any]:
                found = killed(bench.folder / f"{number.name}{seed}", count, number, seed, expected["times"])
                found = json.loads(json.dumps(found))
                equal = all(found[key] == value for key, value in expected["replicates"].items())
                return {"signal": number.name, "kills": found["kills"], "equal": equal, "wrong": found["wrong"]}

            missed = [seed for seed in seeds if not bench.has(f"{number.name} {seed}")]
            with ThreadPoolExecutor(2) as pool:
                for seed, row in zip(missed, pool.map(one, missed), strict=True):
                    bench.reckon(f"{number.name} {seed}", row)
            done += [bench.kept(f"{number.name} {seed}") for seed in seeds]
        rows += done
    return {
        "kills": sum(row["kills"] for row in rows),
        "by signal": {
            name: sum(row["kills"] for row in rows if row["signal"] == name) for name in ("SIGKILL", "SIGTERM")
        },
        "survived": float(np.mean([row["equal"] and not row["wrong"] for row in rows])),
    }


def _last_line(said: str) -> str:
    """Of what a command said, which of a traceback is its reason; the lines before it name places of this machine."""
    return next(reversed(said.strip().splitlines()), "")


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[tuple[Path, bool]]:
    """A file system of so many bytes, where this user may mount one; else a folder whose files may not grow beyond."""
    with tempfile.TemporaryDirectory(prefix="nas-disk-") as temporary:
        mounted = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", temporary], capture_output=True, check=False
            ).returncode
            == 0
        )
        try:
            yield Path(temporary), mounted
        finally:
            if mounted:
                subprocess.run(["umount", temporary], check=False)


def full_disks(levels: list[int]) -> dict[str, Any]:
    rows = []
    for size in levels:
        with small_disk(size) as (disk, mounted), tempfile.TemporaryDirectory() as elsewhere:
            study = Path(elsewhere) / "study.py"
            study.write_text(STUDY.format(steps=30))

            def limited(size: int = size) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

            arguments = [
                sys.executable,
                "-m",
                "nas.cli",
                "run",
                str(study),
                "--searcher",
                "evolution",
                "--out",
                str(disk / "run"),
                "-q",
            ]
            done = subprocess.run(
                arguments, capture_output=True, text=True, check=False, preexec_fn=None if mounted else limited
            )
            clear = done.returncode == 0 or (
                done.returncode == 1
                and "Traceback" not in done.stderr
                and len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
                and "fault of" not in done.stderr
            )
            if mounted:
                subprocess.run(["mount", "-o", f"remount,size={2**28}", str(disk)], check=True)
            again = subprocess.run(arguments, capture_output=True, text=True, check=False)
            rows.append(
                {
                    "bytes": size,
                    "mounted": mounted,
                    "rc": done.returncode,
                    "clear": clear,
                    "went_on": again.returncode == 0,
                    "said": done.stderr.strip().replace(str(disk), "DISK")[-200:],
                }
            )
    return {"levels": rows, "clear": sum(row["clear"] for row in rows), "went_on": sum(row["went_on"] for row in rows)}
