"""What the machine could not do, in one line with the remedy: a full disk, a database that is gone, memory that is short."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from nas.base.exported import ExportError
from nas.base.files import first_line
from nas.base.pictures import PictureError
from nas.contracts import UserError

AGAIN = "the same command goes on from what is kept"

REMEDIES = {
    errno.ENOSPC: f"the disk is full; make room, then {AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; make room, then {AGAIN}",
    errno.EFBIG: f"the file may not grow so large here; raise the limit (ulimit -f), then {AGAIN}",
    errno.EROFS: "the file system is read-only; choose another path",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.EACCES: "permission denied; choose another path, or change its permissions",
    errno.EPERM: "not permitted; choose another path, or change its permissions",
    errno.EEXIST: "it exists already; choose another path",
    errno.ENOTDIR: "a part of the path is no folder; choose another path",
    errno.EISDIR: "it is a folder; choose another path",
    errno.ENOENT: "there is no such file; check the path",
    errno.ELOOP: "its links lead in a circle; choose another path",
    errno.EMFILE: f"too many files are open; raise the limit (ulimit -n), then {AGAIN}",
    errno.ENOMEM: f"memory is short; use a smaller batch or fewer workers, then {AGAIN}",
    errno.ENOLCK: "the file system gives no locks; choose another path, or mount it with them",
    errno.EIO: "the disk failed to read or write; check it",
    errno.EADDRINUSE: "the port is in use; choose another --port",
}

SHORT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENOMEM, errno.ENOLCK, errno.EIO)
"""What the machine lacks. Where an exception comes up while one of these is handled it follows from it; of others, such as a file that is not there, it need
not: they may have been handled well."""

IN_WORDS = (
    ("no space left on device", REMEDIES[errno.ENOSPC]),
    ("disk quota exceeded", REMEDIES[errno.EDQUOT]),
    ("file too large", REMEDIES[errno.EFBIG]),
    ("read-only file system", REMEDIES[errno.EROFS]),
    ("file name too long", REMEDIES[errno.ENAMETOOLONG]),
    ("not enough memory", REMEDIES[errno.ENOMEM]),
    ("cannot allocate memory", REMEDIES[errno.ENOMEM]),
    ("can't allocate memory", REMEDIES[errno.ENOMEM]),
    (
        "unable to mmap",
        f"memory is short, or the file cannot be mapped there (nothing is wrong with the file); {AGAIN}",
    ),
    ("out of memory", REMEDIES[errno.ENOMEM]),
    ("bad_alloc", REMEDIES[errno.ENOMEM]),
)
"""Of libraries that say what the system said in an exception of their own."""


def explained(error: BaseException) -> str | None:
    """One line for people, or None where it is a fault of this program."""
    for one, handled in _causes(error):
        if isinstance(one, UserError | ExportError | PictureError) and not handled:
            return str(one)
        if isinstance(one, MemoryError):
            return f"{first_line(one)}: {REMEDIES[errno.ENOMEM]}" if str(one) else REMEDIES[errno.ENOMEM]
        if isinstance(one, OSError) and one.errno in REMEDIES and (one.errno in SHORT or not handled):
            files = " -> ".join(str(name) for name in (one.filename, one.filename2) if name is not None)
            return f"{files or one.strerror}: {REMEDIES[one.errno]}"
        if type(one).__module__.partition(".")[0] in ("sqlalchemy", "psycopg", "sqlite3", "pymysql", "MySQLdb"):
            # The statement and its values, which follow, are of no use to anybody.
            return f"the database does not answer as it should ({first_line(one).partition('[SQL')[0]}); once it does, {AGAIN}"
        known = str(one).lower()
        for words, remedy in IN_WORDS:
            if words in known:
                return f"{first_line(one)}: {remedy}"
    return None


def _causes(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """The exception and those behind it, and whether it came up while they were handled, not because of them."""
    seen: set[int] = set()
    one: BaseException | None = error
    handled = False
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one, handled
        handled = handled or one.__cause__ is None
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
