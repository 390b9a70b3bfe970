from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from nas.contracts import Proposal, Score, UserError
from nas.engine.ledger import Ledger, known_scores, read_ledgers
from nas.engine.storage import kept_url, lock_run, open_storage
from nas.study import Study
from tests.toy import toy_study

SCORE = Score({"fd": 1.5}, {"fd": (1.4, 1.6)}, {"calls": 64.0, "macs": 1e3, "seconds": 0.1}, {"fd": "toy@64"})


def ledger(folder: Path, study: Study | None = None, url: str | None = None, searcher: str = "evolution") -> Ledger:
    study = study or toy_study()
    return Ledger(open_storage(folder, url, writing=True), study.ledger_info(folder, searcher, 0), study.problem)


def open_trial(book: Ledger, genome: tuple[int, ...], rung: int = 64) -> int:
    return book.open(Proposal(genome, {"operator": "test"}), toy_study().space.decode(genome), rung).number


@pytest.mark.parametrize("url", [None, "sqlite"])
def test_a_reopened_ledger_is_the_one_that_was_written(tmp_path: Path, url: str | None) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db" if url else None
    book = ledger(tmp_path, url=url)
    numbers = [open_trial(book, (i, 0, 0, 0, 0, 0)) for i in range(4)]
    book.close(numbers[2], SCORE)
    book.fail(numbers[0], "Traceback\nRuntimeError: broken")
    verified = open_trial(book, (2, 0, 0, 0, 0, 0), rung=256)
    book.close(verified, SCORE)
    again = ledger(tmp_path, url=url)
    assert again.trials == book.trials
    assert [trial.number for trial in again.finished] == [numbers[2], numbers[0], verified]
    assert [trial.status for trial in again.trials] == ["failed", "running", "pruned", "running", "complete"]
    assert again.trial(2).score == SCORE
    assert again.trial(0).reason.endswith("broken")


def test_optuna_shows_verified_feasible_trials_alone(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.close(open_trial(book, (0,) * 6), SCORE)
    best = open_trial(book, (1,) * 6, rung=256)
    book.close(best, SCORE)
    book.close(open_trial(book, (3,) * 6, rung=256), Score({"fd": 0.1}, {}, {}, {}))
    study = optuna.load_study(study_name="toy.evolution", storage=open_storage(tmp_path))
    assert [trial.number for trial in study.best_trials] == [best]
    assert study.metric_names == ["fd", "macs"]
    assert study.trials[best].params["gene0003"] == 1
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    assert study.trials[0].values is None, "what was scored on fewer samples is not on the axis of what was verified"
    assert study.trials[0].user_attrs["fd on 64 samples"] == SCORE.values["fd"]
    assert study.trials[best].values == [SCORE.values["fd"], 24]


def test_constraints_are_where_optuna_and_the_dashboard_look(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    open_trial(book, (3,) * 6)
    frozen = optuna.load_study(study_name="toy.evolution", storage=open_storage(tmp_path)).trials[0]
    assert frozen.system_attrs["constraints"] == [pytest.approx(0.4)]
    assert frozen.constraints["macs_share"] == pytest.approx(0.4)


@pytest.mark.parametrize("tail", [b'{"op_code":4,"study_id":0,"user_at', b'{"op_code":4,"study_id":0,"user_at\n'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    book = ledger(tmp_path)
    open_trial(book, (0,) * 6)
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(tail)
    if tail.endswith(b"\n"):
        with pytest.raises(UserError, match="was written by another program"):
            ledger(tmp_path)
        (tmp_path / "journal.check").unlink()  # as it was before there were checks
    again = ledger(tmp_path)
    assert again.trials == book.trials
    open_trial(again, (1,) * 6)
    assert len(ledger(tmp_path).trials) == 2


@pytest.mark.parametrize("link", [True, False])
def test_a_stale_journal_lock_does_not_stop_the_next_run(link: bool, tmp_path: Path) -> None:
    """A link, as Optuna leaves by default, or a file."""
    import os
    import time

    open_trial(ledger(tmp_path), (0,) * 6)
    stale = tmp_path / "journal.log.lock"
    if link:
        stale.symlink_to(tmp_path / "journal.log")
    else:
        stale.touch()
    os.utime(stale, (time.time() - 60,) * 2, follow_symlinks=False)
    started = time.monotonic()
    open_trial(ledger(tmp_path), (1,) * 6)
    assert time.monotonic() - started < 5


def test_a_trial_killed_between_score_and_close_is_closed_on_opening(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    number = open_trial(book, (0,) * 6)
    storage = open_storage(tmp_path)
    study_id = storage.get_study_id_from_name("toy.evolution")
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    storage.set_trial_system_attr(trial_id, "nas:score", {**SCORE.to_json(), "order": 0})
    again = ledger(tmp_path)
    assert again.trial(number).score == SCORE
    assert again.trial(number).status == "pruned"
    assert ledger(tmp_path).trials == again.trials


def test_a_trial_closed_from_outside_does_not_stop_the_next_run(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    number = open_trial(book, (0,) * 6)
    optuna.load_study(study_name="toy.evolution", storage=open_storage(tmp_path)).tell(
        number, state=optuna.trial.TrialState.FAIL
    )
    assert ledger(tmp_path).trial(number).status == "failed"
    whole = open_trial(ledger(tmp_path), (1,) * 6)
    optuna.load_study(study_name="toy.evolution", storage=open_storage(tmp_path)).tell(whole, [0.5, 0.5])
    found = ledger(tmp_path).trial(whole)
    assert (found.status, found.score) == ("failed", None)  # of which nobody knows how it was measured
    assert "closed from outside" in found.reason


def test_a_second_run_on_a_locked_folder_is_refused(tmp_path: Path) -> None:
    import os

    lock = lock_run(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        lock_run(tmp_path)
    lock.release()
    lock_run(tmp_path).release()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"supernet__version": "2"}, "supernet was 1, now 2"),
        ({"evaluator__kind": "another"}, "evaluator was"),
        ({"space__options": 3}, "space was"),
        ({"seed": 5}, "seed was 0, now 5"),
    ],
)
def test_a_ledger_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    open_trial(ledger(tmp_path), (0,) * 6)
    before = (tmp_path / "journal.log").read_bytes()
    with pytest.raises(UserError, match=named):
        ledger(tmp_path, toy_study(**change))
    assert (tmp_path / "journal.log").read_bytes() == before
    assert len(ledger(tmp_path).trials) == 1


def test_scores_are_known_across_searchers_and_not_across_supernets(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    trial = book.close(open_trial(book, (0,) * 6), SCORE)
    study = toy_study()
    storage = open_storage(tmp_path)
    known = known_scores(storage, study.ledger_info(tmp_path, "random", 0))
    assert known == {(trial.digest, 64): ("toy.evolution#0", SCORE)}
    other = toy_study(supernet__version="2").ledger_info(tmp_path, "random", 0)
    assert known_scores(storage, other) == {}


def test_trials_of_others_in_the_same_storage_are_left_alone(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    open_trial(book, (0,) * 6)
    optuna.create_study(study_name="someone's", storage=open_storage(tmp_path)).add_trial(
        optuna.trial.create_trial(value=1.0)
    )
    assert [info.name for info, _ in read_ledgers(open_storage(tmp_path))] == ["toy.evolution"]


def test_an_optuna_study_of_the_same_name_is_not_taken_over(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, writing=True)
    optuna.create_study(study_name="toy.evolution", storage=storage).add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(UserError, match="of another program; rename"):
        ledger(tmp_path)


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://user:secret@127.0.0.1:1/none", "nonsense://x", "sqlite:////no/such/folder/x.db"]
)
def test_a_storage_that_cannot_be_opened_is_one_message_without_the_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match="cannot be opened") as caught:
        open_storage(tmp_path, url)
    assert "secret" not in str(caught.value)


def test_the_stored_url_has_no_password() -> None:
    assert "secret" not in kept_url("postgresql://user:secret@host/db")
    json.dumps(kept_url("sqlite:///x.db"))
