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
machinery: one seed, and no claim follows from the order of the rows.
3. Elastic: the trained network as the beginning of a sandwich training of 3,000 steps, widths 1/2, 3/4 and 1, depths 4, 6 and 8. Per interval: of five
intervals each chooses a width and a depth (evolution, 60 trials of 256 samples, the least FD of those verified with 1,024, at no more than half of the
multiply-adds). Static: of the single subnets with no more than half, the one of least FD on the same 1,024 verifying samples. Both are fine-tuned
equally, 2,000 steps, distilled by half from the full network, three seeds; FD and accuracy on 2,048 new noises and labels, unguided and at the scale of
the best row of 1. What is asked: does the schedule by interval, as DyDiT has it, beat a static network of as many multiply-adds? The mean difference
of FD at that scale over the three seeds, its interval from Student's t on them; no target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Benchmark, Target, borrow
from evaluators.agreement import Agreement
from evaluators.conditions import Labels
from evaluators.fashion import FashionMNIST
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.scoring import Scores
from nas.contracts import Guidance, Schedule, Step, derive_seed
from nas.engine.session import open_session
from nas.searchers.evolution import Evolution
from nas.searchers.gates import Gates
from nas.searchers.pruner import Pruner
from nas.searchers.router import Router
from nas.study import Study
from search_spaces.branches import Branches
from search_spaces.intervals import equal, uniform
from search_spaces.options import Options
from search_spaces.patterns import ALL, Every, Only
from search_spaces.shipped.graph import AROUND
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, TrainAutoencoder

STEPS = 20
SCALES = (1.0, 1.5, 2.5)
SHARE = 0.5
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
        searcher = Gates(Router(steps=4 if few else 4000, batch=16, learning_rate=0.01), ("threshold",), threshold=0.1)
    study = replace(setting.study, name=f"transformer-{kind}", space=space, searchers={kind: searcher}, limits=limits)
    if kind != "evolution":
        study = replace(study, trials=1, verified=1)
    run = borrow(setting.run, setting.folder / kind)
    with open_session(study, run) as session:
        for _ in session.prepare(threads=1):
            pass
        conductor = session.conductor(kind)
        session.run(conductor)
        done = [t for t in conductor.ledger.trials if t.status == "complete" and t.score is not None]
        best = min(done, key=lambda trial: trial.score.values["fd"])  # type: ignore[union-attr]
        decoded: Schedule = space.decode(best.genome)
        return decoded


def found(setting: Setting, scale: float, kind: str) -> Row:
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
    frozen: dict[str, tuple[Any, ...]] = {
        "searched reuse": (found, setting, scale, "evolution"),
        "gates": (found, setting, scale, "gates"),
        "Learning-to-Cache's router at 0.1": (found, setting, scale, "router"),
        "FORA": (judge, setting, fora(setting, scale), scale),
        "ten steps": (judge, setting, setting.everywhere(scale, STEPS // 2), scale),
    }
    bench.rows(frozen)
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
