"""What does a schedule save once everything is trained, and how much of the saving is time?

Quality, on digits (8x8), for each of eight training seeds: the digits study's supernet; an exact search on it; the verified schedules exported
and fine-tuned by `nas train`'s own loop, and the full net in the same way for the same multiply-adds; the best of them chosen on the scores
after training and judged on fresh samples. The full net takes the fewest DDIM steps that lose nothing against more steps, and the winner has
to beat it with as few steps as have the winner's MACs, too. "No loss": the upper end of the 95 % interval of the paired difference is at most
5 % of the full net's FD, at 3 x 4,096 fresh samples for each training seed.

Speed: exported folders as pipelines, in turns, the full net at every step against a schedule of half the MACs or less, for the DDPM
network of CIFAR-10 (initial weights, which are as fast as trained ones) and for the digits winner.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from scipy.stats import t as student

from benchmarks.common import Benchmark, Target
from benchmarks.digits import digits, images
from evaluators.frechet import Frechet
from evaluators.sampling import DDIM
from nas.contracts import LoadedSupernet, Schedule, Score, Step, derive_seed, jackknife_error
from nas.engine.session import open_session
from nas.evidence.confirm import equal_steps, gradient_macs
from nas.handover.export import export
from nas.handover.training import adopt
from nas.searchers.knapsack import Knapsack
from nas.study import Study
from search_spaces.intervals import Timesteps, linspace, per_step, uniform
from search_spaces.shipped.train_diffusers import TRAINED, Settings, train
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from studies.ddsm_cifar10 import UNET as CIFAR
from studies.digits import net

BUDGET = 0.4
COUNTS = (10, 15, 20, 25, 30, 40)
"""Sampler steps of the full net, of which the fewest that lose nothing are the reference."""

SEEDS = tuple(range(8))
"""Of training. The spread of the paired difference over three of them is too wide for Student's t to tell 5 %."""

NO_LOSS = 0.05
SCHEDULES = 9
FULL = "full"

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One training seed's part of the benchmark. `folder` is the run folder of its study."""

    folder: Path
    seed: int
    quick: bool

    def study(self, timesteps: Timesteps) -> Study:
        """The digits study with a deeper search, a width for each of these steps."""
        return replace(
            digits,
            name=f"digits-{len(timesteps)}",
            space=Stepwise(net, timesteps, per_step(timesteps)),
            training=Sandwich(steps=60) if self.quick else digits.training,
            evaluator=Frechet(images, rungs=(64, self.samples) if self.quick else (512, self.samples)),
            searchers={"knapsack": Knapsack(around="both")},
            limits={"macs_share": BUDGET},
            trials=30 if self.quick else 6 * len(timesteps) + 60,
            verified=SCHEDULES if self.quick else 24,
            seed=self.seed,
        )

    @property
    def samples(self) -> int:
        return 128 if self.quick else 4096

    @property
    def fresh(self) -> tuple[int, ...]:
        """Noises on which no schedule was chosen."""
        return tuple(derive_seed(self.seed, i, "handover benchmark") for i in range(2 if self.quick else 3))

    @property
    def tune(self) -> Settings:
        """Of the full net. Whatever else is trained has as many multiply-adds."""
        return Settings(steps=20 if self.quick else 600, learning_rate=3e-4, distillation=0.0, seed=self.seed)

    def exported(self, schedule: Schedule) -> Path:
        """The full net serves all timesteps, whatever the steps."""
        if schedule.archs == (net.anatomy.full,):
            return self.folder / "exports" / FULL
        return self.folder / "exports" / schedule.digest


def full_net(timesteps: Timesteps) -> Schedule:
    return Schedule(tuple(Step(t, net.anatomy.full) for t in timesteps))


def prepare(setting: Setting) -> Row:
    """Trains the supernet and the feature extractor, or finds them trained."""
    with open_session(setting.study(uniform(COUNTS[0])), setting.folder) as session:
        for _ in session.prepare(threads=1):
            pass
    return {"training_macs": json.loads((setting.folder / "supernet" / "training.json").read_text())[0]["macs"]}


def fine_tune(setting: Setting, schedule: Schedule) -> Row:
    """Exports the schedule and trains what was exported, for as many multiply-adds as the full net is trained."""
    torch.set_num_threads(1)
    loaded = net.load(setting.folder / "supernet", "cpu")
    folder = setting.exported(schedule)
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        export(loaded, schedule, DDIM().describe(), {}, folder)
    settings = replace(setting.tune, steps=equal_steps(loaded, schedule, setting.tune))
    for _ in train(folder, images.load().pixels, settings, cpu=True):
        pass
    whole = setting.tune.steps * setting.tune.batch * gradient_macs(loaded, loaded.full_arch, setting.tune)
    return {"gradient_steps": settings.steps, "training_macs": whole}


def judge(setting: Setting, schedule: Schedule, seeds: Sequence[int], trained: bool) -> Row:
    """FD on each seed's noises, with replicates, before or after the fine-tune."""
    torch.set_num_threads(1)
    loaded = net.load(setting.folder / "supernet", "cpu")
    evaluator = Frechet(images, rungs=(setting.samples,)).load(loaded, setting.folder)
    if trained:
        adopt(evaluator, setting.exported(schedule) / TRAINED)
    scores = [evaluator(schedule, setting.samples, seed) for seed in seeds]
    macs = sum(loaded.macs(step) for step in schedule.steps)
    return {
        "fd": [score.values["fd"] for score in scores],
        "replicates": [score.replicates["fd"] for score in scores],
        "steps": len(schedule.steps),
        "macs": macs,
    }


def search(setting: Setting, timesteps: Timesteps) -> Row:
    """Genomes of verified schedules: the best, and others from cheap to dear."""
    study = setting.study(timesteps)
    with open_session(study, setting.folder) as session:
        conductor = session.conductor("knapsack")
        session.run(conductor)
        trials = [t for t in conductor.ledger.trials if t.status == "complete" and t.score]
    by_score = sorted(trials, key=lambda trial: trial.objectives(("fd",)))
    chosen = by_score[: (SCHEDULES + 1) // 2]
    others = sorted(by_score[len(chosen) :], key=lambda trial: trial.cost["macs"])
    places = np.linspace(0, len(others) - 1, SCHEDULES - len(chosen)).round().astype(int)
    chosen += [others[place] for place in dict.fromkeys(places.tolist())] if others else []
    return {
        "evaluations": len(conductor.ledger.trials),
        "schedules": [
            {"genome": t.genome, "macs_share": t.cost["macs_share"], "fd": t.objectives(("fd",))[0]} for t in chosen
        ],
    }


def compared(mine: Sequence[Row], theirs: Sequence[Row]) -> Row:
    """Over training seeds: FD, the paired difference, the larger of sampling's error and training's spread, and no loss or not."""
    each, errors = [], []
    for row, other in zip(mine, theirs, strict=True):
        pairs = [
            Score({"fd": a}, {"fd": tuple(ra)}).difference(Score({"fd": b}, {"fd": tuple(rb)}), "fd")
            for a, ra, b, rb in zip(row["fd"], row["replicates"], other["fd"], other["replicates"], strict=True)
        ]
        each.append(float(np.mean([difference for difference, _ in pairs])))
        errors.append(math.hypot(*(error for _, error in pairs)) / len(pairs))
    mean = float(np.mean(each))
    error = math.hypot(*errors) / len(errors)
    spread = jackknife_error([(sum(each) - x) / (len(each) - 1) for x in each])
    fd, other_fd = (float(np.mean([row["fd"] for row in rows])) for rows in (mine, theirs))
    # Of sampling, many blocks of samples tell the error; of training, as many values as there are seeds.
    beyond = max(1.96 * error, float(student.ppf(0.975, len(each) - 1)) * spread)
    upper = (mean + beyond) / other_fd
    return {
        "fd": fd,
        "against_fd": other_fd,
        "difference": mean,
        "of_each_training_seed": each,
        "error_of_sampling": error,
        "spread_over_training_seeds": spread,
        "upper_bound_share": upper,
        "no_loss": upper <= NO_LOSS,
        "better": mean + beyond < 0,
    }


def reference(counts: Mapping[int, Sequence[Row]]) -> tuple[int, Row]:
    """The fewest steps of the full net that lose nothing against any larger number, and the comparisons."""
    against = {
        few: {more: compared(counts[few], counts[more]) for more in counts if more > few} for few in sorted(counts)
    }
    count = min(few for few, rows in against.items() if all(row["no_loss"] for row in rows.values()))
    words = {
        f"{few} steps": max((row["upper_bound_share"] for row in rows.values()), default=None)
        for few, rows in against.items()
    }
    fd = {f"{count} steps": float(np.mean([row["fd"] for row in rows])) for count, rows in counts.items()}
    return count, {"fd": fd, "worst_upper_bound_share_against_more": words, "reference_steps": count}


# ---------------------------------------------------------------------------------------------------------------------- speed


def speed(loaded: LoadedSupernet, schedule: Schedule, folder: Path, batch: int, repeats: int) -> Row:
    """Seconds of the two exported pipelines, the full net at every step and the schedule, in turns."""
    from diffusers import DiffusionPipeline

    plain = Schedule(tuple(Step(step.timestep, loaded.full_arch) for step in schedule.steps))
    calls: dict[str, Callable[[], Any]] = {}
    for name, each in ((FULL, plain), ("schedule", schedule)):
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            export(loaded, each, DDIM().describe(), {}, folder / name)
        pipeline = DiffusionPipeline.from_pretrained(
            folder / name, custom_pipeline=str(folder / name), trust_remote_code=True
        )
        pipeline.set_progress_bar_config(disable=True)
        calls[name] = lambda pipeline=pipeline: pipeline(batch_size=batch, seed=0, output_type="pt")  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first is warm-up
                seconds[name].append(time.perf_counter() - started)
    macs = {
        name: sum(loaded.macs(step) for step in each.steps) for name, each in ((FULL, plain), ("schedule", schedule))
    }
    ratio = macs[FULL] / macs["schedule"]
    faster = median(a / b for a, b in zip(seconds[FULL], seconds["schedule"], strict=True))
    return {
        "batch": batch,
        "macs_ratio": ratio,
        "faster": faster,
        "quartiles": np.percentile(
            [a / b for a, b in zip(seconds[FULL], seconds["schedule"], strict=True)], [25, 75]
        ).tolist(),
        "efficiency": faster / ratio,
        "ms_per_image": {name: 1e3 * median(times) / batch for name, times in seconds.items()},
    }


def cifar(folder: Path, quick: bool) -> Row:
    """Three quarters of the steps at half the width."""
    torch.set_num_threads(1)
    recipe = Elastic(CIFAR, widths=(0.5, 1.0))
    loaded = recipe.initial(0)
    widths = (0.5, 1.0) if quick else (0.5, 0.5, 0.5, 1.0)
    timesteps = linspace(len(widths), 999, 20)
    schedule = Schedule(tuple(Step(t, recipe.uniform(w)) for t, w in zip(timesteps, widths, strict=True)))
    return speed(
        loaded, schedule, folder / f"cifar-{schedule.digest}", batch=1 if quick else 16, repeats=1 if quick else 7
    )


def judge_each(bench: Benchmark, words: str, schedules: Mapping[Setting, Schedule], trained: bool) -> list[Row]:
    """On fresh noises, for each training seed. `words` name the rows; {} in them is the schedule's digest."""
    jobs = {
        f"{words.format(schedule.digest)}, seed {s.seed}": (judge, s, schedule, s.fresh, trained)
        for s, schedule in schedules.items()
    }
    return list(bench.rows(jobs).values())


def settle(bench: Benchmark, settings: Sequence[Setting], counts: Sequence[int]) -> tuple[int, list[Row]]:
    """How many steps the full net takes, and what it then has for each training seed, fine-tuned."""
    bench.rows({f"full net fine-tuned, seed {s.seed}": (fine_tune, s, full_net(uniform(counts[0]))) for s in settings})
    full = {
        count: judge_each(
            bench, f"full net fine-tuned, {count} steps", dict.fromkeys(settings, full_net(uniform(count))), True
        )
        for count in counts
    }
    count, words = reference(full)
    bench.reckon("reference", words)
    return count, full[count]


def train_found(bench: Benchmark, s: Setting, count: int, found: Row) -> tuple[Schedule, float]:
    """Of what a search has found the schedule with the best score after training; and the tau of scores before and after."""
    space = s.study(uniform(count)).space
    schedules = [space.decode(tuple(each["genome"])) for each in found["schedules"]]
    bench.rows({f"fine-tuning {schedule.digest}, seed {s.seed}": (fine_tune, s, schedule) for schedule in schedules})
    seeds = (derive_seed(s.seed, "verification noise"),)
    keys = {after: [f"{x.digest} {after} training, seed {s.seed}" for x in schedules] for after in ("before", "after")}
    jobs = {
        key: (judge, s, schedule, seeds, after == "after")
        for after, names in keys.items()
        for key, schedule in zip(names, schedules, strict=True)
    }
    rows = bench.rows(jobs)
    before, trained = ([rows[key]["fd"][0] for key in keys[after]] for after in ("before", "after"))
    tau = float(kendalltau(before, trained).statistic)
    shown = [
        {"before": a, "after": b, "macs_share": _share(schedule, count)}
        for a, b, schedule in zip(before, trained, schedules, strict=True)
    ]
    bench.reckon(f"supernet against trained, seed {s.seed}", {"tau": tau, "schedules": shown})
    return schedules[int(np.argmin(trained))], tau


def judge_winners(
    bench: Benchmark, winners: Mapping[Setting, Schedule], count: int, full: Sequence[Row]
) -> tuple[Row, Row]:
    """The winners against the full net, both fine-tuned, and against as few steps of it as have their MACs."""
    share = float(np.mean([_share(winner, count) for winner in winners.values()]))
    fewer = math.ceil(max(_share(winner, count) for winner in winners.values()) * count)
    full_frozen = judge_each(
        bench, f"full net frozen, {count} steps", dict.fromkeys(winners, full_net(uniform(count))), False
    )
    full_fewer = judge_each(
        bench, f"full net fine-tuned, {fewer} steps", dict.fromkeys(winners, full_net(uniform(fewer))), True
    )
    frozen, trained = (
        judge_each(bench, "winner {} frozen", winners, False),
        judge_each(bench, "winner {} fine-tuned", winners, True),
    )
    tuned = bench.reckon("winner against full net, both fine-tuned", {"macs_share": share, **compared(trained, full)})
    bench.reckon("winner against full net, both frozen", {"macs_share": share, **compared(frozen, full_frozen)})
    against_fewer = bench.reckon(
        "winner against full net with fewer steps, both fine-tuned", {"steps": fewer, **compared(trained, full_fewer)}
    )
    return tuned, against_fewer


WHAT = (
    "share of the MACs that the best of {schedules} trained schedules saves while level with one full net (not no loss: best of {schedules} against one, seeds "
    "and reference changed after a look; one schedule named beforehand: up to +11.3 %), digits, {seeds} training seeds; None where it is not level"
)


def main() -> None:
    bench = Benchmark("handover", __doc__ or "", ("nas/handover/export.py", "search_spaces/shipped/train_diffusers.py"))
    settings = [
        Setting(bench.folder / f"seed-{seed}", seed, bench.quick) for seed in SEEDS[: 2 if bench.quick else None]
    ]
    torch.set_num_threads(1)
    efficiency = bench.row("speed, DDPM CIFAR-10", lambda: cifar(bench.folder, bench.quick))["efficiency"]
    bench.rows({f"training, seed {s.seed}": (prepare, s) for s in settings})
    count, full = settle(bench, settings, (4, 6) if bench.quick else COUNTS)
    found = bench.rows({f"search over {count} steps, seed {s.seed}": (search, s, uniform(count)) for s in settings})
    trained = {s: train_found(bench, s, count, found[f"search over {count} steps, seed {s.seed}"]) for s in settings}
    winners = {s: winner for s, (winner, _) in trained.items()}
    tuned, against_fewer = judge_winners(bench, winners, count, full)
    first, winner = next(iter(winners.items()))
    batch, repeats = (16, 2) if bench.quick else (256, 9)
    loaded = net.load(first.folder / "supernet", "cpu")
    bench.row(
        f"speed, digits, {winner.digest}",
        lambda: speed(loaded, winner, bench.folder / f"digits-{winner.digest}", batch, repeats),
    )
    bench.finish(
        [
            Target(
                "saved_at_no_loss",
                WHAT.format(schedules=SCHEDULES, seeds=len(settings)),
                0.6,
                1 - tuned["macs_share"] if tuned["no_loss"] and against_fewer["better"] else None,
                at_most=False,
            ),
            Target(
                "speedup_efficiency",
                "speed-up of an exported folder over its MACs ratio, DDPM network of CIFAR-10, ratio of 2 or more",
                0.85,
                efficiency,
                at_most=False,
            ),
            Target(
                "trained_tau",
                f"Kendall's tau of supernet and trained scores over {SCHEDULES} schedules, mean of {len(settings)} training seeds",
                None,
                float(np.mean([tau for _, tau in trained.values()])),
                at_most=False,
            ),
        ]
    )


def _share(schedule: Schedule, count: int) -> float:
    return sum(net.cost(step.arch).macs for step in schedule.steps) / (count * net.cost(net.anatomy.full).macs)


if __name__ == "__main__":
    main()
