"""Latent diffusion from nothing, on garments: what it takes, how good it is, and against pixels.

`studies/fashion_latent.py` on Fashion-MNIST, 60,000 images to train on and 10,000 held out, on this machine's cores. Written down before the
rows; training seed 0 throughout, so that intervals are those of sampling alone:

1. Minutes: the autoencoder, the latents, judge and supernet, the search (evolution, 60 trials), the export, as `make fashion` runs them.
2. How good: FD to the held-out images, by a judge that the search does not know, trained longer and with a finer last map, of the train images (the floor of any network), of the held-out images'
reconstructions (the floor of any network on these latents), and of samples of the full network, 2,048 at 10 and 20 steps and 10,000 at 50,
unguided and guided everywhere at 1.5 and 2, with the judge's accuracy; noises and labels that nothing was chosen on. Targets at 50 steps, at the
guidance of least FD.
3. Against pixels: the same kind of network on 32x32 pixels with about as many multiply-adds a call, trained with as many multiply-adds
as the latent network and its autoencoder together. FD of 4,096 samples of each at as many multiply-adds an image, decoding included
(the latent network at 20 steps), and at as much time an image; the difference's interval is 1.96 standard errors.
4. Memory: peak of a worker that scores 2,048 samples.
5. Repeated images: `nearer_than_held_out` of 4,096 samples of the full network, 20 steps, guided at 1.5.

A first run had the study's own judge in place of that of 2., which turned out to be right about 89.35 % of held-out images alone where at least 90 % are
wanted of a judge. Its rows up to 20 steps were seen, and are withdrawn: FD of reconstructions 0.339; 10 and 20 steps, unguided, 1.5, 2: FD 0.79, 0.98,
1.30 and 0.56, 0.73, 1.02, accuracy 0.837, 0.937, 0.962 and 0.825, 0.929, 0.961. Autoencoder, network and search are that run's; what they are judged
by is made anew, and nothing else was changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Benchmark, Target, copied
from evaluators.agreement import Agreement
from evaluators.features import SmallClassifier
from evaluators.frechet import Frechet
from evaluators.latency import Latency, Timer
from evaluators.scoring import Scores
from nas.contracts import Evaluator, Guidance, Schedule, Score, Step, derive_seed
from nas.engine.session import open_session
from nas.study import Study
from search_spaces.intervals import uniform
from search_spaces.stepwise import Stepwise
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich, TrainAutoencoder
from studies import fashion_latent as latent

STEPS = (10, 20, 50)
STRENGTHS: tuple[float | None, ...] = (None, 1.5, 2.0)
COMPARED = 20
JUDGE = 1000
"""The judge's training seed."""

PIXEL_UNET = {
    **latent.UNET,
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
}
"""23.1 million multiply-adds a call, as the latent network's 23.0."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """`folder`: where the two run folders lie."""

    folder: Path
    quick: bool

    @cached_property
    def study(self) -> Study:
        if not self.quick:
            return latent.study
        codec = TrainAutoencoder(in_channels=1, latent_channels=3, channels=(16, 16, 16), steps=20, warmup=5)
        net = replace(latent.net, codec=codec)
        few, judge = replace(latent.images, count=600), replace(latent.judge, steps=40)
        labels = replace(latent.labels, images=few)
        parts: tuple[Evaluator, ...] = (
            Frechet(few, judge, rungs=(32, 64), conditions=labels),
            Agreement(few, judge, rungs=(32, 64), conditions=labels),
        )
        space = Stepwise(net, uniform(6), (2, 2, 2), guidance=(None, 1.5))
        return replace(
            latent.study,
            name="fashion-latent-quick",
            space=space,
            supernet=net,
            images=few,
            training=Sandwich(steps=20, batch=16, warmup=5),
            evaluator=Scores(parts),
            trials=4,
            verified=2,
        )

    @property
    def run(self) -> Path:
        return self.folder / "latent"

    @property
    def net(self) -> Elastic:
        net = self.study.supernet
        assert isinstance(net, Elastic)
        return net

    @property
    def prepared(self) -> Path:
        """What the run's preparation took."""
        return self.folder / "prepared.json"

    @property
    def judged(self) -> Path:
        """Where the judge lies."""
        return self.folder / "judge"

    def scores(self, samples: int) -> Scores:
        judge = SmallClassifier(steps=40 if self.quick else 4000, cells=4, decay=True)
        frechet, agreement = (
            replace(part, rungs=(samples,), batch=256)
            for part in self.study.evaluator.parts  # type: ignore[attr-defined]
        )
        return Scores((replace(frechet, features=judge), replace(agreement, judge=judge)))

    def samples(self, many: int) -> int:
        return 64 if self.quick else many

    def everywhere(self, steps: int, strength: float | None, net: Elastic | None = None) -> Schedule:
        guidance = None if strength is None else Guidance(strength)
        arch = (net or self.net).anatomy.full
        return Schedule(tuple(Step(t, arch, (), guidance) for t in uniform(steps)))


def lend(setting: Setting, run: Path) -> None:
    """Copies the trained network into another run folder that has none, so that it goes where that goes. Where there is none, it is trained first: some half
    an hour of two cores."""
    if (run / "supernet").is_symlink():
        (run / "supernet").unlink()
    if (run / "supernet").exists():
        return
    if not (setting.run / "supernet" / "weights.safetensors").exists():
        print(f"training the network of benchmarks.latent in {setting.run}", file=sys.stderr, flush=True)
        prepare(setting)
    copied(setting.run / "supernet", run / "supernet")


def prepare(setting: Setting) -> Row:
    """Autoencoder, latents, judge and supernet, as `nas run` makes them; what it took from nothing is kept, for others ask for them too."""
    kept, from_nothing = setting.prepared, not setting.run.exists()
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    seconds: dict[str, float] = {}
    with open_session(setting.study, setting.run) as session:
        started = time.perf_counter()
        for tick in session.prepare():
            now = time.perf_counter()
            seconds[tick.what] = seconds.get(tick.what, 0.0) + now - started
            started = now
    told = json.loads((setting.run / "supernet" / "autoencoder" / "training.json").read_text())
    row = {
        **{f"{name}_s": value for name, value in seconds.items()},
        "squared_error": told["squared_error"],
        "share_of_noise": told["share_of_noise"],
    }
    if from_nothing:
        kept.write_text(json.dumps(row))
    return row


def search(setting: Setting) -> Row:
    """By evolution, on one thread, as `nas run` does without workers."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    with open_session(setting.study, setting.run) as session:
        conductor = session.conductor("evolution")
        session.run(conductor)
        trials = conductor.ledger.trials
    return {"search_s": time.perf_counter() - started, "trials": len(trials)}


def export(setting: Setting, file: str) -> Row:
    """By the command, of the best within the study's limit."""
    to = setting.folder / "exported"
    shutil.rmtree(to, ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "-m", "nas.cli", "export", file, "--within", "macs_share=0.5", "--to", str(to)]
    subprocess.run([*command, "--out", str(setting.run)], check=True, stdout=subprocess.DEVNULL)
    return {"export_s": time.perf_counter() - started}


def prepare_judge(setting: Setting) -> Row:
    """The one of all rows that follow."""
    started = time.perf_counter()
    for _ in setting.scores(2).prepare(setting.judged, JUDGE, "cpu"):
        pass
    return {"seconds": time.perf_counter() - started}


def judge(setting: Setting, schedule: Schedule, samples: int) -> Row:
    torch.set_num_threads(1)
    net = setting.net.load(setting.run / "supernet", "cpu")
    score = setting.scores(samples).load(net, setting.judged)(schedule, samples, derive_seed(0, "latent benchmark"))
    return of_score(score, samples)


def of_score(score: Score, samples: int) -> Row:
    return {
        "samples": samples,
        "fd": score.values["fd"],
        "fd_error": score.error("fd"),
        "accuracy": 1 - score.values["disagreement"],
        "replicates": {"fd": score.replicates["fd"]},
    }


def grounds(setting: Setting, samples: int) -> Row:
    torch.set_num_threads(1)
    net = setting.net.load(setting.run / "supernet", "cpu")
    evaluator = setting.scores(samples)
    told = evaluator.load(net, setting.judged).grounds(
        setting.everywhere(COMPARED, 1.5), samples, derive_seed(0, "latent benchmark")
    )
    assert told is not None
    held_out = evaluator.parts[1].judge.held_out_accuracy(setting.judged)  # type: ignore[attr-defined]
    return {**told, "nearer": {str(q): share for q, share in told["nearer"].items()}, "judge_accuracy": held_out}


WORKER = """
import resource
from pathlib import Path
from benchmarks.latent import Setting, judge
setting = Setting(Path({folder!r}), {quick})
judge(setting, setting.everywhere(10, None), setting.samples(2048))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def worker(setting: Setting) -> Row:
    """Peak memory of a process of its own, that loads the study as a worker does and scores."""
    program = WORKER.format(folder=str(setting.folder), quick=setting.quick)
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return {"rss_mib": float(done.stdout.splitlines()[-1])}


def arm(steps: int, strength: float | None) -> str:
    return f"{steps} steps, {'unguided' if strength is None else f'guided at {strength:g}'}"


def pixel_net() -> Elastic:
    return Elastic(PIXEL_UNET, latent.net.widths)


def train_pixels(setting: Setting) -> Row:
    """The pixel network, with the multiply-adds that latent network and autoencoder took."""
    torch.set_num_threads(1)
    study, net = setting.study, pixel_net()
    training = study.training
    assert isinstance(training, Sandwich)
    budget = training.macs(setting.net) + setting.net.codec.training_macs(setting.net.state_shape)
    steps = max(10, round(budget / training.macs(net) * training.steps))
    run = setting.folder / "pixels"
    for _ in replace(training, steps=steps).run(net, study.images, run / "supernet", 0, "cpu"):
        pass
    return {"steps": steps, "training_macs": budget, "macs": net.cost(net.anatomy.full).macs}


def against_pixels(setting: Setting) -> Row:
    """Both at as many multiply-adds, and at as much time, as the latent network takes for an image of 20 steps."""
    torch.set_num_threads(1)
    ours, theirs = (
        setting.net.load(setting.run / "supernet", "cpu"),
        pixel_net().load(setting.folder / "pixels" / "supernet", "cpu"),
    )
    samples, seed = setting.samples(4096), derive_seed(0, "latent against pixels")
    schedule = setting.everywhere(COMPARED, 1.5)
    timer, other = (
        Timer(Latency(), net, folder) for net, folder in ((ours, setting.run), (theirs, setting.folder / "pixels"))
    )
    macs = sum(map(ours.macs, schedule.steps)) + setting.net.codec.decoder_macs(setting.net.state_shape)
    time_ = timer.of_schedule(schedule)[0] + timer.of_decoding()
    [call] = setting.everywhere(1, 1.5, theirs.recipe).steps
    found: Row = {"macs": macs, "ms": time_}
    first = setting.scores(samples).load(ours, setting.judged)(schedule, samples, seed)
    found["latent_fd"] = first.values["fd"]
    each = {"macs": macs / theirs.macs(call), "time": time_ / other.of_schedule(Schedule((call,)))[0]}
    for name, exact in each.items():
        steps = max(1, round(exact))
        second = setting.scores(samples).load(theirs, setting.judged)(
            setting.everywhere(steps, 1.5, theirs.recipe), samples, seed
        )
        # Noises differ in shape, so nothing is paired: the errors add.
        error = (first.error("fd") ** 2 + second.error("fd") ** 2) ** 0.5
        difference = first.values["fd"] - second.values["fd"]
        found[f"pixel_fd_at_equal_{name}"] = second.values["fd"]
        found[f"pixel_steps_at_equal_{name}"] = steps
        found[f"difference_at_equal_{name}"] = (difference, difference - 1.96 * error, difference + 1.96 * error)
    return found


SMALL = "from benchmarks.latent import Setting\nfrom pathlib import Path\nstudy = Setting(Path('.'), True).study\n"


def main() -> None:
    bench = Benchmark("latent", __doc__ or "", ("studies/fashion_latent.py", "search_spaces/codec.py"))
    setting = Setting(bench.folder, bench.quick)
    file = "studies/fashion_latent.py"
    if bench.quick:
        file = str(bench.folder / "small.py")
        Path(file).write_text(SMALL)
    # What is timed begins at nothing: a row that was not finished is made whole.
    if not (bench.has("prepare") or setting.prepared.exists()):
        shutil.rmtree(setting.run, ignore_errors=True)
    if not bench.has("search"):
        for left in setting.run.glob("journal.*"):
            left.unlink()
    made = [
        bench.row("prepare", lambda: prepare(setting)),
        *bench.rows({"search": (search, setting)}).values(),
        bench.row("export", lambda: export(setting, file)),
    ]
    bench.row("judge", lambda: prepare_judge(setting))
    many, last = setting.samples(10_000), STEPS[0] if bench.quick else STEPS[-1]
    jobs: dict[str, tuple[Any, ...]] = {
        "grounds": (grounds, setting, setting.samples(4096)),
        "worker": (worker, setting),
    }
    for steps in STEPS[:1] if bench.quick else STEPS:
        for strength in STRENGTHS:
            count = many if steps == last else setting.samples(2048)
            jobs[arm(steps, strength)] = (judge, setting, setting.everywhere(steps, strength), count)
    if "pixels" not in bench.without:
        jobs["pixels"] = (train_pixels, setting)
    rows: Mapping[str, Row] = bench.rows(jobs)
    over_pixels = None
    if "pixels" in rows:
        compared = bench.rows({"against pixels": (against_pixels, setting)})["against pixels"]
        over_pixels = compared["latent_fd"] / compared["pixel_fd_at_equal_macs"]
    best = min((rows[arm(last, strength)] for strength in STRENGTHS), key=lambda row: float(row["fd"]))
    seconds = sum(value for row in made for key, value in row.items() if key.endswith("_s"))
    floor = rows["grounds"]["fd_of_reconstructions"]
    bench.finish(
        [
            Target(
                "latent_minutes",
                "minutes from nothing to an exported model: autoencoder, latents, judge, supernet, search, export",
                60,
                seconds / 60,
            ),
            Target(
                "latent_accuracy",
                f"share of {many:,} samples that a judge, right about {rows['grounds']['judge_accuracy']:.1%} of held-out images, puts into the class asked "
                "for; full network, 50 steps, the guidance of least FD",
                0.9,
                best["accuracy"],
                at_most=False,
            ),
            Target(
                "latent_fd_ratio",
                f"FD of the same samples over that of the held-out images' reconstructions ({floor:.3g})",
                2.5,
                best["fd"] / floor,
            ),
            Target("worker_rss_mib", "peak memory of a worker, MiB", 1500, rows["worker"]["rss_mib"]),
            Target(
                "latent_over_pixel_fd",
                "FD in latents over FD in pixels, equal training multiply-adds, equal multiply-adds an image",
                None,
                over_pixels,
            ),
        ]
    )


if __name__ == "__main__":
    main()
