"""Secrets stay secret, and a ledger has one writer wherever it lies."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import nas.engine.writers
from benchmarks.postgres import installed, server
from nas.contracts import UserError
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.engine.storage import check_answers, close_storage, kept_url, open_storage, shown_url
from nas.engine.writers import only_writer
from nas.results.report import Run
from tests.test_cli import nas as command
from tests.test_cli import refused, study_file
from tests.toy import toy_study


@pytest.fixture(autouse=True)
def connections_that_storages_leave() -> Iterator[None]:
    """Optuna leaves its pool of connections to the garbage collector, which warns of each."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


URLS = (
    "postgresql://user:s3cr3t@127.0.0.1:9/db",
    "postgresql+psycopg://user@127.0.0.1:9/db?password=s3cr3t",
    "postgresql+psycopg://user@127.0.0.1:9/db?sslmode=disable&sslpassword=s3cr3t&passfile=s3cr3t",
    "postgresql+psycopg://user:s3cr3t@127.0.0.1:notaport/db",
    "postgresql+psycopg://user:a@s3cr3t@127.0.0.1:9/db",
    "postgresql+psycopg://user:s3cr3t/x@127.0.0.1:9/db",
    "mysql://user:s3cr3t@127.0.0.1:9/db?ssl_key=s3cr3t",
    "nonsense-s3cr3t",
    "://s3cr3t",
    "http://user:s3cr3t@host",
)


@pytest.mark.parametrize("url", URLS)
def test_no_secret_is_shown_or_kept(url: str, tmp_path: Path) -> None:
    assert "s3cr3t" not in shown_url(url)
    assert "s3cr3t" not in kept_url(url)
    with pytest.raises(UserError, match="storage ") as told:
        open_storage(tmp_path, url)
    assert "s3cr3t" not in str(told.value)
    assert told.value.__cause__ is None
    run = tmp_path / "run"
    result = command("run", study_file(tmp_path, steps=1), "--out", run, "--storage", url)
    refused(result, "storage ")
    assert "s3cr3t" not in result.stdout + result.stderr
    for file in run.rglob("*") if run.exists() else ():
        assert not file.is_file() or b"s3cr3t" not in file.read_bytes()


def test_what_a_url_may_say_is_kept() -> None:
    url = "postgresql+psycopg://user:x@host:5432/db?sslmode=require&application_name=a"
    assert kept_url(url) == "postgresql+psycopg://user@host:5432/db?application_name=a&sslmode=require"
    assert kept_url("sqlite:///x.db") == f"sqlite:///{Path('x.db').resolve()}", (
        "the same file wherever a command is typed"
    )
    assert kept_url("sqlite://") == "sqlite://"
    assert shown_url("postgresql://u@h/d?password=x") == "postgresql://u@h/d?password=***"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server on loopback, where Debian's package is installed."""
    if installed() is None:
        pytest.skip("needs Debian's postgresql and root, who starts it as the user postgres")
    with server(tmp_path_factory.mktemp("postgres") / "server") as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/shared.db" if request.param == "sqlite" else request.getfixturevalue("postgres")


HOLDER = """
import sys, time
from nas.engine.writers import only_writer
with only_writer(sys.argv[1], "a"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_who_holds_the_ledger_until_that_one_dies(url: str) -> None:
    with only_writer(url, "a"):
        with (
            pytest.raises(UserError, match=f"ledger a is being written by process {os.getpid()} on"),
            only_writer(url, "a"),
        ):
            pass
        with only_writer(url, "b"):
            pass
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"), only_writer(url, "a"):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    said: list[str] = []
    with only_writer(url, "a", said.append) as check:
        check()


def test_a_row_that_nobody_renews_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a machine that was switched off: nobody can ask whether its process lives."""
    url = f"sqlite:///{tmp_path}/shared.db"
    monkeypatch.setattr(nas.engine.writers, "_who", lambda: "process 1 on another-machine")
    with only_writer(url, "a"):
        monkeypatch.undo()
        with pytest.raises(UserError, match="process 1 on another-machine"), only_writer(url, "a"):
            pass
        monkeypatch.setattr(nas.engine.writers, "STALE", 0.0)
        with only_writer(url, "a"):
            pass


def test_a_process_of_another_container_is_not_taken_for_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the machine's name, and a number that no process has here."""
    url = f"sqlite:///{tmp_path}/shared.db"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(nas.engine.writers, "_who", lambda: f"process {gone.pid} on {socket.gethostname()}")
    monkeypatch.setattr(nas.engine.writers, "_namespace", lambda: ":17")
    with only_writer(url, "a"):
        monkeypatch.undo()
        with pytest.raises(UserError, match=f"is being written by process {gone.pid} on"), only_writer(url, "a"):
            pass


def test_a_file_below_the_home_folder_is_written_out() -> None:
    with pytest.raises(UserError, match=r"sqlite:///~/nas.db: its path begins with ~"):
        check_answers("sqlite:///~/nas.db")


RUN = """
import sys
from pathlib import Path
from nas.engine.session import open_session
from tests.toy import toy_study
study = toy_study(evaluator__seconds=0.05, evaluator__log=sys.argv[3], trials=6, verified=2)
with open_session(study, Path(sys.argv[1]), sys.argv[2]) as session:
    session.run(session.conductor("uniform"))
    session.run(session.conductor("evolution", int(sys.argv[4])))
"""


def test_two_folders_on_one_database_double_nothing(url: str, tmp_path: Path) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path / f"run{seed}"), url, str(tmp_path / "log"), str(seed)]
        )
        for seed in (0, 1)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    found = {info.name: trials for info, trials in Run.open(tmp_path / "run0", url).ledgers}
    assert set(found) == {"toy.uniform", "toy.evolution", "toy.evolution.seed1"}
    for name, trials in found.items():
        assert len({(trial.genome, trial.rung) for trial in trials}) == len(trials), name
        assert all(trial.status != "running" for trial in trials)
    assert len([t for t in found["toy.uniform"] if t.rung == 64]) == 4
    run = (tmp_path / "log").read_text().splitlines()
    for trial in found["toy.uniform"]:
        assert run.count(f"{trial.digest} {trial.rung}") == 1, "scored by one of them, and known to the other"
    assert {info.searcher for info, _ in read_ledgers(open_storage(tmp_path / "run1", url))} == {"uniform", "evolution"}


def test_a_session_holds_its_ledgers(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/shared.db"
    study = toy_study(trials=4, verified=1)
    with open_session(study, tmp_path / "one", url) as session:
        session.conductor("evolution")
        with (
            open_session(study, tmp_path / "two", url) as other,
            pytest.raises(UserError, match=r"ledger toy\.evolution is being written"),
        ):
            other.conductor("evolution")
    with open_session(study, tmp_path / "two", url) as other:
        other.run(other.conductor("evolution"))


def test_who_looks_at_a_run_makes_no_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'typo.db'}"
    with pytest.raises(UserError, match=r"there is no file .*typo\.db; check --storage"):
        open_storage(tmp_path, url)
    assert not (tmp_path / "typo.db").exists()
    close_storage(open_storage(tmp_path, url, writing=True))
    close_storage(open_storage(tmp_path, url))
