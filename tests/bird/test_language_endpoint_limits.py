"""The judge's limits of time, size and depth, against servers and proxies that keep to none."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bird.lab.language import endpoint
from bird.lab.language.endpoint import Endpoint
from tests.bird.chat_server import Server, running


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with running() as made:
        yield made


@pytest.mark.parametrize(
    ("begin", "piece", "pause"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", 0.02),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" ", 0.02),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
        (b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n", b" ", 0.02),
    ],
    ids=["slow head", "slow body", "endless 100-continue", "slow error"],
)
def test_an_answer_has_a_deadline(server: Server, begin: bytes, piece: bytes, pause: float) -> None:
    server.replies = [(begin, piece, pause)]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"still fails after 0 retries: no whole answer within 0\.4 s"):
        server.judge(timeout=0.4, retries=0)(["a"], ["x"])
    assert time.monotonic() - start < 20  # each of them is endless; a busy machine is slow


def test_a_connection_through_a_proxy_has_the_deadline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", server.url)
    server.replies = [(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", 0.02)]
    with pytest.raises(RuntimeError, match=r"still fails after 0 retries: no whole answer within 0\.4 s"):
        Endpoint("https://judge.invalid/v1", "m", None, timeout=0.4, retries=0)(["a"], ["x"])
    assert server.replies == [], "the proxy was asked"


def test_an_answer_has_a_size(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_LARGEST", 1000)
    server.replies = [(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000, 0.0)]
    with pytest.raises(RuntimeError, match="answers with more than 1000 bytes"):
        server.judge(timeout=20, retries=0)(["a"], ["x"])


@pytest.mark.parametrize("level", ["[", '{"error": '])
def test_an_answer_may_be_too_deep(server: Server, level: str) -> None:
    server.replies = [(200, {}, level * 80_000), (404, {}, level * 80_000)]
    judge = server.judge(timeout=20, retries=0)
    with pytest.raises(RuntimeError, match="the reply is not a chat completion"):
        judge(["a"], ["x"])
    with pytest.raises(RuntimeError, match=r"refuses: 404 Not Found: [^a-z]"):
        judge(["a"], ["x"])
