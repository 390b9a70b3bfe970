"""What every benchmark shares: rows that survive a stop, targets, and the JSON object at the end."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks.protocol import order
from nas.engine.facts import package_versions
from nas.evidence.protocol import Protocol

RESULTS = Path(__file__).parent / "results"
CPUS = Path("/proc/cpuinfo")
UNFINISHED = Path(__file__).parent / "unfinished"
"""NAME/: of a benchmark that is not finished its rows, and what they rest on, committed so that another machine goes on with them."""
RUNS = Path("runs") / "benchmarks"
LONG = ("replicates", "scores", "files")
"""Of a row, what stays in runs/ alone."""
ON_ONE_LINE = ("schedule", "schedules", "genomes")
"""Of a row, what is written as JSON within the JSON, where a number a line would be thousands of them."""


@dataclass(frozen=True)
class Target:
    """A promise, None where a figure is only reported, and what was measured, None where that has no value. `met` follows from the two and
    the direction."""

    id: str
    what: str
    target: float | None
    measured: float | None
    at_most: bool = True

    def to_json(self) -> dict[str, Any]:
        met = self.measured is not None
        if self.measured is not None and self.target is not None:
            met = self.measured <= self.target if self.at_most else self.measured >= self.target
        return {**asdict(self), "met": met}


def short(row: Any) -> Any:
    """A row, or a part of it, without what stays in runs/, and schedules on one line."""
    if isinstance(row, dict):
        kept = {name: value for name, value in row.items() if name not in LONG}
        return {
            name: json.dumps(value) if name in ON_ONE_LINE and isinstance(value, dict | list) else short(value)
            for name, value in kept.items()
        }
    return [short(value) for value in row] if isinstance(row, list) else row


class Benchmark:
    """Parses the command line and keeps rows in runs/benchmarks/NAME[-quick]/rows.json as they finish.

    The same command goes on after a stop, and, where no rows are there, with what lies in `benchmarks/unfinished/NAME`, where `--keep` puts it; `--fresh`
    starts again. `files`: those of the project on which the result depends most, besides the benchmark's own; a result that is older than they are is told
    by `benchmarks.table --check`. `protocol`: what was written down before any row; rows of another one are not gone on with. `rested_on`: patterns of files
    in the benchmark's folder that its rows rest on, such as weights, and begun searches.
    """

    def __init__(
        self,
        name: str,
        description: str,
        files: Sequence[str] = (),
        protocol: Protocol | None = None,
        rested_on: Sequence[str] = (),
    ) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
        parser.add_argument(
            "--quick", action="store_true", help="small sizes, to see that it runs; nothing is kept as a result"
        )
        parser.add_argument("--json", action="store_true", help="print the JSON object alone")
        begin = parser.add_mutually_exclusive_group()
        begin.add_argument("--fresh", action="store_true", help="forget all of an earlier run")
        begin.add_argument(
            "--keep",
            action="store_true",
            help="measure nothing; put the rows of an earlier run, and what they rest on, where another machine goes on with them",
        )
        parser.add_argument(
            "--without",
            nargs="*",
            default=[],
            metavar="ROW",
            help="rows to leave out; targets that need them have no value",
        )
        parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes for independent work")
        options = parser.parse_args()
        self.name = name
        self._files = [f"benchmarks/{name}.py", *files]
        self.quick: bool = options.quick
        self.processes: int = options.processes
        self.without: frozenset[str] = frozenset(options.without)
        self._json: bool = options.json
        self.folder = (RUNS / (name + ("-quick" if self.quick else ""))).resolve()
        if options.fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / "rows.json"
        if self._unfinished.exists() and not (self._path.exists() or self.quick or options.fresh):
            shutil.copytree(
                self._unfinished, self.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(self._path.name)
            )
            shutil.copy(self._unfinished / self._path.name, self._path)  # last: without rows a stop begins this anew
        self._rows: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        if not (self.quick or options.fresh) and (elsewhere := self._elsewhere()):
            self.say(
                f"{len(elsewhere)} rows of {self._unfinished} are not in {self.folder}, {elsewhere[0]} among them: where they were made later, elsewhere, move that "
                "folder away to go on with them, and --keep nothing before"
            )
        self._protocol = protocol
        self._commit = commit()  # as it is now: one that is made while a row is measured is not what measured it
        self._changes = changes()
        if older := {row["commit"] for row in self._rows.values()} - {self._commit}:
            self.say(f"{len(self._rows)} rows are kept, some of commits {', '.join(sorted(one[:9] for one in older))}")
        others = {row.get("protocol") for row in self._rows.values()} - {protocol and protocol.digest}
        if protocol and others:
            raise SystemExit(
                f"error: {self._path} holds rows of another protocol than {protocol.name}; keep them elsewhere, or begin with --fresh"
            )
        if options.keep:
            self._keep(rested_on)
            raise SystemExit(0)

    def _keep(self, patterns: Sequence[str]) -> None:
        if self.quick or not self._path.exists():
            raise SystemExit(f"error: {self.folder} holds no rows to keep; run the benchmark first, without --quick")
        if not patterns and any(key.endswith("rest on") for key in self._rows):
            raise SystemExit(
                f"error: these rows rest on weights in {self.folder}, of which {self.name} does not say which files they are; copy them to {self._unfinished} by hand"
            )
        partial = self._unfinished.with_name(f"{self.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for file in sorted({self._path, *(file for pattern in patterns for file in self.folder.glob(pattern))}):
            # What is reached through a link is kept where it lies.
            if file.is_file() and file.resolve() == file:
                to = partial / file.relative_to(self.folder)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to)
        shutil.rmtree(self._unfinished, ignore_errors=True)
        partial.rename(self._unfinished)
        self.say(f"{len(self._rows)} rows are kept in {self._unfinished}; commit them")

    def _elsewhere(self) -> list[str]:
        """Rows that were kept for other machines and are not here."""
        file = self._unfinished / "rows.json"
        return [key for key in json.loads(file.read_text()) if key not in self._rows] if file.exists() else []

    @property
    def _unfinished(self) -> Path:
        return UNFINISHED / self.name

    def rest_on(self, which: str = "", **digests: str) -> None:
        """Keeps, as a row, of which networks and judges the rows are, or those of them that this names. Raises SystemExit where they are of others."""
        row = self.row(f"{which} rest on".strip(), lambda: digests)
        others = [f"{name} {row[name]}, here {digest}" for name, digest in digests.items() if row[name] != digest]
        if others:
            raise SystemExit(
                f"error: rows are kept of other weights ({'; '.join(others)}), as another kind of processor trains them; go on where they were made, or begin with "
                "--fresh"
            )

    def forget(self, ending: str = "", beginning: str = "") -> None:
        """Leaves out the rows whose keys begin and end so, which are to be measured anew."""
        gone = [key for key in self._rows if key.startswith(beginning) and key.endswith(ending)]
        for key in gone:
            del self._rows[key]
        if gone:
            self.say(f"{len(gone)} rows are measured anew, {', '.join(gone[:3])} among them")

    def row(self, key: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The row of this key: kept from an earlier run, or measured now and kept."""
        return self._rows[key] if key in self._rows else self.reckon(key, measure())

    def reckon(self, key: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The row of this key, in place of an earlier run's: for what follows from other rows and costs nothing."""
        under = {} if self._protocol is None else {"protocol": self._protocol.digest}
        self._rows[key] = {"row": key, "commit": self._commit, "on": device(), **values, **under}
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._rows, indent=1))
        os.replace(partial, self._path)
        self.say(json.dumps(short(self._rows[key])))
        return self._rows[key]

    def has(self, key: str) -> bool:
        """Whether an earlier run has kept this row."""
        return key in self._rows

    def kept(self, key: str) -> dict[str, Any]:
        """A row that was measured before."""
        return self._rows[key]

    def rows(self, jobs: Mapping[str, tuple[Any, ...]]) -> dict[str, dict[str, Any]]:
        """The rows of these keys; those not kept yet are measured in `processes` processes and kept as they finish. A job is
        a function of a module and its arguments."""
        missing = {key: job for key, job in jobs.items() if key not in self._rows}
        failed: BaseException | None = None
        if missing:
            if not (same_code(self._commit) and changes() == self._changes):  # new processes read it anew
                raise SystemExit(
                    f"error: the code is no longer that of commit {self._commit[:9]}, with which this was begun; run it in a clone of its own, or begin the command again"
                )
            context = get_context("spawn")
            with ProcessPoolExecutor(self.processes, mp_context=context, initializer=end_with_parent) as pool:
                running = {pool.submit(*job): key for key, job in missing.items()}
                for future in as_completed(running):
                    failed = future.exception()
                    if failed is not None:
                        self.say(f"{running[future]} failed: {failed}; what runs beside it is waited for")
                        pool.shutdown(cancel_futures=True)
                        break
                    self.row(running[future], future.result)
            for future, key in running.items():
                if not future.cancelled() and future.exception() is None:
                    self.row(key, future.result)
        if failed is not None:
            raise failed
        return {key: self._rows[key] for key in jobs}

    def say(self, text: str) -> None:
        """Progress for people."""
        if not self._json:
            print(text, file=sys.stderr, flush=True)

    def finish(self, targets: Sequence[Target]) -> None:
        """Prints the JSON object; a full run's is kept in benchmarks/results. Replicates stay in the rows alone."""
        shown = [short(row) for row in self._rows.values()]
        result = {
            "name": self.name,
            "date": datetime.date.today().isoformat(),
            "commit": self._commit,
            "files": self._files,
            "device": device(),
            "versions": package_versions(),
            **self._told_before(),
            "rows": shown,
            "targets": [target.to_json() for target in targets],
        }
        text = json.dumps(result, indent=1, allow_nan=False)
        if not self.quick:
            (RESULTS / f"{self.name}.json").write_text(text + "\n")
            shutil.rmtree(self._unfinished, ignore_errors=True)
        print(text)

    def _told_before(self) -> dict[str, Any]:
        """The protocol, and whether its rows' commits held it."""
        protocol = self._protocol
        if protocol is None:
            return {}
        held = order(protocol.name, protocol.digest, [row["commit"] for row in self._rows.values()])
        return {"protocol": {"name": protocol.name, "digest": protocol.digest, "order": held}}


def end_with_parent() -> None:
    """In a process of a pool: ends it with the one that started it, which would otherwise leave it at its job when it is stopped."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def borrow(trained: Path, folder: Path) -> Path:
    """A run folder of its own with what another has of weights, features and kept images."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("supernet", "features", "images"):
        if (trained / part).exists() and not (folder / part).exists():
            (folder / part).symlink_to(trained / part)
    return folder


def copied(trained: Path, to: Path) -> None:
    """What lies in a folder of something trained, but for what is made of it again, whole or not at all."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f"{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(trained, partial, ignore=shutil.ignore_patterns("latents", "checkpoint*"))
    partial.rename(to)


NO_CODE = (":!benchmarks/results", ":!benchmarks/unfinished", ":!*.md")
"""Of a clone, what says what was measured and changes nothing of it."""


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent.parent, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit() -> str:
    """Of the code that runs, with a plus where files were changed since; "unknown" outside of a clone."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *NO_CODE)
        return _git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def changes() -> str:
    """Of the code since its commit, as a patch; empty outside of a clone."""
    try:
        return _git("diff", "HEAD", "--", ".", *NO_CODE)
    except (OSError, subprocess.CalledProcessError):
        return ""


def same_code(earlier: str) -> bool:
    """Whether the code is that of an earlier `commit()`, though rows or words may have been committed since."""
    now = commit()
    if now == earlier or "+" in now + earlier or "unknown" in (now, earlier):
        return now == earlier
    return not _git("diff", "--name-only", earlier, now, "--", ".", *NO_CODE)


def needs(package: str, extra: str) -> None:
    """Ends with the extra's name where a package is missing that only a benchmark asks for."""
    if importlib.util.find_spec(package) is None:
        raise SystemExit(
            f"error: this benchmark needs {package}; run `pip install -e '.[{extra}]' --constraint constraints.txt`"
        )


def processor() -> str:
    """Which kind of CPU it is, more finely than by its name, by which two generations may go; empty where nothing says."""
    told = (
        dict(re.findall(r"^(cpu family|model|stepping|cache size)\s*: (.+)$", CPUS.read_text(), re.M))
        if CPUS.exists()
        else {}
    )
    return ", ".join(f"{name} {value}" for name, value in told.items())


def device() -> str:
    """In words: what the numbers were measured on."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    models = re.findall(r"^model name\s*: (.+)$", CPUS.read_text(), re.M) if CPUS.exists() else []
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}, {accelerator}"
