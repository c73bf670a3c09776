"""The judge at the other end of the network, against a server in this process that fails, differs, or means harm."""

from __future__ import annotations

import email.utils
import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bird.lab.language import endpoint
from bird.lab.language.endpoint import Endpoint
from bird.lab.language.verdicts import SAFETY, question
from tests.bird.chat_server import Reply, Server, refusal, reply, running

KEY = "sk-verysecret/1234+"


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as made:
        yield made


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
        sleep = staticmethod(pauses.append)

        @staticmethod
        def monotonic() -> float:
            return real() + sum(pauses)

    monkeypatch.setattr(endpoint, "time", Clock)
    return pauses


def test_what_is_asked(server: Server) -> None:
    judge = server.judge("JUDGE_KEY")
    assert judge(["Hi {response}"] * 2, ["a", "bad {prompt}"]) == [True, False]
    assert server.asked[0] == {
        "path": "/v1/chat/completions",
        "model": "judge-1",
        "messages": [{"role": "user", "content": question("Hi {response}", "a")}],
        "temperature": 0,
        "max_tokens": 8,
    }
    assert judge.name == "judge-1"
    server.judge()(["p"], ["r"])
    server.judge("JUDGE_KEY", key_header="api-key")(["p"], ["r"])  # Azure's
    names = [{name.lower(): value for name, value in headers.items()} for headers in server.headers]
    assert [headers.get("authorization") for headers in names] == [f"Bearer {KEY}"] * 2 + [None] * 2
    assert [headers.get("api-key") for headers in names] == [None] * 3 + [KEY]


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (reply("  UNSAFE\n"), False),
        (reply("It is safe"), None),
        (reply(None), None),
        (reply("<think>It could be unsafe.</think> safe"), True),
        (reply("it is fine</think>\nsafe"), True),
        (reply("safe <think>I am sure</think>"), True),
        (reply("<think>\nsafe?\n</think>\n\nUnsafe."), False),
        (reply("unsafe because", finish_reason="length"), False),
        (reply([{"type": "text", "text": "un"}, {"type": "text", "text": "safe"}]), False),
        (reply([{"type": "reasoning", "text": "safe"}, {"text": "unsafe"}]), False),
    ],
)
def test_forms_of_an_answer(server: Server, given: Reply, verdict: bool | None) -> None:
    server.replies = [given]
    assert server.judge()(["a"], ["x"]) == [verdict]


def test_a_server_learns_what_it_is_asked_and_no_more(
    server: Server, slept: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of this machine or its environment; and logs do not show a query, which may be private."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-another-server")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Token: of-another-server")
    server.replies = [(500, {}, "oh")]
    server.url += "?deployment=private"
    with caplog.at_level(logging.DEBUG):
        server.judge("JUDGE_KEY")(["p"], ["r"])
    assert server.asked[1]["path"].endswith("?deployment=private")
    assert "again in" in caplog.text
    assert "private" not in caplog.text
    own = {"Accept-Encoding", "Authorization", "Connection", "Content-Length", "Content-Type", "Host", "User-Agent"}
    for headers in server.headers:
        assert set(headers) == own
        assert headers["Content-Type"] == "application/json"
        assert "of-another-server" not in str(headers)


def test_the_key_stands_nowhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache.jsonl"
    one = server.judge("JUDGE_KEY", cache=cache)
    server.replies = [reply(f"safe {KEY}")]  # an echo
    assert one(["p"], ["r"]) == [True]
    assert "safe [key]" in cache.read_text()
    assert KEY not in repr(one) + str(vars(one)) + cache.read_text()
    for value in ("", "two\nlines", "caf\u00e9"):
        monkeypatch.setenv("JUDGE_KEY", value)
        said = "no header can carry" if value else "is not set"
        with pytest.raises(ValueError, match=f"JUDGE_KEY.* {said}") as caught:
            one(["p"], ["other"])
        assert not value or value not in str(caught.value)
    assert one(["p"], ["r"]) == [True], "what is kept needs no key"
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")  # as files of keys end
    one(["p"], ["other"])
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "echo",
    [
        KEY.replace("/", r"\/"),
        "".join(rf"\u{ord(letter):04X}" for letter in KEY),
        KEY.replace("/", r"\\\/"),  # JSON in a string of JSON
        f"{KEY[:5]}<think></think>{KEY[5:]}",
    ],
    ids=["slashes", "numbers", "twice", "around a thought"],
)
def test_a_key_in_disguise_stands_nowhere(server: Server, tmp_path: Path, echo: str) -> None:
    cache = tmp_path / "cache.jsonl"
    server.replies = [(200, {}, f'{{"choices": [{{"message": {{"content": "safe {echo}"}}}}]}}')]
    assert server.judge("JUDGE_KEY", cache=cache)(["p"], ["r"]) == [True]
    assert json.loads(cache.read_text())["answer"] == "safe [key]"
    if "think" in echo:
        return
    for body in (f'{{"error": {{"message": "bad {echo}"}}}}', f'{{"error": {{"is": "bad {echo}"}}}}', f'"bad {echo}'):
        server.replies = [(401, {}, body)]
        with pytest.raises(RuntimeError, match=r"refuses: 401 .*bad \[key\]"):
            server.judge("JUDGE_KEY")(["p"], ["r"])


def test_a_key_in_the_status_line_stands_nowhere(server: Server) -> None:
    server.replies = [(f"HTTP/1.1 401 Bad {KEY}\r\nContent-Length: 1\r\n\r\n".encode(), b"x", 1.0)]
    with pytest.raises(RuntimeError, match=r"refuses: 401 Bad \[key\]: x"):
        server.judge("JUDGE_KEY")(["p"], ["r"])


def test_answers_are_kept_by_what_they_depend_on(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    cache = tmp_path / "deep" / "cache.jsonl"
    prompts, responses, truth = ["p", "p", "q", "p"], ["r", "bad", "r", "r"], [True, False, True, True]
    assert server.judge(cache=cache)(prompts, responses) == truth
    assert len(server.asked) == 3, "the same question is asked once"
    whole = cache.read_bytes()
    for torn in (b"", b'{"key": "12', whole.splitlines()[0]):
        cache.write_bytes(whole + torn)
        assert server.judge(cache=cache)(prompts, responses) == truth
        assert len(server.asked) == 3
    assert server.judge(cache=cache)(["p"], ["new"]) == [True]
    assert cache.read_bytes().startswith(whole)
    assert [set(json.loads(line)) for line in cache.read_text().splitlines()] == [{"key", "answer"}] * 4
    with monkeypatch.context() as patch:
        patch.setattr("bird.lab.language.endpoint.SAFETY", f"{SAFETY} Please.")
        server.judge(cache=cache)(["p"], ["r"])
    Endpoint(server.url, "judge-2", None, cache=cache)(["p"], ["r"])
    server.judge(cache=cache)([[{"role": "user", "content": "p"}]], ["r"])
    server.judge(cache=cache)(["pr"], [""])
    assert len(server.asked) == 8


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ([refusal("revoked", 401)], "401 Unauthorized: revoked"),
        ([(502, {}, f"bad gateway for {KEY}")] * 3, r"still fails after 2 retries: 502 Bad Gateway: .* \[key\]"),
    ],
)
def test_an_ended_run_goes_on(server: Server, slept: list[float], failures: Any, said: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    server.replies = [reply("safe"), reply("unsafe"), *failures]
    prompts, responses = ["p"] * 4, ["a", "b", "c", "bad"]
    with pytest.raises(RuntimeError, match=said):
        server.judge("JUDGE_KEY", retries=2, cache=cache)(prompts, responses)
    assert server.judge("JUDGE_KEY", cache=cache)(prompts, responses) == [True, False, True, False]
    assert len(server.asked) == 4 + len(failures)


def test_an_answer_that_was_cut_off_is_asked_again_with_more_tokens(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A reasoning model at 8 tokens has said nothing yet. That is no verdict, and must not stay one."""
    cache = tmp_path / "answers.jsonl"
    server.replies = [reply(finish_reason="length"), reply("<think>Let me", finish_reason="length")]
    short = server.judge(cache=cache, max_tokens=8)
    assert short(["a", "b"], ["x", "y"]) == [None, None]
    assert short.unjudged == {"cut off": 2}
    assert caplog.text.count("cut off at 8 tokens: raise max_tokens") == 1
    assert not cache.exists()
    assert server.judge(cache=cache, max_tokens=500)(["a"], ["x"]) == [True]
    assert server.asked[-1]["max_tokens"] == 500
    assert server.judge(cache=cache, max_tokens=8)(["a"], ["x"]) == [True]
    assert len(server.asked) == 4  # the answer at 500 tokens is none at 8


@pytest.mark.parametrize(
    ("message", "finish", "reason"),
    [
        ({}, "content_filter", "filtered"),
        ({"content": "I", "refusal": None}, "content_filter", "filtered"),
        ({"refusal": "I cannot help with that."}, "stop", "declined"),
        ({"tool_calls": [{"id": "1", "type": "function"}]}, "tool_calls", "tool call"),
        ({"function_call": {"name": "f"}}, "stop", "tool call"),
        ({"refusal": None, "tool_calls": []}, "stop", "empty"),
        ({"content": "<think>Hm.</think>\n"}, "stop", "empty"),
    ],
)
def test_what_is_no_answer_is_not_kept(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, message: Any, finish: str, reason: str
) -> None:
    cache = tmp_path / "answers.jsonl"
    choice = {"message": {"content": None, **message}, "finish_reason": finish}
    server.replies = [(200, {}, json.dumps({"choices": [choice]}))]
    judge = server.judge(cache=cache)
    assert judge(["p"], ["r"]) == [None]
    assert judge.unjudged == {reason: 1}
    assert "(said once)" in caplog.text
    assert not cache.exists()
    assert judge(["p"], ["r"]) == [True]


@pytest.mark.parametrize(
    ("given", "pause"),
    [
        ((500, {}, "oh"), 1.0),
        ((0, {}, ""), 1.0),
        ((-1, {}, ""), 1.0),
        ((200, {}, "<html>"), 1.0),
        ((200, {}, '{"choices": []}'), 1.0),
        (refusal("request timeout", 408), 1.0),
        (refusal("model overloaded", 200, code=503), 1.0),
        ((429, {"Retry-After": "2.5"}, "{}"), 2.5),
        ((429, {"retry-after-ms": "1500"}, "{}"), 1.5),
        # More than ten minutes are not slept, nor is what is no number of seconds.
        ((429, {"Retry-After": "1e9"}, "{}"), 1.0),
        ((429, {"Retry-After": "9" * 400}, "{}"), 1.0),
        ((429, {"Retry-After": "nan"}, "{}"), 1.0),
        ((429, {"Retry-After": "-5"}, "{}"), 1.0),
        ((429, {"Retry-After": "Wed, 21 Oct 9999 07:28:00 GMT"}, "{}"), 1.0),
    ],
    ids=lambda value: None if value is None else str(value)[:50],
)
def test_failures_that_pass_are_waited_for(server: Server, slept: list[float], given: Reply, pause: float) -> None:
    server.replies = [given]
    assert server.judge(timeout=0.2 if given[0] == -1 else 30)(["p"], ["bad"]) == [False]
    assert len(server.asked) == 2
    assert server.asked[0] == server.asked[1]
    (found,) = (seconds for seconds in slept if seconds > 0.01)
    assert found == pytest.approx(pause, abs=0.01)


def test_a_date_is_waited_for(server: Server, slept: list[float]) -> None:
    server.replies = [(503, {"Retry-After": email.utils.formatdate(time.time() + 400, usegmt=True)}, "busy")]
    assert server.judge()(["p"], ["bad"]) == [False]
    assert max(slept) == pytest.approx(400, abs=100)


def test_failures_are_logged_without_the_key_and_back_off_has_a_limit(
    server: Server, slept: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server.replies = [refusal(f"slow down, {KEY}", 429), (200, {}, "<html>"), *[(500, {}, "")] * 7]
    with caplog.at_level(logging.DEBUG):
        assert server.judge("JUDGE_KEY", retries=9, backoff=0.5)(["p"], ["r"]) == [True]
    assert [pause for pause in slept if pause > 0.01] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert "429 Too Many Requests: slow down, [key]" in caplog.text
    assert "the reply is not a chat completion" in caplog.text
    assert KEY not in caplog.text


def test_requests_keep_their_distance(server: Server, slept: list[float]) -> None:
    start = time.monotonic()
    server.judge(per_minute=6)(["p"] * 4, ["a", "b", "c", "d"])
    assert len(slept) == 3
    assert 0 < sum(slept) <= 30
    assert sum(slept) + time.monotonic() - start > 29


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_refusals_end_the_run_at_once(server: Server, slept: list[float], status: int) -> None:
    """A redirect too, which would take the key to another place."""
    server.replies = [refusal(f"no: {'x' * 475}{KEY}", status)]  # cut after the key is taken out, not in its middle
    with pytest.raises(RuntimeError, match=rf"127.0.0.1:\d+/v1/.*completions refuses: {status} .*: no: x+") as caught:
        server.judge("JUDGE_KEY")(["p"], ["r"])
    assert (len(server.asked), slept) == (1, [])
    error: BaseException | None = caught.value
    while error is not None:
        assert "sk-" not in f"{error!r} {error}"
        error = error.__cause__ or error.__context__


def test_other_ends_of_a_run(server: Server, slept: list[float]) -> None:
    server.replies = [refusal("no such model", 200, code=404)]
    with pytest.raises(RuntimeError, match=r"404 .*no such model"):
        server.judge()(["a"], ["x"])
    server.replies = [refusal("no model m")] * 9
    with pytest.raises(RuntimeError, match=r"refuses each item: 400 .*no model m"):
        server.judge()(["a"] * 9, [str(i) for i in range(9)])
    assert len(server.asked) == 1 + 3
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(RuntimeError, match="after 1 retries: URLError"):
        Endpoint(f"http://127.0.0.1:{port}", "m", None, per_minute=1e6, retries=1)(["p"], ["r"])


def test_one_refused_item_ends_no_run(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.replies = [reply("safe"), refusal("content filter"), refusal("context window"), reply("safe")]
    judge = server.judge(cache=tmp_path / "answers.jsonl")
    with caplog.at_level(logging.WARNING):
        assert judge(["a"] * 4, ["1", "2", "3", "4"]) == [True, None, None, True]
    assert judge.unjudged == {"refused (400)": 2}
    assert "content filter (said once)" in caplog.text
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


def test_options_that_a_server_refuses(server: Server, slept: list[float]) -> None:
    server.replies = [
        refusal("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        refusal("Unsupported value: 'temperature' does not support 0."),
    ]
    assert server.judge()(["a", "b"], ["x", "bad"]) == [True, False]
    assert len(server.asked) == 4  # what was learnt holds for the next item
    assert server.asked[-1]["max_completion_tokens"] == 8
    assert not {"max_tokens", "temperature"} & set(server.asked[-1])


def test_options_that_a_server_names(server: Server, slept: list[float]) -> None:
    server.replies = [refusal("no", param="max_tokens"), refusal("no", 422, param="temperature")]
    assert server.judge()(["a"], ["bad"]) == [False]
    assert server.asked[-1]["max_completion_tokens"] == 8
    assert not {"max_tokens", "temperature"} & set(server.asked[-1])


@pytest.mark.parametrize(
    "replies",
    [
        [refusal("filtered: what temperature melts it, and max_tokens?", param="messages")],
        [refusal("filtered: Unsupported parameter: temperature")] * 2,
        [refusal("too long", param="max_tokens"), refusal("unsupported value 'temperature'"), refusal("too long")],
        [refusal("filtered: Unsupported parameter: max_tokens"), (500, {}, ""), refusal("filtered")],
    ],
)
def test_one_refused_item_changes_no_option(server: Server, slept: list[float], replies: list[Reply]) -> None:
    """A server may say the item's own words again, and they may be about options."""
    server.replies = [*replies]
    judge = server.judge()
    assert judge(["p", "p"], ["bad", "r"]) == [None, True]
    assert judge.unjudged == {"refused (400)": 1}
    assert len(server.asked) == len(replies) + 1
    assert server.asked[-1]["temperature"] == 0
    assert server.asked[-1]["max_tokens"] == 8


def test_bad_input_is_refused(server: Server, tmp_path: Path) -> None:
    for url in ("file:///etc/passwd", "localhost:8000/v1", "https://me:secret@host/v1"):
        with pytest.raises(ValueError, match="must start with http") as caught:
            Endpoint(url, "m", None)
        assert "secret" not in str(caught.value)
    for option in ({"per_minute": 0}, {"timeout": 0}, {"retries": -1}, {"max_tokens": 0}, {"backoff": -1}):
        with pytest.raises(ValueError, match="per_minute, timeout and max_tokens must be above 0"):
            server.judge(**option)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        server.judge()(["a", "b"], ["c"])
    cache = tmp_path / "notes"
    for text, said in {"notes\n": "is not a JSON object", '{"a": 1}\n': "is not a cache of answers"}.items():
        cache.write_text(text)
        with pytest.raises(ValueError, match=said):
            server.judge(cache=cache)
        assert cache.read_text() == text
    assert server.asked == []
