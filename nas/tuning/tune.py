"""Searches a faster schedule for a pipeline folder, verifies it on other noises, and says whether it is one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluators.conditions import lines_of
from evaluators.latency import Timed, Timer
from nas.base.files import read_json, write_json, write_text
from nas.contracts import (
    Genome,
    Guidance,
    LoadedEvaluator,
    LoadedSupernet,
    Progress,
    Schedule,
    Score,
    Step,
    Trial,
    UserError,
    derive_seed,
    digest_of,
)
from nas.engine.runner import Conductor
from nas.engine.session import CONFIRMING, Session, open_session, take_weights, torch_threads
from nas.engine.show import Bar, Show
from nas.genomes.genetics import LATENCY, cheapest, dearest
from nas.handover.portable import resampled, schedule_of
from nas.study import Study
from nas.tuning.found import FAR, Candidate, Found
from nas.tuning.study import LOSS, SEARCHER, Wanted, computed
from search_spaces.patterns import Every, Only, Pattern, Subset
from search_spaces.shipped.schedule_file import ScheduleError, read_schedule

KEPT_FOR_VERIFYING = 5
"""Of so many prompts one."""

FEWER = 3
"""Of so many schedules of whole steps the best is compared with."""

PICTURES = 8

RIVAL = "another_sampler.json"
"""Keeps its score in the run folder."""


def tune(
    wanted: Wanted,
    folder: Path,
    show: Show | None = None,
    device: str = "cpu",
    start: Mapping[str, Any] | None = None,
    beside: Path | None = None,
    also: Mapping[str, Any] | None = None,
) -> Found:
    """`folder`: the run folder; the same call goes on where it stopped. `start`: what a schedule file holds, which is tried first; where it keeps to the limit
    and loses here what it lost where it was found, nothing is searched. `beside`: the run folder of the same pipeline in another number of steps, whose
    weights and times hold here too, and `also`: what was found there, one more first try. Raises UserError where the folder is no pipeline that this can be
    done with, or nothing fits the limit."""
    wanted.check()
    if beside is not None:
        take_weights(beside, folder)
    with torch_threads(1) as threads:  # as calls are timed and samples scored
        return _tune(wanted, folder, show or Show(), device, start, also, threads)


def _tune(
    wanted: Wanted,
    folder: Path,
    show: Show,
    device: str,
    start: Mapping[str, Any] | None,
    also: Mapping[str, Any] | None,
    threads: int,
) -> Found:
    given = None if start is None else given_schedule(wanted, start)
    before = None if also is None or also["sampler"]["class"] != wanted.sampler_name else given_schedule(wanted, also)
    further = [one for one in (given, before) if one is not None]
    patterns = dict.fromkeys(computed(wanted.graph, step.reuse) for one in further for step in one.steps if step.reuse)
    wanted, elsewhere = split_prompts(replace(wanted, further=tuple(patterns)), folder)
    study, milliseconds = limited(wanted, folder, show, device, threads)
    verifying = replace(study, name=f"{study.name}-verified", evaluator=elsewhere.study(study.limits).evaluator)
    with open_session(study, folder, None, device) as session:
        show.follow(session.prepare(threads))
        show.follow(verifying.evaluator.prepare(folder, study.seed, device))
        space: Any = study.problem_in(folder).space
        feasible = study.problem_in(folder).feasible
        tried = {one: tuple(study.space.genome(one)) for one in further}  # type: ignore[attr-defined]
        own = None if given is None else tried[given]
        first_tries = [*filter(feasible, tried.values()), *within(study, folder, baselines(wanted))]
        study = session.study = replace(study, enqueue=tuple(dict.fromkeys(first_tries)))
        full = full_samples(verifying.load(folder, device), wanted)
        apart = 2 * float(full.var(axis=0, ddof=1).mean())
        searched = True
        if own is not None and start is not None and feasible(own):
            searched = not _nothing_lost(_confirmed(session, show, verifying, [own])[own], apart, start)
        _confirmed(session, show, verifying, [])  # where that cannot be, it is said before hours of searching
        trials = _searched(session, show, study.trials + len(study.enqueue)) if searched else []
        best = verified(study, trials) if searched or own is None else own
        whole = _fewer_steps(space, trials) if searched else []
        named = [genome for genome in (best, *whole, own) if genome is not None]
        scores = _confirmed(session, show, verifying, list(dict.fromkeys(named)))
        few = min(whole, key=lambda genome: scores[genome].values[LOSS], default=None)
        judge = verifying.load(folder, device)
        rival = show.follow(_by_rival(wanted, verifying, judge, folder)) if searched else None
    shares = shares_of(study, folder, judge.supernet, list(scores))
    numbers = {trial.genome: trial.number for trial in trials}
    candidates = {
        genome: Candidate(name, space.decode(genome), shares[genome], scores[genome], numbers.get(genome))
        for genome, name in ((own, "given"), (few, "fewer steps"), (best, "found"))
        if genome is not None
    }
    images = pictures(judge, full, [*candidates.values(), *([rival] if rival else [])])
    return Found(
        wanted,
        study,
        candidates[best],
        candidates.get(few) if few else None,
        rival,
        candidates.get(own) if own else None,
        apart,
        len(trials),
        {
            "samples": sum(t.score.spent.get("macs", 0.0) for t in trials if t.score)
            / (study.full["macs"] * (wanted.full_steps or wanted.steps) / wanted.steps),
            "seconds": sum(t.score.spent.get("seconds", 0.0) for t in trials if t.score),
        },
        milliseconds,
        searched,
        None if elsewhere.prompts in (None, wanted.prompts) else len(lines_of(elsewhere.prompts)),
        device,
        images,
    )


def split_prompts(wanted: Wanted, folder: Path) -> tuple[Wanted, Wanted]:
    """Of what is searched on, and of what is verified: every fifth prompt is kept for it alone. Of few prompts it is the same. Files are called after what they
    hold, so that a run that is under way, or done, keeps its own."""
    if wanted.prompts is None:
        return wanted, wanted
    lines = list(dict.fromkeys(line.strip() for line in lines_of(wanted.prompts)))
    if len(lines) < KEPT_FOR_VERIFYING:
        return wanted, wanted
    kept = lines[KEPT_FOR_VERIFYING - 1 :: KEPT_FOR_VERIFYING]
    rest = [line for place, line in enumerate(lines, 1) if place % KEPT_FOR_VERIFYING]
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    found = []
    for name, part in (("searched", rest), ("verified", kept)):
        path = folder / "prompts" / f"{name}-{digest_of(part)}.txt"
        write_text(path, "\n".join(part) + "\n")
        found.append(replace(wanted, prompts=path))
    return found[0], found[1]


# ----------------------------------------------------------------------------------------------------------- the limit


def limited(wanted: Wanted, folder: Path, show: Show, device: str, threads: int) -> tuple[Study, float | None]:
    """The study with its limit, and milliseconds that an image of the full pipeline takes: a share of its time is known when all calls are measured, after
    texts are read on `threads` CPU threads (0: torch's own number)."""
    of_macs = wanted.measure == "macs"
    open_ended = wanted.study({"macs_share": wanted.limit} if of_macs else {LATENCY: 1e12})
    open_ended.check()  # before anything is read or timed
    if of_macs:
        return open_ended, None
    with open_session(open_ended, folder, None, device) as session:
        show.follow(session.prepare(threads))
        net = open_ended.supernet.load(folder / "supernet", device)
        full, decoding = _full_time(open_ended, folder, net)
    limit = wanted.limit * (full + decoding) - decoding
    least = open_ended.problem_in(folder).space.cost(cheapest(open_ended.space))[LATENCY]
    if limit < least:
        raise UserError(
            f"--within time={wanted.limit:g}: the cheapest schedule takes {(least + decoding) / (full + decoding):.2f} of the full pipeline's "
            f"{full + decoding:.3g} ms an image, {decoding / (full + decoding):.0%} of which is decoding; give more"
        )
    return wanted.study({LATENCY: limit}), full + decoding


def _full_time(study: Study, folder: Path, net: LoadedSupernet) -> tuple[float, float]:
    """Milliseconds of the full pipeline's calls for an image, and of decoding it."""
    assert isinstance(study.evaluator, Timed)
    timer = Timer(study.evaluator.latency, net, folder)
    space = study.problem_in(folder).space
    return float(space.cost(dearest(study.space))[LATENCY]), timer.of_decoding()


def shares_of(study: Study, folder: Path, net: LoadedSupernet, genomes: list[Genome]) -> dict[Genome, float]:
    """Of the full pipeline's time with decoding, or of its multiply-adds."""
    costs = {genome: study.problem_in(folder).space.cost(genome) for genome in genomes}
    if not study.limits_time:
        return {genome: float(cost["macs_share"]) for genome, cost in costs.items()}
    full, decoding = _full_time(study, folder, net)
    return {genome: (cost[LATENCY] + decoding) / (full + decoding) for genome, cost in costs.items()}


# --------------------------------------------------------------------------------------------------------- first tries


def baselines(wanted: Wanted) -> dict[str, list[tuple[Pattern, int]]]:
    """Fixed rules by what they are called, each from the dearest on, with from which step on nothing is guided: fewer steps, whole; every so many steps whole
    with others between, guided throughout; and all steps whole, guided up to one of them (TGATE)."""
    count = wanted.steps
    found: dict[str, list[tuple[Pattern, int]]] = {}
    for spacing in ("uniform", "quadratic"):
        found[f"{spacing} steps"] = [(Subset(n, spacing), count) for n in range(count - 1, 0, -1)]
    for pattern in wanted.patterns:
        between = pattern.steps(1)[0]
        if isinstance(pattern, Only) and between:
            found[f"every few whole, {pattern.label} between"] = [
                (Every(n, between), count) for n in range(2, min(count, 10) + 1)
            ]
    if wanted.scale is not None:
        found["guided at first"] = [(Every(1), stop) for stop in range(count - 1, 0, -1)]
    return found


def within(study: Study, folder: Path, rules: Mapping[str, list[tuple[Pattern, int]]]) -> list[Genome]:
    """Of each rule the dearest schedule that keeps to the limit."""
    problem = study.problem_in(folder)
    space: Any = study.space
    found = []

    def genome(rule: tuple[Pattern, int]) -> Genome:
        made: Genome = space.genome(space.running(*rule))
        return made

    for schedules in rules.values():
        # The schedules of a rule fall in cost, so that few of them have to be made and looked for in the space, which takes a while.
        first = bisect_left(schedules, True, key=lambda rule: problem.feasible(genome(rule)))
        found += [genome(rule) for rule in schedules[first : first + 1]]
    return found


def read_file(path: Path) -> Mapping[str, Any]:
    """What a schedule's file holds. Raises UserError where it is none of this version, or damaged."""
    try:
        return read_schedule(path)
    except ScheduleError as error:
        raise UserError(str(error)) from error


def given_schedule(wanted: Wanted, plan: Mapping[str, Any]) -> Schedule:
    """A file's schedule on this grid of steps, and guided as this pipeline is. Raises UserError for one of another kind of network, or of another sampler."""
    net = wanted.net
    if plan["sampler"]["class"] != wanted.sampler_name:
        raise UserError(
            f"the schedule is of the sampler {plan['sampler']['class']}, this pipeline's is {wanted.sampler_name}; leave --start out"
        )
    if plan["network"]["branches"] != list(wanted.graph.names(True)):
        raise UserError(
            f"the schedule was found for a network of {len(plan['network']['branches'])} branches, this one has {len(wanted.graph.names(True))}; search anew"
        )
    graph = wanted.graph

    def named(reuse: tuple[str, ...]) -> tuple[str, ...]:
        """As a space says it: others may say it in another order, or list the branches of a block."""
        every = graph.expand(graph.blocks)
        asked = every - graph.expand(reuse)
        runs = every if asked == every else graph.live(computed(graph, reuse), graph.predicts_anew)
        if graph.live(runs, "layers") != graph.live(asked, "layers"):
            raise UserError(
                f"the schedule reuses {', '.join(reuse)} at a step, where the blocks {', '.join(graph.blocks)} are searched whole; leave --start out"
            )
        return graph.collapse(every - runs, graph.predicts_anew)

    told = schedule_of(plan, net.anatomy.full)
    # By DDIM a step that holds the prediction goes on where a longer one before it would have.
    whole = len(graph.expand(graph.blocks))
    held = wanted.sampler_name == "DDIM" and not graph.predicts_anew
    steps = [step for step in told.steps if not (held and len(graph.expand(step.reuse)) == whole)]
    own = Schedule(tuple(replace(step, reuse=step.reuse and named(step.reuse)) for step in steps))
    grid = plan["measured"].get("grid", [step["timestep"] for step in plan["steps"]])
    moved = resampled(own, grid, wanted.grid(wanted.steps))
    guide = None if wanted.scale is None else Guidance(wanted.scale)
    return Schedule(tuple(step if step.guidance is None else replace(step, guidance=guide) for step in moved.steps))


# ----------------------------------------------------------------------------------------------------------- searching


def _searched(session: Session, show: Show, count: int) -> list[Trial]:
    bar = show.bar(SEARCHER)
    return _run(session, show, bar, session.conductor(SEARCHER, 0, count, bar))


def _run(session: Session, show: Show, bar: Bar, conductor: Conductor) -> list[Trial]:
    """The scored trials, those of before included."""
    bar.begin(conductor)
    session.run(conductor, workers=show.workers)
    bar.end()
    return [trial for trial in conductor.ledger.trials if trial.scored]


def verified(study: Study, trials: Sequence[Trial]) -> Genome:
    """The best of those that were scored on the last rung, within the limit."""
    last = study.evaluator.rungs[-1]
    done = [t for t in trials if t.rung == last and all(excess <= 0 for excess in t.violations.values())]
    if not done:
        raise UserError("no schedule within the limit was verified; give more --trials, or a wider limit")
    return min(done, key=lambda trial: trial.objectives((LOSS,))).genome


def _fewer_steps(space: Any, trials: list[Trial]) -> list[Genome]:
    """The best few within the limit of those that were scored whose steps run whole, guided as the full pipeline; by the first rung, where all were, of which the
    best one is not known."""
    full = space.decode(dearest(space)).steps
    whole = {step.timestep: step for step in full}
    scored: dict[Genome, float] = {}
    for trial in trials:
        if all(excess <= 0 for excess in trial.violations.values()) and trial.genome not in scored:
            steps = space.decode(trial.genome).steps
            if all(whole.get(step.timestep) == step for step in steps):
                scored[trial.genome] = trial.objectives((LOSS,))[0]
    return sorted(scored, key=lambda genome: scored[genome])[:FEWER]


def _nothing_lost(score: Score, apart: float, start: Mapping[str, Any]) -> bool:
    """Whether a schedule that was given loses no larger share of the way to unrelated samples than where it was found, beyond two errors, and is near."""
    before = start["measured"]
    if before.get("loss") is None or not before.get("apart"):
        return False
    lost, error = score.values[LOSS] / apart, score.error(LOSS) / apart
    return lost - 2 * error <= before["loss"] / before["apart"] and lost <= FAR


def _confirmed(session: Session, show: Show, verifying: Study, genomes: list[Genome]) -> dict[Genome, Score]:
    """On the noises, and what samples are told, that nothing was searched on."""
    searching, session.study = session.study, verifying
    try:
        conductor = session.confirmation(genomes)
        trials = _run(session, show, show.bar("confirming"), conductor)
        conductor.check_scored(genomes)
    finally:
        session.study = searching
    return {t.genome: t.score for t in trials if t.score is not None and t.genome in genomes}


def _by_rival(
    wanted: Wanted, study: Study, judge: LoadedEvaluator, folder: Path
) -> Generator[Progress, None, Candidate | None]:
    """Returns the most whole steps of another sampler that keep to the limit, scored on the noises that confirm; once for all calls. None where there is no
    other sampler, or not one of its steps keeps to it."""
    if wanted.rival is None:
        return None
    guide = None if wanted.scale is None else Guidance(wanted.scale)
    whole, decoding = _full_time(study, folder, judge.supernet) if study.limits_time else (1.0, 0.0)
    shares = {n: (whole * n / wanted.steps + decoding) / (whole + decoding) for n in range(1, wanted.steps)}
    count = max((n for n, share in shares.items() if share <= wanted.limit), default=0)
    if not count:
        return None
    steps = tuple(Step(t, wanted.net.anatomy.full, (), guide) for t in wanted.rival_grid(count))
    schedule = Schedule(steps, wanted.rival.name)
    rung, kept = study.evaluator.rungs[-1], folder / RIVAL
    key = digest_of([schedule.digest, study.evaluator.digest(folder), rung])
    known = read_json(kept, "delete it") if kept.exists() else {}
    if key not in known:
        yield Progress("another sampler", 0, 1)
        known[key] = judge(schedule, rung, derive_seed(study.seed, CONFIRMING)).to_json()
        write_json(kept, known)
        yield Progress("another sampler", 1, 1)
    return Candidate("another sampler", schedule, shares[count], Score.from_json(known[key]))


def full_samples(evaluator: LoadedEvaluator, wanted: Wanted) -> npt.NDArray[np.float64]:
    """Of the full pipeline, (samples, channels, height, width)."""
    guide = None if wanted.scale is None else Guidance(wanted.scale)
    full = Schedule(
        tuple(Step(t, wanted.net.anatomy.full, (), guide) for t in wanted.grid(wanted.full_steps or wanted.steps))
    )
    found: npt.NDArray[np.float64] = (
        evaluator.sample(full, max(PICTURES, wanted.samples[0]), derive_seed(0, "pictures")).double().cpu().numpy()
    )
    return found


def pictures(
    evaluator: LoadedEvaluator, full: npt.NDArray[np.float64], candidates: Sequence[Candidate]
) -> dict[str, Any]:
    """A few samples of each schedule, of the same noises as those of the full pipeline."""
    images = {"full pipeline": full[:PICTURES].astype(np.float32)}
    for candidate in candidates:
        images[candidate.name] = (
            evaluator.sample(candidate.schedule, PICTURES, derive_seed(0, "pictures")).cpu().numpy()
        )
    return images
