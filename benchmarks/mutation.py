"""Whether the tests notice when the code changes: a seeded sample of mutants of the files that decide scores, stratified by file.

cosmic-ray makes the mutants. Each is tried in a copy of the clone, by tests that run its line: killed where one of them
fails or they do not end. Rows are kept, so that the same command goes on. `--hours` bounds one call.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, RUNS, commit, needs
from nas.base.files import read_json, write_json

ROOT = RESULTS.parent.parent

FILES = (
    "evaluators/frechet.py",
    "evaluators/sampling.py",
    "evaluators/scoring.py",
    "evaluators/trajectories.py",
    "nas/genomes/allocation.py",
    "nas/genomes/genetics.py",
    "nas/engine/ladder.py",
    "nas/genomes/pareto.py",
    "nas/engine/runner.py",
    "search_spaces/networks/cost.py",
    "search_spaces/intervals.py",
    "search_spaces/stepwise.py",
)

TESTS = (
    "test_allocation", "test_audit", "test_benchmarks", "test_evaluators", "test_failures", "test_genetics", "test_intervals", "test_ladder", "test_latency",
    "test_options", "test_pareto", "test_pretrained", "test_reuse", "test_runner", "test_searchers", "test_supernet", "test_trajectories",
)  # fmt: skip
"""Files of tests that touch them, the slow ones of commands and workers left out."""

SAMPLE = 400
SECONDS = 180
"""After which a mutant counts as endless, and as killed."""

MOST, ENOUGH = 60, 30.0
"""Tests of one mutant, and their seconds on unchanged code."""

_LENGTHS = "both have the same length by construction, so that strict has nothing to find"
_METER = "a meter is read as the difference of two of its states alone, which its start does not change"

EQUIVALENT: dict[str, str] = {
    "evaluators/frechet.py: for start, stop in batches(len(pixels), 257)": "how many images one call of the extractor takes, a matter of speed",
    "evaluators/sampling.py: def stochastic(self) -> bool: ...": "a member of a Protocol, which nobody calls",
    "evaluators/sampling.py: @dataclass(frozen=True, slots=False)": "slots are a matter of memory",
    "evaluators/trajectories.py: calls: float = 1.0": _METER,
    "evaluators/trajectories.py: cached_calls: float = 1.0": _METER,
    "evaluators/trajectories.py: cached_macs: float = 1.0": _METER,
    "evaluators/trajectories.py: for number in range( 0, len(steps))": "a state after no step is never asked for",
    "nas/engine/ladder.py: count = differences.shape[+1]": "the array has two axes, the last of which is number 1",
    "nas/genomes/allocation.py: low, high = -1, len(thresholds)": "where the least threshold is feasible every chosen error equals it, and so has the least sum too",
    "nas/genomes/allocation.py: continue": "once nothing remains, nothing is found in the rounds that follow",
    "nas/genomes/allocation.py: for price, error, room in zip(prices, table, _rooms(prices, budget), strict=False):": _LENGTHS,
    "nas/genomes/allocation.py: for k, (price, error, room) in enumerate(zip(prices, table, _rooms(prices, budget), strict=False)):": _LENGTHS,
    "nas/genomes/genetics.py: options = (np.unravel_index(i, table.shape) for i, table in zip(flat, self.tables, strict=False))": _LENGTHS,
    "nas/genomes/genetics.py: named = [str(choice.options[gene]) for choice, gene in zip(space.choices, genome, strict=False)]": _LENGTHS,
    "nas/genomes/pareto.py: return np.asarray(found[place.reshape(- 2)])": "numpy takes any negative number for the length that is left",
    "search_spaces/intervals.py: return tuple(sorted((timesteps[end - 1] + timesteps[end] ** 1) // 2 for end in ends.tolist()))": "the power of one",
    "search_spaces/intervals.py: decibels = 10 + np.log10(alphas_cumprod / (1 - alphas_cumprod))": "even levels of a line are even after it is stretched and moved",
    "search_spaces/networks/cost.py: if len(reused) is len(self.graph(arch).branches):": "Python keeps one object of each number below 257, and no network has so many branches",
    "search_spaces/networks/cost.py: rows, columns = tensor.axes[0], tensor.axes[1] if len(tensor.axes) != 1 else one": "every tensor has an axis",
    "search_spaces/stepwise.py: return self._patterns[k][gene[ -1] if gene else 0].steps(count) if self.patterns else (ALL,) * count": "the gene of a pattern is one number, first and last",
    "search_spaces/stepwise.py: total += price(Step( -1, arch, self.net.cost.graph(arch).blocks))": "a price does not look at the timestep",
    "search_spaces/stepwise.py: if computed <= ALL:": "names of blocks sort after 'all', and for no blocks it is not asked",
    "search_spaces/stepwise.py: for k, (subnets, count) in enumerate(zip(self.subnets, self.intervals, strict=False)):": _LENGTHS,
}
"""Mutants that change nothing anybody can see, by file and changed line, with the reason; at most a tenth."""

_CHOSEN = "a test notices, which is not among those chosen by coverage: the line runs when the module is imported"
_SETTING = "a setting of its own, which no law fixes"

SURVIVORS: dict[str, str] = {
    "evaluators/frechet.py: class KernelDistance(OfFeatures):": _CHOSEN,
    "evaluators/frechet.py: base: str = field(default_factory=os.getcwd, repr=True, compare=False, kw_only=True)": _CHOSEN,
    "evaluators/scoring.py: rungs: Annotated[tuple[Annotated[int, Field(ge=2, le=10**7)], ...], Field(min_length=1)] = (512, 2049)": _SETTING,
    "evaluators/scoring.py: @dataclass(frozen=False)": _CHOSEN,
    "evaluators/trajectories.py: STATES_KEPT = 31": "one kept state more or less; the test's trajectory divides by both alike",
    "evaluators/trajectories.py: for number in range(len(schedule.steps), -1, -1):": "one state more counts as just used, which moves what is forgotten first by one place",
    "evaluators/trajectories.py: elif number is done:": "fewer states count as just used; what is forgotten first is tested at the noisy end alone",
    "nas/engine/ladder.py: quiet = quiet or not above.running": "shows with four rungs and more, which no test has",
    "nas/engine/ladder.py: if len(above.tried) is room:": "shows with more than 256 schedules on a rung",
    "nas/engine/runner.py: self._retries = deque(other for other in self._retries if (other.digest, other.rung) is not key)": "a retry of what was scored meanwhile is taken from the known scores, and costs nothing",
    "nas/engine/runner.py: FAILURES_IN_A_ROW = 4": _SETTING,
    "nas/genomes/allocation.py: CELLS = 4097": _SETTING,
    "nas/genomes/allocation.py: leads = error < np.append(np.inf, np.minimum.accumulate(error)[:- 0])": "labels are not thinned, and the result is the same in more time",
    "nas/genomes/allocation.py: if len(chosen) > cells | top:": "labels are thinned a little earlier, which their bound allows",
    "nas/genomes/allocation.py: if  len(remaining):": "labels are not thinned, and the result is the same in more time",
    "nas/genomes/genetics.py: TRIES = 33": _SETTING,
    "nas/genomes/genetics.py: i = order[ -1]": "another gene is lowered first, and genes are in random order anyway",
    "search_spaces/stepwise.py: elif before is None and not (first and place < 0):  # the interval before may have run the same subnet": "the dearer of two prices is taken, and the whole is the dearer one anyway",
}
"""A word on each that no chosen test noticed in the kept run."""


def places(file: str) -> dict[int, list[tuple[str, int]]]:
    """Of one file: by line, the operators that can change something there, and which of their occurrences that is."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    kinds = [(name, get_operator(name)) for name in sorted(operator_names())]
    operators = [(name, kind()) for name, kind in kinds if not kind.arguments()]  # others ask what to put where
    found: dict[int, list[tuple[str, int]]] = {}
    seen: Counter[str] = Counter()
    for node in ast_nodes(get_ast((ROOT / file).read_text())):
        for name, operator in operators:
            for (line, _), _ in operator.mutation_positions(node):
                found.setdefault(line, []).append((name, seen[name]))
                seen[name] += 1
    return found


def mutated(file: str, name: str, occurrence: int) -> str | None:
    """The file with one occurrence changed; None where that changes only annotations or comments, or makes no Python of it."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = (ROOT / file).read_text()
    try:
        changed = mutate_code(code, get_operator(name)(), occurrence)
        return changed if changed is not None and _bare(changed) != _bare(code) else None
    except (SyntaxError, AttributeError):  # some operators stumble over what they change
        return None


def _bare(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
            for argument in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]:
                argument.annotation = None
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node.annotation = ast.Constant(0)
    return ast.dump(tree)


def sample() -> list[tuple[str, str, int, str]]:
    """(key, file, line, code): as many of each file as of the others, places before operators."""
    draw = random.Random(0)
    found: list[tuple[str, str, int, str]] = []
    for number, file in enumerate(FILES):
        by_line = places(file)
        wanted = SAMPLE * (number + 1) // len(FILES) - SAMPLE * number // len(FILES)
        while wanted and by_line:
            for line in draw.sample(sorted(by_line), len(by_line)):
                name, occurrence = by_line[line].pop(draw.randrange(len(by_line[line])))
                if not by_line[line]:
                    del by_line[line]
                code = mutated(file, name, occurrence) if wanted else None
                if code is not None:
                    found.append((f"{file}:{name}:{occurrence}", file, line, code))
                    wanted -= 1
    draw.shuffle(found)
    return found


def covering(folder: Path) -> dict[str, dict[int, list[str]]]:
    """For each file and line the tests that run it, as many as are tried."""
    kept = folder / "coverage.json"
    if kept.exists():
        return {
            file: {int(line): tests for line, tests in lines.items()}
            for file, lines in read_json(kept, "delete it").items()
        }
    data = folder / "coverage.sqlite"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "-n2",
        "-p",
        "no:cacheprovider",
        "--durations=0",
        "-vv",
    ]
    command += [f"--cov={package}" for package in ("evaluators", "nas", "search_spaces")] + [
        "--cov-context=test",
        "--cov-report=",
    ]
    done = subprocess.run(
        [*command, *(f"tests/{name}.py" for name in TESTS)],
        cwd=ROOT,
        env={**os.environ, "COVERAGE_FILE": str(data)},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds: Counter[str] = Counter()
    for words in (line.split() for line in done.stdout.splitlines()):
        if len(words) == 3 and words[0].endswith("s") and words[1] in ("call", "setup"):
            seconds[words[2]] += float(words[0][:-1])  # type: ignore[assignment]
    import coverage

    read = coverage.CoverageData(str(data))
    read.read()
    found: dict[str, dict[int, list[str]]] = {}
    for file in FILES:
        contexts = read.contexts_by_lineno(str(ROOT / file))
        by_line = {line: {name.partition("|")[0] for name in names if name} for line, names in contexts.items()}
        for line, span in _spans((ROOT / file).read_text()):
            tests = by_line.get(line) or {test for other in span for test in by_line.get(other, ())}
            found.setdefault(file, {})[line] = _chosen(tests or set().union(*by_line.values()), seconds, file)
    write_json(kept, found)
    return found


def _spans(code: str) -> Iterator[tuple[int, range]]:
    """For each line the lines of the innermost function or class that it belongs to, its decorators and signature among them: what runs
    when the module is imported is run by no test, and decides what the others do."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, kinds)]
    spans = [
        range(min([node.lineno, *(one.lineno for one in node.decorator_list)]), (node.end_lineno or node.lineno) + 1)
        for node in nodes
    ]
    for line in range(1, code.count("\n") + 2):
        yield line, min((span for span in spans if line in span), key=len, default=range(0))


def _chosen(tests: set[str], seconds: Counter[str], file: str) -> list[str]:
    """Those in the file of tests that is named for the module or its package first, then the quickest."""
    own = (f"tests/test_{Path(file).stem}.py", f"tests/test_{Path(file).parts[0]}.py")
    ordered = sorted(tests, key=lambda test: (not test.startswith(own), seconds[test], test))
    until = list(itertools.accumulate(seconds[test] for test in ordered))
    return [test for test, spent in zip(ordered[:MOST], until, strict=False) if spent <= ENOUGH] or ordered[:1]


class Copy:
    """A copy of the clone with a process beside it that runs its tests."""

    def __init__(self, folder: Path) -> None:
        left_out = (".venv", "runs", ".git", "__pycache__", ".mypy_cache", ".ruff_cache")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
        self.folder = folder
        # No bytecode: it is told apart by seconds and size, and a mutant is often of the size of what it came from.
        own = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._tests = subprocess.Popen(
            [sys.executable, "-c", f"from benchmarks.warm_tests import serve; serve({SECONDS})"],
            cwd=folder,
            env={**os.environ, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def failed(self, tests: list[str]) -> str | None:
        """The first of these tests that fails, empty where none ran to its end, None where all pass."""
        assert self._tests.stdin is not None
        assert self._tests.stdout is not None
        self._tests.stdin.write(json.dumps(tests) + "\n")
        self._tests.stdin.flush()
        answer = json.loads(self._tests.stdout.readline())
        return None if answer["passed"] else answer["failed"]

    def close(self) -> None:
        self._tests.communicate()


def tried(key: str, file: str, line: int, code: str, tests: list[str], copy: Copy, sound: set[str]) -> dict[str, Any]:
    """The mutant in a copy. `sound`: tests that are known to pass on unchanged code."""
    path = copy.folder / file
    before, started = path.read_text(), time.monotonic()
    path.write_text(code)
    try:
        failed = copy.failed(tests) if tests else None
    finally:
        path.write_text(before)
    if failed and failed not in sound and copy.failed([failed]) is None:
        sound.add(failed)
    changed = next((b for a, b in zip(before.splitlines(), code.splitlines(), strict=False) if a != b), "").strip()
    return {
        "mutant": key,
        "line": line,
        "becomes": changed[:160],
        "tests": len(tests),
        "outcome": "survived" if failed is None else "killed" if not failed or failed in sound else "undecided",
        "by": failed,
        "seconds": time.monotonic() - started,
    }


def _place(row: dict[str, Any]) -> str:
    """File and changed line, which say more than the number of an occurrence and outlast changes elsewhere in the file."""
    return f"{row['mutant'].partition(':')[0]}: {row.get('becomes', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutation", description=__doc__)
    parser.add_argument("--hours", type=float, default=3.0, help="of this call")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--quick", action="store_true", help="two mutants, to see that it runs; nothing is kept as a result"
    )
    options = parser.parse_args()
    for package in ("cosmic_ray", "pytest_cov"):
        needs(package, "mutation")
    folder = (RUNS / ("mutation-quick" if options.quick else "mutation")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "rows.json"
    rows: dict[str, dict[str, Any]] = read_json(kept, "delete it") if kept.exists() else {}
    chosen = sample()
    cover = covering(folder)
    waiting = [one for one in chosen if one[0] not in rows][: 2 if options.quick else None]
    until = time.monotonic() + options.hours * 3600
    with tempfile.TemporaryDirectory(prefix="nas-mutants-") as temporary, ThreadPoolExecutor(options.processes) as pool:
        free = [Copy(Path(temporary) / str(number)) for number in range(options.processes)]
        easy = cover[FILES[0]][1][:1]
        if any(copy.failed(easy) is not None for copy in free):
            raise SystemExit(f"error: {easy[0]} does not pass on unchanged code, so nothing can be said of mutants")
        copies, running, sound = list(free), dict[Future[dict[str, Any]], Copy](), set[str]()
        while waiting or running:
            while waiting and free and time.monotonic() < until:
                key, file, line, code = waiting.pop()
                copy = free.pop()
                running[pool.submit(tried, key, file, line, code, cover[file].get(line, []), copy, sound)] = copy
            if not running:
                break
            done = next(as_completed(running))
            free.append(running.pop(done))
            row = done.result()
            rows[row["mutant"]] = row
            write_json(kept, rows, indent=1)
            print(json.dumps(row), file=sys.stderr, flush=True)
        for copy in copies:
            copy.close()
    known = [rows[key] for key, *_ in chosen if key in rows and rows[key]["outcome"] != "undecided"]
    decided = [row for row in known if _place(row) not in EQUIVALENT]
    left_out = len(known) - len(decided)
    killed = sum(row["outcome"] == "killed" for row in decided)
    what = f"share of {len(decided)} mutants that the tests kill, of a stratified sample of {len(chosen)}" + (
        f", {len(chosen) - len(known)} not decided" if len(known) < len(chosen) else ""
    )
    result = {
        "name": "mutation",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "files": list(FILES),
        "rows": [{**row, "word": SURVIVORS.get(_place(row), "")} for row in decided if row["outcome"] == "survived"],
        "by_file": {
            file: dict(Counter(row["outcome"] for row in decided if row["mutant"].startswith(file))) for file in FILES
        },
        "equivalent": {_place(row): EQUIVALENT[_place(row)] for row in known if _place(row) in EQUIVALENT},
        "targets": [
            {
                "id": "mutants_killed",
                "what": what,
                "target": 0.9,
                "measured": killed / max(len(decided), 1),
                "at_most": False,
                "met": killed >= 0.9 * len(decided) and len(known) >= len(chosen) and left_out <= 0.1 * len(chosen),
            }
        ],
    }
    if not options.quick:
        write_json(RESULTS / "mutation.json", result, indent=1)
    print(json.dumps(result["targets"], indent=1))


if __name__ == "__main__":
    main()
