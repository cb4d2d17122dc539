"""The judge behind a stub server: good answers, nonsense, silence, errors that pass and errors that stay."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from intertitle.align.preference import Candidate, Endpoint, Judge, JudgeError, Material, Scores
from intertitle.errors import OptionError

MATERIAL = Material("clip", "Describe.", segments=["A dog runs."])
CANDIDATES = [Candidate(text, ("greedy",)) for text in ("A dog runs.", "A cat sleeps here.", "A dog.")]


def judge(url: str, **options: float) -> Judge:
    return Judge(Endpoint(url, "stub", "secret-key", **{"backoff": 0.01, "timeout": 5, **options}))  # type: ignore[arg-type]


def test_good_answers(server):
    server.answer = lambda question, _: time.sleep(0.05) or (
        '{"consistency": [3, 0, 2]}' if "independently" in question
        else '{"factuality": 5, "fluency": 4}' if "so: <<<A dog" in question
        else '{"factuality": 0, "fluency": 3}'
    )  # fmt: skip
    assert judge(server.url).score(MATERIAL, CANDIDATES) == [Scores(5, 4, 3), Scores(0, 3, 0), Scores(5, 4, 2)]
    assert len(server.requests) == 4
    assert server.busiest > 1  # at the same time
    assert server.paths == {"/v1/chat/completions"}
    for headers, body in server.requests:
        assert headers["Authorization"] == "Bearer secret-key"
        assert (body["model"], body["temperature"], len(body["messages"])) == ("stub", 0, 2)
    assert Endpoint(f"{server.url}/chat/completions/", "stub").url == f"{server.url}/chat/completions"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(server, status: int):
    from .conftest import good

    server.answer = lambda question, tries: (status, {}, b"busy") if tries < 2 else good(question)
    assert len(judge(server.url).score(MATERIAL, CANDIDATES)) == 3
    assert len(server.requests) == 12


def test_what_stays_is_given_up(server):
    server.answer = lambda *_: (500, {}, b"{}")
    with pytest.raises(JudgeError, match=r"^the judge gave no answer in 3 tries: status 500$"):
        judge(server.url, retries=2).score(MATERIAL, CANDIDATES)
    assert max(sum(body == other for _, other in server.requests) for _, body in server.requests) == 3


def test_the_server_says_when(server):
    server.answer = lambda question, tries: (429, {"Retry-After": "1"}, b"") if not tries else "yes"
    began = time.monotonic()
    assert Endpoint(server.url, "stub", backoff=0.01).ask("", "?") == "yes"
    assert time.monotonic() - began >= 1
    began = time.monotonic()
    server.requests.clear()
    assert Endpoint(server.url, "stub", backoff=0.01, longest_wait=0.1).ask("", "?") == "yes"
    assert time.monotonic() - began < 1


def test_silence(server):
    server.answer = lambda *_: None
    began = time.monotonic()
    with pytest.raises(JudgeError, match=r"^the judge gave no answer in 2 tries: timed out$"):
        judge(server.url, timeout=0.2, retries=1).score(MATERIAL, CANDIDATES)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (200, b"<html>welcome</html>"),
        (200, b"{}"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": {"content": null}}]}'),
        (200, b"[" * 100_000),
        (400, b"bad"),
    ],
)
def test_what_is_no_answer_is_not_tried_again(server, status: int, data: bytes):
    server.answer = lambda *_: (status, {}, data)
    with pytest.raises(JudgeError, match=r"not that of a chat completion|status 400"):
        Endpoint(server.url, "stub").ask("", "?")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_ends_the_run(server, status: int):
    server.answer = lambda *_: (status, {}, b"wrong key: secret-key")
    with pytest.raises(OptionError, match=f"status {status}") as raised:
        judge(server.url).score(MATERIAL, CANDIDATES)
    assert "secret" not in str(raised.value)


def test_the_key_goes_nowhere_else(server):
    server.answer = lambda *_: (302, {"Location": f"{server.url}/elsewhere"}, b"")
    with pytest.raises(JudgeError, match="status 302"):
        Endpoint(server.url, "stub", "secret-key").ask("", "?")
    assert server.paths == {"/v1/chat/completions"}


def test_nobody_there(server):
    server.close()
    with pytest.raises(JudgeError, match="2 tries: Connection refused"):
        Endpoint(server.url, "stub", backoff=0.01, retries=1).ask("", "?")


@pytest.mark.parametrize("url", ["", "localhost:8000", "file:///a/b", "http://", "http://h:99999/", "http://a b/"])
def test_what_is_no_address(url: str):
    with pytest.raises(OptionError, match="the judge's address is"):
        Endpoint(url, "stub")


def test_what_else_is_refused():
    with pytest.raises(OptionError, match="no user or password"):
        Endpoint("http://me:secret@host/v1", "stub")
    with pytest.raises(OptionError, match="no key has"):
        Endpoint("http://host/v1", "stub", "one\ntwo")
    with pytest.raises(OptionError, match="no name"):
        Endpoint("http://host/v1", "")
    assert json.dumps(Endpoint("https://host", "stub").url) == '"https://host/chat/completions"'


def raw_server(*pieces: bytes, drip: bytes = b"") -> tuple[str, Callable[[], None]]:
    """A server that says what no HTTP library would: ``pieces``, then ``drip`` ten times a second without end."""
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def speak(client: socket.socket) -> None:
        with client, suppress(OSError):
            client.recv(1 << 16)
            for piece in pieces:
                client.sendall(piece)
            while drip and not over.wait(0.1):
                client.sendall(drip)

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=speak, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()

    def close() -> None:
        over.set()
        listener.close()

    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", close


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS: dict[str, tuple[list[bytes], bytes]] = {
    "a status line byte by byte": ([], b"H"),
    "a body byte by byte": ([HEAD + b"Content-Length: 100000\r\n\r\n"], b"{"),
    "a body without a length": ([HEAD + b"\r\n"], b" "),
    "chunks": ([CHUNKED], b"1\r\n \r\n"),
    "100 Continue": ([], b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers": ([HEAD], b"X-A: b\r\n"),
    "trailers": ([CHUNKED, b"2\r\n{}\r\n0\r\n"], b"X-A: b\r\n"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_answer_that_never_ends(kind: str):
    """Each byte comes well within the timeout of a socket."""
    pieces, drip = ENDLESS[kind]
    url, close = raw_server(*pieces, drip=drip)
    began = time.monotonic()
    with pytest.raises(JudgeError, match="gave no answer in 1 tries: "):
        Endpoint(url, "stub", timeout=0.5, retries=0).ask("", "?")
    close()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 3_000_000, "5", None, True])
def test_a_timeout_that_no_socket_can_wait_for(timeout: Any):
    with pytest.raises(OptionError, match="the judge's timeout is seconds above 0 and at most 2147483, not "):
        Endpoint("http://127.0.0.1:9/v1", "stub", timeout=timeout)
    with socket.socket() as each:
        each.settimeout(2_147_483)


@pytest.mark.parametrize(
    "answer",
    [
        CHUNKED + b"-5\r\nabcde\r\n",
        CHUNKED + b"zz\r\n",
        HEAD + b"Content-Length: -7\r\n\r\n{}",
        b"\x1b[2J\x07" + b"evil\x85" * 9000 + b"\r\n",
        b"HTTP/1.1 9999999 \x1b]0;title\x07\r\n\r\n",
        b"",
    ],
)
def test_an_answer_that_is_no_http(answer: bytes):
    url, close = raw_server(answer)
    with pytest.raises(JudgeError) as raised:
        Endpoint(url, "stub", timeout=5, retries=0).ask("", "?")
    close()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 300
