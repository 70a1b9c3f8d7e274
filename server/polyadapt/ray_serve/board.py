"""What engine replicas say of themselves, where Ray's thread and the edge's loop both reach it.

Knows no Ray: the request router writes, on a thread of Ray's; the fleet is told on its own loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping

import msgspec

from polyadapt.types import EngineStats, Residency


class Statement(msgspec.Struct, frozen=True):
    """One replica's word about its engine; the default is that of one that has said nothing yet.

    loads: tokens that each edge has sent there and that are not computed yet.
    """

    is_ready: bool = True
    is_alive: bool = True
    num_restarts: int = 0
    loads: dict[str, int] = {}
    stats: EngineStats = EngineStats()
    residencies: tuple[Residency, ...] = ()


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Statement)
Statements = Mapping[str, Statement]


def encode_statement(statement: Statement) -> bytes:
    """The form in which it crosses machines."""
    return _ENCODER.encode(statement)


class Board:
    """The newest statement of every replica that Ray counts as running."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._raw: dict[str, bytes | None] = {}
        self._statements: Statements = {}
        self._listener: tuple[asyncio.AbstractEventLoop, Callable[[], None]] | None = None

    @property
    def statements(self) -> Statements:
        """By replica; never changed once it is returned."""
        return self._statements

    def post(self, raw: Mapping[str, bytes | None]) -> None:
        """Replace all of them; None of a replica that has said nothing. From any thread."""
        with self._lock:
            before, known = self._raw, self._statements
            self._statements = {
                name: known[name] if name in known and before[name] == message
                else Statement() if message is None
                else _DECODER.decode(message)
                for name, message in raw.items()
            }  # fmt: skip
            self._raw = dict(raw)
            listener = self._listener
        if listener is not None:
            loop, callback = listener
            if not loop.is_closed():
                loop.call_soon_threadsafe(callback)

    def listen(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called on this loop after every post; None: no more."""
        with self._lock:
            self._listener = None if callback is None else (asyncio.get_running_loop(), callback)


# Ray makes the router, inside the handle: a name is all that it and the fleet have in common.
_boards: dict[tuple[str, str], Board] = {}
_boards_lock = threading.Lock()


def board_of(app_name: str, deployment: str) -> Board:
    """This process's board of a deployment: the router and the fleet do not know each other."""
    with _boards_lock:
        return _boards.setdefault((app_name, deployment), Board())
