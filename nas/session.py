"""One run folder held open by one process: prepare what is missing, then search, resuming what is there.

<run>/study.json     what is searched, for `nas status` and `nas compare`
<run>/supernet/      weights, or the checkpoint of an unfinished training
<run>/features/      the feature extractor
<run>/learned/       what searchers learned from the supernet before they searched
<run>/times.json     what calls take, where time is limited; <run>/latency.json: all that was timed, by device
<run>/journal.log    the ledgers, unless --storage names another place
<run>/report/        pictures and tables
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from nas.contracts import LearningSearcher, Progress, Trial
from nas.genetics import uniform_genomes
from nas.ladder import Ladder
from nas.learning import Learner, learn_once, learned_tensors, wants_to_learn
from nas.ledger import Ledger, known_scores, lock_run, open_storage, url_without_password
from nas.report import RUN
from nas.runner import Conductor, run_here
from nas.study import BASELINE, Study

if TYPE_CHECKING:
    from nas.ray_runner import Workers

VERSIONS = ("step-aware-nas", "torch", "diffusers", "optuna", "ray", "numpy")


class Session:
    """A study in its run folder. Created by `open_session`, which holds the run lock.

    `device` is where this process computes; Ray workers have their own.
    """

    def __init__(self, study: Study, folder: Path, storage: str | None, device: str) -> None:
        self.study = study
        self.folder = folder.resolve()
        self.device = device
        self.storage = open_storage(self.folder, storage, repair=True)
        self._url = storage
        if not (self.folder / RUN).exists():
            self._write_facts()

    def prepare(self, threads: int = 0) -> Iterator[Progress]:
        """Trains the supernet and the features where they are missing, on `threads` CPU threads (0: all cores), and times calls where time is
        limited, on one."""
        with torch_threads(threads or os.cpu_count() or 1):
            yield from self.study.prepare(self.folder, self.device)
        with torch_threads(1):  # as scores are computed
            yield from self.study.time_calls(self.folder, self.device)

    def learn(self, searcher: str, seed: int = 0, workers: Workers | None = None) -> Iterator[Progress]:
        """Lets a searcher that learns from the supernet do so, once, on one CPU thread or on a Ray worker."""
        if workers is None:
            with torch_threads(1):
                yield from learn_once(self.study, self.folder, self.device, searcher, seed)
        elif wants_to_learn(self.study, self.folder, searcher, seed):
            from nas.ray_runner import map_on_ray

            yield Progress(f"{searcher} learns", 0, 1)
            for _ in map_on_ray(partial(Learner, self.study, self.folder), [(searcher, seed)], self.study, workers):
                yield Progress(f"{searcher} learns", 1, 1)

    def conductor(
        self,
        searcher: str,
        seed: int = 0,
        trials: int | None = None,
        on_settled: Callable[[Trial], None] = lambda t: None,
    ) -> Conductor:
        """The searcher's ledger, opened and replayed. The baseline ignores the study's limits."""
        study = self.study
        info = study.ledger_info(self.folder, searcher, seed)
        problem = study.problem_in(self.folder)
        ledger = Ledger(self.storage, info, problem)
        self._write_facts()
        ladder = Ladder(info.rungs, study.objectives, trials or study.trials, study.verified)
        if searcher == BASELINE:  # all of it, at every rung, whatever the limits
            problem = study.unlimited(self.folder)
            ladder = replace(ladder, trials=len(uniform_genomes(study.space)), everything=True)
        recipe = study.searcher(searcher)
        if isinstance(recipe, LearningSearcher):
            search = recipe.start(problem, seed, learned_tensors(self.folder, info))
        else:
            search = recipe.start(problem, seed)
        known = known_scores(self.storage, info)
        return Conductor(ledger, search, problem, ladder, study.seed, known, on_settled)

    def run(self, conductor: Conductor, workers: Workers | None = None) -> None:
        """Runs the conductor's jobs: in this process on one CPU thread, or on Ray workers."""
        if workers is None:
            with torch_threads(1):
                # Loaded anew, so that no searcher profits from states that another one paid for.
                run_here(conductor, self.study.load(self.folder, self.device))
        else:
            from nas.ray_runner import run_on_ray

            run_on_ray(conductor, self.study, self.folder, workers)

    def on_one_thread(self, ticks: Iterator[Progress]) -> Iterator[Progress]:
        """Work that scores, on one CPU thread, as scores always are."""
        with torch_threads(1):
            yield from ticks

    def _write_facts(self) -> None:
        """For a new folder, and again once a ledger has accepted the study as it is now."""
        study = self.study
        facts = {
            "study": study.name,
            "storage": url_without_password(self._url) if self._url else None,
            "baseline": BASELINE,
            "trials": study.trials,
            "objectives": study.objectives,
            "limits": dict(study.limits),
            "rungs": study.evaluator.rungs,
            "choices": [[choice.name, choice.options] for choice in study.space.choices],
            "seed": study.seed,
            "versions": package_versions(),
        }
        partial = self.folder / f"{RUN}.partial"
        partial.write_text(json.dumps(facts, indent=2) + "\n")
        os.replace(partial, self.folder / RUN)


@contextmanager
def open_session(study: Study, folder: Path, storage: str | None = None, device: str = "cpu") -> Iterator[Session]:
    """Raises UserError where another process holds the folder, or the storage cannot be opened."""
    lock = lock_run(folder)
    try:
        yield Session(study, folder, storage, device)
    finally:
        lock.release()


def package_versions() -> dict[str, str]:
    """Of this project and of the libraries that a score may depend on."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """CPU threads of torch, for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
