"""Who may call what: principals from keys, the guard of a keyless server, the scope of each route.

Default-deny: a route without a declared scope answers nobody. Knows no bodies.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from polyadapt.api.errors import error_response
from polyadapt.config import ServerConfig
from polyadapt.errors import ForeignOrigin, StartupError, Unauthenticated, Unavailable
from polyadapt.tasks.directory import DEFAULT_TENANT
from polyadapt_store.keys import SCOPES, ApiKey

RequiredScope = Literal["public", "infer", "adapters:read", "adapters:write", "watermarks", "admin"]

_MAX_SECRET = 512
_ANONYMOUS_SCOPES = frozenset({"infer", "adapters:read", "adapters:write"})
_RETRY_S = 1.0  # from one look for keys that failed to the next
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a tenant and what it may do. `admin` includes every other scope."""

    tenant: str
    scopes: frozenset[str]
    key_id: str | None = None

    @property
    def user(self) -> str | None:
        """Whom signatures are issued to: the key; None for the operator and on a keyless server."""
        return self.key_id

    def may(self, scope: str) -> bool:
        """Whether the principal holds the scope."""
        return scope in self.scopes or "admin" in self.scopes


class Keys(Protocol):
    """What authentication needs of polyadapt_store's KeyRing."""

    @property
    def num_writes(self) -> int: ...

    def authenticate(self, secret: str) -> ApiKey: ...

    def has_keys(self) -> bool: ...


class Authenticator:
    """Turns an Authorization header into a Principal."""

    def __init__(
        self, config: ServerConfig, keys: Keys, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._keys = keys
        self._clock = clock
        self._operator_hash = (
            None if config.api_key is None else _hash(config.api_key.get_secret_value())
        )
        # After how many writes, and whether there were keys then; there are until it was read.
        self._known = (-1, True)
        self._retry_at = float("-inf")

    def check_exposure(self) -> None:
        """Raise StartupError if other machines could reach a server without a key."""
        if self._config.is_loopback or self._config.allow_anonymous:
            return
        if self._operator_hash is None and not self._keys.has_keys():
            raise StartupError(
                f"refusing to listen on {self._config.host} without an API key; set --api-key or "
                "POLYADAPT_API_KEY, make one with `polyadapt keys create`, or allow everybody "
                "with --allow-anonymous"
            )

    async def is_keyless(self) -> bool:
        """Whether nobody needs a key: none is configured, and none was made, as of the last write
        that was seen. While that cannot be read it is as it was; at first a key is needed.
        """
        if self._operator_hash is not None:
            return False
        written = self._keys.num_writes
        if written != self._known[0] and self._clock() >= self._retry_at:
            try:
                # The number was taken first: what is written meanwhile is read again.
                self._known = written, await asyncio.to_thread(self._keys.has_keys)
            except Unavailable:  # which a probe of this process has nothing to do with
                self._retry_at = self._clock() + _RETRY_S
        return not self._known[1]

    async def authenticate(self, authorization: str | None) -> Principal:
        """Return who sent the header; raises Unauthenticated."""
        if await self.is_keyless():
            if self._config.is_loopback:
                return Principal(DEFAULT_TENANT, SCOPES)
            if self._config.allow_anonymous:
                return Principal(DEFAULT_TENANT, _ANONYMOUS_SCOPES)
        secret = _bearer(authorization)
        if self._operator_hash is not None and hmac.compare_digest(
            _hash(secret), self._operator_hash
        ):
            return Principal(DEFAULT_TENANT, SCOPES)
        key = await asyncio.to_thread(self._keys.authenticate, secret)
        return Principal(key.tenant, key.scopes, key.id)


class KeylessGuard:
    """ASGI middleware: a keyless server answers only requests meant for it.

    A web page in the operator's browser can reach a loopback port; its Origin, or a Host name that
    an attacker's DNS points here, gives it away.
    """

    def __init__(self, app: ASGIApp, *, authenticator: Authenticator, config: ServerConfig) -> None:
        self._app = app
        self._authenticator = authenticator
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and await self._authenticator.is_keyless():
            error = self._judge(Headers(scope=scope))
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _judge(self, headers: Headers) -> ForeignOrigin | None:
        host = headers.get("host", "")
        name = _host_name(f"//{host}")
        if name is None or not self._is_own(name):
            return ForeignOrigin(
                f"the Host {host[:100]!r} is not this server's; add it with --allowed-host, "
                "or set an API key"
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_same(origin, host):
            return ForeignOrigin(
                f"the Origin {origin[:100]!r} may not call a server without an API key; set one"
            )
        return None

    def _is_own(self, name: str) -> bool:
        if name in self._config.allowed_hosts or "*" in self._config.allowed_hosts:
            return True
        if self._config.is_loopback:
            return name in _LOOPBACK_NAMES or name == self._config.host
        # Bound to the network for everybody: DNS tricks need a name, an address is no name.
        return name in _LOOPBACK_NAMES or name == self._config.host or _is_address(name)

    def _is_same(self, origin: str, host: str) -> bool:
        name = _host_name(origin)
        if name is not None and name in self._config.allowed_hosts:
            return True
        return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _bearer(authorization: str | None) -> str:
    if authorization is None:
        raise Unauthenticated("no API key was sent; send 'Authorization: Bearer sk-…'")
    scheme, _, secret = authorization.partition(" ")
    secret = secret.strip()
    if scheme.lower() != "bearer" or not secret or len(secret) > _MAX_SECRET:
        raise Unauthenticated("the Authorization header is not of the form 'Bearer sk-…'")
    return secret


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
