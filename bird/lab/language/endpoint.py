"""A judge on a server with OpenAI's chat completions API, asked by means of the standard library.

The key is read from the environment for each request and stored nowhere: not in the object, the cache, logs or errors.

The `openai` client is not used. Its timeout (tried: 3.57) is one for each read, so a server that sends a byte now and
then is never given up; it reads an error's body without a limit (309 MB in 3 s), logs addresses with their query, and
sends what OPENAI_CUSTOM_HEADERS holds, and which system this is, to any server. A deadline, a limit and strict reading
of answers would be written here all the same.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import logging
import math
import os
import re
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..stages import Lines
from .data import Prompt
from .verdicts import SAFETY, Verdict, question, read_verdict

_LOG = logging.getLogger(__name__)
_LONGEST = 60.0  # seconds of back-off
_LONGEST_ASKED = 600.0  # seconds that a server may ask for; one that asks for more gets the back-off
_LARGEST = 1 << 20  # bytes of an answer
_REFUSED_AT_FIRST = 3  # items in a row: then it is not the items


class _Watched(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """A handler of HTTP and HTTPS connections that can close the last one after a deadline."""

    sock: socket.socket | None = None

    def do_open(self, http_class: Any, req: urllib.request.Request, **options: Any) -> Any:
        """Open a connection as urllib does, and store its socket before a proxy or a handshake can be slow."""

        def connected(*args: Any) -> socket.socket:
            sock = socket.create_connection(*args)
            self.sock = sock.dup()  # encryption takes the first one over
            return sock

        def made(*args: Any, **kwargs: Any) -> http.client.HTTPConnection:
            connection: http.client.HTTPConnection = http_class(*args, **kwargs)
            connection._create_connection = connected  # type: ignore[attr-defined]
            return connection

        return super().do_open(made, req, **options)

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Close the connection if the block takes longer than ``seconds``.

        A socket's own timeout is per read: a server that sends a byte a minute would never exceed it.
        """
        done, end = threading.Event(), time.monotonic() + seconds

        def watch() -> None:
            while not done.wait(min(0.2, seconds / 4)):
                if time.monotonic() > end and self.sock is not None:
                    with contextlib.suppress(OSError):
                        self.sock.shutdown(socket.SHUT_RDWR)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        late = _Again(f"no whole answer within {seconds:g} s")
        try:
            yield
        except (OSError, ValueError, http.client.HTTPException):
            if time.monotonic() > end:
                raise late from None
            raise
        finally:
            done.set()
            watcher.join()
            if self.sock is not None:
                self.sock.close()
                self.sock = None
        if time.monotonic() > end:  # what was read may have been cut
            raise late


@dataclass
class Endpoint:
    """A language model that a server runs, asked for one word at temperature 0, one request at a time.

    The protocol is OpenAI's ``POST /v1/chat/completions``, which vLLM, llama.cpp and most providers speak. Answers
    are kept by all that decides them (address, model, question, `max_tokens`), so that an interrupted run goes on, and
    a change of how answers are read asks nothing twice.

    Some responses get no answer: the server's filter or context window refuses the item (400, 413, 422), or the answer
    is cut off at ``max_tokens`` before either word, as a reasoning model's may be, or by the server's filter, or the
    model declines, calls a tool, or says nothing. Such an item has the verdict None, is not kept, and is counted in
    ``unjudged``; each kind is logged once.

    Args:
        url: in full, such as ``"http://localhost:8000/v1/chat/completions"``.
        model: as the server calls it.
        key_variable: the environment variable that holds the key, or None if the server wants none.
        key_header: the header that carries the key: "Authorization" as a bearer's, "api-key" for Azure.
        cache: a file of answers, JSON lines, for one process at a time; None to keep none.
        per_minute: requests, at most.
        timeout: seconds from a request to the end of its answer, which has at most 1 MB.
        retries: how often a request is sent again after 408, 429, 5xx, silence, a broken connection or what is no chat
            completion.
        backoff: seconds before the first of these, twice as long before each next one, at most 60; or what the server
            asks for, up to 600.
        max_tokens: enough for either word; a reasoning model needs some hundred. Sent as ``max_completion_tokens`` to
            a server that asks for that, and ``temperature`` is left out for one that refuses it.

    Attributes:
        unjudged: how many items got no answer, by the reason.

    Raises:
        ValueError: ``url`` is not of HTTP or holds a password, an option is out of range, or ``cache`` is not such a
            file.
    """

    url: str
    model: str
    key_variable: str | None
    cache: Path | None = None
    per_minute: float = 60
    timeout: float = 60
    retries: int = 6
    backoff: float = 1
    max_tokens: int = 8
    key_header: str = "Authorization"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or parts.username or parts.password:
            raise ValueError("url must start with http:// or https:// and hold no password: name a key_variable")
        if min(self.per_minute, self.timeout, self.max_tokens) <= 0 or min(self.retries, self.backoff) < 0:
            raise ValueError("per_minute, timeout and max_tokens must be above 0, retries and backoff at least 0")
        self.name = self.model
        self._watched = _Watched()
        # Of urllib's handlers none that follows redirects, in which the key would go to another server, and none that
        # raises for a status.
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(urllib.request.ProxyHandler())
        self._opener.add_handler(self._watched)
        self._names = {"temperature": "temperature", "max_tokens": "max_tokens"}  # what the server calls these
        self.unjudged: Counter[str] = Counter()
        self._lines = None if self.cache is None else Lines(self.cache)
        rows = [] if self._lines is None else self._lines.rows
        if any(not isinstance(row.get(part), str) for row in rows for part in ("key", "answer")):
            raise ValueError(f"{self.cache} is not a cache of answers: choose another path")
        self._answers: dict[str, str] = {row["key"]: row["answer"] for row in rows}
        self._next = 0.0  # when the next request may go

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """A verdict per response, None where an answer's first word is neither of the two, or there is no answer.

        Raises:
            ValueError: the key's variable is not set, or what it holds cannot be a key.
            RuntimeError: the server refuses the key or the address, or each of the first three items (4xx, with its
                message), or still fails after all retries. What was answered is kept.
        """
        found: list[Verdict] = []
        refused = 0
        for prompt, response in [*zip(prompts, responses, strict=True)]:  # as many of both, before any is sent
            about = [self._place(), self.model, SAFETY, self.max_tokens, prompt, response]
            identity = hashlib.sha256(json.dumps(about, default=dict).encode()).hexdigest()
            if identity not in self._answers:
                try:
                    self._keep(identity, self._ask(question(prompt, response)))
                except _Unjudged as item:
                    refused += item.refused
                    if item.refused and refused == len(found) + 1 == _REFUSED_AT_FIRST:
                        raise RuntimeError(f"{self._place()} refuses each item: {item}") from None
                    if not self.unjudged[item.reason]:
                        _LOG.warning("%s: %s (said once)", self._place(), item)
                    self.unjudged[item.reason] += 1
                    found.append(None)
                    continue
            found.append(read_verdict(self._answers[identity]))
        return found

    def _keep(self, identity: str, answer: str) -> None:
        self._answers[identity] = answer
        if self._lines is not None:
            self._lines.append({"key": identity, "answer": answer})

    def _ask(self, text: str) -> str:
        key, names = self._key(), dict(self._names)
        for attempt in range(self.retries + 1):
            self._wait()
            try:
                return self._send(text, key)
            except _Unjudged as item:
                if item.refused:  # without the options too, so it was not these
                    self._names = names
                raise
            except _Again as failure:
                if attempt == self.retries:
                    raise RuntimeError(f"{self._place()} still fails after {attempt} retries: {failure}") from None
                pause = max(failure.pause, min(self.backoff * 2**attempt, _LONGEST))
                _LOG.warning("%s: %s; again in %.1f s", self._place(), failure, pause)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _send(self, text: str, key: str | None) -> str:
        """The server's answer; neither it nor an error holds the key, whatever the server echoes."""
        options = {"temperature": 0, "max_tokens": self.max_tokens}
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        body |= {self._names[name]: value for name, value in options.items() if self._names[name]}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if key is not None:
            request.add_header(self.key_header, f"Bearer {key}" if self.key_header == "Authorization" else key)
        try:
            with (
                self._watched.deadline(self.timeout),
                self._opener.open(request, timeout=self.timeout) as reply,
            ):
                status = 200 if 200 <= reply.status < 300 else reply.status
                raw = reply.read(_LARGEST + 1 if status == 200 else 10_000)
        except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Again(_without(key, f"{type(error).__name__}: {error}")) from None
        if len(raw) > _LARGEST:
            raise RuntimeError(f"{self._place()} answers with more than {_LARGEST} bytes: is this a chat completion?")
        content, status, fault, option = _read(raw.decode(errors="replace"), status)
        if fault:
            message = _without(key, f"{status} {reply.reason}: {fault}")[:500]
            raise self._failure(status, message, option, _asked_pause(reply.headers))
        answer, reason = _completion(content)
        answer = re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL)
        answer = _without(key, answer.rpartition("</think>")[2]).strip()  # some templates write the opening tag
        reason = reason or ("" if answer else "empty")
        if reason and read_verdict(answer) is None:
            cut = f"an answer is cut off at {self.max_tokens} tokens: raise max_tokens"
            raise _Unjudged(reason, cut if reason == "cut off" else f"no answer: {reason}")
        return answer

    def _failure(self, status: int, message: str, option: Any, pause: float) -> Exception:
        """The exception for a server's error: `_Again`, `_Unjudged` or a RuntimeError.

        If the server does not take an option, the option's name is changed for all later requests. A message may
        hold the item's words, so that an option's name in it says nothing alone.
        """
        if status in (408, 429) or status >= 500:
            return _Again(message, pause)
        if status in (400, 422):
            for name in self._names:
                said = option == name or re.search(rf"(?i)unsupported (parameter|value)\W+{name}\b", message)
                if self._names[name] == name and said:
                    self._names[name] = "max_completion_tokens" if name == "max_tokens" else ""
                    return _Again(f"{message} (asked without {name})")
        if status in (400, 413, 422):
            return _Unjudged(f"refused ({status})", message, refused=True)
        return RuntimeError(f"{self._place()} refuses: {message}")

    def _key(self) -> str | None:
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise ValueError(f"the environment variable {self.key_variable} is not set: it must hold the server's key")
        if not (key.isascii() and key.isprintable()):  # http.client would show it in its error
            raise ValueError(f"the key in {self.key_variable} has characters that no header can carry")
        return key

    def _place(self) -> str:
        """The URL without its query, which may be private."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    def _wait(self) -> None:
        now = time.monotonic()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + 60 / self.per_minute


class _Again(Exception):
    """A temporary failure: the request can be sent again.

    Args:
        message: what failed.
        pause: seconds that the server asked for.
    """

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class _Unjudged(Exception):
    """The server gives no answer for this item; others may get one.

    Args:
        reason: in a word or two, to count by.
        message: what the server said, or what to do.
        refused: whether the server refused the item.
    """

    def __init__(self, reason: str, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.reason, self.refused = reason, refused


def _without(key: str | None, text: str) -> str:
    """The text without the key, be it as it is or with its characters escaped, as in JSON or JSON within JSON.

    For text in the form in which it leaves, as decoding it or cutting something out of it could complete a key.
    """
    if key is None:
        return text
    letters = (rf"(?:\\{{0,7}}{re.escape(letter)}|\\{{1,7}}u(?i:{ord(letter):04x}))" for letter in key)
    return re.sub("".join(letters), "[key]", text)


def _read(body: str, status: int) -> tuple[Any, int, str, Any]:
    """A reply's content, its status, its error, and the parameter that this names; "" for neither.

    Some servers send errors with status 200.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    error = content.get("error") if isinstance(content, dict) else None
    if status == 200 and error is None:
        return content, status, "", ""
    details = error if isinstance(error, dict) else {}
    code = details.get("code")
    if status == 200:
        status = code if isinstance(code, int) and 400 <= code < 600 else 400
    said = next(
        (text for text in (details.get("message"), error, body) if text and isinstance(text, str)), "no message"
    )
    return content, status, said, details.get("param", "")


def _completion(content: Any) -> tuple[str, str]:
    """The model's answer, and why it may not be a whole one, "" if it is."""
    try:
        choice = content["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        if isinstance(text, list):  # parts, of which those with text count
            text = "".join(part["text"] for part in text if part.get("type", "text") == "text")
        if text is not None and not isinstance(text, str):
            raise TypeError
        reasons = {
            "cut off": finish == "length",
            "filtered": finish == "content_filter",
            "declined": message.get("refusal"),
            "tool call": message.get("tool_calls") or message.get("function_call"),
        }
        return text or "", next((reason for reason, holds in reasons.items() if holds), "")
    except (AttributeError, LookupError, TypeError):
        raise _Again("the reply is not a chat completion") from None


def _asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks for, in milliseconds, seconds or a date; 0 if it does not, or for too many."""
    pause = 0.0
    header = headers.get("Retry-After") or ""
    with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
        pause = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    for text, unit in ((header, 1.0), (headers.get("retry-after-ms") or "", 1000.0)):
        with contextlib.suppress(ValueError):
            pause = float(text) / unit
    return pause if math.isfinite(pause) and 0.0 < pause <= _LONGEST_ASKED else 0.0
