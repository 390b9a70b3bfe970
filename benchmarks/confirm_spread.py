"""How far do training seeds spread what two judges say of a found schedule and of the full network, on Fashion-MNIST's latents, and how many does a claim need?

The exploratory pilot of `benchmarks.confirm`, whose training and judging it has; it claims nothing. Its protocol is `protocols/confirm-spread.json`. Some
forty minutes of one core.
"""

from __future__ import annotations

import json
import math

import numpy as np

from benchmarks import confirm_pilot, recover
from benchmarks.common import Benchmark, Target
from benchmarks.confirm_arms import Claim, asked
from benchmarks.protocol import committed
from nas.evidence.confirm import FULL
from nas.evidence.judges import judges_of
from nas.evidence.verdict import seeds_needed
from nas.genomes.genetics import dearest

PROTOCOL = committed("confirm-spread")
ARM = "within 0.51"


def main() -> None:
    bench = Benchmark("confirm_spread", __doc__ or "", ("nas/evidence", "benchmarks/confirm_pilot.py"), PROTOCOL)
    setting = recover.Setting(bench.folder, bench.quick)
    recover.prepared(bench, setting)
    confirm_pilot.order(setting.confirmed)
    space = setting.study.space
    for judge in judges_of(setting.study)[0]:
        for _ in judge.prepare(setting.run, 0, "cpu"):
            pass
    genomes = {FULL: dearest(space), ARM: tuple(PROTOCOL.settings["genome"])}
    schedules = {name: json.loads(space.decode(genome).to_json()) for name, genome in genomes.items()}
    seeds = PROTOCOL.seeds[: 2 if bench.quick else None]
    verdict = asked(bench, Claim(setting, PROTOCOL, schedules), (ARM,), seeds)[ARM]
    needed = []
    for judged in verdict.judges:
        deviation = float(np.std(judged.differences, ddof=1))
        needed += [seeds_needed(deviation, judged.margin)] if judged.decides else []
        bench.reckon(
            f"spread under {judged.judge}",
            {
                **judged.to_json(),
                "deviation": deviation,
                "of_sampling": judged.error * math.sqrt(len(seeds)),
                "seeds_needed": seeds_needed(deviation, judged.margin),
            },
        )
    bench.finish(
        [
            Target(
                "confirm_seeds_needed",
                f"training seeds at which no loss beyond the margin is shown with 80 % power under both judges, the true difference being 0, from {len(seeds)} seeds",
                None,
                float(max(needed)),
            )
        ]
    )


if __name__ == "__main__":
    main()
