"""A judge at the other end of the network: any server of OpenAI's chat completions, through the standard library.

The key is read from the environment for each request, and stands nowhere else: not in the object, the cache, logs
or errors. (The `openai` client would log addresses with their query, send any server what OPENAI_CUSTOM_HEADERS and
its like hold, and leave retries, back-off and strict reading to this file all the same.)
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..stages import Lines
from .data import Prompt
from .verdicts import SAFETY, Verdict, fill, paired, parse

_LOG = logging.getLogger(__name__)
_LONGEST = 60.0  # seconds of back-off; a server may ask for more


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would take the key along to wherever a server points."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Not followed: the redirect is an error like 404."""
        return


@dataclass
class Endpoint:
    """A language model that a server runs, asked for one word at temperature 0, one request at a time.

    The protocol is OpenAI's ``POST /v1/chat/completions``, which vLLM, llama.cpp and most providers speak. Answers
    are kept by model, template, prompt and response, so that an interrupted run goes on, and a judge whose words or
    parsing change asks nothing twice.

    Args:
        url: in full, such as ``"http://localhost:8000/v1/chat/completions"``.
        model: as the server calls it.
        key_variable: the environment variable that holds the key, or None if the server wants none.
        name: in results; empty for the model's.
        template: the question, with ``{prompt}`` and ``{response}``.
        words: the answers for good and for bad, see `bird.lab.language.verdicts.parse`.
        cache: a file of answers, JSON lines, for one process at a time; None to keep none.
        per_minute: requests, at most.
        timeout: seconds that the server may be silent.
        retries: how often a request is sent again after 429, 5xx, silence, a broken connection or what is not JSON.
        backoff: seconds before the first of these, twice as long before each next one; or what the server asks for.
        max_tokens: enough for either word.

    Raises:
        ValueError: ``url`` is not of HTTP or holds a password, the template has no ``{response}``, an option is out
            of range, or ``cache`` is not such a file.
    """

    url: str
    model: str
    key_variable: str | None
    name: str = ""
    template: str = field(default=SAFETY, repr=False)
    words: tuple[str, str] = ("safe", "unsafe")
    cache: Path | None = None
    per_minute: float = 60
    timeout: float = 60
    retries: int = 6
    backoff: float = 1
    max_tokens: int = 8

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or parts.username or parts.password:
            raise ValueError("url must start with http:// or https:// and hold no password: name a key_variable")
        if min(self.per_minute, self.timeout, self.max_tokens) <= 0 or min(self.retries, self.backoff) < 0:
            raise ValueError("per_minute, timeout and max_tokens must be above 0, retries and backoff at least 0")
        fill(self.template, "", "")
        self.name = self.name or self.model
        self._opener = urllib.request.build_opener(_NoRedirects())
        self._lines = None if self.cache is None else Lines(self.cache)
        rows = [] if self._lines is None else self._lines.rows
        if any(not isinstance(row.get(part), str) for row in rows for part in ("key", "answer")):
            raise ValueError(f"{self.cache} is not a cache of answers: choose another path")
        self._answers: dict[str, str] = {row["key"]: row["answer"] for row in rows}
        self._next = 0.0  # when the next request may go

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Verdict]:
        """None where the first word is neither of the two.

        Raises:
            ValueError: the key's variable is not set, or what it holds cannot be a key.
            RuntimeError: the server refuses (4xx, with its message), or still fails after all retries. What was
                answered is kept.
        """
        found = []
        for prompt, response in paired(prompts, responses):
            question = fill(self.template, prompt, response)
            about = [self.model, self.template, prompt, response]
            identity = hashlib.sha256(json.dumps(about, default=dict).encode()).hexdigest()
            if identity not in self._answers:
                answer = self._ask(question)
                self._answers[identity] = answer
                if self._lines is not None:
                    self._lines.append({"key": identity, "answer": answer})
            found.append(parse(self._answers[identity], self.words))
        return found

    def _ask(self, question: str) -> str:
        key = self._key()
        for attempt in range(self.retries + 1):
            self._wait()
            try:
                return self._send(question, key)
            except _Again as failure:
                if attempt == self.retries:
                    raise RuntimeError(f"{self._place()} still fails after {attempt} retries: {failure}") from None
                pause = max(failure.pause, min(self.backoff * 2**attempt, _LONGEST))
                _LOG.warning("%s: %s; again in %.1f s", self._place(), failure, pause)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _send(self, question: str, key: str | None) -> str:
        """The server's answer; all errors leave without what they came from, which may hold the key."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                return _content(reply.read())
        except urllib.error.HTTPError as error:
            message = f"{error.code} {error.reason}: {_text(error)}".replace(key or "\0", "[key]")[:500]
            if error.code != 429 and error.code < 500:
                raise RuntimeError(f"{self._place()} refuses: {message}") from None
            raise _Again(message, _retry_after(error.headers.get("Retry-After"))) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            raise _Again(f"{type(error).__name__}: {error}".replace(key or "\0", "[key]")) from None

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
        """Where requests go, without a query, which may be private."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    def _wait(self) -> None:
        now = time.monotonic()
        if now < self._next:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + 60 / self.per_minute


class _Again(Exception):
    """A failure that may pass.

    Args:
        message: what failed.
        pause: seconds that the server asked for.
    """

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


def _content(body: bytes) -> str:
    """What the model said; nothing, if the server's filter left nothing."""
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise _Again("the reply is not a chat completion") from None
    if content is not None and not isinstance(content, str):
        raise _Again("the reply is not a chat completion")
    return content or ""


def _text(error: urllib.error.HTTPError) -> str:
    """The message in an error's body, or the body."""
    try:
        raw = error.read(10_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        return str(json.loads(raw)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return raw


def _retry_after(header: str | None) -> float:
    """Seconds, of a number or a date; 0 if there is neither."""
    try:
        return max(0.0, float(int(header or "")))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header or "").timestamp() - time.time())
    except (ValueError, TypeError, IndexError):
        return 0.0
