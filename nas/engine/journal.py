"""Optuna's journal file, and beside it what shows that it is whole.

<run>/journal.log     Optuna's format, one record a line; the dashboard reads it
<run>/journal.check   for each line where it starts, how long it is, its checksum, and of which record it is: [offset, length, checksum,
                      operation, study, trial, key]

A line of the check file is written before the line that it is for, under the same lock. So a crash between the two leaves a check without
its line, which the next append overrules; a line without its check is never one of ours.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import SequenceMatcher
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.storages.journal._storage import JournalOperation

from nas.contracts import UserError

log = logging.getLogger("nas")

AGAIN = "nas:again"
"""Attribute of a trial: when one that a stop had left was handed out again, in seconds since 1970. Nothing but that is lost with it."""
JOURNAL, CHECK = "journal.log", "journal.check"
TAIL = 1 << 16
"""Bytes at the end of a file that are looked through at once."""
HELD = 10.0
"""Seconds that an append holds its lock at the most: who still holds one was killed."""
LOST = "lost: its line of the journal was damaged"


class Check(NamedTuple):
    offset: int
    length: int
    checksum: str
    operation: int
    study: int | None
    trial: int | None
    key: str | None

    @property
    def stop(self) -> int:
        return self.offset + self.length


class CheckedJournal(JournalFileBackend):
    """Optuna's backend, each append of which is checked. `path`: absolute."""

    def __init__(self, path: Path) -> None:
        # Not by a symbolic link, as Optuna's is by default, which memory cards and some shares lack.
        super().__init__(str(path), JournalFileOpenLock(str(path)))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = [json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in logs]
        with get_lock_file(self._lock), self._path.open("ab+") as journal:
            offset = _drop_torn(journal)
            checks = list(_checks(lines, offset))
            with self._path.with_name(CHECK).open("ab+") as file:
                _drop_torn(file)
                file.write(_text(checks))
                file.flush()
                os.fsync(file.fileno())
            journal.write(b"".join(lines))
            journal.flush()
            os.fsync(journal.fileno())


def _drop_torn(file: BinaryIO) -> int:
    """Cuts off a last line that has no end, which a writer left that was killed, and with it what would be written behind it; where the file ends then."""
    size = end = file.seek(0, os.SEEK_END)
    tail = b""
    while end and b"\n" not in tail:
        start = max(0, end - TAIL)
        file.seek(start)
        tail, end = file.read(end - start), start
    whole = end + tail.rfind(b"\n") + 1
    if whole < size:
        file.truncate(whole)
    return whole


def prepare(path: Path) -> None:
    """For the one who is about to write: drops what a killed run left at the end, a torn line or a stale lock, and gives a journal that has
    no check file one. Raises UserError where the journal is damaged elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stale = path.with_name(path.name + ".lock")
    if os.path.lexists(stale) and time.time() - stale.lstat().st_mtime > HELD:
        stale.unlink()
    if not path.exists():
        if path.with_name(CHECK).exists():
            log.warning("%s is gone, though %s is there; the search begins anew", path, CHECK)
            path.with_name(CHECK).unlink()
        return
    checks = path.with_name(CHECK)
    with _locked(path):  # another process may be in the middle of a line
        with path.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            last = content[:whole].rstrip(b"\n").rfind(b"\n") + 1
            if not checks.exists() and not _parsed(content[last:whole] or b"{}"):
                whole = last
            file.truncate(whole)
        if checks.exists():
            with checks.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
    verify(path)
    with _locked(path):
        if not checks.exists():
            _replace(checks, _text(_checks(_lines(path.read_bytes()), 0)))


def _locked(path: Path) -> AbstractContextManager[None]:
    """While this holds, no process appends."""
    return get_lock_file(JournalFileOpenLock(str(path)))


def verify(path: Path) -> None:
    """Raises UserError naming the line where the journal is not what was written. A line that another process is writing is no damage."""
    checks = path.with_name(CHECK)
    size = path.stat().st_size
    if not checks.exists():
        for number, line in enumerate(_lines(path.read_bytes()), 1):
            if line.endswith(b"\n") and not _parsed(line):
                raise UserError(f"{path} line {number} is no record; {_remedy(path)}")
        if size:
            log.warning("%s has no %s beside it, so damage done to it before now cannot be told", path, CHECK)
        return
    known = read_checks(checks)
    with path.open("rb") as file:
        stop = 0
        for number, check in enumerate(known, 1):
            if check.offset != stop:
                raise UserError(f"{path} line {number} was written by another program; {_remedy(path)}")
            line = file.read(check.length)
            stop = check.stop
            if _checksum(line) == check.checksum:
                continue
            if len(line) < check.length and b"\n" not in line:  # the file ends here
                missing = len(known) - number + 1
                if missing > 1:  # one is being written, or was when its writer was killed
                    log.warning("%s ends %d lines early; what they held is done again", path, missing)
                return
            raise UserError(f"{path} line {number} is not what was written there; {_remedy(path)}")
    if stop < size:
        raise UserError(f"{path} line {len(known) + 1} was written by another program; {_remedy(path)}")


def read_checks(path: Path) -> list[Check]:
    """In the order of their lines, those that were overruled left out. Raises UserError where the check file itself is damaged."""
    found: list[Check] = []
    lines = _lines(path.read_bytes())
    for number, line in enumerate(lines, 1):
        entry = _parsed(line)
        kinds = (int, int, str, int, int | None, int | None, str | None)
        if not isinstance(entry, list) or len(entry) != 7 or not all(map(isinstance, entry, kinds)):
            if number == len(lines) and not line.endswith(b"\n"):
                break  # torn: its line was not written
            raise UserError(f"{path} line {number} is damaged; {_remedy(path)}")
        check = Check(*entry)
        while found and found[-1].offset >= check.offset:
            found.pop()
        found.append(check)
    return found


@dataclass(frozen=True)
class Repair:
    """`kept`: trials that are whole. `again`: those that will be run again. `lost`: those whose genes are gone. `aside`: file of the lines
    that were set aside, `lines` many; None where there were none."""

    kept: int
    again: int
    lost: int
    lines: int
    aside: Path | None


def repair(path: Path) -> Repair:
    """Keeps every whole trial and sets the rest aside in a file. A trial whose score is gone is open again; one whose genes are gone stays as
    a failed one, so that the others keep their numbers."""
    content = path.read_bytes()
    lines = _lines(content)
    checks = _known_checks(path.with_name(CHECK), lines)
    matched = _matched(lines, checks)
    builder = _Builder()
    used = {place for place in matched if place is not None and isinstance(_parsed(lines[place]), dict)}
    for check, place in zip(checks, matched, strict=True):
        builder.take(check, lines[place] if place in used else None)
    kept = builder.lines()
    aside = [*(line for place, line in enumerate(lines) if place not in used), *builder.aside]
    if kept == content and len(used) == len(checks) == len(lines):
        return Repair(builder.whole, 0, 0, 0, None)
    damaged = None
    if aside:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        damaged = path.with_name(f"{path.stem}.damaged-{stamp}.log")
        _replace(damaged, b"".join(line if line.endswith(b"\n") else line + b"\n" for line in aside))
    # Without a check file the journal is taken as it is, so that a crash in between leaves a legal state.
    path.with_name(CHECK).unlink(missing_ok=True)
    _replace(path, kept)
    _replace(path.with_name(CHECK), _text(_checks(_lines(kept), 0)))
    return Repair(builder.whole, len(builder.again), len(builder.lost), len(aside), damaged)


class _Builder:
    """Writes the journal anew, record by record, with the same numbers of studies and trials."""

    def __init__(self) -> None:
        self.aside: list[bytes] = []
        self.again: set[int] = set()
        self.lost: set[int] = set()
        self._studies = 0
        self._lost_studies: set[int] = set()
        self._trials: list[int] = []
        self._records: list[tuple[int | None, bytes]] = []
        self._closed: set[int] = set()

    @property
    def whole(self) -> int:
        return len(self._closed - self.again - self.lost)

    def take(self, check: Check, line: bytes | None) -> None:
        """The next record; None where its line is gone."""
        if check.operation == JournalOperation.CREATE_STUDY:
            if line is None:
                self._lost_studies.add(self._studies)
                line = _record(JournalOperation.CREATE_STUDY, study_name=f"lost-{self._studies}", directions=[1])
            self._studies += 1
            self._records.append((None, line))
        elif check.operation == JournalOperation.CREATE_TRIAL:
            study = check.study or 0
            number = len(self._trials)
            self._trials.append(study)
            if line is None or study in self._lost_studies:
                self.lost.add(number)
                self.aside += [] if line is None else [line]
                now = datetime.now(UTC).isoformat(timespec="microseconds")
                made = _record(JournalOperation.CREATE_TRIAL, study_id=study, datetime_start=now)
                failed = _record(
                    JournalOperation.SET_TRIAL_STATE_VALUES,
                    trial_id=number,
                    state=3,
                    values=None,
                    datetime_complete=now,
                )
                noted = _record(JournalOperation.SET_TRIAL_USER_ATTR, trial_id=number, user_attr={"failed": LOST})
                self._records += [(None, made), (None, noted), (None, failed)]
            else:
                self._records.append((None, line))
        elif check.trial is not None:
            self._take_of_trial(check, line)
        elif line is not None and check.study not in self._lost_studies:
            self._records.append((None, line))
        elif line is not None:
            self.aside.append(line)

    def _take_of_trial(self, check: Check, line: bytes | None) -> None:
        assert check.trial is not None
        if line is None:
            noted = check.operation == JournalOperation.SET_TRIAL_SYSTEM_ATTR and check.key != AGAIN
            if noted and check.trial not in self.lost:
                self.again.add(check.trial)  # its score, or why it failed
        elif check.trial in self.lost:
            self.aside.append(line)
        else:
            if check.operation == JournalOperation.SET_TRIAL_STATE_VALUES:
                self._closed.add(check.trial)
            self._records.append((check.trial, line))

    def lines(self) -> bytes:
        """The whole journal. Of trials that are run again, what came after their genes is set aside."""
        kept = []
        for trial, line in self._records:
            if trial in self.again:
                self.aside.append(line)
            else:
                kept.append(line)
        return b"".join(kept)


def _record(operation: JournalOperation, **fields: Any) -> bytes:
    return (
        json.dumps({"op_code": int(operation), "worker_id": "repair", **fields}, separators=(",", ":")).encode() + b"\n"
    )


def _known_checks(path: Path, lines: Sequence[bytes]) -> list[Check]:
    """What should stand in the journal; where no check file says it, what its own lines say of themselves."""
    if path.exists():
        with suppress(UserError):
            return read_checks(path)
    return list(_checks(lines, 0))


def _matched(lines: Sequence[bytes], checks: Sequence[Check]) -> list[int | None]:
    """For each check the place of its line, in an order that both share."""
    found: list[int | None] = [None] * len(checks)
    mine, theirs = [check.checksum for check in checks], [_checksum(line) for line in lines]
    for start, place, size in SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks():
        found[start : start + size] = range(place, place + size)
    return found


def _checks(lines: Iterable[bytes], offset: int) -> Iterator[Check]:
    for line in lines:
        entry: Any = _parsed(line)
        if not isinstance(entry, dict):  # what can still be made out says which numbers were given
            entry = {
                name.decode(): int(value)
                for name, value in re.findall(rb'"(op_code|study_id|trial_id)":(\d{1,18})', line)
            }
        keyed: dict[str, Any] = {}
        for name in ("user_attr", "system_attr"):
            if isinstance(entry.get(name), dict):
                keyed = entry[name]
        operation, study, trial = (
            entry.get(name) if type(entry.get(name)) is int else None for name in ("op_code", "study_id", "trial_id")
        )
        code = -1 if operation is None else operation
        yield Check(offset, len(line), _checksum(line), code, study, trial, next(iter(keyed), None))
        offset += len(line)


def _text(checks: Iterable[Check]) -> bytes:
    return b"".join(json.dumps(check, separators=(",", ":")).encode() + b"\n" for check in checks)


def _lines(content: bytes) -> list[bytes]:
    return re.findall(rb"[^\n]*\n|[^\n]+", content)


def _checksum(line: bytes) -> str:
    return blake2b(line, digest_size=8).hexdigest()


def _parsed(line: bytes) -> Any:
    """None for what is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _remedy(path: Path) -> str:
    return f"`nas repair {path.parent}` keeps every whole trial and sets the rest aside"
