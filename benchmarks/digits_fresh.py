"""Does the digits claim hold on fresh training seeds, with one schedule named beforehand, and with as many tries for the full network?

Arms, seeds, reference, margin and test stand in `protocols/digits-fresh.json`, written down before any row. Networks, trainings, searches and judge are
those of `benchmarks.handover`. Some eleven hours of one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.common import Benchmark, Target
from benchmarks.handover import (
    FULL,
    NO_LOSS,
    Row,
    Setting,
    compared,
    fine_tune,
    full_net,
    judge,
    judge_each,
    prepare,
    search,
    train_found,
)
from benchmarks.protocol import committed
from nas.contracts import Schedule, derive_seed
from search_spaces.intervals import uniform
from search_spaces.shipped.train_diffusers import Settings

PROTOCOL = committed("digits-fresh")
assert PROTOCOL.margin == NO_LOSS, "what `compared` tells"
FILES = (
    "benchmarks/handover.py",
    "nas/handover/export.py",
    "search_spaces/shipped/train_diffusers.py",
    "search_spaces/training",
)
STEPS, FEWER, TRIES = (PROTOCOL.settings[name] for name in ("steps", "fewer_steps", "tries"))


@dataclass(frozen=True)
class Try(Setting):
    """Another fine-tune of the full network of the same training seed; number 0 is the one that a single schedule is compared with."""

    number: int = 0

    @property
    def tune(self) -> Settings:
        own = super().tune
        return replace(own, seed=derive_seed(self.seed, self.number, "another try") % 2**31) if self.number else own

    def exported(self, schedule: Schedule) -> Path:
        own = super().exported(schedule)
        return own.with_name(f"{FULL}-{self.number}") if self.number and own.name == FULL else own


def best_full(bench: Benchmark, setting: Setting, steps: int, tries: int) -> Setting:
    """Of so many fine-tunes of the full network the one of the least FD on the noise that the schedules' best is chosen on."""
    each = [Try(setting.folder, setting.seed, setting.quick, number) for number in range(tries)]
    full = full_net(uniform(steps))
    bench.rows({f"full net, try {t.number}, seed {t.seed}": (fine_tune, t, full) for t in each})
    noise = (derive_seed(setting.seed, "verification noise"),)
    keys = [f"full net, try {t.number} chosen on, seed {t.seed}" for t in each]
    rows = bench.rows({key: (judge, t, full, noise, True) for key, t in zip(keys, each, strict=True)})
    return each[int(np.argmin([rows[key]["fd"][0] for key in keys]))]


def verdict(bench: Benchmark, words: str, mine: Sequence[Row], theirs: Sequence[Row]) -> Row:
    share = float(np.mean([a["macs"] / b["macs"] for a, b in zip(mine, theirs, strict=True)]))
    return bench.reckon(words, {"macs_share": share, **compared(mine, theirs)})


def measured(bench: Benchmark, settings: Sequence[Setting]) -> dict[str, list[Row]]:
    """Trains and searches with these training seeds, and judges each arm: by arm, a row for each seed."""
    steps, fewer, tries = (4, 2, 2) if bench.quick else (STEPS, FEWER, TRIES)
    bench.rows({f"training, seed {s.seed}": (prepare, s) for s in settings})
    found = bench.rows({f"search over {steps} steps, seed {s.seed}": (search, s, uniform(steps)) for s in settings})
    named, winners, fulls = {}, {}, {}
    for s in settings:
        row = found[f"search over {steps} steps, seed {s.seed}"]
        space = s.study(uniform(steps)).space
        named[s] = space.decode(tuple(min(row["schedules"], key=lambda one: one["fd"])["genome"]))
        winners[s], _ = train_found(bench, s, steps, row)
        fulls[s] = best_full(bench, s, steps, tries)
    whole, less = full_net(uniform(steps)), full_net(uniform(fewer))
    return {
        "once": judge_each(bench, "full net, tuned once", dict.fromkeys(settings, whole), True),
        "few": judge_each(bench, f"full net, tuned once, {fewer} steps", dict.fromkeys(settings, less), True),
        "one": judge_each(bench, "named beforehand {}, tuned", named, True),
        "nine": judge_each(bench, "best of the tuned {}", winners, True),
        "best": judge_each(bench, "best of the full nets", dict.fromkeys(fulls.values(), whole), True),
    }


def main() -> None:
    bench = Benchmark("digits_fresh", __doc__ or "", FILES, PROTOCOL)
    seeds = PROTOCOL.seeds[: 2 if bench.quick else None]
    settings: list[Setting] = [Try(bench.folder / f"seed-{seed}", seed, bench.quick) for seed in seeds]
    for s in settings:
        # What is trained of a seed that was begun may be gone: where its rows alone were kept.
        begun = bench.has(f"training, seed {s.seed}") and not bench.has(f"best of the full nets, seed {s.seed}")
        if begun and not (s.folder / "supernet" / "weights.safetensors").exists():
            bench.forget(f", seed {s.seed}")
    # A few seeds to their end and then the next: what a stop leaves are whole seeds, which need no weights any more.
    for start in range(0, len(settings), bench.processes):
        measured(bench, settings[start : start + bench.processes])
    rows = measured(bench, settings)
    told = verdict(bench, "one schedule named beforehand against one full net", rows["one"], rows["once"])
    both = verdict(bench, "best of the schedules against best of the full nets", rows["nine"], rows["best"])
    verdict(bench, "fewer steps of the full net against all", rows["few"], rows["once"])
    told["saved"] = verdict(bench, "one schedule named beforehand against fewer steps", rows["one"], rows["few"])[
        "better"
    ]
    both["saved"] = verdict(bench, "best of the schedules against fewer steps", rows["nine"], rows["few"])["better"]
    bench.finish(
        [
            Target(
                "digits_saved_by_one",
                "share of the MACs that one schedule, named before it is trained, saves with no loss on eight fresh seeds, digits; None where that, or that fewer steps are worse, is not shown",
                None,
                1 - told["macs_share"] if told["no_loss"] and told["saved"] else None,
                at_most=False,
            ),
            Target(
                "digits_saved_by_best",
                "the same of the best of nine schedules against the best of nine full nets",
                None,
                1 - both["macs_share"] if both["no_loss"] and both["saved"] else None,
                at_most=False,
            ),
        ]
    )


if __name__ == "__main__":
    main()
