"""Asked to stop, by Ctrl-C or SIGTERM; and what the machine could not do, in words."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from sqlalchemy.exc import OperationalError

from evaluators.images import Digits
from nas.base.failures import explained
from nas.base.interrupts import Answered, Terminated, exit_code, whole
from nas.cli.options import resumable
from nas.contracts import UserError
from search_spaces.supernet import Elastic
from search_spaces.training import Sandwich
from tests.conftest import TINY
from tests.test_cli import ROOT, study_file


def asked_during(*numbers: signal.Signals) -> tuple[KeyboardInterrupt, bool]:
    """What is raised where one is asked to stop so often in the middle, and whether the rest ran first."""
    rest = False
    try:
        with whole():
            for number in numbers:
                signal.raise_signal(number)
            rest = True
    except KeyboardInterrupt as asked:
        return asked, rest
    raise AssertionError("nobody stopped")


def test_what_is_whole_is_finished_first() -> None:
    before = signal.signal(signal.SIGTERM, lambda number, frame: (_ for _ in ()).throw(Terminated()))
    try:
        asked, finished = asked_during(signal.SIGTERM)
        assert (exit_code(asked), finished) == (143, True)
        asked, finished = asked_during(signal.SIGINT)
        assert (exit_code(asked), finished) == (130, True)
        asked, finished = asked_during(signal.SIGINT, signal.SIGINT)
        assert not finished, "who asks twice does not wait"
    finally:
        signal.signal(signal.SIGTERM, before)


def started(folder: Path, *more: object, steps: int = 4000) -> subprocess.Popen[str]:
    study = study_file(folder, steps=steps)
    study.write_text(study.read_text().replace("checkpoint_every=10", "checkpoint_every=1000"))
    command = [
        sys.executable,
        "-m",
        "nas.cli",
        "run",
        str(study),
        "--out",
        str(folder / "run"),
        "--threads",
        "1",
        *map(str, more),
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_training_that_is_stopped_keeps_its_steps(number: signal.Signals, tmp_path: Path) -> None:
    run = started(tmp_path)
    until((tmp_path / "run" / "features" / "classifier.safetensors").exists)
    assert run.stderr is not None
    until(lambda: "supernet:" in run.stderr.readline())
    run.send_signal(number)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + number, said
    assert "interrupted; the same command goes on" in said
    assert "Traceback" not in said
    with safe_open(tmp_path / "run" / "supernet" / "checkpoint.safetensors", "pt") as file:
        assert 0 < int(file.metadata()["step"]) < 1000


def test_every_command_answers_sigterm() -> None:
    """Whatever it does then: here it waits."""
    code = "import nas.cli, time; nas.cli.app = lambda: (print('at work', flush=True), time.sleep(60)); nas.cli.main()"
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "at work\n"
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/run/x"), "/run/x: the disk is full; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/run/x"), "/run/x: the file system is read-only"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/run/x"), "/run/x: the path is too long"),
        (PermissionError(errno.EACCES, "Permission denied", "/run/x"), "/run/x: permission denied"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("unable to mmap 12 bytes from file </x>: Cannot allocate memory (12)"), "memory is short"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"),
            "memory is short",
        ),
        (MemoryError(), "memory is short; use a smaller batch"),
        (
            OperationalError("SELECT 1", {}, Exception("server closed the connection")),
            "the database does not answer as it should",
        ),
        (UserError("as it is"), "as it is"),
    ],
)
def test_what_the_machine_could_not_do_is_one_line_with_a_remedy(error: Exception, words: str) -> None:
    said = explained(error)
    assert said is not None
    assert words in said
    assert "\n" not in said
    wrapped = RuntimeError("something else")
    wrapped.__cause__ = error
    assert explained(wrapped) == said


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "cache.npy"), None),
        (UserError("a limit that was handled"), None),
        (OSError(errno.ENOSPC, "No space left on device", "/run/x"), "the disk is full"),
        (MemoryError(), "memory is short"),
    ],
)
def test_what_was_handled_before_is_no_reason_but_where_the_machine_was_short(
    first: Exception, words: str | None
) -> None:
    try:
        try:
            raise first
        except type(first):
            raise ValueError("bins must increase")  # noqa: B904
    except ValueError as error:
        said = explained(error)
    assert said is None if words is None else words in str(said)


def test_what_the_disk_refuses_without_a_name_is_the_folders_and_other_words_stay(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk") as full, resumable(tmp_path):
        raise OSError(errno.ENOSPC, "disk")
    assert full.value.filename == str(tmp_path)
    with pytest.raises(OSError, match="image file is truncated"), resumable(tmp_path):
        raise OSError("image file is truncated")


def test_a_fault_of_the_program_is_not_explained_away() -> None:
    assert explained(TypeError("can only concatenate tuple")) is None
    assert explained(AssertionError()) is None


@pytest.mark.long
@pytest.mark.parametrize("most", [3_000, 40_000])
def test_a_full_disk_is_told_in_a_line_and_what_is_kept_goes_on(most: int, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    study = study_file(tmp_path, steps=12)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "nas.cli", "run", str(study), "--out", str(tmp_path / "run"), "-q"]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert "fault of the program" not in done.stderr
    assert any(words in done.stderr for words in ("raise the limit", "make room", "temporary directory"))
    after = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert after.returncode == 0, after.stderr


def test_training_ends_at_the_first_loss_that_is_no_number(tmp_path: Path) -> None:
    net = Elastic(TINY, widths=(0.5, 1.0))
    training = Sandwich(steps=60, batch=8, warmup=0, learning_rate=1e18, clip=1e18)
    with pytest.raises(UserError, match=r"the loss of .* is (nan|inf) at step \d+; lower learning_rate=1e\+18"):
        for _ in training.run(net, Digits(), tmp_path, 0, "cpu"):
            pass
    assert not (tmp_path / "weights.safetensors").exists()


def test_what_is_closed_at_the_very_end_of_the_interpreter_is_whole_too() -> None:
    script = """
from nas.base.interrupts import answer_sigterm, whole

def training():
    try:
        while True:
            yield
    finally:
        with whole():
            print("kept")

answer_sigterm()
left_open = training()
next(left_open)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n", "")


def test_an_interrupt_that_made_a_library_stumble_is_one(tmp_path: Path) -> None:
    """Interrupted while it let go of its lock, it found the file gone, and raised that."""

    def stumble() -> None:
        try:
            raise Terminated
        finally:
            (tmp_path / "gone").unlink()

    with pytest.raises(Answered) as end, resumable(tmp_path):
        stumble()
    assert end.value.code == 143
    with pytest.raises(FileNotFoundError), resumable(tmp_path):
        (tmp_path / "gone").unlink()


def test_what_was_made_of_an_interrupt_on_purpose_is_said_and_not_that(tmp_path: Path) -> None:
    def die() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise UserError("the cluster died") from None

    with pytest.raises(UserError, match="the cluster died"), resumable(tmp_path):
        die()
