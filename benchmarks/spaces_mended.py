"""Can a larger space be made to pay? A width for each level, and a depth too, against one width for the network, with mends of training and search.

Arms, seeds, choice and test stand in `protocols/spaces-mended.json`, written down before any row; network and searcher are those of `benchmarks.spaces`.
Some fifteen hours of one core.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
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
from nas.contracts import Schedule, derive_seed
from nas.engine.session import open_session
from nas.evidence.confirm import equal_steps
from nas.results.trials import best_within
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import equal
from search_spaces.loaded import LoadedElastic
from search_spaces.shipped.train_diffusers import Settings
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Experts, FineTune, Order, Sandwich, Stage, Stages, ZeroInit
from studies.digits import steps

PROTOCOL = committed("spaces-mended")
SETTINGS = PROTOCOL.settings
SPACES = {"width alone": "width alone", "larger in width": "+ width per level", "larger": "+ depth"}
"""What an arm's name begins with, and the space that `benchmarks.spaces` has of it."""
ALONE, IN_WIDTH, LARGER = SPACES
SHARED = {
    f"{LARGER}, 16 options": LARGER,
    f"{LARGER}, screened evolution": LARGER,
    f"{ALONE}, screened evolution": ALONE,
}
"""Arms on the weights of their space's own."""
DEEP, MANY = ("+ depth",), ("+ depth", "+ width per level")
"""Spaces that have depths, and that have more than four options."""
FULL_NETWORK = "the full network, frozen"
Row = dict[str, Any]
Pair = tuple[str, int]
"""An arm and a training seed."""


@dataclass(frozen=True)
class Setting(spaces.Setting):
    """`mend`: what an arm's name says after its space."""

    mend: str = ""

    def mended(self, *names: str, together: Sequence[str] = tuple(SPACES.values())) -> bool:
        """`together`: the spaces that have this mend where they have several."""
        return self.mend in names or (self.mend == "together" and self.variant in together)

    @property
    def net(self) -> Elastic:
        net = super().net
        size = len(steps) // spaces.INTERVALS
        takes_over = tuple(sorted(steps[size * place] + 1 for place in range(1, spaces.INTERVALS)))
        return replace(net, experts=takes_over) if self.mend == "order per interval" else net

    def few(self, count: int) -> int:
        return max(1, count // 25) if self.quick else count

    def stage(self, count: int, rate: str) -> Sandwich:
        batch = 32 if self.quick else SETTINGS["batch"]
        return Sandwich(count, batch, learning_rate=SETTINGS["learning_rates"][rate], warmup=count // 20)

    @property
    def training(self) -> Stages:
        plain = replace(self, mend="", variant=spaces.VARIANTS[0]).net
        whole = replace(self.stage(self.few(SETTINGS["full_steps"]), "full"), full_only=True)
        elastic = self.stage(self.few(SETTINGS["elastic_steps"]), "elastic")
        left = whole.macs(plain) + elastic.macs(plain)
        teacher = SETTINGS["teacher"]
        if self.mend == "teacher":
            whole = replace(self.stage(self.few(teacher["full_steps"]), "full"), full_only=True)
        elastic = replace(
            elastic,
            between=SETTINGS["several"] if self.mend == "several" else 1,
            full_weight=SETTINGS["full_weight"] if self.mended("full weight 3") else 1.0,
            distillation=teacher["distillation"] if self.mend == "teacher" else 0.0,
            drawn="by macs" if self.mended("by macs") else "evenly",
        )
        begun: list[Stage] = [*([ZeroInit()] if self.mended("zero units", together=DEEP) else []), whole]
        left -= whole.macs(self.net)
        if self.mend == "order per interval":
            order = Order(**{**SETTINGS["order"], **({"stride": 200} if self.quick else {})})
            own = replace(elastic, ema=SETTINGS["experts_ema"])
            # The visits of all copies together are of all timesteps.
            each = self._as_many(own, (left - order.macs(self.net)) / spaces.INTERVALS)
            return Stages((*begun, Experts(each, order)))
        if self.mended("gradual", together=DEEP):
            wide = self._as_many(replace(elastic, held=("depth",)), left / 2)
            return Stages((*begun, wide, self._as_many(elastic, left / 2)))
        return Stages((*begun, self._as_many(elastic, left)))

    def _as_many(self, stage: Sandwich, macs: float) -> Sandwich:
        """For so many multiply-adds."""
        count = max(1, round(macs / replace(stage, steps=1).macs(self.net)))
        return replace(stage, steps=count, warmup=count // 20)

    @property
    def study(self) -> Study:
        many = self.mended("16 options", together=MANY)
        searcher: Any = Knapsack(around="full" if many else "both", options=16 if many else 4)
        if self.mend == "screened evolution":
            searcher = Evolution(screened=16)
        return Study(
            name="spaces-mended",
            space=Stepwise(self.net, steps, equal(steps, spaces.INTERVALS)),
            supernet=self.net,
            images=images,
            training=self.training,
            evaluator=Frechet(images, rungs=(32, 64) if self.quick else tuple(SETTINGS["samples"])),
            searchers={"search": searcher},
            limits={"macs_share": SETTINGS["budget"]},
            trials=140 if self.quick else SETTINGS["trials"],
            verified=4 if self.quick else SETTINGS["verified"],
            seed=self.seed,
        )

    def tune_of(self, net: LoadedElastic, schedule: Schedule) -> FineTune:
        """For as many multiply-adds as the full network's."""
        given = SETTINGS["fine_tune"]
        whole = Settings(steps=self.few(given["steps"]), distillation=given["distillation"])
        count, rate = equal_steps(net, schedule, whole), SETTINGS["learning_rates"]["fine-tune"]
        return FineTune(count, learning_rate=rate, warmup=count // 20, distillation=given["distillation"])

    @property
    def samples(self) -> int:
        return 64 if self.quick else int(SETTINGS["judged"])


def search(setting: Setting) -> Row:
    """The best verified schedule within the budget."""
    with open_session(setting.study, setting.folder) as session:
        conductor = session.conductor("search")
        session.run(conductor)
        trials = conductor.ledger.trials
    best = best_within(trials, "macs_share", SETTINGS["budget"], "fd")
    return {"evaluations": len(trials), "genome": best.genome, "macs_share": best.cost["macs_share"]}


def judge(setting: Setting, genome: Sequence[int], tuned: bool) -> Row:
    """FD of a schedule on a noise that nothing was chosen on; of the full network's where there is no genome."""
    torch.set_num_threads(1)
    loaded = setting.net.load(setting.folder / "supernet", "cpu")
    space = setting.study.space
    schedule = space.decode(tuple(genome) or tuple(len(choice.options) - 1 for choice in space.choices))
    if tuned:
        for _ in setting.tune_of(loaded, schedule).fit(loaded, schedule, images.load(), setting.seed):
            pass
    evaluate = Frechet(images, rungs=(setting.samples,)).load(loaded, setting.folder)
    score = evaluate(schedule, setting.samples, derive_seed(setting.seed, "spaces, mended"))
    return {"fd": [score.values["fd"]], "replicates": [score.replicates["fd"]]}


def arm(name: str, seed: int, folder: Path, quick: bool) -> Setting:
    space, _, mend = name.partition(", ")
    own = folder / name.replace(",", "").replace(" ", "-") / f"seed-{seed}"
    return Setting(SPACES[space], seed, own, (), quick, mend)


def judge_of(seed: int, folder: Path) -> Path:
    """The run folder with the judge of all arms of a training seed, which is trained where there is none."""
    own = folder / "judges" / f"seed-{seed}"
    torch.set_num_threads(1)
    for _ in Frechet(images).prepare(own, seed, "cpu"):
        pass
    return own


def measured(name: str, seed: int, folder: Path, quick: bool) -> Row:
    """Trains and searches what the arm has, and judges it; a row that needs no weights any more."""
    setting = arm(name, seed, folder, quick)
    judges, own = (judge_of(seed, folder) / "features").resolve(), setting.folder / "features"
    if own.resolve() != judges:
        setting.folder.mkdir(parents=True, exist_ok=True)
        if own.is_symlink():
            own.unlink()
        elif own.exists():
            shutil.rmtree(own)
        own.symlink_to(judges)
    trained = arm(SHARED[name], seed, folder, quick) if name in SHARED else setting
    told = spaces.train(trained) if trained is setting else spaces.trained_for(borrow(trained.folder, setting.folder))
    found = search(setting)
    states = {state: judge(setting, found["genome"], state == "fine-tuned") for state in ("fine-tuned", "frozen")}
    features = Frechet(images).features.digest(setting.folder)
    weights = setting.net.digest(setting.folder / "supernet")
    return {**told, **found, **states, FULL_NETWORK: judge(setting, (), False), "judge": features, "weights": weights}


def rows_of(bench: Benchmark, names: Iterable[str], seeds: Iterable[int]) -> dict[Pair, Row]:
    """Seed by seed, so that one is whole and judged by one classifier when it is done. What was begun with another judge, as another kind of processor
    trains it, is begun anew, and so are arms of the same weights where some are missing and the weights are gone."""
    found: dict[Pair, Row] = {}
    for seed in seeds:
        pairs = [(name, seed) for name in names]
        if not all(bench.has(key_of(pair)) for pair in pairs):
            digest = Frechet(images).features.digest(judge_of(seed, bench.folder))
            if any(bench.kept(key_of(pair))["judge"] != digest for pair in pairs if bench.has(key_of(pair))):
                bench.forget(f", seed {seed}")
        for plain in dict.fromkeys(SHARED.values()):
            alike = [key_of(pair) for pair in pairs if plain in (pair[0], SHARED.get(pair[0]))]
            weights = arm(plain, seed, bench.folder, bench.quick).folder / "supernet" / "weights.safetensors"
            if not (all(map(bench.has, alike)) or weights.exists()):
                for key in filter(bench.has, alike):
                    bench.forget(key, key)
        mine = of_seed(bench, pairs)
        assert len({row["judge"] for row in mine.values()}) == 1
        for name, plain in SHARED.items():
            assert (name, seed) not in mine or mine[name, seed]["weights"] == mine[plain, seed]["weights"]
        found |= mine
    return found


def key_of(pair: Pair) -> str:
    return f"{pair[0]}, seed {pair[1]}"


def of_seed(bench: Benchmark, pairs: Sequence[Pair]) -> dict[Pair, Row]:
    """First those whose weights others share."""
    found: dict[Pair, Row] = {}
    for first in (True, False):
        keys = {pair: key_of(pair) for pair in pairs if (pair[0] in SHARED.values()) == first}
        rows = bench.rows({key: (measured, *pair, bench.folder, bench.quick) for pair, key in keys.items()})
        found |= {pair: rows[key] for pair, key in keys.items()}
    return found


def interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """Of a comparison's difference, 95 %."""
    half = row["upper_bound_share"] * row["against_fd"] - row["difference"]
    return row["difference"] - half, row["difference"] + half


def main() -> None:
    files = ("benchmarks/spaces.py", "search_spaces/training")
    bench = Benchmark("spaces_mended", __doc__ or "", files, PROTOCOL, ("judges/*/features/*",))
    few = 2 if bench.quick else None
    seeds, others = PROTOCOL.seeds[:few], tuple(SETTINGS["judged_with"])[:few]
    rows = rows_of(bench, PROTOCOL.arms, seeds)

    def of(name: str, state: str, whose: Iterable[int]) -> list[Row]:
        return [rows[name, seed][state] for seed in whose]

    def mean(name: str, state: str) -> float:
        return float(np.mean([row["fd"] for row in of(name, state, seeds)]))

    for name in PROTOCOL.arms:
        plain = name.partition(", ")[0]
        told: Row = {
            "macs_share": float(np.mean([rows[name, seed]["macs_share"] for seed in seeds])),
            "full_fd": mean(name, FULL_NETWORK),
        }
        for state in ("frozen", "fine-tuned"):
            row = compared(of(name, state, seeds), of(plain, state, seeds))
            told[state] = {"fd": row["fd"], "less_plain": row["difference"], "interval": interval(row)}
        bench.reckon(name, told)

    def best(space: str) -> str:
        return min((one for one in PROTOCOL.arms if one.startswith(space)), key=lambda one: mean(one, "fine-tuned"))

    larger, alone = best(LARGER), best(ALONE)
    rows |= rows_of(bench, dict.fromkeys((*SPACES, alone, larger)), others)
    pairs = {
        f"{LARGER}, without a mend": (LARGER, ALONE),
        f"{IN_WIDTH}, without a mend": (IN_WIDTH, ALONE),
        "the chosen of each": (larger, alone),
    }
    for what, (mine, theirs) in pairs.items():
        row = compared(of(mine, "fine-tuned", others), of(theirs, "fine-tuned", others))
        told = bench.reckon(what, {"larger": mine, "alone": theirs, **row, "interval": interval(row)})
    bench.finish(
        [
            Target(
                "larger_space_gain",
                f"FD of the chosen of width alone ({alone}) less that of the chosen larger space ({larger}), both fine-tuned, within 40 % of the MACs, digits, four training seeds that chose nothing",
                None,
                -told["difference"],
                at_most=False,
            )
        ]
    )


if __name__ == "__main__":
    main()
