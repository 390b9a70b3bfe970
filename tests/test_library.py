"""The engine from Python: the calls that the commands are a skin of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import nas
from nas.callbacks import MLflow, TensorBoard, WeightsAndBiases, numbers_of
from nas.contracts import Trial, UserError
from nas.results.report import Run
from nas.searchers.evolution import Evolution
from nas.searchers.random import Random
from nas.study import Study


@pytest.fixture(scope="module")
def prepared(tiny_run: Path) -> Callable[[Path], Path]:
    """Makes a run folder in which all is trained and nothing is searched."""

    def copied(place: Path) -> Path:
        for part in ("supernet", "features"):
            shutil.copytree(tiny_run / part, place / "run" / part)
        return place / "run"

    return copied


@pytest.fixture(scope="module")
def run(tiny_study: Study, prepared: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> nas.StudyRun:
    """Searched by two seeds of one searcher."""
    opened = nas.open_run(tiny_study, prepared(tmp_path_factory.mktemp("library")))
    opened.search("evolution", trials=6, seeds=2)
    return opened


def test_importing_the_package_is_light() -> None:
    code = "import nas, sys; print(sorted({'torch', 'ray', 'diffusers', 'optuna'} & set(sys.modules)), nas.open_run.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "open_run"]
    with pytest.raises(AttributeError, match="no attribute 'opened'"):
        nas.opened  # noqa: B018


def test_callbacks_hear_of_every_trial_once(tiny_study: Study, tmp_path: Path) -> None:
    heard: list[tuple[str, Trial]] = []
    opened = nas.open_run(tiny_study, tmp_path / "run")
    opened.search("evolution", trials=5, on_trial=lambda search, trial: heard.append((search, trial)))
    kept = [(info.searcher, trial) for info, trials in opened.results.ledgers for trial in trials]
    assert sorted((s, t.number) for s, t in heard) == sorted((s, t.number) for s, t in kept)
    # The same call again scores nothing.
    again: list[Any] = []
    opened.search("evolution", trials=5, on_trial=lambda *told: again.append(told))
    assert again == []


def test_trials_and_front_are_data_frames(run: nas.StudyRun, tiny_study: Study) -> None:
    trials, front = run.trials(), run.front()
    assert isinstance(trials, pd.DataFrame)
    every = [trial for _, ledger in run.results.ledgers for trial in ledger]
    assert len(trials) == len(every)
    assert set(trials["searcher"]) == {"evolution", "uniform"}
    assert set(run.trials("evolution")["seed"]) == {0, 1}
    assert {"fd", "fd_error", "macs", "macs_share", "params", "genome", "status", "samples"} <= set(trials.columns)
    assert set(front["status"]) == {"complete"}
    # Sorted by cost, every one is better than those before.
    values = front[list(tiny_study.objectives)].to_numpy()
    verified = trials[trials["status"] == "complete"][list(tiny_study.objectives)].to_numpy()
    for value in values:
        assert not ((verified <= value).all(1) & (verified < value).any(1)).any()
    assert run.trials("nobody").empty


def test_the_best_within_a_budget_is_what_the_run_calls_the_best(run: nas.StudyRun) -> None:
    best = run.best(macs_share=0.6)
    done = run.trials()
    done = done[(done["status"] == "complete") & (done["macs_share"] <= 0.6) & (done["seed"] == 0)]
    assert best.trial.score is not None
    assert best.trial.score.values["fd"] == done["fd"].min()
    assert best.confirmed is not None
    assert best.score is best.confirmed
    number, searcher = best.trial.number, best.ledger.split(".")[1]
    assert run.trial(number, searcher).trial == best.trial
    with pytest.raises(nas.UserError, match="one limit"):
        run.best()
    with pytest.raises(nas.UserError, match="no scored trial 999"):
        run.trial(999)
    with pytest.raises(nas.UserError, match="nobody"):
        run.best("nobody", macs_share=0.6)


def test_what_is_chosen_is_sampled_exported_and_reported(run: nas.StudyRun, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    best = run.best(macs_share=0.6)
    images = run.sample(best, 3, seed=5)
    assert images.shape == (3, 1, 8, 8)
    assert run.export(best, tmp_path / "model") == {}
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "model"), trust_remote_code=True
    )
    theirs = pipeline(batch_size=3, seed=5, output_type="pt").images.numpy() * 2 - 1
    assert np.abs(theirs - images).max() < 1e-4  # float32 through four steps
    assert run.report() == run.folder / "report" / "index.html"
    assert {row["searcher"] for row in run.compare()["searchers"]} >= {"evolution", "uniform"}
    with pytest.raises(nas.UserError, match="not empty"):
        run.export(best, tmp_path / "model")


def test_another_study_is_not_taken_for_the_runs(run: nas.StudyRun, tiny_study: Study) -> None:
    other = nas.open_run(replace(tiny_study, seed=7), run.folder)
    with pytest.raises(nas.UserError, match="another study"):
        other.best(macs_share=0.6)


def test_what_no_search_of_the_study_as_it_is_has_found_is_not_the_baselines(
    run: nas.StudyRun, tiny_study: Study
) -> None:
    """Its schedules were scored whatever the limits are, and are all that is left where the search was of others."""
    other = nas.open_run(replace(tiny_study, limits={"macs_share": 0.9}), run.folder)
    with pytest.raises(nas.UserError, match="holds no search of tiny with seed 0 as it is now"):
        other.best(macs_share=0.9)
    renamed = nas.open_run(replace(tiny_study, searchers={"mine": Random()}), run.folder)
    with pytest.raises(nas.UserError, match="say --searcher uniform where that is meant"):
        renamed.best(macs_share=0.6)
    assert other.best("uniform", again=False, macs_share=0.9).ledger == "tiny.uniform"


def test_a_searcher_that_the_study_has_no_more_stands_in_no_ones_way(
    tiny_study: Study, prepared: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = prepared(tmp_path)
    both = replace(tiny_study, searchers={"mine": Random(), "evolution": Evolution(population=5)}, trials=4, verified=1)
    run = nas.open_run(both, folder)
    run.search("mine", "evolution")
    best = run.best(macs_share=0.6)
    # One by a name of its own, one that is known by itself and was set otherwise.
    for left in (("evolution",), ("mine",)):
        fewer = replace(both, searchers={name: both.searchers[name] for name in left})
        found = nas.open_run(fewer, folder).best(macs_share=0.6)
        names = {info.name for info, _ in run.results.ledgers if info.searcher in (*left, "uniform")}
        assert found.ledger in names
        assert found.ledger == best.ledger or best.ledger not in names
    with pytest.raises(UserError, match="no searcher is called 'mine'"):
        nas.open_run(replace(both, searchers={"evolution": Evolution(population=5)}), folder).best(
            "mine", macs_share=0.6
        )


def test_a_study_file_opens_in_its_own_folder_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opened = nas.open_run(Path(__file__).parent.parent / "studies" / "digits.py")
    assert opened.folder == tmp_path / "runs" / "digits"
    assert not opened.folder.exists()


# -------------------------------------------------------------------------------------------------------------- callbacks


def trial(number: int = 3) -> Trial:
    from nas.contracts import Score

    return Trial(number, (0, 1), "digest", 64, "complete", Score({"fd": 1.5}, {"fd": (1.4, 1.6)}), {"macs": 10.0})


def test_numbers_are_scores_errors_and_costs() -> None:
    told = numbers_of(trial())
    assert told == {"samples": 64.0, "macs": 10.0, "fd": 1.5, "fd_error": pytest.approx(0.1)}
    assert numbers_of(replace(trial(), score=None)) == {"samples": 64.0, "macs": 10.0}


def test_tensorboard_has_the_scalars_of_each_trial(tmp_path: Path) -> None:
    record = TensorBoard(tmp_path)
    record("evolution", trial(3))
    record.close()
    [file] = tmp_path.iterdir()
    assert b"evolution/fd" in file.read_bytes()
    assert b"evolution/fd_error" in file.read_bytes()


def test_weights_and_biases_takes_each_trial_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    record = WeightsAndBiases(project="nas", mode="offline", dir=str(tmp_path))
    record("evolution (seed 1)", trial())
    record.close()
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.filterwarnings("ignore")  # of its own
def test_mlflow_takes_each_trial(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    record = MLflow("nas", f"sqlite:///{tmp_path}/mlflow.db")
    record("evolution (seed 1)", trial())
    record.close()
    [found] = mlflow.search_runs(experiment_names=["nas"], output_format="list")
    assert found.data.metrics["evolution__seed_1_/fd"] == 1.5


@pytest.mark.parametrize(("record", "package"), [(WeightsAndBiases, "wandb"), (MLflow, "mlflow")])
def test_a_package_that_is_missing_is_named_with_its_remedy(
    record: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(nas.UserError, match=f"pip install {package}"):
        record()


def test_the_run_folder_reads_the_same_from_both_sides(run: nas.StudyRun) -> None:
    assert [info for info, _ in run.results.ledgers] == [info for info, _ in Run.open(run.folder).ledgers]
