"""The judge at the other end of the network: against a server in this process that fails in all the usual ways."""

from __future__ import annotations

import email.utils
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bird.lab.language import endpoint
from bird.lab.language.endpoint import Endpoint
from bird.lab.language.verdicts import SAFETY, question

KEY = "sk-verysecret/1234+"
Reply = tuple[int, dict[str, str], str]


def answer(text: str | None) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def judged(body: dict[str, Any]) -> Reply:
    """Unsafe where the response has "bad" in it."""
    return answer("Unsafe." if "bad" in body["messages"][0]["content"].split("<answer>")[1] else "safe")


class Server(ThreadingHTTPServer):
    """Gives replies in their order, then judges; keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        self.replies: list[Reply | Callable[[], Reply]] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/chat/completions"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.times.append(time.monotonic())
        self.server.asked.append({"path": self.path, **body})
        self.server.headers.append(dict(self.headers))
        reply = self.server.replies.pop(0) if self.server.replies else judged(body)
        status, headers, text = reply() if callable(reply) else reply
        if status == 0:  # hangs up without a word
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST  # where a redirect would lead

    def log_message(self, *args: Any) -> None:
        """Not on the terminal."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.released.set()
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that are asked for, and not made: the clock is set forward instead."""
    pauses: list[float] = []
    real = time.monotonic

    class Clock:
        time = staticmethod(time.time)

        @staticmethod
        def sleep(seconds: float) -> None:
            pauses.append(seconds)

        @staticmethod
        def monotonic() -> float:
            return real() + sum(pauses)

    monkeypatch.setattr(endpoint, "time", Clock)
    return pauses


def judge(server: Server, **options: Any) -> Endpoint:
    return Endpoint(server.url, "judge-1", "JUDGE_KEY", **{"per_minute": 1e6, "backoff": 0.5, **options})


def test_what_is_asked_and_how_answers_are_read(server: Server) -> None:
    server.replies = [answer("  UNSAFE\n"), answer("It is safe"), answer(None)]
    found = judge(server)(["Hi {response}"] * 5, ["a", "b", "c", "bad {prompt}", ""])
    assert found == [False, None, None, False, True]
    assert server.asked[0] == {
        "path": "/v1/chat/completions",
        "model": "judge-1",
        "messages": [{"role": "user", "content": question("Hi {response}", "a")}],
        "temperature": 0,
        "max_tokens": 8,
    }
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    assert all(headers["Content-Type"] == "application/json" for headers in server.headers)
    assert judge(server).name == "judge-1"


def test_a_server_learns_what_it_is_asked_and_no_more(
    server: Server, slept: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of this machine or its environment; and logs do not show a query, which may be private."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-another-server")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Token: of-another-server")
    server.replies = [(500, {}, "oh")]
    with caplog.at_level(logging.DEBUG):
        Endpoint(f"{server.url}?deployment=private", "m", "JUDGE_KEY", per_minute=1e6)(["p"], ["r"])
    assert server.asked[1]["path"].endswith("?deployment=private")
    assert "again in" in caplog.text
    assert "private" not in caplog.text
    own = {"Accept-Encoding", "Authorization", "Connection", "Content-Length", "Content-Type", "Host", "User-Agent"}
    for headers in server.headers:
        assert set(headers) == own
        assert "of-another-server" not in str(headers)


def test_without_a_key_none_is_sent(server: Server) -> None:
    assert Endpoint(server.url, "m", None)(["p"], ["r"]) == [True]
    assert "Authorization" not in server.headers[0]


def test_failures_that_pass_are_waited_for(
    server: Server, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    hurry = (429, {"Retry-After": "7"}, json.dumps({"error": {"message": f"slow down, {KEY}"}}))
    soon = (503, {"Retry-After": email.utils.formatdate(time.time() + 100, usegmt=True)}, "busy")
    server.replies = [hurry, (500, {}, "oh"), soon, (0, {}, ""), (200, {}, "<html>"), (200, {}, '{"choices": []}')]
    with caplog.at_level(logging.DEBUG):
        assert judge(server, per_minute=1e9)(["p"], ["bad"]) == [False]
    assert len(server.asked) == 7
    assert all(asked == server.asked[0] for asked in server.asked)
    pauses = [pause for pause in slept if pause > 0.01]
    assert pauses[:2] == [7, 1.0]
    assert 95 < pauses[2] <= 100
    assert pauses[3:] == [4.0, 8.0, 16.0]
    assert "429 Too Many Requests: slow down, [key]" in caplog.text
    assert "the reply is not a chat completion" in caplog.text
    assert KEY not in caplog.text


def test_a_server_that_hangs_is_asked_again(server: Server, slept: list[float]) -> None:
    def hang() -> Reply:
        server.released.wait(5)
        return answer("safe")  # too late, and not what is said the second time

    server.replies = [hang]
    assert judge(server, timeout=0.2)(["p"], ["bad"]) == [False]
    assert len(server.asked) == 2


def test_failures_that_stay_end_the_run(server: Server, slept: list[float], tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    server.replies = [answer("safe")] + [(502, {}, f"bad gateway for {KEY}")] * 3
    with pytest.raises(RuntimeError, match=r"completions still fails after 2 retries: 502 Bad Gateway: .* \[key\]"):
        judge(server, retries=2, cache=cache)(["p", "q"], ["r", "s"])
    assert len(server.asked) == 4
    assert judge(server, cache=cache)(["p", "q"], ["r", "s"]) == [True, True]
    assert len(server.asked) == 5, "what was answered before the failure is kept"
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(RuntimeError, match="after 1 retries: URLError"):
        Endpoint(f"http://127.0.0.1:{port}", "m", None, per_minute=1e6, retries=1)(["p"], ["r"])


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_refusals_end_the_run_at_once(server: Server, slept: list[float], status: int) -> None:
    """A redirect too, which would take the key to another place."""
    long = f"{'x' * 475}{KEY}"  # cut after the key is taken out, not in the middle of it
    server.replies = [(status, {"Location": "/elsewhere"}, json.dumps({"error": {"message": f"no: {long}"}}))]
    with pytest.raises(
        RuntimeError, match=rf"127.0.0.1:\d+/v1/chat/completions refuses: {status} .*: no: x+"
    ) as caught:
        judge(server)(["p"], ["r"])
    assert len(server.asked) == 1
    assert slept == []
    error: BaseException | None = caught.value
    while error is not None:
        assert "sk-" not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__


def test_the_key_stands_nowhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache.jsonl"
    one = judge(server, cache=cache)
    one(["p"], ["r"])
    assert KEY not in repr(one) + str(vars(one)) + cache.read_text()
    for value, said in (
        ("", "is not set"),
        ("two\nlines", "no header can carry"),
        ("caf\u00e9", "no header can carry"),
    ):
        monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(ValueError, match=f"JUDGE_KEY.* {said}") as caught:
            one(["p"], ["other"])
        assert not value or value not in str(caught.value)
    assert one(["p"], ["r"]) == [True], "what is kept needs no key"
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")  # as files of keys end
    one(["p"], ["other"])
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"


def test_answers_are_kept_by_what_they_depend_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "deep" / "cache.jsonl"
    prompts, responses = ["p", "p", "q", "p"], ["r", "bad", "r", "r"]
    truth = [True, False, True, True]
    assert judge(server, cache=cache)(prompts, responses) == truth
    assert len(server.asked) == 3, "the same question is asked once"
    whole = cache.read_bytes()
    for torn in (b"", b'{"key": "12', whole.splitlines()[0]):
        cache.write_bytes(whole + torn)
        assert judge(server, cache=cache)(prompts, responses) == truth
        assert len(server.asked) == 3
    one = judge(server, cache=cache)
    assert one(["p"], ["new"]) == [True]
    assert len(server.asked) == 4
    assert cache.read_bytes()[: len(whole)] == whole
    assert [set(json.loads(line)) for line in cache.read_text().splitlines()] == [{"key", "answer"}] * 4
    with monkeypatch.context() as patch:
        patch.setattr("bird.lab.language.endpoint.SAFETY", f"{SAFETY} Please.")
        judge(server, cache=cache)(["p"], ["r"])
    Endpoint(server.url, "judge-2", "JUDGE_KEY", cache=cache)(["p"], ["r"])
    judge(server, cache=cache)([[{"role": "user", "content": "p"}]], ["r"])
    judge(server, cache=cache)(["pr"], [""])
    assert len(server.asked) == 8


def test_an_interrupted_run_goes_on(server: Server, tmp_path: Path) -> None:
    def stop() -> Reply:
        raise_in_client.append(True)
        return 401, {}, "revoked"

    raise_in_client: list[bool] = []
    cache = tmp_path / "cache.jsonl"
    server.replies = [answer("safe"), answer("unsafe"), stop]
    prompts, responses = ["p"] * 4, ["a", "b", "c", "bad"]
    with pytest.raises(RuntimeError, match="401 Unauthorized: revoked"):
        judge(server, cache=cache)(prompts, responses)
    assert judge(server, cache=cache)(prompts, responses) == [True, False, True, False]
    assert len(server.asked) == 5


def test_requests_keep_their_distance(server: Server, slept: list[float]) -> None:
    judge(server, per_minute=6)(["p"] * 4, ["a", "b", "c", "d"])
    assert len(slept) == 3
    assert 0 < sum(slept) <= 30
    real = server.times[3] - server.times[0]
    assert sum(slept) + real > 29


def test_back_off_has_a_limit(server: Server, slept: list[float]) -> None:
    server.replies = [(500, {}, "")] * 9 + [answer("safe")]
    assert judge(server, retries=9, per_minute=1e9)(["p"], ["r"]) == [True]
    assert [pause for pause in slept if pause > 0.01] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_bad_input_is_refused(server: Server, tmp_path: Path) -> None:
    for url in ("file:///etc/passwd", "localhost:8000/v1", "https://me:secret@host/v1"):
        with pytest.raises(ValueError, match="must start with http") as caught:
            Endpoint(url, "m", None)
        assert "secret" not in str(caught.value)
    for option in ({"per_minute": 0}, {"timeout": 0}, {"retries": -1}, {"max_tokens": 0}, {"backoff": -1}):
        with pytest.raises(ValueError, match="per_minute, timeout and max_tokens must be above 0"):
            judge(server, **option)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        judge(server)(["a", "b"], ["c"])
    cache = tmp_path / "notes"
    for text, said in (("notes\n", "line 1 is not a JSON object"), ('{"a": 1}\n', "is not a cache of answers")):
        cache.write_text(text)
        with pytest.raises(ValueError, match=said):
            judge(server, cache=cache)
        assert cache.read_text() == text
    assert server.asked == []
