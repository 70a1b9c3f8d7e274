"""Asks a suspect as a stranger would: an OpenAI-compatible endpoint, one chat per question.

Every question costs its owner a request, so that there is a budget, a time limit, and few at once.
Knows no triggers and no bits; torch-free.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from polyadapt.errors import InvalidRequest, RequestCancelled, Unavailable
from polyadapt.watermark.queries import REPLY_TOKENS

_MAX_REPLY_BYTES = 1 << 20
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class EndpointLimits:
    """What one reading may cost."""

    max_queries: int = 4096
    num_at_once: int = 4
    request_timeout_s: float = 60.0  # of what comes at once; a silent endpoint is left after it
    timeout_s: float = 600.0  # of the whole reading
    num_tries: int = 4  # of one question, where the endpoint asks to come again
    # Of the answers, so many may be missing: an endpoint that mostly fails says nothing.
    most_missing: float = 0.2


@dataclass(frozen=True, slots=True)
class EndpointUrl:
    """Where chats are asked for. `root` is as given to OpenAI's clients, `origin` its beginning."""

    root: str
    origin: str

    @classmethod
    def parse(cls, text: str) -> EndpointUrl:
        """Read http(s)://HOST[:PORT][/PATH]; raises InvalidRequest for anything else."""
        try:
            parts = urlsplit(text.strip())
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        is_plain = not (parts.username or parts.password or parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            raise InvalidRequest(
                "the endpoint is no URL of the form https://HOST[:PORT]/v1 without user, query and "
                "fragment",
                param="endpoint",
            )
        host = parts.hostname.lower()
        host = f"[{host}]" if ":" in host else host
        known = {"http": 80, "https": 443}[parts.scheme]
        origin = f"{parts.scheme}://{host}:{port or known}"
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        return cls(f"{origin}{path or '/v1'}", origin)


@dataclass
class Endpoint:
    """Asks one model of one endpoint. `ask` is an AskChats; close it when done."""

    url: EndpointUrl
    model: str
    api_key: str | None = field(default=None, repr=False)
    limits: EndpointLimits = EndpointLimits()
    transport: httpx.BaseTransport | None = None
    num_asked: int = 0
    num_missing: int = 0

    def __post_init__(self) -> None:
        headers = {"accept": "application/json"}
        if self.api_key:
            headers["authorization"] = f"Bearer {self.api_key}"
        # No redirects and no proxies: what is asked is what the caller named and nothing else.
        self._client = httpx.Client(
            headers=headers,
            follow_redirects=False,
            trust_env=False,
            transport=self.transport,
        )
        self._deadline = time.monotonic() + self.limits.timeout_s
        self._is_cancelled = threading.Event()

    def ask(self, messages: Sequence[str]) -> list[str | None]:
        """Return how each reply begins, None where there was none.

        Raises InvalidRequest where the endpoint refuses what is asked, Unavailable where it cannot
        be reached, fails too often, or takes too long, RequestCancelled after `cancel`.
        """
        if self.num_asked + len(messages) > self.limits.max_queries:
            raise InvalidRequest(
                f"the reading would take more than {self.limits.max_queries} questions; allow more",
                param="max_queries",
            )
        self.num_asked += len(messages)
        with ThreadPoolExecutor(self.limits.num_at_once) as threads:
            replies = list(threads.map(self._ask_one, messages))
        self.num_missing += sum(reply is None for reply in replies)
        if self.num_missing > max(3.0, self.limits.most_missing * self.num_asked):
            raise Unavailable(
                f"the endpoint gave no reply to {self.num_missing} of {self.num_asked} questions; "
                "ask again when it is well"
            )
        return replies

    def cancel(self) -> None:
        """Ask nothing more; may be called from another thread."""
        self._is_cancelled.set()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask_one(self, message: str) -> str | None:
        for turn in range(self.limits.num_tries):
            if turn:
                self._is_cancelled.wait(min(0.125 * 2**turn, 4.0))
            try:
                status, body = self._post(message)
            except httpx.HTTPError as error:
                status, body = 0, type(error).__name__.encode()
            if status == 200:
                return _reply_of(body)
            if status and status not in _RETRIED:
                raise InvalidRequest(
                    f"the endpoint answers {status} to a chat; see its URL, model and key",
                    param="endpoint",
                )
        return None

    def _time_left_s(self) -> float:
        """Seconds that the reading may still take; raises Unavailable when there are none, and
        RequestCancelled after `cancel`.
        """
        if self._is_cancelled.is_set():
            raise RequestCancelled("the reading was cancelled")
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise Unavailable(f"the reading took more than {self.limits.timeout_s:g} s")
        return left

    def _post(self, message: str) -> tuple[int, bytes]:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": 0,
            "max_tokens": REPLY_TOKENS,
        }
        url = f"{self.url.root}/chat/completions"
        # httpx's limit is for one read: a reply of many may take as long as it likes.
        timeout = min(self.limits.request_timeout_s, self._time_left_s())
        with self._client.stream("POST", url, json=body, timeout=timeout) as reply:
            data = bytearray()
            for chunk in reply.iter_bytes():
                self._time_left_s()
                data += chunk
                if len(data) > _MAX_REPLY_BYTES:
                    raise httpx.ReadError("the reply is too long")
            return reply.status_code, bytes(data)


def _reply_of(body: bytes) -> str | None:
    """The text of a chat's reply; None for what is none."""
    try:
        found: Any = json.loads(body)
        text = found["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None
