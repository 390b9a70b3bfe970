"""What optuna-dashboard shows of a run: pictures and a note with each verified trial, and the pictures of the whole with each study.

Files lie in <run>/artifacts. Optuna books artifacts of a trial before it ends, and ours are drawn after that, so they are
booked with the study under the keys by which the dashboard finds a trial's.
"""

from __future__ import annotations

import json
import math
import mimetypes
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import optuna
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import BaseStorage

from nas.contracts import Progress, Trial, UserError
from nas.results.page import draw_once, samples_of, schedule_of
from nas.results.recommendation import next_command
from nas.results.report import Run
from nas.results.trials import cost_in_words
from nas.study import Study

ARTIFACTS = "artifacts"


def store_of(folder: Path) -> FileSystemArtifactStore:
    path = folder / ARTIFACTS
    path.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(path)


def attach(study: Study, study_file: str, run: Run, storage: BaseStorage, loaded: Any) -> Iterator[Progress]:
    """Gives every verified trial its schedule's picture, a grid of samples and a note with the command to go on with, and every
    study the fronts and the curves. What is there already stays. Raises UserError where the dashboard is not installed."""
    try:
        from optuna_dashboard import save_note
    except ImportError as error:
        raise UserError("optuna-dashboard is not installed; run `pip install -e '.[dashboard]'`") from error
    done = [(info, trial) for info, trials in run.ledgers for trial in trials if trial.status == "complete"]
    pictures, weights = run.folder / "report", study.supernet.digest(run.folder / "supernet")
    for number, (info, trial) in enumerate(done):
        study_id = storage.get_study_id_from_name(info.name)
        trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)
        booked = storage.get_study_system_attrs(study_id)
        schedule = pictures / "trials" / f"schedule-{trial.digest}.svg"
        samples = samples_of(study, loaded, trial, pictures, weights)
        drawn = schedule_of(
            study, trial.genome, "#7c8594"
        )  # shown on light and on dark ground, where it has no ink of the page
        if drawn:
            draw_once(schedule, partial(_write, drawn))
        for picture in [*([schedule] if drawn else []), samples]:
            _book(run.folder, storage, study_id, f"dashboard:artifacts:{trial_id}:", picture, booked)
        if f"dashboard:{trial_id}:note_ver" not in booked:
            whose = SimpleNamespace(storage=storage, study=SimpleNamespace(_study_id=study_id), _trial_id=trial_id)
            save_note(whose, _note(study_file, run, info.searcher, info.seed, trial))
        yield Progress("pictures for the dashboard", number + 1, len(done))
    for info, _ in run.ledgers:
        study_id = storage.get_study_id_from_name(info.name)
        booked = storage.get_study_system_attrs(study_id)
        for name in ("front.png", "curves.png"):
            if (pictures / name).exists():
                _book(run.folder, storage, study_id, "artifacts:", pictures / name, booked)


def _write(drawn: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(drawn)


def _book(
    folder: Path, storage: BaseStorage, study_id: int, prefix: str, picture: Path, booked: Mapping[str, Any]
) -> None:
    """Copies a picture to the store and books it, unless it is booked: the identifier follows from its place."""
    identifier = str(uuid5(NAMESPACE_URL, f"{study_id}/{prefix}/{picture.name}"))
    with picture.open("rb") as file:
        store_of(folder).write(identifier, file)
    if prefix + identifier not in booked:
        kind, encoding = mimetypes.guess_type(picture.name)
        entry = {"artifact_id": identifier, "mimetype": kind, "encoding": encoding, "filename": picture.name}
        storage.set_study_system_attr(study_id, prefix + identifier, json.dumps(entry))


def _note(study_file: str, run: Run, searcher: str, seed: int, trial: Trial) -> str:
    assert trial.score is not None
    values = "\n".join(
        f"- {name}: {value:.5g}" + (f" ± {error:.2g}" if math.isfinite(error := trial.score.error(name)) else "")
        for name, value in trial.score.values.items()
    )
    spent = trial.score.spent
    return (
        f"Verified on {trial.rung:,} samples, {cost_in_words(trial)}.\n\n{values}\n"
        f"- spent: {spent.get('macs', 0):.3g} MACs, {spent.get('seconds', 0):.1f} s\n\n"
        f"```\n{next_command(study_file, run, searcher, seed, trial.number)}\n```\n"
    )


def serve(folder: Path, storage: BaseStorage, port: int) -> None:
    """Until it is interrupted, on the loopback address alone. Raises UserError where the dashboard is not installed, or the port
    cannot be had."""
    try:
        from optuna_dashboard import run_server
    except ImportError as error:
        raise UserError("optuna-dashboard is not installed; run `pip install -e '.[dashboard]'`") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    failed: list[Exception] = []
    store = store_of(folder)

    def answer() -> None:
        try:
            run_server(storage, host="127.0.0.1", port=port, artifact_store=store)
        except Exception as error:  # which a thread would print, and go on
            failed.append(error)

    # Not in the main thread, where signals are answered: wsgiref swallows whatever is raised while it answers a request.
    server = Thread(target=answer, daemon=True)
    server.start()
    server.join()
    for reason in failed:
        if isinstance(reason, OSError):
            raise UserError(f"port {port} cannot be used ({reason.strerror}); choose another --port") from reason
        raise reason
