"""A journal that was damaged is never taken for what was written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages.journal import JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file

from nas.contracts import Trial, UserError
from nas.engine.journal import CHECK, JOURNAL, TAIL, _drop_torn, prepare, read_checks, repair, verify
from nas.engine.ledger import read_ledgers
from nas.engine.session import open_session
from nas.engine.storage import open_storage
from tests.test_cli import nas, refused
from tests.test_ledger import SCORE, ledger, open_trial
from tests.toy import toy_study

STUDY = toy_study(trials=8, verified=3)
LEDGERS = ("uniform", "evolution")


def search(folder: Path) -> dict[str, list[Trial]]:
    with open_session(STUDY, folder) as session:
        for name in LEDGERS:
            session.run(session.conductor(name))
        return {info.searcher: trials for info, trials in read_ledgers(session.storage)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Trial]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, search(folder)


def copied(folder: Path, into: Path) -> Path:
    into.mkdir(parents=True, exist_ok=True)
    for name in (JOURNAL, CHECK, "study.json"):
        (into / name).write_bytes((folder / name).read_bytes())
    return into


def lost(lines: list[bytes], draw: random.Random) -> None:
    del lines[draw.randrange(1, len(lines) - 1)]


def doubled(lines: list[bytes], draw: random.Random) -> None:
    place = draw.randrange(len(lines))
    lines.insert(place, lines[place])


def joined(lines: list[bytes], draw: random.Random) -> None:
    place = draw.randrange(len(lines) - 1)
    lines[place] = lines[place].rstrip(b"\n")


def flipped(lines: list[bytes], draw: random.Random) -> None:
    place = draw.randrange(len(lines) - 1)
    line = bytearray(lines[place])
    line[draw.randrange(len(line))] ^= 1 << draw.randrange(8)
    lines[place] = bytes(line)


def swapped(lines: list[bytes], draw: random.Random) -> None:
    place = next(
        place for place in range(draw.randrange(len(lines) // 2), len(lines)) if lines[place] != lines[place + 1]
    )
    lines[place], lines[place + 1] = lines[place + 1], lines[place]


def foreign(lines: list[bytes], draw: random.Random) -> None:
    lines.insert(
        draw.randrange(len(lines) + 1), b'{"op_code":6,"worker_id":"x","trial_id":1,"state":3,"values":null}\n'
    )


def garbage(lines: list[bytes], draw: random.Random) -> None:
    lines[draw.randrange(len(lines) - 1)] = draw.randbytes(40) + b"\n"


DAMAGES = (lost, doubled, joined, flipped, swapped, foreign, garbage)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("seed", range(4))
def test_damage_is_refused_by_line_and_repaired(
    whole: tuple[Path, dict[str, list[Trial]]], tmp_path: Path, damage: Callable[..., None], seed: int
) -> None:
    folder, before = whole
    run = copied(folder, tmp_path / "run")
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    damage(lines, random.Random(seed))
    (run / JOURNAL).write_bytes(b"".join(lines))
    for open_it in (lambda: open_storage(run), lambda: open_storage(run, writing=True)):
        with pytest.raises(UserError, match=r"journal\.log line \d+ (is not what|was written by).*nas repair"):
            open_it()
    refused(nas("status", run), r"line \d+")
    result = nas("repair", run)
    assert result.returncode == 0, result.stderr
    assert "finished trials are whole" in result.stdout
    kept = {info.searcher: trials for info, trials in read_ledgers(open_storage(run))}
    for name, trials in kept.items():
        known = {trial.number: trial for trial in before[name]}
        for trial in trials:
            if trial.score is not None:
                assert trial == known[trial.number], "a trial that was kept is the one that was written"
    after = search(run)
    for name in LEDGERS:
        if name in kept:
            assert {t.genome for t in after[name] if t.rung == 64} >= {
                t.genome for t in kept[name] if t.scored and t.rung == 64
            }
        assert all(trial.status != "running" for trial in after[name])
    assert nas("repair", run).stdout.count("set aside") == 0, "nothing is left to repair"


@given(st.integers(0, 10**6))
def test_a_journal_cut_anywhere_ends_as_the_whole_one(whole: tuple[Path, dict[str, list[Trial]]], place: int) -> None:
    """What a power cut or a killed write leaves: everything up to some byte."""
    import tempfile

    folder, before = whole
    content = (folder / JOURNAL).read_bytes()
    with tempfile.TemporaryDirectory() as temporary:
        run = copied(folder, Path(temporary) / "run")
        (run / JOURNAL).write_bytes(content[: place % len(content)])
        assert search(run) == before


def test_what_another_process_is_writing_is_not_cut_off(
    whole: tuple[Path, dict[str, list[Trial]]], tmp_path: Path
) -> None:
    """Who opens the run for writing waits for whoever is in the middle of a line."""
    run = copied(whole[0], tmp_path / "run")
    content = (run / JOURNAL).read_bytes()
    with ThreadPoolExecutor(1) as pool:
        with get_lock_file(JournalFileOpenLock(str(run / JOURNAL))):
            (run / JOURNAL).write_bytes(content[:-9])
            opening = pool.submit(prepare, run / JOURNAL)
            with pytest.raises(TimeoutError):
                opening.result(0.2)
            (run / JOURNAL).write_bytes(content)
        opening.result(30)
    assert (run / JOURNAL).read_bytes() == content


def test_a_check_without_its_line_is_overruled(whole: tuple[Path, dict[str, list[Trial]]], tmp_path: Path) -> None:
    """Killed between the two writes."""
    folder, before = whole
    run = copied(folder, tmp_path / "run")
    size = (run / JOURNAL).stat().st_size
    with (run / CHECK).open("a") as file:
        file.write(json.dumps([size, 99, "0" * 16, 4, 0, None, None]) + "\n" + '[5, 3, "')
    verify(run / JOURNAL)
    assert search(run) == before
    more = toy_study(trials=10, verified=3)
    with open_session(more, run) as session:
        session.run(session.conductor("evolution"))
    assert len(read_checks(run / CHECK)) == len((run / JOURNAL).read_bytes().splitlines())
    verify(run / JOURNAL)


def test_who_only_notes_something_leaves_no_damage_behind_a_torn_line(
    whole: tuple[Path, dict[str, list[Trial]]], tmp_path: Path
) -> None:
    """A report and the dashboard write too, and nobody has looked after the end of the file for them."""
    run = copied(whole[0], tmp_path / "run")
    content = (run / JOURNAL).read_bytes()
    (run / JOURNAL).write_bytes(content[:-30])
    (run / CHECK).write_bytes((run / CHECK).read_bytes() + b"[1, 2,")
    storage = open_storage(run)
    storage.set_study_system_attr(storage.get_all_studies()[0]._study_id, "noted", 1)
    verify(run / JOURNAL)
    assert search(run) == whole[1]
    with (tmp_path / "long").open("wb+") as file:
        file.write(b"a\n" + b"b" * (3 * TAIL))
        assert _drop_torn(file) == 2
        file.seek(0)
        assert file.read() == b"a\n"
        assert _drop_torn(file) == 2


def test_a_journal_without_checks_opens_with_a_warning_and_gets_them(
    whole: tuple[Path, dict[str, list[Trial]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, before = whole
    run = copied(folder, tmp_path / "run")
    (run / CHECK).unlink()
    with caplog.at_level("WARNING", "nas"):
        assert {info.searcher for info, _ in read_ledgers(open_storage(run))} == set(LEDGERS)
    assert "damage done to it before now cannot be told" in caplog.text
    assert search(run) == before
    assert (run / CHECK).exists()
    verify(run / JOURNAL)


def test_garbage_in_a_journal_without_checks_is_named_and_repaired(
    whole: tuple[Path, dict[str, list[Trial]]], tmp_path: Path
) -> None:
    folder, _ = whole
    run = copied(folder, tmp_path / "run")
    (run / CHECK).unlink()
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[20] = b"\x00garbage\n"
    (run / JOURNAL).write_bytes(b"".join(lines))
    refused(nas("status", run), r"journal\.log line 21 is no record; `nas repair")
    assert nas("repair", run).returncode == 0
    assert nas("status", run).returncode == 0


def test_what_cannot_be_repaired_says_so(tmp_path: Path) -> None:
    refused(nas("repair", tmp_path), r"journal\.log does not exist")
    folder = tmp_path / "held"
    with open_session(STUDY, folder):
        (folder / JOURNAL).touch()
        refused(nas("repair", folder), "is in use by process")


def test_repair_of_a_lost_score_runs_that_trial_again(
    whole: tuple[Path, dict[str, list[Trial]]], tmp_path: Path
) -> None:
    folder, before = whole
    run = copied(folder, tmp_path / "run")
    lines = (run / JOURNAL).read_bytes().splitlines(keepends=True)
    scores = [place for place, line in enumerate(lines) if b'"nas:score"' in line]
    del lines[scores[-1]]
    (run / JOURNAL).write_bytes(b"".join(lines))
    done = repair(run / JOURNAL)
    assert (done.again, done.lost) == (1, 0)
    assert done.aside is not None
    assert search(run) == before
    genes = [place for place, line in enumerate(lines) if b'"nas:record"' in line]
    (run / JOURNAL).write_bytes(b"".join(line for place, line in enumerate(lines) if place != genes[2]))
    (run / CHECK).write_bytes((folder / CHECK).read_bytes())
    done = repair(run / JOURNAL)
    assert done.lost == 1
    assert all(trial.status != "running" for trials in search(run).values() for trial in trials)


def test_repair_of_a_lost_time_loses_no_score(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    number = open_trial(book, (0,) * 6)
    book.begin_again(number)
    book.close(number, SCORE)
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"nas:again"' not in line))
    done = repair(path)
    assert (done.kept, done.again, done.lost) == (1, 0, 0)
    assert ledger(tmp_path).trial(number).score == SCORE
