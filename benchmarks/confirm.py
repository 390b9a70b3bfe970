"""How much can be saved at no loss, on Fashion-MNIST's latents, once schedules and the full network are fine-tuned equally, under two judges of different kind?

Question, arms, seeds, reference, margin and test stand in `protocols/confirm.json`, written down before any row; the number of seeds follows from
`benchmarks.confirm_spread`. What `nas confirm --within macs_share=...,...` does, with random schedules of equal multiply-adds and the pilot's controls beside it.
Some twelve hours of one core.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import confirm_pilot, recover
from benchmarks.common import Benchmark, Target
from benchmarks.confirm_arms import Claim, asked
from benchmarks.protocol import committed
from nas.contracts import Schedule
from nas.evidence.confirm import FULL
from nas.evidence.judges import judges_of
from nas.evidence.verdict import Verdict

PROTOCOL = committed("confirm")
SETTINGS = PROTOCOL.settings
Row = dict[str, Any]


def named(bench: Benchmark, setting: recover.Setting) -> Row:
    """The schedules of all arms, as JSON, before anything is trained; and the shares of the multiply-adds of those that are asked about."""
    study, quick = setting.study, bench.quick
    few, many = (16, 32) if quick else (SETTINGS["screened"], SETTINGS["scored"])
    shares = {genome: study.space.cost(genome)["macs_share"] for genome in recover.genomes_of(study)}
    every = [genome for genome, share in shares.items() if share <= max(SETTINGS["budgets"])]
    rough = dict(zip(every, recover.scored(setting, every, 0, few)["fd"], strict=True))
    found: dict[str, float] = {}
    schedules: dict[str, Schedule] = {}
    for budget in SETTINGS["budgets"]:
        best = sorted((g for g in every if shares[g] <= budget), key=rough.__getitem__)[: SETTINGS["best"]]
        fine = recover.scored(setting, best, 0, many, "others")["fd"]
        genome, arm = best[int(np.argmin(fine))], f"within {budget:g}"
        schedules[arm], found[arm] = study.space.decode(genome), shares[genome]
    loose = replace(study, limits={"macs_share": 1.0})
    for arm, share in found.items():
        schedules[f"random, as {arm}"] = study.space.decode(confirm_pilot.random_of(loose, share, 0))
    schedules |= confirm_pilot.controls(setting.confirmed, min(found.values()))
    return {"shares": found, "schedules": {name: json.loads(one.to_json()) for name, one in schedules.items()}}


def main() -> None:
    bench = Benchmark("confirm", __doc__ or "", ("nas/evidence", "benchmarks/confirm_pilot.py"), PROTOCOL)
    setting = recover.Setting(bench.folder, bench.quick)
    recover.prepared(bench, setting)
    for judge in judges_of(setting.study)[0]:
        for _ in judge.prepare(setting.run, 0, "cpu"):
            pass
    confirm_pilot.order(setting.confirmed)
    told = bench.row("named", lambda: named(bench, setting))
    claim, sequence = Claim(setting, PROTOCOL, told["schedules"]), list(told["shares"])
    seeds = PROTOCOL.seeds[: 2 if bench.quick else None]
    least: Verdict | None = None
    reached = ""
    for arm in sequence:
        found = asked(bench, claim, (arm,), seeds)[arm]
        bench.reckon(f"verdict on {arm}", found.to_json())
        if not found.confirmed:
            break
        least, reached = found, arm
    few = seeds[: SETTINGS["controls_seeds"]]
    others = [arm for arm in told["schedules"] if arm not in (*sequence, FULL)]
    for name, verdict in asked(bench, claim, others, few).items():
        bench.reckon(f"verdict on {name}, {len(few)} seeds", verdict.to_json())
    bench.finish(
        [
            Target(
                "confirmed_saving",
                f"share of the network's multiply-adds saved at no loss beyond 5 % of its distance above that of real images, by the schedule {reached}, under both judges, "
                f"{len(seeds)} seeds; None where none is confirmed",
                0.6,
                least.saved if least else None,
                at_most=False,
            ),
            Target(
                "least_share_confirmed",
                "least share of the network's multiply-adds confirmed",
                None,
                1 - least.saved if least else None,
            ),
        ]
    )


if __name__ == "__main__":
    main()
