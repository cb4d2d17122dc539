"""A chat model behind an OpenAI-compatible endpoint, asked with the standard library alone."""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
import urllib.error
import urllib.request
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ...errors import OptionError
from ...runtime.timing import checked_limit
from .judge import JudgeError

#: Worth asking again: too busy, or broken for now. Any other failure would come again.
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
#: Mean that no question will be answered: a wrong key, a wrong address or model.
_REFUSED = {401: "refuses the API key", 403: "forbids the request", 404: "knows no such address or model"}
_LARGEST = 4 << 20
_LONGEST_REASON = 120
#: Seconds that a socket can wait: it counts milliseconds in 32 bits.
_LONGEST = 2_147_483
_NO_LONGER = "the judge is no longer asked"


class Asker:
    """Asks an endpoint up to ``workers`` questions at a time, in threads that no exit of the process waits for.

    A thread that waits for a silent server cannot be stopped, and whoever presses Ctrl-C is not to wait with it.
    """

    def __init__(self, endpoint: Endpoint, workers: int) -> None:
        self._endpoint, self._workers = endpoint, workers
        self._questions: SimpleQueue[tuple[Future[str], str, str]] = SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Future[str]] = set()
        self._threads = 0
        self._closed = False

    def submit(self, system: str, question: str) -> Future[str]:
        """The answer to be, or what ``Endpoint.ask`` raises."""
        future: Future[str] = Future()
        with self._lock:
            if self._closed:
                raise JudgeError(_NO_LONGER)
            self._open.add(future)
            if self._threads < self._workers:
                self._threads += 1
                threading.Thread(target=self._work, name="intertitle-judge", daemon=True).start()
        self._questions.put((future, system, question))
        return future

    def close(self) -> None:
        """Every answer that is still to be becomes a ``JudgeError`` at once."""
        self._endpoint.close()
        with self._lock:
            self._closed = True
            waiting, self._open = self._open, set()
        for future in waiting:
            with suppress(InvalidStateError):
                future.set_exception(JudgeError(_NO_LONGER))

    def _work(self) -> None:
        while True:
            future, system, question = self._questions.get()
            if not future.done() and future.set_running_or_notify_cancel():
                # Closing may have answered it meanwhile.
                try:
                    answer = self._endpoint.ask(system, question)
                except BaseException as error:
                    with suppress(InvalidStateError):
                        future.set_exception(error)
                else:
                    with suppress(InvalidStateError):
                        future.set_result(answer)
            with self._lock:
                self._open.discard(future)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect could carry the key to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class _Deadline:
    """Cuts a connection when its time is over, whatever it is doing.

    A socket's own timeout starts anew with each byte that comes. The connection is cut through a second descriptor, as
    TLS takes the first one over.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for each in self._sockets:
                each.close()
            self._sockets.clear()

    def watch(self, connected: socket.socket) -> None:
        with self._lock:
            self._sockets.append(connected.dup())
        if self.passed:
            self._cut()

    def _cut(self) -> None:
        self.passed = True
        with self._lock:
            for each in self._sockets:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


class _Request(urllib.request.Request):
    """A request with the deadline of its answer."""

    deadline: _Deadline


class _Plain(http.client.HTTPConnection):
    deadline: _Deadline

    def connect(self) -> None:
        super().connect()
        self.deadline.watch(self.sock)


class _Secure(http.client.HTTPSConnection, _Plain):
    """``HTTPSConnection.connect`` calls ``_Plain.connect`` before it begins with TLS."""


def _watched(kind: type[_Plain], deadline: _Deadline) -> Any:
    """What ``do_open`` calls for a connection: one of a kind, with a deadline."""

    def connection(*args: Any, **options: Any) -> _Plain:
        made = kind(*args, **options)
        made.deadline = deadline
        return made

    return connection


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> http.client.HTTPResponse:
        return self.do_open(_watched(_Plain, req.deadline), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        self._trusted = ssl.create_default_context()
        self._trusted.set_alpn_protocols(["http/1.1"])
        super().__init__(context=self._trusted)

    def https_open(self, req: Any) -> http.client.HTTPResponse:
        return self.do_open(_watched(_Secure, req.deadline), req, context=self._trusted)


class Endpoint:
    """``url`` is that of the API (``http://host:8000/v1``) or of its ``/chat/completions``; ``key`` its bearer token.

    A question without a whole answer in ``timeout`` seconds, one that is refused for now (429, 5xx) and a connection
    that breaks are tried again up to ``retries`` times, after ``backoff`` seconds, doubled each time up to
    ``longest_wait`` and shortened at random by up to a half, or after the seconds that the server names. Safe for
    several threads. ``OptionError`` for what is no address and for a ``timeout`` that no socket can wait for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        longest_wait: float = 30.0,
    ) -> None:
        parts = _address(url)
        if parts is None:
            raise OptionError(f"the judge's address is http://HOST/… or https://HOST/…, not '{url}'")
        if parts.username is not None:
            raise OptionError("the judge's address may hold no user or password; the key comes from the environment")
        if not model:
            raise OptionError("the judge's model has no name")
        key = (key or "").strip()
        if not key.isascii() or not key.isprintable():
            raise OptionError("the judge's API key holds characters that no key has")
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions"
        self.url, self.model = parts._replace(path=path).geturl(), model
        self._key, self._timeout, self._retries = key, checked_limit("the judge's timeout", timeout, _LONGEST), retries
        self._backoff, self._longest_wait = backoff, longest_wait
        self._closed = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect, _Http, *([_Https] if parts.scheme == "https" else []))

    def ask(self, system: str, question: str) -> str:
        """The model's answer at temperature 0.

        ``JudgeError`` when there is none after all tries, ``OptionError`` when there can be none for any question.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        reason = ""
        for attempt in range(self._retries + 1):
            try:
                return self._content(self._post(body))
            except urllib.error.HTTPError as error:
                with error:
                    reason, wait = f"status {error.code}", _seconds(error.headers.get("Retry-After"))
                if error.code in _REFUSED:
                    raise OptionError(f"the judge {_REFUSED[error.code]} ({reason})") from None
                if error.code not in _AGAIN:
                    raise JudgeError(f"the judge answered with {reason}") from None
            except (OSError, http.client.HTTPException) as error:
                reason, wait = _reason(error), None
            if attempt < self._retries:
                usual = self._backoff * 2**attempt * random.uniform(0.5, 1)
                if self._closed.wait(min(usual if wait is None else wait, self._longest_wait)):
                    raise JudgeError(_NO_LONGER)
        raise JudgeError(f"the judge gave no answer in {self._retries + 1} tries: {reason}")

    def close(self) -> None:
        """Try nothing again from now on."""
        self._closed.set()

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "intertitle"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = _Request(self.url, body, headers)
        with _Deadline(self._timeout) as deadline:
            request.deadline = deadline
            try:
                with self._opener.open(request, timeout=self._timeout) as response:
                    data = response.read(_LARGEST + 1)
            except urllib.error.HTTPError:
                raise
            # ValueError: the standard library's, for sizes of chunks that are none.
            except (OSError, http.client.HTTPException, ValueError) as error:
                if deadline.passed:
                    raise TimeoutError from None
                raise error if not isinstance(error, ValueError) else http.client.HTTPException(str(error)) from None
            if deadline.passed:
                raise TimeoutError
        if len(data) > _LARGEST:
            raise JudgeError("the judge's answer is longer than an answer can be")
        return data

    @staticmethod
    def _content(data: bytes) -> str:
        try:
            content = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            content = None
        if not isinstance(content, str):
            raise JudgeError("the judge's answer is not that of a chat completion")
        return content


def _address(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return None
    return parts if usable and url.isascii() and url.isprintable() and " " not in url else None


def _seconds(value: str | None) -> float | None:
    """``Retry-After`` where it is a number of seconds."""
    return float(value) if value is not None and value.isdecimal() else None


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return "timed out"
    text = " ".join(str(getattr(cause, "strerror", None) or cause or type(cause).__name__).split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}…"
