"""Is a schedule, named before it is trained, as good as the full network once both are trained equally? And of several, how cheap a one?

Several are asked about in a fixed sequence, such as from the largest budget on, until one is not shown to lose nothing: each is asked about only where all before it were
confirmed, so that no correction for their number is needed (Maurer, Hothorn & Lehmacher 1995; Wiens 2003), and what comes after is not trained.

RUN/confirm/NAME/protocol.json      the question, the schedules, seeds, judges and margin, before anything is trained
RUN/confirm/NAME/schedule-0, ...    the schedule's networks as exported, and trained with each seed; full-0, ... the full network's
RUN/confirm/NAME/scores.json        what the judges say of each
RUN/confirm/NAME/verdict.json       no loss, a loss, or not decided; of several schedules all that were asked about
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluators.images import load_once
from nas.base.exported import read_export, read_network
from nas.base.files import read_json, write_json
from nas.base.interrupts import whole
from nas.contracts import Arch, LoadedSupernet, Progress, Schedule, Score, Step, Trial, UserError, derive_seed
from nas.engine.session import torch_threads
from nas.evidence.judges import judges_of
from nas.evidence.protocol import Protocol
from nas.evidence.verdict import Verdict, judged
from nas.genomes.genetics import dearest
from nas.handover.export import export
from nas.handover.training import fine_tune, train_on
from nas.results.report import CONFIRMATIONS, VERDICT, Run
from nas.results.trials import full_network
from nas.study import BASELINE, Study
from search_spaces.shipped.train_diffusers import TRAINED, Settings, keep_settings, settings_of, train

SCHEDULE, FULL = "schedule", "full"
PROTOCOL, SCORES = "protocol.json", "scores.json"
SEQUENCE = "sequence"
"""Of a protocol's settings: the arms that are asked about, in this order, where they are several."""


@dataclass(frozen=True)
class Confirmation:
    """One claim of one study: the arms of its protocol, trained and judged. `folder`: the run's. The protocol's settings hold each arm's `schedules` and
    `gradient_steps`, and what they are trained with."""

    study: Study
    folder: Path
    protocol: Protocol
    device: str = "cpu"

    @property
    def place(self) -> Path:
        return self.folder / CONFIRMATIONS / self.protocol.name

    def schedule(self, arm: str) -> Schedule:
        return Schedule.from_json(json.dumps(self.protocol.settings["schedules"][arm]))

    @property
    def sequence(self) -> tuple[str, ...]:
        """The arms that are asked about, in this order."""
        return tuple(self.protocol.settings.get(SEQUENCE, (SCHEDULE,)))

    @property
    def jobs(self) -> list[tuple[int, str]]:
        """Seeds and arms, whose trainings are independent of each other."""
        return [(seed, arm) for seed in self.protocol.seeds for arm in self.protocol.arms]

    def trained_as(self, arm: str) -> str:
        """The first arm whose networks are trained the same: arms that differ in their steps alone are one training."""
        mine = self._plan(arm)
        return next(other for other in self.protocol.arms if self._plan(other) == mine)

    def _plan(self, arm: str) -> tuple[Any, int]:
        timesteps = int(self.protocol.settings["timesteps"])
        return _served(self.schedule(arm), timesteps), self.protocol.settings["gradient_steps"][arm]

    def run(self) -> Generator[Progress, None, tuple[Verdict, ...]]:
        """Trains and scores what is missing, and writes what comes of it, up to the first arm that is not confirmed. Goes on where it stopped."""
        self.write_down()
        judges, _ = judges_of(self.study)
        for judge in judges:
            yield from judge.prepare(self.folder, self.study.seed, self.device)
        net = self.net()
        for judge in judges:  # what one of them lacks is said before anything is trained
            judge.evaluator.load_features(net, self.folder)
        found: list[Verdict] = []
        for arm in self.sequence:
            yield from self._measured(arm)
            found.append(self.verdict(arm))
            told = [verdict.to_json() for verdict in found]
            write_json(self.place / VERDICT, {"verdicts": told} if SEQUENCE in self.protocol.settings else told[0])
            if not found[-1].confirmed:
                break
        return tuple(found)

    def _measured(self, arm: str) -> Iterator[Progress]:
        """The arm and the reference, with every seed."""
        jobs = [(seed, one) for seed in self.protocol.seeds for one in (arm, self.protocol.reference)]
        for seed, one in jobs:
            yield from self.trained(one, seed)
        done = self._scores()
        for number, (seed, one) in enumerate(jobs):
            yield Progress("judging", number, len(jobs))
            if f"{one}-{seed}" not in done:
                done[f"{one}-{seed}"] = {name: score.to_json() for name, score in self.judged(one, seed).items()}
                write_json(self.place / SCORES, done)
        yield Progress("judging", len(jobs), len(jobs))

    def keep(self, scores: Mapping[str, Any]) -> None:
        """Takes scores that were made elsewhere, by `judged`: of ARM-SEED, by judge, as JSON."""
        self.place.mkdir(parents=True, exist_ok=True)
        write_json(self.place / SCORES, dict(scores))

    def verdict(self, arm: str = SCHEDULE) -> Verdict:
        """Of an arm against the reference, from the kept scores."""
        reference = self.protocol.reference
        judges, seen = judges_of(self.study)
        kept = self._scores()
        net = self.net()
        said = []
        for judge in judges:
            mine, full = (
                [Score.from_json(kept[f"{arm}-{seed}"][judge.name]) for seed in self.protocol.seeds]
                for arm in (arm, reference)
            )
            floor = judge.floor(net, self.folder, self.study.seed)
            fewer = None if judge.reals == judge.samples else judge.reals
            margin = self.protocol.margin
            said.append(judged(judge.name, mine, full, judge.metric, floor, margin, judge.decides, fewer))
        share = sum(map(net.macs, self.schedule(arm).steps)) / sum(map(net.macs, self.schedule(reference).steps))
        digest = self.schedule(arm).digest
        words = full_in_words(self.schedule(reference))
        return Verdict(self.protocol.name, self.protocol.digest, 1 - share, tuple(said), seen, digest, words)

    def write_down(self) -> None:
        """Keeps the protocol. Raises UserError where another one of this name was kept before."""
        path = self.place / PROTOCOL
        if path.exists():
            kept = Protocol.read(path)
            if kept.digest != self.protocol.digest:
                changed = [
                    name
                    for name in (
                        "question",
                        "arms",
                        "reference",
                        "seeds",
                        "outcome",
                        "margin",
                        "test",
                        "stopping",
                        "settings",
                    )
                    if getattr(kept, name) != getattr(self.protocol, name)
                ]
                raise UserError(
                    f"{path} says otherwise ({', '.join(changed)}): a protocol is not changed once it is written; ask as it does, or make a second try under another --name"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.protocol.write(path)

    def net(self) -> LoadedSupernet:
        """Whose subnets the arms are, before they are trained."""
        return self.study.supernet.load(self.folder / "supernet", self.device)

    def trained(self, arm: str, seed: int) -> Iterator[Progress]:
        """Exports the arm's networks and trains them with this seed, unless another arm's are the same."""
        arm = self.trained_as(arm)
        folder = self.place / f"{arm}-{seed}"
        if not (folder / "provenance.json").exists():
            net = self.net()
            schedule = self.schedule(arm)
            with torch_threads(1):
                sampler = self.study.evaluator.load(net, self.folder).sampler_of(schedule)
                export(net, schedule, sampler, {"study": self.study.name, "protocol": self.protocol.digest}, folder)
        settings = self.settings(arm, seed)
        exported = read_export(folder)
        data = load_once(self.study.images)
        classes = data.labels if "null_label" in exported.training else None
        texts = data.texts if "text" in exported.training else None
        keep_settings(folder, settings)
        train_on(self.device)
        ticks = train(folder, data.pixels, settings, self.device == "cpu", False, whole, classes, texts)
        for tick in fine_tune(ticks, folder):
            yield replace(tick, what=f"{arm}, seed {seed}: {tick.what}")

    def settings(self, arm: str, seed: int) -> Settings:
        """As the protocol has them; the schedule's networks get as many multiply-adds of training as the full network."""
        given = settings_of(self.protocol.settings["training"])
        steps = self.protocol.settings["gradient_steps"][arm]
        return replace(given, steps=steps, seed=derive_seed(self.study.seed, seed, "confirmation's training") % 2**31)

    def judged(self, arm: str, seed: int) -> dict[str, Score]:
        """On noises of this seed, on which nothing was chosen; the same for all arms."""
        net = self.net()
        judges, _ = judges_of(self.study)
        trained = self.place / f"{self.trained_as(arm)}-{seed}" / TRAINED
        with torch_threads(1):
            loaded = {judge.name: judge.load(net, self.folder) for judge in judges}
            adopted = read_export(trained)
            for name, arch in adopted.networks.items():
                net.adopt(arch, read_network(trained / name))
            noise = derive_seed(self.study.seed, seed, "confirmation's noise")
            schedule = self.schedule(arm)
            return {judge.name: loaded[judge.name](schedule, judge.samples, noise) for judge in judges}

    def _scores(self) -> dict[str, Any]:
        path = self.place / SCORES
        return read_json(path, "delete it, and the trained networks are scored again") if path.exists() else {}


def protocol_of(
    study: Study,
    folder: Path,
    trials: Sequence[tuple[str, Trial]],
    name: str,
    seeds: int,
    margin: float,
    training: Mapping[str, Any],
    storage: str | None = None,
) -> Protocol:
    """What `nas confirm` will do, in full. `trials`: each with its ledger's name, in the order in which they are asked about; those of one schedule once. `training`: settings of `nas train`
    that differ from its own; `margin`: share of the full network's distance above the floor. Raises UserError for fewer than two seeds."""
    if seeds < 2:
        raise UserError(f"--seeds {seeds}: one training says nothing about the next; give 2 or more")
    judges, seen = judges_of(study)
    full = _full(study, folder, storage)
    net = study.supernet.load(folder / "supernet", "cpu")
    settings = settings_of({**dict(net.training_settings), **training})
    arms = _arms(study, trials)
    schedules = {arm: study.space.decode(trial.genome) for arm, (_, trial) in arms.items()}
    steps = {FULL: settings.steps, **{arm: equal_steps(net, one, settings) for arm, one in schedules.items()}}
    deciding, others = ([j.name for j in judges if j.decides is decides] for decides in (True, False))
    asked = [
        f"{ledger} trial {trial.number}, {trial.cost['macs_share']:.1%} of the MACs" for ledger, trial in arms.values()
    ]
    told = [
        {"ledger": ledger, "number": trial.number, "schedule": schedules[arm].digest}
        for arm, (ledger, trial) in arms.items()
    ]
    one = len(arms) == 1
    return Protocol(
        name=name,
        question=f"Is the schedule of {asked[0]}, trained, as good as the full network equally trained?"
        if one
        else f"Which of these schedules are, trained, as good as the full network equally trained: {'; '.join(asked)}?",
        arms={
            **{
                arm: f"the networks of schedule {schedule.digest}, each fine-tuned on its timesteps, {steps[arm]} gradient steps together"
                for arm, schedule in schedules.items()
            },
            FULL: f"the full network, fine-tuned for as many multiply-adds, {steps[FULL]} gradient steps",
        },
        reference=FULL,
        seeds=tuple(range(seeds)),
        outcome=f"distance to {'the held-out images, which the search was scored against too' if seen else 'held-out images that nothing was chosen on'}, of "
        f"{judges[0].samples} samples of noises of each seed alone, under {' and '.join(deciding)}; reported beside it: {' and '.join(others)}",
        margin=margin,
        test="paired by noise, over training seeds of one supernet: the upper end of the 95 % interval (Student's t over the seeds, at least 1.96 errors of sampling) is "
        "at most the margin, a share of what the full network's distance is above that of equally many real images, under both judges"
        + ("" if one else ". In the order of the arms, each only where all before it were confirmed"),
        stopping="when every seed is trained and judged; no seed is added"
        + ("" if one else ". At the first schedule that is not confirmed"),
        settings={
            "study": study.name,
            "supernet": study.supernet.digest(folder / "supernet"),
            **({"trial": told[0]} if one else {SEQUENCE: list(arms), "trials": told}),
            "schedules": {
                **{arm: json.loads(schedule.to_json()) for arm, schedule in schedules.items()},
                FULL: json.loads(full.to_json()),
            },
            "timesteps": len(net.alphas_cumprod),
            "training": {name: value for name, value in settings.__dict__.items() if name not in ("seed", "steps")},
            "gradient_steps": steps,
            "judges": {judge.name: dict(judge.evaluator.describe()) for judge in judges},
        },
    )


def _arms(study: Study, trials: Sequence[tuple[str, Trial]]) -> dict[str, tuple[str, Trial]]:
    """As they are given, of equal schedules the first."""
    distinct: dict[str, tuple[str, Trial]] = {}
    for ledger, trial in trials:
        distinct.setdefault(study.space.decode(trial.genome).digest, (ledger, trial))
    if len(distinct) == 1:
        return {SCHEDULE: next(iter(distinct.values()))}
    return {f"{SCHEDULE}-{number}": one for number, one in enumerate(distinct.values(), 1)}


def _full(study: Study, folder: Path, storage: str | None) -> Schedule:
    """The full network at every step, guided as does it best."""
    uniform = [t for info, trials in Run.open(folder, storage).ledgers if info.searcher == BASELINE for t in trials]
    found = full_network(uniform, study.objectives[0])
    return study.space.decode(dearest(study.space) if found is None else found.genome)


def full_in_words(schedule: Schedule) -> str:
    """What a schedule of the full network is called: guidance doubles what it costs, and a cheaper one may do without."""
    scales = sorted({step.guidance.scale for step in schedule.steps if step.guidance})
    return "the full network" + (f" guided at {' and '.join(f'{scale:g}' for scale in scales)}" if scales else "")


def _served(schedule: Schedule, timesteps: int) -> dict[Arch, list[tuple[int, int]]]:
    """For each network which training timesteps it serves, from, up to: as exported folders have it in train.json."""
    bounds = [timesteps, *(t + 1 for t in schedule.timesteps[1:]), 0]
    found: dict[Arch, list[tuple[int, int]]] = {}
    for step, start, stop in zip(schedule.steps, bounds[1:], bounds, strict=False):
        for arch in step.archs:
            mine = found.setdefault(arch, [])
            if mine and mine[-1][0] == stop:
                mine[-1] = (start, mine[-1][1])
            else:
                mine.append((start, stop))
    return found


def equal_steps(net: LoadedSupernet, schedule: Schedule, settings: Settings) -> int:
    """Gradient steps in which the schedule's networks take as many multiply-adds of training as the full network in `settings.steps`; every network has the
    share of the steps that its timesteps have."""
    timesteps = len(net.alphas_cumprod)
    mean = sum(
        (stop - start) / timesteps * gradient_macs(net, arch, settings)
        for arch, ranges in _served(schedule, timesteps).items()
        for start, stop in ranges
    )
    return max(1, round(settings.steps * gradient_macs(net, net.full_arch, settings) / mean))


def gradient_macs(net: LoadedSupernet, arch: Arch, settings: Settings) -> int:
    """Multiply-adds of one image of a gradient step of this subnet: forward and backward count thrice, the teacher once, which says where the variance lies of
    networks that have learned that."""
    taught = settings.distillation or settings.features or getattr(net, "learned_variance", False)
    return 3 * net.macs(Step(0, arch)) + (net.macs(Step(0, net.full_arch)) if taught else 0)
