# ruff: noqa: F811 - fixtures that another file has are imported
"""The judge at the other end of the network, against servers that differ, cut answers off, or mean harm."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bird.lab.language import endpoint
from bird.lab.language.endpoint import Endpoint
from tests.bird.test_language_endpoint import KEY, Reply, Server, answer, server, slept  # noqa: F401


def reply_with(**message: Any) -> Reply:
    """A chat completion whose choice has these fields beside an empty message, or in it: ``content``."""
    content = message.pop("content", None)
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, **message}]})


def refusal(message: str, status: int = 400, **more: Any) -> Reply:
    return status, {}, json.dumps({"error": {"message": message, **more}})


# ------------------------------------------------------------------------------------------- what an answer is


def test_an_answer_that_was_cut_off_is_asked_again_with_more_tokens(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A reasoning model at 8 tokens has said nothing yet. That is no verdict, and must not stay one."""
    cache = tmp_path / "answers.jsonl"
    server.replies = [reply_with(finish_reason="length"), reply_with(content="<think>Let me", finish_reason="length")]
    short = Endpoint(server.url, "m", None, cache=cache, per_minute=1e6, max_tokens=8)
    assert short(["a", "b"], ["x", "y"]) == [None, None]
    assert short.unjudged == {"cut off": 2}
    assert caplog.text.count("cut off at 8 tokens: raise max_tokens") == 1
    assert not cache.exists()
    assert Endpoint(server.url, "m", None, cache=cache, per_minute=1e6, max_tokens=500)(["a"], ["x"]) == [True]
    assert server.asked[-1]["max_tokens"] == 500
    assert Endpoint(server.url, "m", None, cache=cache, per_minute=1e6, max_tokens=8)(["a"], ["x"]) == [True]
    assert len(server.asked) == 4  # the answer at 500 tokens is none at 8


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (reply_with(content="<think>It could be unsafe.</think> safe"), True),
        (reply_with(content="<think>\nsafe?\n</think>\n\nUnsafe."), False),
        (reply_with(content="unsafe because", finish_reason="length"), False),
        (reply_with(content=[{"type": "text", "text": "un"}, {"type": "text", "text": "safe"}]), False),
        (reply_with(content=[{"type": "reasoning", "text": "safe"}, {"text": "unsafe"}]), False),
    ],
    ids=["thought", "thought on lines", "cut after the word", "parts", "a part that is no text"],
)
def test_forms_of_an_answer(server: Server, reply: Reply, verdict: bool) -> None:
    server.replies = [reply]
    assert Endpoint(server.url, "m", None, per_minute=1e6)(["a"], ["x"]) == [verdict]


def test_an_echoed_key_is_not_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.replies = [answer(f"safe {KEY}")]
    cache = tmp_path / "answers.jsonl"
    assert Endpoint(server.url, "m", "JUDGE_KEY", cache=cache)(["a"], ["x"]) == [True]
    assert "safe [key]" in cache.read_text()
    assert KEY not in cache.read_text()


# ------------------------------------------------------------------------------------------- servers that differ


def test_azure_takes_the_key_in_a_header_of_its_own(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    Endpoint(server.url, "m", "JUDGE_KEY", key_header="api-key")(["a"], ["x"])
    headers = {name.lower(): value for name, value in server.headers[0].items()}
    assert headers["api-key"] == KEY
    assert "authorization" not in headers


def test_options_that_a_server_refuses(server: Server, slept: list[float]) -> None:
    server.replies = [
        refusal("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        refusal("Unsupported value: 'temperature' does not support 0."),
    ]
    assert Endpoint(server.url, "m", None, per_minute=1e6)(["a", "b"], ["x", "bad"]) == [True, False]
    assert len(server.asked) == 4  # what was learnt holds for the next item
    assert server.asked[-1]["max_completion_tokens"] == 8
    assert not {"max_tokens", "temperature"} & set(server.asked[-1])


def test_an_error_inside_a_good_status(server: Server, slept: list[float]) -> None:
    server.replies = [refusal("model overloaded", 200, code=503)]
    assert Endpoint(server.url, "m", None, per_minute=1e6)(["a"], ["x"]) == [True]
    assert slept == [1.0]
    server.replies = [refusal("no such model", 200, code=404)]
    with pytest.raises(RuntimeError, match=r"404 .*no such model"):
        Endpoint(server.url, "m", None, per_minute=1e6)(["a"], ["x"])


def test_a_timeout_of_the_server_is_asked_again(server: Server, slept: list[float]) -> None:
    server.replies = [refusal("request timeout", 408)]
    assert Endpoint(server.url, "m", None, per_minute=1e6)(["a"], ["x"]) == [True]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2.5"}, 2.5),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"Retry-After": "1e9"}, 1.0),
        ({"Retry-After": "9" * 400}, 1.0),
        ({"Retry-After": "nan"}, 1.0),
        ({"Retry-After": "-5"}, 1.0),
        ({"Retry-After": "Wed, 21 Oct 9999 07:28:00 GMT"}, 1.0),
    ],
)
def test_what_a_server_asks_for(server: Server, slept: list[float], headers: dict[str, str], seconds: float) -> None:
    """More than ten minutes are not slept, nor is what is no number of seconds: then it is the back-off, 1 s."""
    server.replies = [(429, headers, "{}")]
    Endpoint(server.url, "m", None, per_minute=1e6)(["a"], ["x"])
    assert slept == [pytest.approx(seconds)]


# ------------------------------------------------------------------------------------------- items that are refused


def test_one_refused_item_does_not_end_the_run(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.replies = [answer("safe"), refusal("content filter"), refusal("context window"), answer("safe")]
    judge = Endpoint(server.url, "m", None, cache=tmp_path / "answers.jsonl", per_minute=1e6)
    with caplog.at_level(logging.WARNING):
        assert judge(["a"] * 4, ["1", "2", "3", "4"]) == [True, None, None, True]
    assert judge.unjudged == {"refused (400)": 2}
    assert "content filter (said once)" in caplog.text
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_a_server_that_refuses_each_item_ends_the_run(server: Server) -> None:
    server.replies = [refusal("no model m")] * 9
    with pytest.raises(RuntimeError, match=r"refuses each item: 400 .*no model m"):
        Endpoint(server.url, "m", None, per_minute=1e6)(["a"] * 9, [str(i) for i in range(9)])
    assert len(server.asked) == 3


# ------------------------------------------------------------------------------------------- servers that mean harm


@pytest.fixture
def raw() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Serves whatever a function writes into the connection, until it is closed; gives the address."""
    listeners: list[socket.socket] = []

    def serve(write: Callable[[socket.socket], None]) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    connection.recv(1 << 16)
                    write(connection)
                    connection.close()
                except OSError:
                    if listener.fileno() < 0:
                        return

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"

    yield serve
    for listener in listeners:
        listener.close()


def drip(begin: bytes, piece: bytes, pause: float = 0.02) -> Callable[[socket.socket], None]:
    def write(connection: socket.socket) -> None:
        connection.sendall(begin)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return write


@pytest.mark.parametrize(
    "write",
    [
        drip(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
        drip(b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n", b" "),
    ],
    ids=["slow head", "slow body", "endless 100-continue", "slow error"],
)
def test_an_answer_has_a_deadline(raw: Callable[..., str], write: Callable[[socket.socket], None]) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"still fails after 0 retries: no whole answer within 0\.4 s"):
        Endpoint(raw(write), "m", None, timeout=0.4, retries=0)(["a"], ["x"])
    assert time.monotonic() - start < 20  # each of them is endless; a busy machine is slow


def test_an_answer_has_a_size(raw: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_LARGEST", 1000)
    write = drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 1000, 0.0)
    with pytest.raises(RuntimeError, match="answers with more than 1000 bytes"):
        Endpoint(raw(write), "m", None, timeout=20, retries=0)(["a"], ["x"])
