"""Ready callbacks for `StudyRun.search(on_trial=...)`: each closed trial's objectives, costs and errors, to who keeps records of experiments. None of their packages
is required; each raises UserError with the command that installs it where it is missing."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from nas.contracts import Trial, UserError


def numbers_of(trial: Trial) -> dict[str, float]:
    """What a trial measured and costs: scores, their errors as NAME_error, costs, and the samples it was scored on."""
    score = trial.score
    values = {} if score is None else dict(score.values)
    errors = {} if score is None else {f"{name}_error": score.error(name) for name in values}
    return {"samples": float(trial.rung), **{n: float(v) for n, v in trial.cost.items()}, **values, **errors}


class TensorBoard:
    """Scalars by search, `evolution/fd`, at the trial's number."""

    def __init__(self, folder: str | Path) -> None:
        writers = (("tensorboardX", "tensorboardX"), ("torch.utils.tensorboard", "tensorboard"))
        self._writer = _first(writers, "pip install tensorboardX").SummaryWriter(str(folder))

    def __call__(self, search: str, trial: Trial) -> None:
        for name, value in numbers_of(trial).items():
            self._writer.add_scalar(f"{search}/{name}", value, trial.number)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of W&B, begun with `settings` as `wandb.init` takes them, such as project="nas", mode="offline"."""

    def __init__(self, **settings: Any) -> None:
        self._run = _first((("wandb", "wandb"),), "pip install wandb").init(**settings)

    def __call__(self, search: str, trial: Trial) -> None:
        told = {f"{search}/{name}": value for name, value in numbers_of(trial).items()}
        self._run.log({**told, f"{search}/trial": trial.number})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """One run of MLflow, in the experiment of this name, at the tracking URI that MLflow has, or this one."""

    def __init__(self, experiment: str = "nas", tracking_uri: str | None = None) -> None:
        self._mlflow = _first((("mlflow", "mlflow"),), "pip install mlflow")
        if tracking_uri is not None:
            self._mlflow.set_tracking_uri(tracking_uri)
        self._mlflow.set_experiment(experiment)
        self._mlflow.start_run()

    def __call__(self, search: str, trial: Trial) -> None:
        # Names of metrics take no parentheses, as in "evolution (seed 1)".
        place = "".join(letter if letter.isalnum() else "_" for letter in search)
        told = {f"{place}/{name}": value for name, value in numbers_of(trial).items()}
        self._mlflow.log_metrics(told, step=trial.number)

    def close(self) -> None:
        self._mlflow.end_run()


def _first(names: tuple[tuple[str, str], ...], remedy: str) -> Any:
    """The first of these modules that is there."""
    for module, _ in names:
        try:
            return import_module(module)
        except ImportError:
            continue
    raise UserError(f"{' or '.join(package for _, package in names)} is not installed; {remedy}")
