"""How fast the commands feel: seconds until something is shown, and of CPU and by the clock until they are done, on the run that `make demo` makes; and how
well a dry run tells what the run takes, the demo's and that of garments.

The commands are those of a newcomer, in an environment with what `make demo` installs and nothing else: packages that only the tests need are imported by
others where they are there. The least of three calls: other work on the machine only adds. What is shown first is the first byte, on either stream. What a dry run says is measured right
before the run, on as many threads.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Target
from benchmarks.demo import SMALL

CALLS = 3
ROOT = Path(__file__).parent.parent


THREADS = "1"
"""Other work on the machine then slows the dry run and the run alike."""


def environment(folder: Path) -> str:
    """Its Python."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        install: list[str | Path] = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--editable",
            f"{ROOT}[dashboard]",
            "--constraint",
        ]
        subprocess.run([*install, ROOT / "constraints.txt"], check=True)
    return str(python)


def told_and_run(folder: Path, file: str) -> dict[str, Any]:
    """Minutes that a dry run tells, and those that the same command takes then."""
    command = [sys.executable, "-m", "nas.cli", "run", file, "--threads", THREADS]
    told = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True)
    started = time.perf_counter()
    subprocess.run([*command, "--out", str(folder), "--quiet"], check=True)
    minutes, here = (time.perf_counter() - started) / 60, json.loads(told.stdout)["here"]
    return {"minutes": minutes, "told_minutes": 60 * here["hours"], "told": here["seconds"]}


def felt(python: str, arguments: Sequence[str], made: Path | None = None) -> dict[str, float]:
    """`made`: what the command writes, which is deleted before each call."""
    calls = []
    for _ in range(CALLS):
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
            made.unlink(missing_ok=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        read, write = os.pipe()
        command = [python, "-m", "nas.cli", *arguments]
        with subprocess.Popen(command, stdout=write, stderr=write) as running:
            os.close(write)
            first = os.read(read, 1)
            shown = time.perf_counter() - started
            while os.read(read, 1 << 16):
                pass
            os.close(read)
            code = running.wait()
        if code:
            raise SystemExit(f"error: nas {' '.join(arguments)} ended with {code}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        calls.append((shown if first else float("inf"), cpu, time.perf_counter() - started))
    return dict(zip(("first_s", "cpu_s", "wall_s"), (min(values) for values in zip(*calls, strict=True)), strict=True))


def main() -> None:
    bench = Benchmark("feel", __doc__ or "", ("nas/cli", "nas/library.py", "nas/results"))
    file, run, made = "studies/digits_classes.py", bench.folder / "run", bench.folder / "made"
    if bench.quick:
        file = str(bench.folder / "small.py")
        Path(file).write_text(SMALL)
    runs = [bench.row("run", lambda: told_and_run(run, file))]
    if not bench.quick and "garments" not in bench.without:
        runs.append(bench.row("garments", lambda: told_and_run(bench.folder / "garments", "studies/fashion_latent.py")))
    within = (file, "--out", str(run), "--within", "macs_share=0.5")
    samples = made.with_suffix(".png")
    commands: dict[str, tuple[tuple[str, ...], Path | None]] = {
        "help": (("--help",), None),
        "status": (("status", str(run)), None),
        "compare": (("compare", str(run)), None),
        "report": (("report", file, "--out", str(run)), run / "report"),
        "export": (("export", *within, "--to", str(made)), made),
        "sample": (("sample", *within, "--to", str(samples)), samples),
        "dry run": (("run", file, "--dry-run"), None),
    }
    python = sys.executable if bench.quick else environment(bench.folder)
    rows = {name: bench.row(name, lambda given=given: felt(python, *given)) for name, given in commands.items()}  # type: ignore[misc]
    slowest = max(row["first_s"] for row in rows.values())
    bench.finish(
        [
            Target("help_seconds", "seconds of `nas --help`", 0.5, rows["help"]["wall_s"]),
            Target("first_output_seconds", "seconds until the slowest of these commands shows something", 1, slowest),
            Target(
                "compare_cpu_seconds", "seconds of CPU of `nas compare` on the demo's run", 10, rows["compare"]["cpu_s"]
            ),
            Target(
                "report_cpu_seconds", "seconds of CPU of `nas report` on the demo's run", 10, rows["report"]["cpu_s"]
            ),
            Target(
                "export_cpu_seconds", "seconds of CPU of `nas export` on the demo's run", 6, rows["export"]["cpu_s"]
            ),
            Target(
                "eta_error",
                f"largest relative error of what a dry run tells of the run's time, of {len(runs)} runs",
                0.3,
                max(abs(row["told_minutes"] / row["minutes"] - 1) for row in runs),
            ),
            Target(
                "sample_cpu_seconds", "seconds of CPU of `nas sample` on the demo's run", 6, rows["sample"]["cpu_s"]
            ),
        ]
    )


if __name__ == "__main__":
    main()
