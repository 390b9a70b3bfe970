"""Runs tests again and again without importing the libraries again: `serve` in a process that imports nothing of the project.

Each line of standard input is a JSON list of tests, each answer a JSON object. Every list runs in a fork of its own, so that what a test
left behind, and the project's code as it stood on disk, end with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import Any

OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
"""The last, because some plug-ins are imported before pytest could see to it."""


class _FirstFailure:
    """A plug-in of pytest that remembers which test failed."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def serve(seconds: float) -> None:
    """Answers {"passed": bool, "failed": the first test that failed, empty where none ran to its end}; what takes longer than `seconds` failed."""
    import diffusers  # noqa: F401
    import optuna  # noqa: F401
    import pytest
    import scipy  # noqa: F401
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        tests, (reading, writing) = json.loads(line), os.pipe()
        child = os.fork()
        if not child:
            os.setsid()
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            for stream in (1, 2):
                os.dup2(0, stream)
            first = _FirstFailure()
            code = pytest.main([*OPTIONS, *tests], plugins=[first])
            os.write(writing, json.dumps({"passed": code == 0, "failed": first.name}).encode())
            os._exit(0)
        os.close(writing)
        answers.write((_ended(child, seconds) and _read(reading)) or '{"passed": false, "failed": ""}')
        answers.write("\n")
        answers.flush()
        os.close(reading)


def _ended(child: int, seconds: float) -> bool:
    """Whether it ended by itself. It and its children are gone in any case."""
    until, gone = time.monotonic() + seconds, False
    while not gone and time.monotonic() < until:
        gone = os.waitpid(child, os.WNOHANG)[0] == child
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not gone:
        os.waitpid(child, 0)
    return gone


def _read(reading: int) -> str:
    with os.fdopen(os.dup(reading)) as answer:
        return answer.read()
