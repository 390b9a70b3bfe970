"""Faster schedules for frozen models: what searched reuse loses beside published rules, beside what others learn, and beside fewer steps, at equal measured time.

Question, arms, seeds, reference and test stand in `protocols/tune-2.json`, written down before any row. Models are what `benchmarks.latent`,
`benchmarks.transformer` and `benchmarks.text` have trained on Fashion-MNIST, frozen; those whose run folder is not there are left out, and the targets are of
the others. An hour or two of one core for a small model's 20 steps, six times that for 50. `nas tune` itself is timed on the transformer's pipeline folder.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import norm

from benchmarks.common import RESULTS, Benchmark, Target, device, processor
from benchmarks.protocol import committed
from benchmarks.tune_arms import (
    NETWORKS,
    SEARCHED,
    Cell,
    Row,
    folder_of,
    learned_routes,
    lend,
    restored,
    routed,
    ruled,
    searched,
    there,
    timed,
    trained,
)
from evaluators.images import read_into
from evaluators.sampling import DDIM
from nas.evidence.protocol import Protocol
from nas.genomes.paths import Steps, paths, together
from nas.handover.export import export

PROTOCOL = committed("tune-2")
NAMES = {"latent": "class-conditional UNet", "transformer": "transformer", "text": "text UNet"}
BEST_RULE = "best rule"
ANOTHER = "DPM-Solver++ steps"
LINES = {
    "path": ("nas tune (path)", "#1f6f8b", "o-"),
    "steps": ("searched whole steps", "#4a4a4a", "s-"),
    BEST_RULE: ("best published rule", "#c8553d", "^--"),
    "evolution": ("evolution", "#5b8c5a", "D:"),
    "knapsack": ("knapsack", "#8d6a9f", "v:"),
    "gates": ("DiP-GO's gates", "#d19c1d", "x:"),
    "router": ("Learning-to-Cache's router", "#d19c1d", "P"),
    ANOTHER: ("fewer steps of DPM-Solver++", "#8c8c8c", "*"),
}
"""Of a picture, by what a verdict calls it: words, colour and line. What is none of these is a rule."""


def compared(rows: list[tuple[Row, Row]]) -> tuple[float, float]:
    """Mean difference of losses over seeds, and its error: each seed's paired by its samples."""
    differences, errors = [], []
    for mine, theirs in rows:
        pairs = np.array(mine["replicates"]) - np.array(theirs["replicates"])
        count = len(pairs)
        errors.append(math.sqrt((count - 1) / count * float(((pairs - pairs.mean()) ** 2).sum())))
        differences.append(mine["loss"] - theirs["loss"])
    return float(np.mean(differences)), math.sqrt(sum(e**2 for e in errors)) / len(errors)


def exact() -> Row:
    """Seconds for the best paths of nine blocks over 50 steps, together, for 40 budgets; errors that grow with the way back, costs of nine digits."""
    rng = np.random.default_rng(0)
    count, blocks = 50, 9
    way = np.maximum(0, np.arange(count)[None, :] - np.arange(count)[:, None]).astype(float)
    problems = [
        Steps(
            rng.integers(10**8, 10**9, (count, 1)),
            np.zeros((count, 1)),
            rng.integers(10**6, 10**7, (count, 1)),
            (way ** rng.uniform(1, 2) * rng.random((1, count)))[..., None],
        )
        for _ in range(blocks)
    ]
    started = time.perf_counter()
    fronts = [paths(one) for one in problems]
    most = sum(front[-1].cost for front in fronts)
    found = together(fronts, [most * (place + 1) / 40 for place in range(40)])
    return {"seconds": time.perf_counter() - started, "solved": sum(one is not None for one in found)}


def newcomer(folder: Path, quick: bool) -> Row:
    """Minutes of `nas tune` from the transformer's pipeline folder to the schedule's file, as typed."""
    lend(folder, "transformer", quick)
    setting, run = trained(folder, "transformer", quick)
    pipeline = folder / "dit"
    if not pipeline.exists():
        net = setting.net.load(run / "supernet", "cpu")
        # Of ten classes: the stock pipeline of transformers knows a thousand.
        export(net, setting.everywhere(PROTOCOL.settings["guidance"]["transformer"]), DDIM().describe(), {}, pipeline)
    typed = ["tune", "dit", "--within", "time=0.5", *(["--trials", "10", "--samples", "4,8"] if quick else [])]
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "nas.cli", *typed], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    minutes = (time.perf_counter() - started) / 60
    return {"minutes": minutes, "command": f"nas {' '.join(typed)}"}


def mean(rows: list[Row], what: str = "loss") -> float:
    """Over seeds."""
    return float(np.mean([row[what] for row in rows]))


def verdict(cells: list[Cell], budget: float, bench: Benchmark) -> Row:
    """Of one (model, steps, budget), over its seeds. Another sampler's fewer steps stand among the losses and decide nothing."""
    place = f"{budget:g}"

    def of(arm: str) -> list[Row]:
        return [bench.kept(f"{cell.key}: {arm}")["of"][place] for cell in cells]

    mine, steps, every = of("path"), of("steps"), of("rules")
    references = {name: [one[name] for one in every] for name in every[0] if all(name in one for one in every)}
    left_out = sorted({name for one in every for name in one} - set(references))
    references["gates"] = of("gates")
    if bench.has(f"{cells[0].key}: router"):
        routes = [bench.kept(f"{cell.key}: router")["of"].get(place) for cell in cells]
        references |= {"router": routes} if all(routes) else {}
    best = min(references, key=lambda name: mean(references[name]))
    worse = []
    rivals = {**references, **({"steps": steps} if cells[0].settings.get("steps_among_rivals") else {})}
    for rows in rivals.values():
        difference, error = compared(list(zip(mine, rows, strict=True)))
        worse.append(float(norm.sf(difference / error)) if error > 0 else (0.0 if difference > 0 else 1.0))
    error = math.sqrt(sum(row["loss_error"] ** 2 for row in references[best])) / len(cells)
    kept = [bench.kept(f"{cell.key}: rules") for cell in cells]
    full = [row["full"] for row in kept]
    losses = {arm: mean(of(arm)) for arm in SEARCHED} | {name: mean(rows) for name, rows in references.items()}
    if "another_sampler" in kept[0]:
        losses[ANOTHER] = mean([row["another_sampler"][place] for row in kept])
    return {
        "losses": losses,
        "fd": {
            "full": mean(full, "fd"),
            **{arm: mean(of(arm), "fd") for arm in SEARCHED},
            best: mean(references[best], "fd"),
        },
        "agreement": {
            "full": mean(full, "agreement"),
            "path": mean(mine, "agreement"),
            best: mean(references[best], "agreement"),
        },
        "best_reference": best,
        "rules_that_fit_in_some_seeds_alone": left_out,
        "ratio": mean(mine) / mean(references[best]),
        **({} if "steps" in rivals else {"over_steps": mean(mine) / mean(steps)}),
        "difference_to_reference": compared(list(zip(mine, references[best], strict=True))),
        "difference_to_steps": compared(list(zip(mine, steps, strict=True))),
        "differences_of_seeds": [a["loss"] - b["loss"] for a, b in zip(mine, references[best], strict=True)],
        "tie": mean(references[best]) <= 2 * error,
        # Holm's first step: if the smallest is none, no other is.
        "won": min(worse) > cells[0].settings["level"] / len(worse),
    }


def draw(cells: Mapping[str, Mapping[float, Row]], path: Path) -> None:
    """Loss over the share of the time, a panel for each model: the path, and what it is compared with. `cells`: of a model's name its verdicts by budget."""
    figure = Figure(figsize=(4.2 * len(cells) + 1.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(cells), squeeze=False)[0]
    for axes, (model, verdicts) in zip(panels, cells.items(), strict=True):
        budgets = sorted(verdicts)
        told = {budget: dict(verdicts[budget]["losses"]) for budget in budgets}
        for losses in told.values():
            rules = [name for name in losses if name not in LINES]
            losses[BEST_RULE] = min(losses.pop(name) for name in rules)
        for name, (words, colour, form) in LINES.items():
            points = [(budget, told[budget][name]) for budget in budgets if name in told[budget]]
            if points:
                thick = 2.4 if name == "path" else 1.2
                axes.plot(*zip(*points, strict=True), form, color=colour, linewidth=thick, markersize=5, label=words)
        axes.set_yscale("log")
        axes.set_xticks(budgets, [f"{budget:.0%}" for budget in budgets])
        axes.set_xlabel("time of an image, of the full pipeline's")
        axes.set_title(model, fontsize=10)
    panels[0].set_ylabel("distance to the full pipeline's\nsample of the same noise (log)", fontsize=9)
    handles = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path)


def measured(model: str, steps: int, bench: Benchmark, protocol: Protocol) -> list[Cell]:
    """All rows of one model with so many steps, one seed after another: what a stop leaves are whole seeds, which rest on no other's times."""
    seeds = protocol.seeds[:1] if bench.quick else protocol.seeds
    cells = [Cell(bench.folder, protocol.settings, bench.quick, model, steps, seed) for seed in seeds]
    if missing := [cell for cell in cells if not whole(cell, bench)]:
        lend(bench.folder, model, bench.quick)
        rest_on_one_network(cells[0], bench)
        setting, run = cells[0].trained
        for folder in (run, *([setting.judged] if model == "latent" else [])):
            for _ in read_into(cells[0].loss.images, folder):
                pass  # once, for all processes
        for cell in missing:
            _measured(cell, bench)
    return cells


def rest_on_one_network(cell: Cell, bench: Benchmark) -> None:
    """Raises SystemExit where rows of the cell's model are kept of another network or judge."""
    setting, run = cell.trained
    looks = setting.scores(2) if cell.model == "latent" else setting.evaluator(2)
    judge = looks.digest(setting.judged if cell.model == "latent" else run)
    bench.rest_on(cell.model, network=cell.study({}).supernet.digest(run / "supernet"), judge=judge)


def whole(cell: Cell, bench: Benchmark) -> bool:
    """Whether all of the cell's rows are there."""
    last = ("router",) if cell.model == "transformer" else ()
    return all(bench.has(f"{cell.key}: {name}") for name in ("times", "rules", *SEARCHED, *last))


def _measured(cell: Cell, bench: Benchmark) -> None:
    """The rows of a cell that are not there. One that was begun elsewhere is begun anew, since its times are those of a processor."""
    kept = bench.kept(f"{cell.key}: times") if bench.has(f"{cell.key}: times") else {}
    timed_here = (kept.get("on"), kept.get("processor", "")) == (device(), processor())
    if not (timed_here and cell.run.exists()):
        bench.forget(beginning=f"{cell.key}: ")
        shutil.rmtree(cell.run, ignore_errors=True)
    # On one thread, with nothing beside it that this benchmark starts.
    times = bench.row(f"{cell.key}: times", partial(timed, cell))
    restored(cell, times)
    folder_of(cell, "rules")  # which several processes look into
    jobs: dict[str, tuple[object, ...]] = {f"{cell.key}: rules": (ruled, cell, times)}
    jobs |= {f"{cell.key}: {arm}": (searched, cell, arm, times) for arm in SEARCHED}
    if cell.model == "transformer":
        jobs[f"{cell.key}: router's learning"] = (learned_routes, cell)
    bench.rows(jobs)
    if cell.model == "transformer":
        # With nothing beside it: it times calls.
        bench.row(f"{cell.key}: router", partial(routed, cell, times))


def there_are(bench: Benchmark, protocol: Protocol) -> list[str]:
    """Models of the protocol that are trained; a quick run trains a small one where there is none. Raises SystemExit where none is."""
    wanted = protocol.settings["models"]
    models = [model for model in wanted if there(bench.folder, model, bench.quick)]
    if not models and bench.quick:
        return ["transformer"]
    if not models:
        raise SystemExit(
            "error: no model is there; run one of " + ", ".join(f"`python -m benchmarks.{model}`" for model in wanted)
        )
    return models


def verdicts_of(
    bench: Benchmark, protocol: Protocol, models: Sequence[str], steps: Sequence[int], picture: str
) -> Verdicts:
    """Rows and verdicts of the models, in so many steps each, and their picture."""
    rows: list[Row] = []
    spent: list[float] = []
    done: list[str] = []
    pictured: dict[str, dict[float, Row]] = {}
    for count in steps:
        for model in models:
            if f"{model}-{count}" in bench.without:
                continue
            cells = measured(model, count, bench, protocol)
            done.append(f"{model} {count} steps")
            for budget in cells[0].budgets:
                key = f"{model}, {count} steps, {budget:g} of the time"
                rows.append(bench.reckon(key, verdict(cells, budget, bench)))
                pictured.setdefault(f"{NAMES[model]}, {count} steps", {})[budget] = rows[-1]
            for cell in cells:
                spent += [one["spent_samples"] for one in bench.kept(f"{cell.key}: path")["of"].values()]
    if pictured:
        draw(pictured, (bench.folder if bench.quick else RESULTS) / picture)
    return Verdicts(tuple(rows), tuple(spent), tuple(done))


@dataclass(frozen=True)
class Verdicts:
    """`of`: models and their numbers of steps. `spent`: samples of the full pipeline that each of the path's searches took."""

    rows: tuple[Row, ...]
    spent: tuple[float, ...]
    of: tuple[str, ...]

    def targets(self, prefix: str) -> list[Target]:
        """`prefix`: of their names."""
        clear = [row for row in self.rows if not row["tie"]]
        what = f"{', '.join(self.of)}; {len(self.rows)} cells, {len(self.rows) - len(clear)} of them ties"
        over_steps = Target(
            f"{prefix}_over_steps",
            "loss of searched reuse over that of searched fewer steps, median",
            None,
            float(np.median([row["over_steps"] for row in clear])) if clear and "over_steps" in clear[0] else None,
        )
        return [
            Target(
                f"{prefix}_loss_ratio",
                f"loss of searched reuse over that of the best published rule, gates or router at equal measured time, median ({what})",
                0.5,
                float(np.median([row["ratio"] for row in clear])) if clear else None,
            ),
            # Where searched steps are among the rivals, no ratio is taken of them.
            *([] if any("over_steps" not in row for row in self.rows) else [over_steps]),
            Target(
                f"{prefix}_cells_won",
                "share of cells in which none of them is better, one-sided, Holm-corrected",
                0.9,
                sum(row["won"] for row in self.rows) / len(self.rows) if self.rows else None,
                at_most=False,
            ),
            Target(
                f"{prefix}_cost_samples",
                "samples of the full pipeline that the dearest search took",
                20_000,
                max(self.spent, default=None),
            ),
        ]


def main() -> None:
    files = ("benchmarks/tune_arms.py", "nas/searchers/path.py", "nas/tuning/tune.py")
    bench = Benchmark("tune", __doc__ or "", files, PROTOCOL, NETWORKS)
    models = there_are(bench, PROTOCOL)
    solved = bench.row("exact", exact)
    timing: Row = {"minutes": None}
    if "transformer" in models and "nas tune" not in bench.without:
        timing = bench.row("nas tune", partial(newcomer, bench.folder, bench.quick))
    steps = PROTOCOL.settings["steps"]
    bench.finish(
        [
            *verdicts_of(bench, PROTOCOL, models, steps[:1] if bench.quick else steps, "tune.png").targets("tune"),
            Target("path_seconds", "seconds for nine blocks of 50 steps, 40 budgets at once", 1, solved["seconds"]),
            Target(
                "tune_minutes",
                "minutes of `nas tune` from a transformer's folder to the file; None where there is none",
                15,
                timing["minutes"],
            ),
        ]
    )


if __name__ == "__main__":
    main()
