"""One run folder held open by one process: prepare what is missing, then search, resuming what is there.

<run>/study.json     what is searched, for `nas status` and `nas compare`
<run>/supernet/      weights, or the checkpoint of an unfinished training
<run>/features/      the feature extractor
<run>/learned/       what searchers learned from the supernet before they searched
<run>/working.json   what is being prepared at the moment, for `nas status`
<run>/times.json     what calls take, where time is limited; <run>/latency.json: all that was timed, by device
<run>/journal.log    the ledgers, unless --storage names another place
<run>/report/        pictures and tables
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nas.contracts import Genome, LearningSearcher, Problem, Progress, Score, Trial, UserError
from nas.engine.enqueued import Enqueued
from nas.engine.facts import FILE, write_facts
from nas.engine.ladder import Ladder
from nas.engine.learning import Learner, learn_once, learned_tensors, wants_to_learn
from nas.engine.ledger import Ledger, known_scores
from nas.engine.runner import Conductor, run_here
from nas.engine.storage import close_storage, lock_run, open_storage
from nas.engine.timing import measure
from nas.engine.working import noted
from nas.engine.writers import Wait, only_writer
from nas.genomes.genetics import uniform_genomes
from nas.genomes.timed import Timing
from nas.searchers.uniform import UniformSearch
from nas.study import BASELINE, CONFIRMED, LedgerInfo, Study

if TYPE_CHECKING:
    from nas.engine.cluster import Workers


class Session:
    """A study in its run folder. Created by `open_session`, which holds the run lock.

    `device` is where this process computes; Ray workers have their own.
    """

    def __init__(self, study: Study, folder: Path, storage: str | None, device: str) -> None:
        self.study = study
        self.folder = folder.resolve()
        self.device = device
        self.storage = open_storage(self.folder, storage, writing=True)
        self._writers: dict[str, ExitStack] = {}
        self._known: dict[tuple[str, int], tuple[str, Score]] = {}
        self._url = storage
        if not (self.folder / FILE).exists():
            write_facts(self.study, self.folder, self._url)

    def prepare(self, threads: int = 0) -> Iterator[Progress]:
        """Trains the supernet and the features where they are missing, on `threads` CPU threads (0: as torch has them, of which `OMP_NUM_THREADS`
        or `torch.set_num_threads` tells, else all cores), and times calls where time is limited, on one."""
        with torch_threads(threads):
            yield from noted(self.study.prepare(self.folder, self.device), self.folder)
        with torch_threads(1):  # as scores are computed
            yield from noted(self._time_calls(), self.folder)

    def _time_calls(self) -> Iterator[Progress]:
        """Measures what calls take that the run folder lacks, where time is limited."""
        study = self.study
        if study.limits_time:
            assert isinstance(study.evaluator, Timing)
            net = study.supernet.load(self.folder / "supernet", self.device)
            yield from measure(study.space, study.evaluator, net, self.folder)

    def learn(self, searcher: str, seed: int = 0, workers: Workers | None = None) -> Iterator[Progress]:
        """Lets a searcher that learns from the supernet do so, once, on one CPU thread or on a Ray worker."""
        if workers is None:
            with torch_threads(1):
                yield from noted(learn_once(self.study, self.folder, self.device, searcher, seed), self.folder)
        elif wants_to_learn(self.study, self.folder, searcher, seed):
            from nas.engine.ray_runner import map_on_ray

            yield Progress(f"{searcher} learns", 0, 1)
            for _ in map_on_ray(partial(Learner, self.study, self.folder), [(searcher, seed)], self.study, workers):
                yield Progress(f"{searcher} learns", 1, 1)

    def ledger(self, info: LedgerInfo, problem: Problem, wait: Wait | None = None) -> Ledger:
        """Opened, and held until what is run on it has ended, or the session. Raises UserError where another writer holds it, which is waited for where `wait` is
        given."""
        held = self._writers.setdefault(info.base_name, ExitStack())
        held.close()
        return Ledger(self.storage, info, problem, held.enter_context(only_writer(self._url, info.name, wait)))

    def conductor(
        self,
        searcher: str,
        seed: int = 0,
        trials: int | None = None,
        on_settled: Callable[[Trial], None] = lambda t: None,
        wait: Wait | None = None,
        patience: int | None = None,
    ) -> Conductor:
        """The searcher's ledger, opened and replayed, and held until it has run or the session ends. The baseline ignores the study's limits; where
        another run is scoring it, on the same database, it is waited for, and `wait` is told. `patience`: schedules that leave the front as it was, after which the
        search ends early.

        Raises UserError where another writer holds the ledger of any other searcher, and for one that has yet to learn.
        """
        study = self.study
        info = study.ledger_info(self.folder, searcher, seed)
        problem = study.problem_in(self.folder)
        patient = (wait or (lambda holder: None)) if searcher == BASELINE else None
        ledger = self.ledger(info, problem, patient)
        write_facts(self.study, self.folder, self._url)
        ladder = Ladder(
            info.rungs, study.objectives, study.trials if trials is None else trials, study.verified, patience=patience
        )
        if searcher == BASELINE:  # all of it, at every rung, whatever the limits
            problem = study.unlimited(self.folder)
            ladder = replace(ladder, trials=len(uniform_genomes(study.space)), everything=True, patience=None)
        recipe = study.searcher(searcher)
        if isinstance(recipe, LearningSearcher):
            if wants_to_learn(study, self.folder, searcher, seed):
                raise UserError(
                    f"{searcher} learns before it searches, and has not; let it, session.learn({searcher!r}, {seed})"
                )
            search = recipe.start(problem, seed, learned_tensors(self.folder, info))
        else:
            search = recipe.start(problem, seed)
        if study.enqueue and searcher != BASELINE:
            search = Enqueued(search, study.enqueue, problem)
        # Shared by all searchers of the session: what one has scored no other scores again.
        for key, score in known_scores(self.storage, info).items():
            self._known.setdefault(key, score)
        with torch_threads(1):  # as a search that learns was told it the first time
            return Conductor(ledger, search, problem, ladder, study.seed, self._known, on_settled)

    def confirmation(self, genomes: Sequence[Genome]) -> Conductor:
        """Scores chosen schedules once more, on noises on which nothing was chosen, with as many samples as verified them. Whatever failed in an earlier
        run is tried again."""
        study, problem = self.study, self.study.unlimited(self.folder)
        info = confirmed_ledger(study, self.folder)
        ledger = self.ledger(info, problem, lambda holder: None)
        ladder = Ladder(info.rungs, study.objectives, len(ledger.trials) + len(genomes), 1, everything=True)
        known = known_scores(self.storage, info)
        search = UniformSearch(genomes)
        return Conductor(ledger, search, problem, ladder, study.seed, known, noise=CONFIRMING, forgiven=genomes)

    def run(self, *conductors: Conductor, workers: Workers | None = None) -> None:
        """Runs the conductors' jobs: one after another in this process, on one CPU thread, or side by side on Ray workers."""
        if workers is not None:
            from nas.engine.ray_runner import run_on_ray

            with torch_threads(1):
                run_on_ray(conductors, self.study, self.folder, workers)
            self._let_go(*conductors)
            return
        for conductor in conductors:
            with torch_threads(1):
                # Loaded anew, so that no searcher profits from states that another one paid for.
                run_here(conductor, partial(self.study.load, self.folder, self.device))
            self._let_go(conductor)

    def _let_go(self, *conductors: Conductor) -> None:
        """Other machines on the database may write these ledgers now."""
        for conductor in conductors:
            if (held := self._writers.get(conductor.ledger.info.base_name)) is not None:
                held.close()

    def close(self) -> None:
        """Lets go of the ledgers, and of the database."""
        for held in self._writers.values():
            held.close()
        close_storage(self.storage)

    def on_one_thread(self, ticks: Iterator[Progress]) -> Iterator[Progress]:
        """Work that scores, on one CPU thread, as scores always are."""
        with torch_threads(1):
            yield from ticks


@contextmanager
def open_session(study: Study, folder: Path, storage: str | None = None, device: str = "cpu") -> Iterator[Session]:
    """Raises UserError where another process holds the folder, or the storage cannot be opened."""
    lock = lock_run(folder)
    try:
        session = Session(study, folder, storage, device)
        try:
            yield session
        finally:
            session.close()
    finally:
        lock.release()


TIMES = "latency.json"
CONFIRMING = "confirmation noise"
"""Purpose of the noises on which what was chosen is scored once more."""


def take_weights(source: Path, folder: Path) -> None:
    """Copies supernet, features and measured times from one run folder to another that has none. Raises UserError where the first holds no trained supernet."""
    if not (source / "supernet" / "weights.safetensors").is_file():
        raise UserError(f"{source} holds no trained supernet; give the folder of a run that was trained to its end")
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "supernet"
    if begun.exists() and not (begun / "weights.safetensors").is_file():
        raise UserError(
            f"{begun} holds a training that was begun; leave --weights-from out to go on with it, or delete it to take those"
        )
    for part in ("supernet", "features"):
        if (source / part).is_dir() and not (folder / part).exists():
            partial = folder / f".{part}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(
                source / part, partial, ignore=shutil.ignore_patterns("checkpoint*", "latents", "*.partial")
            )
            os.replace(partial, folder / part)
    if (source / TIMES).is_file() and not (folder / TIMES).exists():
        partial = folder / f".{TIMES}.partial"
        shutil.copyfile(source / TIMES, partial)
        os.replace(partial, folder / TIMES)


def confirmed_ledger(study: Study, folder: Path) -> LedgerInfo:
    """Its scores are of other noises than those of searches, so no search may take them for its own."""
    like = study.ledger_info(folder, BASELINE, 0)
    kept = {**like.provenance, "seed": f"{study.seed}, {CONFIRMING}", "searcher": "none", "limits": ""}
    return replace(like, searcher=CONFIRMED, rungs=like.rungs[-1:], limits={}, provenance=kept)


@contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """CPU threads of torch, for a while; 0 leaves them as they are. Hands out how many there were."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
