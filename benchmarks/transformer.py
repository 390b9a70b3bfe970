"""A small diffusion transformer from nothing: does it draw what it is told, and what is left of that at half the multiply-adds?

Fashion-MNIST in latents of an autoencoder of its own, a DiT of eight blocks with adaLN-Zero, 10,000 steps of 64. Written down before the rows; one
training seed, so that errors are those of sampling alone, unless another is named:

1. The full network, 20 DDIM steps, 2,048 samples, unguided and guided at 1.5 and 2.5: the share that a judge, trained on the train images, puts into the
class asked for, and the FD to the held-out images by its features. Target: the share at the best of the three.
2. The network frozen, guided as in the best row at all steps, 2,048 new noises and labels, one row each. At no more than half of the multiply-adds of the
whole network so guided: a search of what runs in each of ten intervals (evolution, 60 trials of 256 samples; attention alone, the feed-forward layers
alone, or what stands around them alone, at each step or each second one; the least FD of those verified with 1,024), gates (DiP-GO's pruner, 100 gradient
steps, branches, the schedule that bisection makes of them), and ten steps. Near half, as it comes: FORA, all branches reused at each second step, whose
gates and embeddings still run, and the router of Learning-to-Cache at its threshold of 0.1, which can save no more than FORA (lambda 5e-6, as published for
20 steps of DiT-XL/2; 4,000 gradient steps of 16 images at 0.01, as published for DiT-L/2, where the paper has 50,000 of 64). A smoke test of the
machinery: one seed, and no claim follows from the order of the rows. A first run forgot to let gates and router learn, so that they proposed at random:
its one such row, gates at 0.469 of the multiply-adds, FD 1.850 and accuracy 0.978, was seen and is withdrawn, and nothing else was changed.
3. Elastic: the trained network as the beginning of a sandwich training of 3,000 steps, widths 1/2, 3/4 and 1, depths 4, 6 and 8. Per interval: of five
intervals each chooses a width and a depth (evolution, 60 trials of 256 samples, the least FD of those verified with 1,024, at no more than half of the
multiply-adds). Static: of the single subnets with no more than half, the one of least FD on the same 1,024 verifying samples. Both are fine-tuned
equally, 2,000 steps, distilled by half from the full network, three seeds; FD and accuracy on 2,048 new noises and labels, unguided and at the scale of
the best row of 1. What is asked: does the schedule by interval, as DyDiT has it, beat a static network of as many multiply-adds? The mean difference
of FD at that scale over the three seeds, its interval from Student's t on them; no target.
4. A second protocol, written down when the choices of 3 were seen and none of its fine-tuned rows: least FD under strong guidance chose the smallest single
subnet, 13 % of the multiply-adds, beside a schedule of 38 %, so that what 3 asks about as many multiply-adds is not answered by it. A third arm therefore: the single
subnet whose multiply-adds are nearest to the schedule's (3/4 of the width, 6 blocks, 43 %), with the same three seeds, fine-tuning, noises and test; the rows of 3 stand
as they come.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.common import Benchmark, Target, borrow
from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.fashion import FashionMNIST
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.scoring import Scores
from nas.contracts import Guidance, Schedule, Step, derive_seed, frozen
from nas.engine.session import open_session
from nas.handover.training import verification_seed
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.router import Router
from nas.study import Study
from search_spaces.branches import Branches
from search_spaces.intervals import equal, uniform
from search_spaces.networks.slices import Arch
from search_spaces.options import Options
from search_spaces.patterns import ALL, Every, Only
from search_spaces.shipped.graph import AROUND
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import FineTune, Sandwich, TrainAutoencoder

STEPS = 20
SCALES = (1.0, 1.5, 2.5)
SHARE = 0.5
SEEDS = (0, 1, 2)
DIT: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "sample_size": 8,  # latents of 32x32 pixels
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 2,
    "num_attention_heads": 8,
    "attention_head_dim": 16,
    "num_layers": 8,
    "num_embeds_ada_norm": 10,
}
PARTS = (tuple(f"b{i}.attn" for i in range(8)), tuple(f"b{i}.mlp" for i in range(8)), (AROUND,))
"""What runs where not all does: attention alone, the feed-forward layers alone, or neither."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """`folder`: where everything lies."""

    folder: Path
    quick: bool

    @cached_property
    def images(self) -> FashionMNIST:
        return FashionMNIST(count=600 if self.quick else None)

    @cached_property
    def net(self) -> Elastic:
        codec = TrainAutoencoder(
            in_channels=1,
            latent_channels=3,
            channels=(16, 32, 32),
            steps=20 if self.quick else 4000,
            divergence=5e-6,
            warmup=5 if self.quick else 100,
        )
        return Elastic(DIT, widths=(0.5, 0.75, 1.0), depths=(4, 6, 8), codec=codec)

    @cached_property
    def labels(self) -> Labels:
        return Labels(self.images)

    def evaluator(self, *rungs: int) -> Scores:
        judge = SmallClassifier(steps=20 if self.quick else 3000, cells=4, decay=True)
        common: dict[str, Any] = {"conditions": self.labels, "rungs": rungs}
        return Scores((Frechet(self.images, judge, **common), Agreement(self.images, judge, **common)))

    @cached_property
    def study(self) -> Study:
        return Study(
            name="transformer",
            space=Stepwise(self.net, uniform(STEPS), (STEPS,), guidance=(None, 1.5)),
            supernet=self.net,
            images=self.images,
            training=Sandwich(
                steps=20 if self.quick else 10_000, learning_rate=1e-3, warmup=5 if self.quick else 200, full_only=True
            ),
            evaluator=self.evaluator(32, 64) if self.quick else self.evaluator(256, 1024),
            searchers={"evolution": Evolution(population=4 if self.quick else 15)},
            objectives=("fd", "macs"),
            limits={"macs_share": SHARE},
            trials=4 if self.quick else 60,
            verified=2 if self.quick else 5,
        )

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def samples(self, many: int) -> int:
        return 64 if self.quick else many

    def everywhere(self, scale: float, steps: int = STEPS) -> Schedule:
        arch, guidance = self.net.anatomy.full, None if scale == 1 else Guidance(scale)
        return Schedule(tuple(Step(t, arch, (), guidance) for t in uniform(steps)))


def prepare(setting: Setting) -> Row:
    """Autoencoder, judge and network, on one thread."""
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    with open_session(setting.study, setting.run) as session:
        started = time.process_time()
        for tick in session.prepare(threads=1):
            now = time.process_time()
            seconds[tick.what] = seconds.get(tick.what, 0.0) + now - started
            started = now
    return {
        "network_macs": setting.net.cost(setting.net.anatomy.full).macs,
        **{f"{name}_cpu_s": value for name, value in seconds.items()},
    }


def searched(setting: Setting, scale: float, kind: str) -> Schedule:
    """What a searcher makes of the frozen network."""
    torch.set_num_threads(1)
    steps, guide = uniform(STEPS), None if scale == 1 else scale
    limits, few = {"macs_share": SHARE}, setting.quick
    space: Any = Branches(setting.net, steps, guidance=guide, whole=2 if kind == "router" else 0)
    searcher: Any = Gates(Pruner(steps=2 if few else 100, batch=2, clip=False, finer=True), ("bisection",))
    if kind == "evolution":
        patterns = (Only(ALL), *(make for names in PARTS for make in (Every(2, names), Only(names))))
        space = Stepwise(
            setting.net, steps, equal(steps, 10), Options((1.0,)), patterns=patterns, guidance=(guide,), finer=True
        )
        searcher = Evolution(population=4 if few else 15)
    if kind == "router":
        limits = {}
        searcher = Gates(Router(steps=4 if few else 4000, batch=16, learning_rate=0.01), ("threshold",))
    study = replace(setting.study, name=f"transformer-{kind}", space=space, searchers={kind: searcher}, limits=limits)
    if kind != "evolution":
        study = replace(study, trials=1, verified=1)
    run = borrow(setting.run, setting.folder / kind)
    with open_session(study, run) as session:
        for _ in session.prepare(threads=1):
            pass
        for _ in session.learn(kind):
            pass
        conductor = session.conductor(kind)
        session.run(conductor)
        done = [t for t in conductor.ledger.trials if t.status == "complete" and t.score is not None]
        best = min(done, key=lambda trial: trial.score.values["fd"])  # type: ignore[union-attr]
        decoded: Schedule = space.decode(best.genome)
        return decoded


def of_search(setting: Setting, scale: float, kind: str) -> Row:
    return judge(setting, searched(setting, scale, kind), scale)


def fora(setting: Setting, scale: float) -> Schedule:
    """Everything at each second step, what stands around the branches at those between."""
    guide = None if scale == 1 else scale
    patterns = (Every(2, (AROUND,)),)
    space = Stepwise(
        setting.net, uniform(STEPS), (STEPS,), Options((1.0,)), patterns=patterns, guidance=(guide,), finer=True
    )
    return space.decode((0,) * len(space.choices))


def judge(setting: Setting, schedule: Schedule, scale: float) -> Row:
    """`scale`: how the whole network is guided whose multiply-adds are one."""
    torch.set_num_threads(1)
    count = setting.samples(2048)
    net = setting.net.load(setting.run / "supernet", "cpu")
    score = setting.evaluator(count).load(net, setting.run)(schedule, count, derive_seed(0, "transformer benchmark"))
    whole = STEPS * setting.net.macs(Step(0, net.full_arch, (), None if scale == 1 else Guidance(scale)))
    return {
        "accuracy": 1 - score.values["disagreement"],
        "accuracy_error": score.error("disagreement"),
        "fd": score.values["fd"],
        "fd_error": score.error("fd"),
        "macs_share": sum(map(setting.net.macs, schedule.steps)) / whole,
        "steps": len(schedule.steps),
        "labels": dict(score.labels),
    }


# ------------------------------------------------------------------------------------------------- widths and depths


def elastic(setting: Setting) -> tuple[Study, Path]:
    """The study whose supernet begins as the trained network, and its run folder with that network's autoencoder."""
    whole, run = setting.folder / "full", setting.folder / "elastic"
    if not whole.exists():
        trained = setting.net.load(setting.run / "supernet", "cpu")
        trained.extract(trained.full_arch).save_pretrained(whole)
    if not (run / "supernet").exists():
        made = shutil.ignore_patterns("weights.*", "checkpoint.*", "stage.*", "training.json")
        shutil.copytree(setting.run / "supernet", run / "supernet", ignore=made)
        shutil.copytree(setting.run / "features", run / "features")
    few = setting.quick
    study = replace(
        setting.study,
        name="transformer-elastic",
        supernet=replace(setting.net, pretrained=str(whole)),
        training=Sandwich(steps=10 if few else 3000, learning_rate=5e-4, warmup=5 if few else 100),
    )
    return study, run


def by_interval(setting: Setting, scale: float) -> Study:
    study, _ = elastic(setting)
    net: Any = study.supernet
    guide, steps = None if scale == 1 else scale, uniform(STEPS)
    return replace(study, space=Stepwise(net, steps, equal(steps, 5), guidance=(guide,)))


def train_elastic(setting: Setting, scale: float) -> Row:
    """The supernet, the search, and of the single subnets the best."""
    torch.set_num_threads(1)
    study, (_, run) = by_interval(setting, scale), elastic(setting)
    net: Any = study.supernet
    with open_session(study, run) as session:
        for _ in session.prepare(threads=1):
            pass
        conductor = session.conductor("evolution")
        session.run(conductor)
        done = [t for t in conductor.ledger.trials if t.status == "complete" and t.score is not None]
    best = min(done, key=lambda trial: trial.score.values["fd"])  # type: ignore[union-attr]
    guidance = None if scale == 1 else Guidance(scale)
    most = SHARE * net.cost(net.anatomy.full).macs
    subnets = net.subnets(net.options)
    loaded = net.load(run / "supernet", "cpu")
    evaluator, last = study.evaluator.load(loaded, run), study.evaluator.rungs[-1]
    singles = {}
    for arch in (subnets.flat(i) for i in range(len(subnets))):
        if net.cost(arch).macs <= most:
            schedule = Schedule(tuple(Step(t, arch, (), guidance) for t in uniform(STEPS)))
            singles[arch] = evaluator(schedule, last, verification_seed(study)).values["fd"]
    static = min(singles, key=lambda arch: singles[arch])
    return {
        "genome": best.genome,
        "genome_fd": best.score.values["fd"],  # type: ignore[union-attr]
        "static": static,
        "static_fd": singles[static],
        "singles": len(singles),
    }


def nearest(setting: Setting, schedule: Schedule) -> Arch:
    """The single subnet whose multiply-adds are nearest to the schedule's."""
    net = setting.net
    macs = sum(net.cost(Arch(*step.arch)).macs for step in schedule.steps) / len(schedule.steps)
    subnets = net.subnets(net.options)
    return min((subnets.flat(i) for i in range(len(subnets))), key=lambda arch: abs(net.cost(arch).macs - macs))


def fine_tuned(setting: Setting, scale: float, schedule: Schedule, seed: int) -> Row:
    """Fine-tuned for this schedule, and then scored unguided and guided."""
    torch.set_num_threads(1)
    study, run = elastic(setting)
    net: Any = study.supernet
    loaded, count = net.load(run / "supernet", "cpu"), setting.samples(2048)
    stage = FineTune(steps=10 if setting.quick else 2000, distillation=0.5)
    for _ in stage.fit(loaded, schedule, setting.images.load(), derive_seed(seed, "transformer fine-tune")):
        pass
    evaluator = setting.evaluator(count).load(loaded, run)
    row: Row = {}
    for name, by in (("unguided", None), ("guided", None if scale == 1 else Guidance(scale))):
        mine = Schedule(tuple(replace(step, guidance=by) for step in schedule.steps))
        score = evaluator(mine, count, derive_seed(seed, "transformer benchmark, elastic"))
        row |= {
            f"{name}_fd": score.values["fd"],
            f"{name}_fd_error": score.error("fd"),
            f"{name}_accuracy": 1 - score.values["disagreement"],
        }
    full = STEPS * net.cost(net.anatomy.full).macs
    return {**row, "macs_share": sum(net.cost(Arch(*step.arch)).macs for step in schedule.steps) / full}


def compare(pairs: list[tuple[Row, Row]]) -> Row:
    """Mean difference of guided FD, by interval less static, and its interval by Student's t over the seeds."""
    differences = [one["guided_fd"] - other["guided_fd"] for one, other in pairs]
    low, high = stats.t.interval(0.95, len(pairs) - 1, np.mean(differences), stats.sem(differences))
    return {"difference": float(np.mean(differences)), "interval": (float(low), float(high))}


def main() -> None:
    bench = Benchmark("transformer", __doc__ or "", ("search_spaces/networks/transformer.py",))
    setting = Setting(bench.folder, bench.quick)
    bench.row("prepare", lambda: prepare(setting))
    whole = {
        f"guided at {scale:g}" if scale != 1 else "unguided": (judge, setting, setting.everywhere(scale), scale)
        for scale in SCALES
    }
    rows: Mapping[str, Row] = bench.rows(whole)
    best = max(rows, key=lambda name: float(rows[name]["accuracy"]))
    scale = SCALES[list(whole).index(best)]
    halves: dict[str, tuple[Any, ...]] = {
        "searched reuse": (of_search, setting, scale, "evolution"),
        "gates": (of_search, setting, scale, "gates"),
        "Learning-to-Cache's router at 0.1": (of_search, setting, scale, "router"),
        "FORA": (judge, setting, fora(setting, scale), scale),
        "ten steps": (judge, setting, setting.everywhere(scale, STEPS // 2), scale),
    }
    bench.rows(halves)
    if "elastic" not in bench.without:
        found = bench.row("elastic", partial(train_elastic, setting, scale))
        schedule = by_interval(setting, scale).space.decode(tuple(found["genome"]))
        static = frozen(found["static"])
        single = Schedule(tuple(replace(step, arch=static) for step in schedule.steps))
        arms = {"by interval": schedule, "static": single}
        jobs: dict[str, tuple[Any, ...]] = {
            f"{arm}, seed {seed}": (fine_tuned, setting, scale, arms[arm], seed) for seed in SEEDS for arm in arms
        }
        tuned = bench.rows(jobs)
        near = nearest(setting, schedule)
        equal_macs = Schedule(tuple(replace(step, arch=near) for step in schedule.steps))
        others = {f"static of as many, seed {s}": (fine_tuned, setting, scale, equal_macs, s) for s in SEEDS}
        tuned |= bench.rows(others)
        for rival in ("static", "static of as many"):
            pairs = [(tuned[f"by interval, seed {seed}"], tuned[f"{rival}, seed {seed}"]) for seed in SEEDS]
            bench.reckon(f"by interval against {rival}", compare(pairs))
    bench.finish(
        [
            Target(
                "dit_accuracy",
                f"share of {setting.samples(2048):,} samples that a judge puts into the class asked for, full network, 20 steps, {best}",
                0.85,
                rows[best]["accuracy"],
                at_most=False,
            )
        ]
    )


if __name__ == "__main__":
    main()
