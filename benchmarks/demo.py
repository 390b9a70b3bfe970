"""How long the main job takes after the install: train, search, export, on this machine, by the README's commands; and can what it draws be read?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Benchmark, Target
from nas.engine.session import open_session
from nas.study import Study, load_study

SMALL = """
from dataclasses import replace
from search_spaces.training import Sandwich
from studies.digits_classes import study as digits

study = replace(digits, training=Sandwich(steps=60), trials=6)
"""


def prepare(study: Study, folder: str) -> dict[str, Any]:
    """Supernet and features, as `nas run` makes them."""
    started, seconds = time.perf_counter(), {"supernet": 0.0, "features": 0.0}
    with open_session(study, Path(folder)) as session:
        for tick in session.prepare():
            now = time.perf_counter()
            seconds[tick.what] += now - started
            started = now
    return {f"{name}_s": value for name, value in seconds.items()}


def command(name: str, *arguments: str) -> dict[str, Any]:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nas.cli", name, *arguments], check=True, stdout=subprocess.DEVNULL)
    return {f"{name}_s": time.perf_counter() - started}


def main() -> None:
    bench = Benchmark("demo", __doc__ or "", ("studies/digits_classes.py",))
    run, exported = str(bench.folder / "run"), str(bench.folder / "exported")
    if not bench.has("prepare"):
        shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(exported, ignore_errors=True) if not bench.has("export") else None
    file = "studies/digits_classes.py"
    if bench.quick:
        file = str(bench.folder / "small.py")
        Path(file).write_text(SMALL)
    rows = [
        bench.row("prepare", lambda: prepare(load_study(file), run)),
        bench.row("search", lambda: command("run", file, "--out", run, "--quiet")),
        bench.row(
            "export",
            lambda: command("export", file, "--within", "macs_share=0.3", "--to", exported, "--out", run),
        ),
    ]
    told = json.loads((Path(exported) / "provenance.json").read_text())
    score = told.get("confirmed", told["score"])
    rows.append(bench.row("read", lambda: {"samples": told["samples"], **score["values"], "cost": told["cost"]}))
    seconds = sum(value for row in rows for key, value in row.items() if key.endswith("_s"))
    bench.finish(
        [
            Target(
                "demo_minutes",
                "minutes from installed to exported model: train, search, verify, export",
                6,
                seconds / 60,
            ),
            Target(
                "demo_accuracy",
                "share of the exported schedule's samples that the judge puts into the class asked for, on noises on which nothing was chosen",
                0.9,
                1 - float(score["values"]["disagreement"]),
                at_most=False,
            ),
        ]
    )


if __name__ == "__main__":
    main()
