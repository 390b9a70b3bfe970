"""Which cheap score ranks schedules as the expensive one does? `nas audit` on digits, five intervals, every proxy.

The reference is FD at 4,096 samples, on two seeds; a proxy counts as cheap at an eighth of its MACs. Then a pair of schedules that
256 unpaired samples often order wrongly, and what the ladder makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Benchmark, Target, borrow
from benchmarks.digits import digits, digits_run, images
from evaluators.frechet import Frechet, KernelDistance
from evaluators.proxies import Additive, DenoisingLoss, TeacherDistance, TeacherFrechet, TrajectoryDistance
from nas.contracts import Evaluator, Genome, Score, Trial, derive_seed
from nas.engine.cluster import Workers
from nas.engine.ladder import clearly_beaten
from nas.engine.session import open_session
from nas.results.audit import REFERENCES, TABLE, measure, read_table, schedules_to_audit, summary
from nas.results.plots import draw_audit
from nas.study import Study
from search_spaces.intervals import equal
from search_spaces.stepwise import Stepwise
from studies.digits import net, steps

CHEAP = 1 / 8
DRAWS = 40
FEW = 256

INTERVALS = equal(steps, 5)


def proxies(largest: int) -> dict[str, Evaluator]:
    """Every kind of score, from `largest` samples down."""
    counts = [largest // 2**k for k in range(4)]
    found: dict[str, Evaluator] = {}
    for count in counts:
        found[f"fd@{count}"] = Frechet(images, rungs=(count,))
    for count in counts[:2]:
        found[f"kid@{count}"] = KernelDistance(images, rungs=(count,))
    for count in counts:
        found[f"fd to teacher@{count}"] = TeacherFrechet(images, rungs=(count,))
    for count in counts[1::2]:
        found[f"distance to teacher@{count}"] = TeacherDistance(images, rungs=(count,))
        found[f"distance along trajectory@{count}"] = TrajectoryDistance(images, rungs=(count,))
    found[f"denoising loss@{largest}"] = DenoisingLoss(images, rungs=(largest,))
    for around in ("full", "both"):
        found[f"additive fd@{largest}, {around}"] = Additive(Frechet(images, rungs=(largest,)), INTERVALS, around)
    found[f"additive fd to teacher@{counts[1]}"] = Additive(
        TeacherFrechet(images, rungs=(counts[1],)), INTERVALS, "both"
    )
    return found


def audited(study: Study, folder: Path, count: int, processes: int) -> dict[str, Any]:
    with open_session(study, folder) as session:
        for _ in session.prepare():
            pass
        for _ in session.on_one_thread(measure(study, folder, count, "cpu", Workers(processes))):
            pass
    rows = read_table(folder / "audit" / TABLE, set(schedules_to_audit(study.space, count, study.seed)))
    facts = summary(rows)
    draw_audit(rows, facts, folder / "audit" / "audit.png")
    return facts


def close_pair(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Better and worse: of equal MACs, told apart by more than 4 standard errors on both reference seeds, and as close as such
    pairs get."""
    found = []
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if a["cost"]["macs"] == b["cost"]["macs"]:
                differences = [_score(b, name).difference(_score(a, name), "fd") for name in REFERENCES]
                if all(difference > 4 * error for difference, error in differences):
                    found.append((sum(difference for difference, _ in differences), i, j))
    _, i, j = min(found)
    return rows[i], rows[j]


def _score(row: Mapping[str, Any], name: str) -> Score:
    return Score.from_json(row["scores"][name])


def flips(
    study: Study, folder: Path, better: Mapping[str, Any], worse: Mapping[str, Any], draws: int
) -> dict[str, Any]:
    """How often fresh noise for each orders the pair wrongly, and how often the ladder's paired test would drop the better one."""
    evaluate = replace(digits, evaluator=Frechet(images, rungs=(FEW,))).load(folder, "cpu")
    wrong = paired_wrong = dropped = undecided = 0
    for draw in range(draws):
        scores = {}
        for name, row in (("better", better), ("worse", worse)):
            schedule = study.space.decode(tuple(row["genome"]))
            scores[name] = evaluate(schedule, FEW, derive_seed(draw, "shared", "flips"))
            scores[f"{name} alone"] = evaluate(schedule, FEW, derive_seed(draw, name, "flips"))
        wrong += scores["better alone"].values["fd"] > scores["worse alone"].values["fd"]
        paired_wrong += scores["better"].values["fd"] > scores["worse"].values["fd"]
        trials = [
            _trial(i, tuple(row["genome"]), scores[name], row)
            for i, (name, row) in enumerate((("better", better), ("worse", worse)))
        ]
        beaten = clearly_beaten(trials, ("fd", "macs"))
        dropped += bool(beaten[0])
        undecided += not beaten.any()
    final = [_trial(i, tuple(row["genome"]), _score(row, "reference"), row) for i, row in enumerate((better, worse))]
    return {
        "better": better["genome"],
        "worse": worse["genome"],
        "macs_share": [row["cost"]["macs_share"] for row in (better, worse)],
        "fd_at_reference": [_score(row, "reference").values["fd"] for row in (better, worse)],
        "draws": draws,
        "unpaired_orders_wrongly": wrong,
        "paired_orders_wrongly": paired_wrong,
        "ladder_drops_the_better": dropped,
        "ladder_keeps_both": undecided,
        "ladder_drops_the_worse_at_reference": bool(clearly_beaten(final, ("fd", "macs"))[1]),
    }


def _trial(number: int, genome: Genome, score: Score, row: Mapping[str, Any]) -> Trial:
    return Trial(number, genome, row["digest"], FEW, "pruned", score, row["cost"], {})


def main() -> None:
    bench = Benchmark("audit", __doc__ or "", ("evaluators", "nas/results/audit.py"))
    torch.set_num_threads(1)
    base, trained = digits_run(bench.quick)
    reference, count = (128, 24) if bench.quick else (4096, 200)
    study = replace(
        base,
        name="audit",
        space=Stepwise(net, steps, INTERVALS),
        evaluator=Frechet(images, rungs=(reference // 8, reference)),
        proxies=proxies(reference // 8),
    )
    folder = borrow(trained, bench.folder / "run")
    facts = bench.row("audit", lambda: audited(study, folder, count, bench.processes))
    pair = bench.row(
        "a pair that is hard to order",
        lambda: flips(study, folder, *close_pair(read_table(folder / "audit" / TABLE)), 4 if bench.quick else DRAWS),
    )
    if not bench.quick:
        (RESULTS / "audit.png").write_bytes((folder / "audit" / "audit.png").read_bytes())
    # Proxies that need the full model's samples draw them once, a few per cent on top of an eighth.
    cheap = [row for row in facts["proxies"] if row["macs_share"] <= 1.05 * CHEAP]
    best = cheap[0]
    bench.say(json.dumps(best))
    bench.finish(
        [
            Target(
                "best_proxy_tau_in_band",
                f"Kendall's tau with {facts['reference'].split(' (')[0]} inside bands of equal MACs, best proxy at an eighth of its MACs: {best['proxy']}",
                0.6,
                best["tau_in_band"],
                at_most=False,
            ),
            Target(
                "better_schedules_dropped",
                f"times that the ladder drops the better of a close pair, of {pair['draws']} draws at {FEW} samples",
                0.05 * pair["draws"],
                pair["ladder_drops_the_better"],
            ),
        ]
    )


if __name__ == "__main__":
    main()
