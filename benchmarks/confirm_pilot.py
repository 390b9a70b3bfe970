"""Is a found schedule as good as the full network once both are fine-tuned equally, on Fashion-MNIST's latents, under two judges of different kind?

Question, arms, seeds, reference, margin and test stand in `protocols/confirm-pilot.json`, written down before any row. It takes the network that
`benchmarks.latent` left in `runs/benchmarks/`, frozen for the search and fine-tuned for every arm; what `nas confirm` does, with controls beside it. Some
hours of one core; the pilot's figures say how many seeds a protocol that claims something needs.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks import latent
from benchmarks.common import RUNS, Benchmark, Target
from benchmarks.protocol import committed
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.images import HeldOutHalf, load_once
from nas.contracts import Schedule
from nas.engine.session import open_session
from nas.evidence.confirm import FULL, SCHEDULE, Confirmation, equal_steps
from nas.evidence.judges import judges_of
from nas.evidence.protocol import Protocol
from nas.evidence.verdict import seeds_needed
from nas.genomes.genetics import dearest, random_genome
from nas.library import StudyRun
from nas.searchers.evolution import Evolution
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import equal, per_step, quadratic, uniform
from search_spaces.loaded import LoadedElastic
from search_spaces.options import Options
from search_spaces.patterns import Every, Only
from search_spaces.shipped.train_diffusers import settings_of
from search_spaces.stepwise import Stepwise
from search_spaces.training.importance import Order

PROTOCOL = committed("confirm-pilot")
SETTINGS = PROTOCOL.settings
PRUNED, LONGER = "pruned", "full, longer"
SPECIALISTS = tuple(f"interval {number}" for number in range(SETTINGS["intervals"]))
ORDERED = "ordered.safetensors"
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """`folder`: the benchmark's. `guidance`: of every step, None for none."""

    folder: Path
    quick: bool
    guidance: float | None = SETTINGS["guidance"]

    @cached_property
    def trained(self) -> latent.Setting:
        return latent.Setting((RUNS / f"latent{'-quick' if self.quick else ''}").resolve(), self.quick)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def study(self, whole_steps: bool = False) -> Study:
        """`whole_steps`: which of the steps the full network runs at, instead of which width each interval has."""
        net, grid, few = self.trained.net, uniform(SETTINGS["steps"]), self.quick
        images = self.trained.study.images
        space: Any = Stepwise(net, grid, equal(grid, SETTINGS["intervals"]), guidance=(self.guidance,))
        if whole_steps:
            patterns = (Every(1), Only(()))
            space = Stepwise(net, grid, per_step(grid), Options((1.0,)), patterns=patterns, guidance=(self.guidance,))
        judge = SmallClassifier(steps=40 if few else 4000, cells=4, decay=True)
        rungs = (16, 32) if few else tuple(SETTINGS["samples"])
        return Study(
            name="confirm-steps" if whole_steps else "confirm",
            space=space,
            supernet=net,
            images=images,
            training=self.trained.study.training,
            evaluator=Frechet(
                HeldOutHalf(images, "first"),
                judge,
                rungs=rungs,
                conditions=self.trained.study.evaluator.parts[0].conditions,  # type: ignore[attr-defined]
            ),
            searchers={"evolution": Evolution(population=6 if few else 15), "knapsack": Knapsack()},
            limits={"macs_share": SETTINGS["budget"]},
            trials=8 if few else SETTINGS["trials"],
            verified=2 if few else SETTINGS["verified"],
        )

    def opened(self, whole_steps: bool = False) -> StudyRun:
        """The run, in a folder with the trained supernet."""
        name = "steps" if whole_steps else "run"
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("supernet", "features"):
            if (self.run / part).exists() and not (folder / part).exists():
                (folder / part).symlink_to(self.run / part)
        return StudyRun(self.study(whole_steps), folder)


@dataclass(frozen=True)
class Controlled(Confirmation):
    """A confirmation whose arms may start from other weights than the supernet's."""

    def net(self) -> LoadedElastic:
        net = super().net()
        assert isinstance(net, LoadedElastic)
        others = copy.deepcopy(net.full)
        others.load_state_dict(load_file(self.folder / ORDERED))
        net.experts[PRUNED] = others
        net.experts.update(dict.fromkeys(SPECIALISTS, net.full))
        return net


def order(setting: Setting) -> None:
    """Keeps the full network with its channels in Diff-Pruning's order of importance."""
    path = setting.run / ORDERED
    if not path.exists():
        study = setting.study()
        net = study.supernet.load(setting.run / "supernet", "cpu")
        assert isinstance(net, LoadedElastic)
        for _ in Order("gradient", stride=500 if setting.quick else 20, batch=64).fit(net, load_once(study.images), 0):
            pass
        save_file(net.full.state_dict(), path)


def named(setting: Setting) -> Row:
    """The schedules of all arms, before anything is trained."""
    torch.set_num_threads(1)
    order(setting)
    run = setting.opened()
    run.search("evolution", "knapsack")
    chosen = run.best(macs_share=SETTINGS["budget"])
    share = chosen.trial.cost["macs_share"]
    schedules = {SCHEDULE: run.schedule(chosen), **controls(setting, share)}
    return {
        "macs_share": share,
        "searcher": chosen.ledger,
        "trial": chosen.trial.number,
        "frozen_fd": chosen.score.values["fd"],
        "schedules": {name: json.loads(one.to_json()) for name, one in schedules.items()},
    }


def controls(setting: Setting, share: float) -> dict[str, Schedule]:
    """What a schedule of this share of the multiply-adds is compared with, the full network among them."""
    steps = setting.opened(whole_steps=True)
    steps.search("evolution")
    study = setting.study()
    space, count = study.space, max(1, math.floor(share * SETTINGS["steps"] + 1e-9))
    full = space.decode(dearest(space))
    static = full.steps[0].arch.replace(widths=tuple(SETTINGS["static_widths"]))
    narrow = replace(full, steps=tuple(replace(step, arch=static) for step in full.steps))
    specialists = [name for name in SPECIALISTS for _ in range(SETTINGS["steps"] // len(SPECIALISTS))]
    return {
        FULL: full,
        LONGER: full,
        "full, specialised": started_as(full, specialists),
        "narrower": narrow,
        PRUNED: started_as(narrow, [PRUNED] * SETTINGS["steps"]),
        "by hand": space.decode(by_hand(setting, SETTINGS["budget"])),
        "random": space.decode(random_of(study, share, 0)),
        "fewer steps, uniform": on(full, uniform(count)),
        "fewer steps, quadratic": on(full, quadratic(count)),
        "fewer steps, searched": steps.schedule(steps.best(macs_share=count / SETTINGS["steps"])),
    }


def random_of(study: Study, share: float, seed: int) -> tuple[int, ...]:
    """Of 200 schedules drawn at random within the limits the one whose multiply-adds are nearest to this share."""
    rng = np.random.default_rng(seed)
    drawn = [random_genome(study.problem, rng) for _ in range(200)]
    return min(drawn, key=lambda genome: abs(study.space.cost(genome)["macs_share"] - share))


def by_hand(setting: Setting, budget: float) -> tuple[int, ...]:
    """The narrowest width, but in each interval, from the clean end on, the largest that keeps to the budget."""
    space = setting.study().space
    genome = [0] * len(space.choices)
    for place in reversed(range(len(genome))):
        for option in range(1, len(space.choices[place].options)):
            tried = [*genome[:place], option, *genome[place + 1 :]]
            if space.cost(tuple(tried))["macs_share"] > budget:
                break
            genome = tried
    return tuple(genome)


def started_as(schedule: Schedule, starts: Sequence[str]) -> Schedule:
    """With these weights at its steps."""
    steps = zip(schedule.steps, starts, strict=True)
    return replace(schedule, steps=tuple(replace(step, arch=step.arch.replace(expert=start)) for step, start in steps))


def on(full: Schedule, timesteps: tuple[int, ...]) -> Schedule:
    """The full network at these steps, guided as it is."""
    step = full.steps[0]
    return Schedule(tuple(replace(step, timestep=t) for t in timesteps), full.sampler)


def confirmation(setting: Setting, schedules: Mapping[str, Any]) -> Controlled:
    """What `nas confirm` would do, with the controls as further arms."""
    study = setting.study()
    judged = study.evaluator.rungs if setting.quick else (SETTINGS["judged"],)
    study = replace(study, evaluator=replace(study.evaluator, rungs=judged))  # type: ignore[type-var]
    net = study.supernet.load(setting.run / "supernet", "cpu")
    training = {**SETTINGS["training"], **({"steps": 6, "batch": 8} if setting.quick else {})}
    given = settings_of({**dict(net.training_settings), **training})
    made = {name: Schedule.from_json(json.dumps(one)) for name, one in schedules.items()}
    protocol: Protocol = replace(
        PROTOCOL,
        settings={
            **SETTINGS,
            "schedules": dict(schedules),
            "timesteps": len(net.alphas_cumprod),
            "training": {name: value for name, value in given.__dict__.items() if name not in ("seed", "steps")},
            "gradient_steps": {
                name: equal_steps(net, one, given) * (2 if name == LONGER else 1) for name, one in made.items()
            },
        },
    )
    return Controlled(study, setting.run, protocol)


def trained(setting: Setting, schedules: Mapping[str, Any], arm: str, seed: int) -> Row:
    torch.set_num_threads(1)
    made = confirmation(setting, schedules)
    for _ in made.trained(arm, seed):
        pass
    return {"gradient_steps": made.protocol.settings["gradient_steps"][arm]}


def scored(setting: Setting, schedules: Mapping[str, Any], arm: str, seed: int) -> Row:
    torch.set_num_threads(1)
    return {
        "scores": {name: score.to_json() for name, score in confirmation(setting, schedules).judged(arm, seed).items()}
    }


def main() -> None:
    bench = Benchmark("confirm_pilot", __doc__ or "", ("nas/evidence", "evaluators/label_free.py"), PROTOCOL)
    setting = Setting(bench.folder, bench.quick)
    latent.lend(setting.trained, setting.run)
    with open_session(setting.study(), setting.opened().folder) as session:
        for _ in session.prepare(threads=1):
            pass
    schedules = bench.row("named", lambda: named(setting))["schedules"]
    made = confirmation(setting, schedules)
    for judge in judges_of(made.study)[0]:
        for _ in judge.prepare(setting.run, 0, "cpu"):
            pass
    first = {(made.trained_as(arm), seed) for seed, arm in made.jobs}
    bench.rows({f"training of {arm}, seed {s}": (trained, setting, schedules, arm, s) for arm, s in sorted(first)})
    rows = bench.rows({f"{arm}, seed {s}": (scored, setting, schedules, arm, s) for s, arm in made.jobs})
    kept = {f"{arm}-{seed}": rows[f"{arm}, seed {seed}"]["scores"] for seed, arm in made.jobs}
    made.keep(kept)
    needed: list[int] = []
    for arm in (one for one in PROTOCOL.arms if one != FULL):
        found = made.verdict(arm)
        bench.reckon(f"verdict on {arm}", found.to_json())
        if arm == SCHEDULE:
            needed = [
                seeds_needed(judge.spread * math.sqrt(len(judge.differences)), judge.margin)
                for judge in found.judges
                if judge.decides
            ]
    bench.finish(
        [
            Target(
                "seeds_needed",
                "training seeds at which no loss within 5 % of what the full network's FD is above real images' would be shown with 80 % power, of the spread over two seeds",
                None,
                float(max(needed)),
            )
        ]
    )


if __name__ == "__main__":
    main()
