"""A server of chat completions in this process, which gives the replies that a test asks for."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bird.lab.language.endpoint import Endpoint

Reply = tuple[int, dict[str, str], str]


def reply(content: Any = None, **choice: Any) -> Reply:
    """A chat completion with this content; the fields of its choice stand beside the message."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, **choice}]})


def refusal(message: str, status: int = 400, **more: Any) -> Reply:
    return status, {"Location": "/elsewhere"}, json.dumps({"error": {"message": message, **more}})


class Server(ThreadingHTTPServer):
    """Gives replies in their order, then says "Unsafe." where the response holds "bad"; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1/chat/completions"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on what is endless."""

    def judge(self, key: str | None = None, **options: Any) -> Endpoint:
        return Endpoint(self.url, "judge-1", key, **{"per_minute": 1e9, **options})


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, **body})
        self.server.headers.append(dict(self.headers))
        bad = "bad" in body["messages"][0]["content"].partition("<answer>")[2]
        replies = self.server.replies or [reply("Unsafe." if bad else "safe")]
        status, headers, text = replies.pop(0)
        if isinstance(status, bytes):
            self.drip(status, headers, text)
        if status <= 0:  # hangs up without a word, at once or too late
            self.server.released.wait(-5 * status)
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_CONNECT(self) -> None:  # as a proxy
        self.drip(*self.server.replies.pop(0))

    def drip(self, begin: bytes, piece: bytes, pause: float) -> None:
        """Send a beginning, then a piece after each pause, without an end."""
        self.wfile.write(begin)
        while True:
            self.wfile.write(piece)
            time.sleep(pause)

    do_GET = do_POST  # where a redirect would lead

    def log_message(self, *args: Any) -> None:
        """Not on the terminal."""


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server on a port of its own."""
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield made
    finally:
        made.released.set()
        made.shutdown()
        made.server_close()
        thread.join()
