"""A language model's endpoint is somebody else's: whatever it does, the key stays, time and memory are bounded, and the answer is one line."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from nas.contracts import UserError
from nas.searchers.proposers import LONGEST_ANSWER, Chat, RefusedError, read_answer
from tests.test_rounds import QUESTION

Handler = Callable[[socket.socket, bytes], None]


@contextmanager
def listening(handle: Handler) -> Iterator[tuple[str, list[bytes]]]:
    """A server that does as it likes with each connection; what it was sent."""
    asked: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = server.accept()
            except TimeoutError:
                continue
            with connection:
                connection.settimeout(5)
                try:
                    asked.append(connection.recv(2**16))
                    handle(connection, asked[-1])
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", asked
    finally:
        ended.set()
        thread.join()
        server.close()


def replying(body: bytes, status: str = "200 OK", headers: str = "") -> Handler:
    def handle(connection: socket.socket, request: bytes) -> None:
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)

    return handle


def dripping(connection: socket.socket, request: bytes) -> None:
    """Always a little more, each time before a timeout of one read."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.1)


def slow_headers(connection: socket.socket, request: bytes) -> None:
    for letter in b"HTTP/1.1 200 OK\r\nX-Long: " + b"a" * 500:
        connection.sendall(bytes([letter]))
        time.sleep(0.1)


def endless(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"[" * 2**16)


def answer(content: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


HOSTILE: dict[str, Handler] = {
    "nothing": lambda connection, request: None,
    "noise": lambda connection, request: connection.sendall(b"\x00\xff" * 50),
    "a status that is none": lambda connection, request: connection.sendall(b"HTTP/1.1 ninety OK\r\n\r\n"),
    "half a body": lambda connection, request: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
    "a length that is none": replying(b"{}", headers="Content-Length: many\r\n"),
    "chunks that are none": lambda connection, request: connection.sendall(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    ),
    "a long header": lambda connection, request: connection.sendall(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2**20),
    "an error": replying(b"{}", "500 Internal Server Error"),
    "no content": replying(b"", "204 No Content"),
    "no right": replying(b'{"error": "key"}', "401 Unauthorized"),
    "deep nesting": replying(b"[" * 100_000),
    "deep objects": replying(b'{"choices":' * 50_000),
    "a huge number": replying(b"1" * 100_000),
    "text": replying(b"I am a teapot"),
    "bytes that are no text": replying(b"\xff\xfe\xfa"),
    "nothing chosen": replying(b'{"choices": []}'),
    "choices that are none": replying(b'{"choices": 3}'),
    "a message that is none": replying(b'{"choices": [{"message": null}]}'),
    "a number for a message": replying(answer(3)),
    "null for a message": replying(answer(None)),
    "a list for a message": replying(answer([1])),
    "compressed": replying(b"\x1f\x8b", headers="Content-Encoding: gzip\r\n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_one_line(name: str) -> None:
    with listening(HOSTILE[name]) as (url, _), pytest.raises(UserError, match=r"\Achat endpoint http://127[^\n]*\Z"):
        Chat(url, "m", timeout=3).propose(QUESTION)


@pytest.mark.parametrize(
    "status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"]
)
def test_a_redirect_is_not_followed_and_the_key_stays(status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "s3cr3t")
    with (
        listening(replying(answer("[0]"))) as (thief, stolen),
        listening(replying(b"", status, f"Location: {thief}/chat/completions\r\n")) as (url, asked),
    ):
        with pytest.raises(UserError, match=f"answered status {status[:3]}") as told:
            Chat(url, "m", key_variable="TEST_KEY").propose(QUESTION)
        assert b"s3cr3t" in asked[0]
        assert stolen == []
        assert "s3cr3t" not in str(told.value)


@pytest.mark.parametrize("handle", [dripping, slow_headers, lambda connection, request: time.sleep(4)])
def test_there_is_one_deadline_for_all_of_it(handle: Handler) -> None:
    with listening(handle) as (url, _):
        started = time.monotonic()
        with pytest.raises(UserError, match=r"nothing whole within 0\.7 s"):
            Chat(url, "m", timeout=0.7).propose(QUESTION)
        assert time.monotonic() - started < 3


LIMITED = """
import resource, sys
from nas.contracts import UserError
from nas.searchers.proposers import Chat
from tests.test_rounds import QUESTION
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    Chat(sys.argv[1], "m", timeout=30).propose(QUESTION)
except UserError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_there_is_one_limit_on_its_size() -> None:
    with listening(endless) as (url, _):
        done = subprocess.run([sys.executable, "-c", LIMITED, url], capture_output=True, text=True, check=True)
    grown, words = done.stdout.split(" ", 1)
    assert "more than 1024 KiB" in words
    assert int(grown) < 100 * 2**10, "KiB"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" + "9" * 5000 + "]",
        "[1e400]",
        "[-1e400]",
        "[" + "1," * 5000 + "1]",
        "[NaN]",
        '["' + "x" * 10**6 + '"]',
        "[[[[1]]]]",
        "[{}]",
        "[null]",
        "][",
    ],
)
def test_an_answer_that_means_nothing_is_refused_in_a_short_line(text: str) -> None:
    with pytest.raises(RefusedError, match=r"\A.{1,499}\Z"):
        read_answer(text, QUESTION)


def test_what_is_booked_of_an_answer_is_cut() -> None:
    with listening(replying(answer("no list " * 10_000))) as (url, _):
        assert len(Chat(url, "m").propose(QUESTION)) == LONGEST_ANSWER


def test_what_is_thought_aloud_first_does_not_hide_the_answer() -> None:
    text = "Let me think of [1, 2]. " * 1000 + json.dumps([choice.options[0] for choice in QUESTION.choices])
    with listening(replying(answer(text))) as (url, _):
        option, _ = read_answer(Chat(url, "m").propose(QUESTION), QUESTION)
    assert option == read_answer(text[-200:], QUESTION)[0]
