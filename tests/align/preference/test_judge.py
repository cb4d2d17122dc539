"""The judge behind a stub server: good answers, nonsense, silence, errors that pass and errors that stay."""

from __future__ import annotations

import json
import time

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
