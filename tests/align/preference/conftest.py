"""A stub of an OpenAI-compatible server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = Callable[[str, int], "str | tuple[int, dict[str, str], bytes] | None"]


def good(question: str, _: int = 0) -> str:
    """Marks by the length of what is judged, so that captions differ."""
    if "written independently" in question:
        count = int(question.split(" descriptions")[0])
        return json.dumps({"consistency": [number % 4 for number in range(count)]})
    length = len(question.rsplit("so: <<<", 1)[1])
    return json.dumps({"factuality": length % 6, "fluency": length // 6 % 6})


class StubServer:
    """``answer(question, tries)``: a text, a whole response (status, headers, body), or ``None`` to say nothing.

    ``tries`` counts earlier requests with the same question. ``requests`` are the headers and bodies that came.
    """

    def __init__(self) -> None:
        self.answer: Answer = good
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.paths: set[str] = set()
        self.busiest = 0
        self._busy = 0
        self._lock = threading.Lock()
        self._release = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                stub._respond(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, *_: object) -> None:
                """A client that no longer waits is part of the tests."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()

    def _respond(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length", 0))) or "{}")
        question = body["messages"][-1]["content"] if body else ""
        with self._lock:
            tries = sum(1 for _, earlier in self.requests if earlier == body)
            self.requests.append((dict(handler.headers), body))
            self.paths.add(handler.path)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            answer = self.answer(question, tries)
        finally:
            with self._lock:
                self._busy -= 1
        if answer is None:
            self._release.wait(20)
            return
        if isinstance(answer, str):
            content = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
            answer = (200, {}, content)
        status, headers, data = answer
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@pytest.fixture
def server() -> Iterator[StubServer]:
    stub = StubServer()
    yield stub
    stub.close()
