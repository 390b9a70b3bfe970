"""Being asked to stop, by Ctrl-C or by SIGTERM: the work ends at once, but for what is `whole`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nas.contracts import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, answered like Ctrl-C."""


class Answered(SystemExit):
    """The end of a command that has said that it was interrupted."""


_terminated: list[int] = []


def terminated() -> bool:
    """Whether SIGTERM came; who turns a `Terminated` into an exit of his own forgets which signal it was."""
    return bool(_terminated)


def answer_sigterm() -> None:
    """From now on SIGTERM ends this process like Ctrl-C, with exit code 143. Where somebody chose to ignore it, it stays ignored."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def exit_code(asked: KeyboardInterrupt) -> int:
    """128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(asked, Terminated) else signal.SIGINT)


def asked_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """
    The interrupt that an error is, or that it came of: a library that is interrupted while it tidies up may stumble, and raise that.
    A `UserError` is an answer of its own, whatever it came of: the watch of a cluster interrupts this process to say that it died.
    """
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, KeyboardInterrupt):
            return error
        error = error.__context__
    return None


@contextmanager
def whole() -> Iterator[None]:
    """Who asks to stop while this runs is answered after it: a step of a training is done or not done. Asked a second time, it stops."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    # At the very end of the interpreter, where a training that was left open is closed, there are no handlers any more.
    known = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in known.items() if callable(handler)}

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            before[signal.Signals(number)](number, frame)

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        before[signal.Signals(asked[0])](asked[0], None)


def _terminate(number: int, frame: FrameType | None) -> None:
    _terminated.append(number)
    raise Terminated
