"""Can a larger space be made to pay? A width and a depth for each level against one width for the network, each with mends of training and search.

Arms, seeds, choice and test stand in `protocols/spaces-mended.json`, written down before any row; network, searcher and fine-tune are those of
`benchmarks.spaces`. Some seven hours of one core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import spaces
from benchmarks.common import Benchmark, Target, borrow
from benchmarks.digits import images
from benchmarks.handover import compared
from benchmarks.protocol import committed
from evaluators.frechet import Frechet
from nas.contracts import derive_seed
from nas.engine.session import open_session
from nas.results.trials import best_within
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, Order, Sandwich, Stage, Stages, ZeroInit
from studies.digits import steps

PROTOCOL = committed("spaces-mended")
BUDGET, TRIALS = PROTOCOL.settings["budget"], PROTOCOL.settings["trials"]
ALONE, LARGER = "width alone", "larger"
CHOSEN_ON, JUDGED_ON = "chosen on", "judged on"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting(spaces.Setting):
    """`mend`: what an arm's name says after its space."""

    mend: str = ""

    def mended(self, *names: str) -> bool:
        return self.mend in (*names, "together")

    @property
    def net(self) -> Elastic:
        net = super().net
        size = len(steps) // spaces.INTERVALS
        takes_over = tuple(sorted(steps[size * place] + 1 for place in range(1, spaces.INTERVALS)))
        return replace(net, experts=takes_over) if self.mend == "order per interval" else net

    @property
    def training(self) -> Stages:
        first, second = super().training.stages
        assert isinstance(first, Sandwich)
        assert isinstance(second, Sandwich)
        budget = replace(self, mend="", variant=spaces.VARIANTS[0])
        left = sum(stage.macs(budget.net) for stage in (first, second))
        whole = replace(first, steps=2 * first.steps) if self.mended("teacher") else first
        elastic = replace(
            second,
            between=4 if self.mend == "several" else 1,
            full_weight=3.0 if self.mended("full weight 3") else 1.0,
            distillation=0.5 if self.mended("teacher") else 0.0,
            drawn="by macs" if self.mended("by macs") else "evenly",
        )
        begun: list[Stage] = [*([ZeroInit()] if self.mended("zero units") else []), whole]
        left -= whole.macs(self.net)
        if self.mend == "order per interval":
            own = replace(elastic, learning_rate=3e-4, warmup=10, ema=0.99)
            order = Order(stride=200 if self.quick else 20, batch=64)
            # The visit is of all timesteps, whatever copy it is for.
            each = self._as_many(own, (left / 4 - order.macs(self.net)) / spaces.INTERVALS)
            return Stages((*begun, self._as_many(elastic, 0.75 * left), Experts(each, order)))
        if self.mended("gradual"):
            wide = self._as_many(replace(elastic, held=("depth",)), left / 2)
            return Stages((*begun, wide, self._as_many(elastic, left / 2)))
        return Stages((*begun, self._as_many(elastic, left)))

    def _as_many(self, stage: Sandwich, macs: float) -> Sandwich:
        """For so many multiply-adds."""
        return replace(stage, steps=max(1, round(macs / replace(stage, steps=1).macs(self.net))))

    @property
    def study(self) -> Study:
        many = self.mended("16 options")
        searcher: Any = Knapsack(around="full" if many else "both", options=16 if many else 4)
        if self.mend == "screened evolution":
            searcher = Evolution(screened=16)
        return replace(
            super().study,
            name="spaces-mended",
            searchers={"search": searcher},
            limits={"macs_share": BUDGET},
            trials=60 if self.quick else TRIALS,
        )


def search(setting: Setting) -> Row:
    """The best verified schedule within the budget."""
    with open_session(setting.study, setting.folder) as session:
        conductor = session.conductor("search")
        session.run(conductor)
        trials = conductor.ledger.trials
    best = best_within(trials, "macs_share", BUDGET, "fd")
    return {"evaluations": len(trials), "genome": best.genome, "macs_share": best.cost["macs_share"]}


def judge(setting: Setting, genome: Sequence[int], tuned: bool) -> Row:
    """FD of a schedule on both noises; of the full network's where there is no genome."""
    torch.set_num_threads(1)
    loaded = setting.net.load(setting.folder / "supernet", "cpu")
    space = setting.study.space
    schedule = space.decode(tuple(genome) or tuple(len(choice.options) - 1 for choice in space.choices))
    if tuned:
        for _ in setting.tune.fit(loaded, schedule, images.load(), seed=0):
            pass
    evaluate = Frechet(images, rungs=(setting.samples,)).load(loaded, setting.folder)
    scores = {
        noise: evaluate(schedule, setting.samples, derive_seed(setting.seed, noise)) for noise in (CHOSEN_ON, JUDGED_ON)
    }
    return {
        noise: {"fd": [score.values["fd"]], "replicates": [score.replicates["fd"]]} for noise, score in scores.items()
    }


def arm(name: str, seed: int, folder: Path, quick: bool) -> Setting:
    space, _, mend = name.partition(", ")
    variant = spaces.VARIANTS[0] if space == ALONE else "+ depth"
    own = folder / name.replace(",", "").replace(" ", "-") / f"seed-{seed}"
    return Setting(variant, seed, own, (), quick, mend)


def interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Of a comparison's difference, 95 %."""
    half = row["upper_bound_share"] * row["against_fd"] - row["difference"]
    return row["difference"] - half, row["difference"] + half


def main() -> None:
    bench = Benchmark("spaces_mended", __doc__ or "", ("benchmarks/spaces.py", "search_spaces/training"), PROTOCOL)
    seeds = PROTOCOL.seeds[: 2 if bench.quick else None]
    arms = {(name, seed): arm(name, seed, bench.folder, bench.quick) for name in PROTOCOL.arms for seed in seeds}
    shared = (f"{LARGER}, 16 options", f"{LARGER}, screened evolution")
    bench.rows({f"training: {n}, seed {s}": (spaces.train, a) for (n, s), a in arms.items() if n not in shared})
    for name, seed in arms:
        if name in shared:
            borrow(arms[LARGER, seed].folder, arms[name, seed].folder)
    found = bench.rows({f"search: {n}, seed {s}": (search, a) for (n, s), a in arms.items()})
    jobs: dict[str, tuple[Any, ...]] = {}
    for (name, seed), setting in arms.items():
        genome = found[f"search: {name}, seed {seed}"]["genome"]
        jobs |= {f"{name}, seed {seed}, fine-tuned": (judge, setting, genome, True)}
        jobs |= {f"{name}, seed {seed}, frozen": (judge, setting, genome, False)}
        if name not in shared:
            jobs |= {f"{name}, seed {seed}, the full network, frozen": (judge, setting, (), False)}
    rows = bench.rows(jobs)

    def of(name: str, state: str, noise: str = JUDGED_ON) -> list[Row]:
        return [rows[f"{name}, seed {seed}, {state}"][noise] for seed in seeds]

    for name in PROTOCOL.arms:
        plain = LARGER if name.startswith(LARGER) else ALONE
        weights = plain if name in shared else name
        told = {state: compared(of(name, state), of(plain, state)) for state in ("frozen", "fine-tuned")}
        bench.reckon(
            name,
            {
                "macs_share": float(np.mean([found[f"search: {name}, seed {seed}"]["macs_share"] for seed in seeds])),
                "full_fd": float(np.mean([row["fd"] for row in of(weights, "the full network, frozen")])),
                **{
                    state: {"fd": row["fd"], "less_plain": row["difference"], "interval": interval(row)}
                    for state, row in told.items()
                },
            },
        )

    def best(space: str) -> str:
        names = [name for name in PROTOCOL.arms if name.startswith(space)]
        return min(names, key=lambda name: np.mean([row["fd"] for row in of(name, "fine-tuned", CHOSEN_ON)]))

    larger, alone = best(LARGER), best(ALONE)
    last = compared(of(larger, "fine-tuned"), of(alone, "fine-tuned"))
    bench.reckon("the best of each", {"larger": larger, "alone": alone, **last, "interval": interval(last)})
    bench.finish(
        [
            Target(
                "larger_space_gain",
                f"FD of the best of width alone ({alone}) less that of the best larger space ({larger}), both fine-tuned, within 40 % of the MACs, digits, four training seeds",
                None,
                -last["difference"],
                at_most=False,
            )
        ]
    )


if __name__ == "__main__":
    main()
