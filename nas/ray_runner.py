"""The conductor's verbs under Ray Tune: warm workers keep supernet and features loaded from one trial to the next.

Ray Tune schedules, places and restarts workers; what was tried and what came of it stands in the ledger alone, so Tune's
own results are thrown away and its `restore` is not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.contracts import DONE, Schedule, Score, Signal, UserError
from nas.ledger import first_line
from nas.runner import Conductor, attempt
from nas.study import Study

if TYPE_CHECKING:
    from nas.contracts import LoadedEvaluator

# Read by Ray when it is imported. No usage reports; no log files per trial, since the ledger is the log; one state file at
# the end rather than one every few seconds.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Ctrl-C is the caller's: Tune's own handler would end the run as if it had finished.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

import ray
from ray import tune
from ray.tune.search import Searcher as TuneSearcher


@dataclass(frozen=True)
class Workers:
    """`count` workers of one CPU each and `gpus` GPUs each (a fraction shares one), on this machine or on the cluster at
    `address`. With GPUs the workers' device is "cuda", else `device`."""

    count: int = 2
    gpus: float = 0.0
    address: str | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.count < 1 or self.gpus < 0:
            raise UserError(
                f"{self.count} workers with {self.gpus:g} GPUs each cannot run; use at least 1 worker and no negative share"
            )


def run_on_ray(conductor: Conductor, study: Study, folder: Path, workers: Workers) -> None:
    """Runs every job of the conductor on Ray workers. `folder` must be readable by all of them.

    Raises UserError where the cluster cannot be reached or never has room for a worker.
    """
    with _cluster(workers), tempfile.TemporaryDirectory(prefix="nas-tune-") as scratch:
        resources = {"cpu": 1.0, "gpu": workers.gpus} if workers.gpus else {"cpu": 1.0}
        gate = _Gate.remote(min(workers.count, _room(resources)))  # type: ignore[attr-defined]
        # Workers start side by side; the bridge never has more trials under way than workers.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(workers.count)
        with _sent_by_value(study):
            device = "cuda" if workers.gpus else workers.device
            trainable = tune.with_parameters(
                _Worker, study=study, folder=str(folder.resolve()), device=device, gate=gate
            )
            bridge = _Bridge(conductor, workers.count, gate)
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                tune_config=tune.TuneConfig(
                    search_alg=bridge, num_samples=-1, reuse_actors=True, trial_dirname_creator=_short_name
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch, verbose=0, checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False)
                ),
            )
            tuner.fit()
    if bridge.error is not None:
        raise bridge.error


class _Worker(tune.Trainable):  # type: ignore[misc]
    """One warm process. A trial is one evaluation; between trials nothing is loaded again."""

    def setup(self, config: dict[str, Any], study: Study, folder: str, device: str, gate: Any) -> None:
        import torch

        torch.set_num_threads(1)
        try:
            self._evaluate: LoadedEvaluator | _Broken = study.load(Path(folder), device)
        except Exception as error:  # a worker that cannot start says why in each trial that it is given
            self._evaluate = _Broken(error)
        self._gate = gate
        ray.get(gate.arrived.remote())

    def step(self) -> dict[str, Any]:
        config = self.config
        outcome = attempt(self._evaluate, Schedule.from_json(config["schedule"]), config["samples"], config["seed"])
        ray.get(self._gate.passed.remote())
        if isinstance(outcome, str):
            return {"failure": outcome, "done": True}
        return {"score": json.dumps(outcome.to_json()), "done": True}  # as text: Tune flattens nested results

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.config = new_config
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing to keep: a worker has no state of its own."""

    def load_checkpoint(self, checkpoint: Any) -> None: ...


@ray.remote(num_cpus=0)
class _Gate:
    """Holds a finished worker back while a trial under way still waits for its worker to start.

    Tune hands a free worker to any waiting trial and cancels the start of that trial's own worker. Where an evaluation
    takes less time than a start, all but the first worker would be cancelled again and again and never run.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._alive = 0
        self._under_way = 0
        self._changed = asyncio.Condition()

    async def arrived(self) -> None:
        await self._count(alive=1)

    async def lost(self) -> None:
        await self._count(alive=-1)

    async def under_way(self, trials: int) -> None:
        self._under_way = trials
        await self._count()

    async def passed(self) -> None:
        """Returns when each trial under way has a worker, as far as the cluster has room, or after a minute."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60), self._changed:
                await self._changed.wait_for(lambda: self._alive >= min(self._room, self._under_way))

    async def _count(self, alive: int = 0) -> None:
        async with self._changed:
            self._alive += alive
            self._changed.notify_all()


def _short_name(trial: Any) -> str:
    return str(trial.trial_id)


class _Broken:
    """Stands where an evaluator could not be loaded."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, schedule: Schedule, rung: int, seed: int) -> Score:
        raise self._error


class _Bridge(TuneSearcher):  # type: ignore[misc]
    """Ray Tune asks and tells; the conductor answers and books."""

    def __init__(self, conductor: Conductor, workers: int, gate: Any) -> None:
        super().__init__()
        self._conductor = conductor
        self._workers = workers
        self._gate = gate
        self._numbers: dict[str, int] = {}
        self.error: UserError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its search algorithm for a restore that is never used."""
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._numbers) >= self._workers:
            return None
        try:
            job = self._conductor.next()
        except UserError as error:
            self.error = error
            return str(TuneSearcher.FINISHED)
        if isinstance(job, Signal):
            return str(TuneSearcher.FINISHED) if job is DONE else None
        self._numbers[trial_id] = job.trial.number
        self._gate.under_way.remote(len(self._numbers))
        return {"schedule": job.schedule.to_json(), "samples": job.samples, "seed": job.seed}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        self._gate.under_way.remote(len(self._numbers))
        if error:
            self._gate.lost.remote()
        if result and "score" in result and not error:
            self._conductor.settle(number, Score.from_json(json.loads(result["score"])))
        else:
            self._conductor.settle(
                number, (result or {}).get("failure") or "the worker died before it returned a score"
            )

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: the ledger is the only memory."""

    def restore(self, checkpoint_path: str) -> None:
        raise UserError("Ray Tune's restore is not used; run the same `nas run` command again")


@contextmanager
def _cluster(workers: Workers) -> Iterator[None]:
    """A cluster to run on: the one already joined by this process, the one at the address, or a local one."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    try:
        if workers.address:
            ray.init(address=workers.address, log_to_driver=False, logging_level="error")
        else:
            # On loopback, so that nothing of a local cluster can be reached from outside.
            memory = 200 * 2**20
            ray.init("local", num_cpus=workers.count, object_store_memory=memory, _node_ip_address="127.0.0.1", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"Ray at {workers.address or 'this machine'} cannot be used ({first_line(error)})") from error
    try:
        yield
    finally:
        ray.shutdown()


def _room(resources: dict[str, float]) -> int:
    """How many workers the cluster holds at once. A request that no node can ever meet would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name.upper(), 0) // amount for name, amount in resources.items())) for node in nodes)
    if not room:
        raise UserError(
            f"no node of the Ray cluster has room for a worker with {resources}; lower --gpus-per-worker or add nodes"
        )
    return room


@contextmanager
def _sent_by_value(study: Study) -> Iterator[None]:
    """Workers cannot import the study file: its classes travel inside the pickle."""
    parts = (study, study.space, study.supernet, study.images, study.training, study.evaluator)
    names = {type(part).__module__ for part in parts} | {name for name in sys.modules if name.startswith("nas_study_")}
    modules = [sys.modules[name] for name in names if name in sys.modules and not _importable(name)]
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)


def _importable(name: str) -> bool:
    """Whether a worker finds the module: it belongs to an installed package, not to a study file or a script."""
    return name.split(".")[0] in ("nas", "search_spaces", "evaluators") or "site-packages" in (
        getattr(sys.modules[name], "__file__", None) or ""
    )
