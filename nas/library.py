"""A study in its run folder, from Python: what the commands do, and what they call.

    import nas

    run = nas.open_run("studies/digits.py")        # or a Study, and a folder
    run.search("evolution", trials=60, workers=2)  # trains what is missing first
    print(run.front())                             # pandas
    best = run.best(macs_share=0.5)
    run.export(best, "model")

Every call holds the run folder only while it works, goes on where an earlier one stopped, and raises `nas.UserError` with a sentence for a person.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nas.contracts import Grounded, LoadedEvaluator, Schedule, Score, Trial, UserError, derive_seed
from nas.engine.facts import FILE, read_facts, what_is_searched
from nas.engine.journal import JOURNAL
from nas.engine.session import Session, open_session, take_weights
from nas.engine.show import Called, Show
from nas.engine.storage import lock_run
from nas.genomes.genetics import dearest
from nas.genomes.pareto import front
from nas.results.recommendation import compared_of, recommended
from nas.results.report import Run, best_searcher, verdicts
from nas.results.trials import best_within, verified_front
from nas.study import BASELINE, Study, load_study, noise_of

if TYPE_CHECKING:
    import pandas as pd

    from nas.engine.cluster import Workers
    from nas.evidence.confirm import Confirmation
    from nas.evidence.verdict import Verdict

OnTrial = Callable[[str, Trial], None]
"""Told of each trial of a search that is closed, and of the search, "evolution" or "evolution (seed 1)"; of each once."""


SHOWN = 16
"""Samples in the card of an exported folder."""

QUICK = 1e11
"""Multiply-adds that they may take, some seconds of one CPU core."""


GROUNDED, PATIENCE = 1e12, 30.0
"""Multiply-adds of samples, and seconds of features of all images, that a run may take at its end to tell what its scores stand on."""


@dataclass(frozen=True)
class Chosen:
    """One trial, of which ledger, and its score on noises on which nothing was chosen, where it was scored on them."""

    ledger: str
    trial: Trial
    confirmed: Score | None = None

    @property
    def score(self) -> Score:
        found = self.confirmed or self.trial.score
        assert found is not None
        return found


def open_run(
    study: Study | str | Path,
    folder: str | Path | None = None,
    storage: str | None = None,
    device: str = "cpu",
    show: Show | None = None,
) -> StudyRun:
    """`study`: one, or the file that defines it. `folder`: runs/<study name> by default. `storage`: an Optuna storage URL in place of the folder's journal.
    Nothing is made yet. Raises UserError where the study cannot be read."""
    made = study if isinstance(study, Study) else load_study(study)
    file = "STUDY.py" if isinstance(study, Study) else str(study)
    place = Path("runs") / made.name if folder is None else Path(folder)
    return StudyRun(made, place.resolve(), storage, device, show or Show(), file)


@dataclass(frozen=True)
class StudyRun:
    """Made by `open_run`. `show`: how progress is shown, not at all by default; `file`: the study's, as commands in reports name it."""

    study: Study
    folder: Path
    storage: str | None = None
    device: str = "cpu"
    show: Show = field(default_factory=Show)
    file: str = "STUDY.py"

    # ------------------------------------------------------------------------------------------------------- searching

    def take_weights(self, other: str | Path) -> None:
        """Copies supernet, features and times of another run folder, where this one has none, so that nothing is trained or timed again. Raises UserError where
        the other has none. That they are of the same recipe is checked when they are used."""
        lock = lock_run(self.folder)
        try:
            take_weights(Path(other).resolve(), self.folder)
        finally:
            lock.release()

    def prepare(self, threads: int = 0) -> None:
        """Reads images, trains features and the supernet where they are missing, on so many CPU threads (0: torch's own number), and times calls where time is limited."""
        with self._session() as session:
            self.show.follow(session.prepare(threads))

    def search(
        self,
        *searchers: str,
        trials: int | None = None,
        seed: int = 0,
        seeds: int = 1,
        workers: int | Workers = 0,
        threads: int = 0,
        on_trial: OnTrial | None = None,
        patience: int | None = None,
    ) -> None:
        """Prepares what is missing, scores the baseline, runs these searchers of the study, its first by default, each with `seeds` seeds from `seed` on, and scores
        the best of each budget once more, on noises on which nothing was chosen. `trials`: proposals, the study's by default. `workers`: Ray workers, or none. `patience`: a search ends early
        after so many schedules in a row that leave its front, on the first rung's samples, as it was. Raises UserError for `trials`, `seeds` or `patience` below 1, and where calls are timed
        on another device than workers have."""
        for name, number in {"trials": trials, "seeds": seeds, "patience": patience}.items():
            if number is not None and number < 1:
                raise UserError(f"{name}={number}: give 1 or more, or leave it out")
        pool = _pool(workers, self.device) or self.show.workers
        check_times(self.study, self.device, pool)
        names = [name for name in (searchers or self.study.searchers) if name != BASELINE]
        for name in names:
            self.study.searcher(name)
        names = list(dict.fromkeys(names)) if searchers else names[:1]
        searches = [(name, number) for number in range(seed, seed + seeds) for name in names]
        # One after another here; on workers, side by side once the baseline is known.
        groups = [[one] for one in searches] if pool is None else [searches]
        with self._session() as session:
            self.show.follow(session.prepare(threads))
            with on_workers(pool):
                for group in ([(BASELINE, 0)], *filter(None, groups)):
                    self._search(session, group, trials, pool, on_trial, patience)
                self._confirm_best(session, pool)

    def _search(
        self,
        session: Session,
        group: Sequence[tuple[str, int]],
        trials: int | None,
        pool: Workers | None,
        on_trial: OnTrial | None,
        patience: int | None,
    ) -> None:
        for name, number in group:
            self.show.follow(session.learn(name, number, pool))
        conductors, bars = [], []
        for name, number in group:
            called = name + (f" (seed {number})" if number else "")
            bar = self.show.bar(called)
            bar = bar if on_trial is None else Called(called, on_trial, bar)
            conductors.append(session.conductor(name, number, trials, bar, self.show.waiting(name), patience))
            bar.begin(conductors[-1])
            bars.append(bar)
        session.run(*conductors, workers=pool)
        for bar in bars:
            bar.end()

    def _confirm_best(self, session: Session, pool: Workers | None = None) -> None:
        bar = self.show.bar("confirming")
        found = Run.open(self.folder, session.storage)
        genomes = [t.genome for t in {t.digest: t for t in [*found.chosen(), *compared_of(found)]}.values()]
        conductor = session.confirmation(genomes)
        bar.begin(conductor)
        session.run(conductor, workers=pool)
        bar.end()
        conductor.check_scored(genomes)

    # --------------------------------------------------------------------------------------------------------- looking

    @property
    def results(self) -> Run:
        """The run folder as it stands, as plain data."""
        return Run.open(self.folder, self.storage, what_is_searched(self.study))

    def trials(self, searcher: str | None = None) -> pd.DataFrame:
        """Of all searches, or one: a row for each trial, with its searcher, seed, number, status, samples, genome, costs, scores, and their errors."""
        import pandas as pd

        rows = [
            _row(info.searcher, info.seed, trial)
            for info, trials in self.results.ledgers
            if searcher in (None, info.searcher)
            for trial in trials
        ]
        return pd.DataFrame(rows, columns=None if rows else ["searcher", "seed", "trial", "status"])

    def front(self, searcher: str | None = None) -> pd.DataFrame:
        """Rows of the verified trials that no other is better than in all objectives: of all searches together, or of one."""
        import pandas as pd

        names = self.study.objectives
        found = [
            (info, trial)
            for info, trials in self.results.ledgers
            if searcher in (None, info.searcher)
            for trial in verified_front(trials, names)
        ]
        best = front([trial.objectives(names) for _, trial in found])
        return pd.DataFrame([_row(found[i][0].searcher, found[i][0].seed, found[i][1]) for i in best])

    def best(self, searcher: str | None = None, seed: int = 0, again: bool = True, **limit: float) -> Chosen:
        """The best verified trial within one budget, `best(macs_share=0.5)`, of all searchers of the seed or of one; scored on a third noise, now where it has not
        been, unless not `again`. Raises UserError where none keeps to it."""
        if len(limit) != 1:
            raise UserError(f"best takes one limit, such as macs_share=0.5; {', '.join(limit) or 'none'} was given")
        [(cost, most)] = limit.items()
        meant = self._ledgers(searcher, seed)
        trial = best_within([t for trials in meant.values() for t in trials], cost, most, self.study.objectives[0])
        name = next(name for name, trials in meant.items() if any(trial is one for one in trials))
        return Chosen(name, trial, self._again(trial) if again else self.results.confirmed.get(trial.digest))

    def trial(self, number: int, searcher: str | None = None, seed: int = 0) -> Chosen:
        """A scored trial of a searcher, the study's first by default."""
        [(name, trials)] = self._ledgers(searcher or next(iter(self.study.searchers), "evolution"), seed).items()
        found = next((t for t in trials if t.number == number), None)
        if found is None or found.score is None:
            raise UserError(f"{name} has no scored trial {number}; it has numbers 0 to {len(trials) - 1}")
        return Chosen(name, found)

    def _ledgers(self, searcher: str | None, seed: int) -> dict[str, Sequence[Trial]]:
        every = {(info.searcher, info.seed): (info, trials) for info, trials in self.results.ledgers}
        meant = {key: ledger for key, ledger in every.items() if key[1] == seed and searcher in (None, key[0])}
        if not meant:
            known = ", ".join(f"{name} (seed {s})" for name, s in every)
            wanted = f"trials of searcher {searcher}" if searcher else "trials"
            raise UserError(f"{self.folder} has no {wanted} with seed {seed}; it has {known or 'none'}")
        dropped = 0
        for key, (info, _) in list(meant.items()):
            left_out = searcher is None and key[0] not in (BASELINE, *self.study.searchers)
            try:
                changed = bool(self.study.ledger_info(self.folder, *key).changed(info.provenance))
            except UserError:
                if not left_out:
                    raise
                changed = True
            if changed and left_out:  # of a searcher that the study had once, whose settings nobody knows any more
                del meant[key]
                dropped += 1
            elif changed:
                raise UserError(
                    f"{self.folder} was searched by {key[0]} under another study than {self.study.name} is now; restore the study file or its "
                    "supernet, or name another searcher"
                )
        if searcher is None and all(name == BASELINE for name, _ in meant) and (dropped or self.results.others):
            raise UserError(
                f"{self.folder} holds no search of {self.study.name} with seed {seed} as it is now, of its limits, objectives, rungs and searchers' settings, but others "
                f"are kept there; `nas run` it, restore the study file, or say --searcher {BASELINE} where that is meant"
            )
        return {info.name: trials for info, trials in meant.values()}

    def _again(self, trial: Trial) -> Score:
        """Its score on noises on which nothing was chosen; made now where the run has not."""
        known = self.results.confirmed.get(trial.digest)
        if known is None:
            with open_session(self.study, self.folder, self._kept_storage, self.device) as session:
                conductor = session.confirmation([trial.genome])
                session.run(conductor)
                conductor.check_scored([trial.genome])
            known = self.results.confirmed[trial.digest]
        return known

    @property
    def _kept_storage(self) -> str | None:
        """Where its ledgers are: as given, or as the run's own facts say."""
        if self.storage is not None or not (self.folder / FILE).is_file():
            return self.storage
        kept: str | None = read_facts(self.folder)["storage"]
        return kept

    def schedule(self, chosen: Chosen) -> Schedule:
        return self.study.space.decode(chosen.trial.genome)

    def networks(self, chosen: Chosen) -> dict[int, Any]:
        """Its trained subnets as plain modules, by the timestep at which they run; one module where they are the same. One that only guides is not
        among them."""
        supernet, steps = self.loaded.supernet, self.schedule(chosen).steps
        made = {arch: supernet.extract(arch) for arch in dict.fromkeys(step.arch for step in steps)}
        return {step.timestep: made[step.arch] for step in steps}

    def sample(self, chosen: Chosen, count: int = 64, seed: int = 0) -> npt.NDArray[np.float32]:
        """Images (count, channels, height, width) in [-1, 1]; image i depends on the seed and on i alone."""
        images: npt.NDArray[np.float32] = self.loaded.sample(self.schedule(chosen), count, seed).cpu().numpy()
        return images

    def look_at_grounds(self) -> None:
        """Finds what the scores stand on, as a report does, where that takes no longer than a minute or so; a comparison then says so."""
        from nas.results.grounds import keep_grounds, samples_looked_at

        loaded, count = self.loaded, samples_looked_at(self.study)
        if not isinstance(loaded, Grounded):
            return
        steps = self.study.space.decode(dearest(self.study.space)).steps
        if count * sum(map(loaded.supernet.macs, steps)) <= GROUNDED and loaded.seconds_of_images(count) <= PATIENCE:
            keep_grounds(self.study, self.results, loaded)

    def compare(self) -> dict[str, Any]:
        """Searchers side by side, as plain data; draws report/front.png and report/curves.png."""
        return compared(self.results, self.file)

    def report(self, loaded: LoadedEvaluator | None = None) -> Path:
        """Writes report/index.html, one self-contained page, and its pictures. `loaded`: the evaluator that draws samples, where it is at hand."""
        from nas.results.page import write_page

        self.check()
        self.compare()
        return write_page(self.study, self.file, self.results, loaded or self.loaded)

    @property
    def loaded(self) -> LoadedEvaluator:
        """The supernet and the evaluator with their tensors, loaded anew."""
        return self.study.load(self.folder, self.device)

    def check(self) -> None:
        """Raises UserError where the run was searched under another space, supernet or evaluator than the study has now."""
        now = self.study.ledger_info(self.folder, BASELINE, 0)
        for info, _ in self.results.ledgers:
            changed = [
                part for part in ("space", "supernet", "evaluator") if not now.same(part, info.provenance.get(part))
            ]
            if changed:
                raise UserError(
                    f"{self.folder} was searched with another {' and '.join(changed)} than study {self.study.name} has now; restore the study file"
                )

    # ---------------------------------------------------------------------------------------------------- handing over

    def export(self, chosen: Chosen, to: str | Path, programs: bool = False) -> dict[str, str]:
        """Writes the trial's networks as a folder of stock diffusers models with their pipeline; `programs`: also as torch.export programs, and returned is why
        there is none, for each of which that is so. Raises UserError where the folder is not empty."""
        from nas.handover.export import export

        evaluator = self.study.load(self.folder, "cpu")
        schedule = self.schedule(chosen)
        few = SHOWN * sum(map(evaluator.supernet.macs, schedule.steps)) <= QUICK
        return export(
            evaluator.supernet,
            schedule,
            evaluator.sampler_of(schedule),
            self.provenance(chosen),
            Path(to).resolve(),
            programs,
            evaluator.sample(schedule, SHOWN, derive_seed(self.study.seed, "samples")).numpy() if few else None,
        )

    def export_stock(self, chosen: Chosen, to: str | Path) -> dict[str, Any]:
        """Writes a schedule of one network as diffusers' own pipeline, and returns how that is to be called. Raises UserError where no such pipeline does what
        the schedule does."""
        from nas.handover.stock import export_stock

        evaluator = self.study.load(self.folder, "cpu")
        schedule = self.schedule(chosen)
        return export_stock(
            evaluator.supernet, schedule, evaluator.sampler_of(schedule), self.provenance(chosen), Path(to).resolve()
        )

    def provenance(self, chosen: Chosen) -> dict[str, Any]:
        """As exported folders keep it: which trial of which study it is, its costs and scores, and what tests have shown of it."""
        trial, digest = chosen.trial, self.schedule(chosen).digest
        assert trial.score is not None
        supernet = self.study.supernet.digest(self.folder / "supernet")
        tested = [found["words"] for found in verdicts(self.folder, supernet) if found["schedule"] == digest]
        return {
            "study": self.study.name,
            "ledger": chosen.ledger,
            "trial": trial.number,
            "genome": trial.genome,
            "samples": trial.rung,
            "noise": noise_of(trial.rung, self.study.evaluator.rungs),
            "cost": dict(trial.cost),
            "score": trial.score.to_json(),
            **({"confirmed": chosen.confirmed.to_json()} if chosen.confirmed else {}),
            **({"tested": tested} if tested else {}),
            "supernet": supernet,
            "images": self.study.images.load().digest,
            "data": type(self.study.images).__name__,
        }

    def confirm(
        self,
        chosen: Chosen,
        name: str,
        seeds: int = 3,
        margin: float = 0.05,
        training: Mapping[str, Any] | None = None,
    ) -> Verdict:
        """Trains the schedule and the full network equally with each seed, by a protocol that is written first, to confirm/<name>, and says whether anything is
        lost. `training`: settings as `nas train` has them, such as {"steps": 1000}; nothing is distilled by default. `margin`: a share of what the full network's
        distance is above that of equally many real images. Raises UserError where the study holds no images out, or another protocol of that name was written."""
        [verdict] = self.put_to_the_test(self.confirmation([chosen], name, seeds, margin, training))
        return verdict

    def put_to_the_test(self, made: Confirmation) -> tuple[Verdict, ...]:
        """Trains and judges what is missing. A verdict for each schedule that was asked about, up to the first that is not confirmed."""
        with open_session(self.study, self.folder, self._kept_storage, self.device):
            found: tuple[Verdict, ...] = self.show.follow(made.run())
        return found

    def confirmation(
        self,
        chosen: Sequence[Chosen],
        name: str,
        seeds: int = 3,
        margin: float = 0.05,
        training: Mapping[str, Any] | None = None,
    ) -> Confirmation:
        """What `confirm` will do, of several schedules one after another, begin with the one that is likeliest to lose nothing; its protocol can be written down and read before anything is trained."""
        from nas.evidence.confirm import Confirmation, protocol_of

        given = {"distillation": 0.0, **(training or {})}
        trials = [(one.ledger, one.trial) for one in chosen]
        protocol = protocol_of(self.study, self.folder, trials, name, seeds, margin, given, self.storage)
        return Confirmation(self.study, self.folder, protocol, self.device)

    def _session(self) -> AbstractContextManager[Session]:
        # Begun in a database, it goes on there; a journal of its own comes first.
        journal = self.folder / JOURNAL
        own = journal.is_file() and journal.stat().st_size > 0
        return open_session(self.study, self.folder, self.storage if own else self._kept_storage, self.device)


def compared(run: Run, file: str = "STUDY.py") -> dict[str, Any]:
    """What `Run.compare` says, with pictures of it, and which schedule to take. Raises UserError where there is no search yet."""
    from nas.results.plots import draw_curves, draw_front

    if not run.ledgers:
        raise UserError(f"{run.folder} holds no search; `nas run` makes one")
    facts = {**run.compare(), "recommended": recommended(run, file)}
    ledgers = {row["searcher"]: trials for row, (_, trials) in zip(facts["searchers"], run.ledgers, strict=True)}
    picture, curves = (run.folder / "report" / name for name in ("front.png", "curves.png"))
    draw_front(ledgers, run.facts, run.scale, facts["label"], picture, best_searcher(facts))
    draw_curves(facts["searchers"], facts["area_until_macs"], curves)
    return {**facts, "picture": str(picture), "curves": str(curves)}


def _row(searcher: str, seed: int, trial: Trial) -> dict[str, Any]:
    values = trial.score.values if trial.score else {}
    errors = {f"{name}_error": trial.score.error(name) for name in values} if trial.score else {}
    return {
        "searcher": searcher,
        "seed": seed,
        "trial": trial.number,
        "status": trial.status,
        "samples": trial.rung,
        "genome": trial.genome,
        "schedule": trial.digest,
        **trial.cost,
        **values,
        **errors,
    }


def _pool(workers: int | Workers, device: str) -> Workers | None:
    if not isinstance(workers, int):
        return workers
    if workers == 0:
        return None
    from nas.engine.cluster import Workers as Pool
    from nas.engine.cluster import check_workers

    pool = Pool(workers, device=device)
    check_workers(pool)
    return pool


def check_times(study: Study, device: str, pool: Workers | None) -> None:
    """Raises UserError where calls would be timed on another device than the workers'."""
    if pool is not None and pool.gpus and study.limits_time and not device.startswith("cuda"):
        raise UserError(
            f"calls are timed on the device {device}, but workers with GPUs compute on cuda; give the device cuda too"
        )


@contextmanager
def on_workers(pool: Workers | None) -> Iterator[None]:
    """One cluster for all that is run meanwhile, where there are workers."""
    if pool is None:
        yield
        return
    from nas.engine.cluster import cluster

    with cluster(pool):
        yield
