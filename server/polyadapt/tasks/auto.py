"""`model: "auto"`: the server chooses an adapter for each request; and the profiles it chooses by.

A profile is made of examples, texts that the adapter is for: where the base's embeddings of them
gather. Torch-free; knows no HTTP. The arithmetic is in tasks/choice.py.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np

from polyadapt.errors import InvalidRequest, ModelNotFound
from polyadapt.tasks.background import BACKGROUND
from polyadapt.tasks.choice import (
    Choice,
    Index,
    Space,
    centroids_of,
    left_out_scores,
    space_digest,
)
from polyadapt.tasks.directory import NewProfile
from polyadapt.tasks.embed import Embedder
from polyadapt.tasks.model_name import AUTO
from polyadapt.tasks.text import (
    Accepted,
    ChatPrompt,
    Prompt,
    TextEvent,
    TextPrompt,
    TextRequest,
    TextService,
    TokenPrompt,
)
from polyadapt_store.profiles import Profile, ProfileBook, no_profile

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 256
MAX_EXAMPLE_CHARS = 4096
MAX_EXAMPLES_CHARS = 1 << 16  # of all examples of one adapter
# Of a longer text its end counts, where a request usually says what it wants; so that a choice
# costs little beside the answer.
_LAST_TOKENS = 512
_LAST_CHARS = 16 * _LAST_TOKENS
_LEAST_URGENT = 100  # the priority of what nobody waits for
_MAX_INDEXES = 64  # tenants whose profiles are kept at hand
_MAX_TRIES = 8


@dataclass(frozen=True, slots=True)
class _TenantIndex:
    index: Index
    written: int  # see ProfileBook.num_writes


class AutoService:
    """Chooses, and keeps what it chooses by in the registry."""

    def __init__(
        self, text: TextService, embedder: Embedder, book: ProfileBook, threshold: float
    ) -> None:
        """An adapter is chosen at a score of at least `threshold`."""
        self.threshold = threshold
        self._text = text
        self._embedder = embedder
        self._book = book
        self._space: tuple[str, Space] | None = None
        self._space_lock = asyncio.Lock()
        self._indexes: OrderedDict[str, _TenantIndex] = OrderedDict()

    # ------------------------------------------------------------------ requests
    def generate(self, request: TextRequest) -> AsyncGenerator[TextEvent, None]:
        """Yield what TextService.generate yields for the request; where its model is `auto`, for
        the adapter that is chosen, with the choice in Accepted. Raises as it does.
        """
        if request.model != AUTO:
            return self._text.generate(request)
        return self._generate(request)

    async def _generate(self, request: TextRequest) -> AsyncGenerator[TextEvent, None]:
        if request.adapters is not None:
            raise InvalidRequest(
                f"model {AUTO!r} chooses the adapter; leave `adapters` out or name the model",
                param="adapters",
            )
        if len(request.prompts) != 1:
            raise InvalidRequest(
                f"{len(request.prompts)} prompts could be given to different adapters, of which a "
                f"reply names one; with model {AUTO!r} send them one by one",
                param="prompt",
            )
        for number in range(_MAX_TRIES):
            choice, model = await self.choose(request)
            chosen = replace(request, model=model)
            has_begun = False
            try:
                async with aclosing(self._text.generate(chosen)) as events:
                    async for event in events:
                        has_begun = True
                        yield (
                            replace(event, choice=choice) if isinstance(event, Accepted) else event
                        )
                return
            except ModelNotFound as error:
                # Deleted between the choice and its use: choose among those that are left.
                if has_begun or error.param != "model" or number == _MAX_TRIES - 1:
                    raise

    async def choose(self, request: TextRequest) -> tuple[Choice, str]:
        """Return what is chosen for the request's prompt, and the name to serve it under."""
        base = self._text.info().base
        index = await self._index(request.tenant)
        if not index.names:
            return Choice(None, "no_profiles", None, self.threshold), base.name
        ids = await self._last_ids(request.prompts[0])
        if not ids:
            return Choice(None, "empty_prompt", None, self.threshold), base.name
        space = await self._get_space()
        salt = self._text.cache_salt(request)
        (embedded,) = await self._embedder.embed(
            f"{request.id}-{AUTO}", [ids], cache_salt=salt, priority=request.priority
        )
        point = space.place(np.array([embedded.vector], np.float32))[0]
        choice, model = await asyncio.to_thread(index.rank, point, self.threshold)
        return choice, model or base.name

    async def _index(self, tenant: str) -> Index:
        """The fresh profiles that the tenant may be served by, as the last write left them."""
        known = self._indexes.get(tenant)
        written = self._book.num_writes  # before it is read: what is written meanwhile counts again
        if known is None or known.written != written:
            base = self._text.info().base.digest
            index = await asyncio.to_thread(self._read_index, tenant, base)
            known = self._indexes[tenant] = _TenantIndex(index, written)
        self._indexes.move_to_end(tenant)
        while len(self._indexes) > _MAX_INDEXES:
            self._indexes.popitem(last=False)
        return known.index

    def _read_index(self, tenant: str, base_digest: str) -> Index:
        found = self._book.current(tenant, base_digest, space_digest(base_digest, BACKGROUND))
        return Index(
            [of.name for of in found],
            [f"{of.name}@{of.version}" for of in found],
            [_array(of.centroids, of.num_centroids) for of in found],
        )

    async def _last_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The last tokens of what the caller asks: a text, or a chat's turns of the user."""
        num = min(_LAST_TOKENS, self._text.info().base.max_model_len)
        if isinstance(prompt, TokenPrompt):
            return await self._text.encode(TokenPrompt(prompt.ids[-num:]))
        text = prompt.text if isinstance(prompt, TextPrompt) else _asked(prompt)
        ids = await self._text.encode(TextPrompt(text[-_LAST_CHARS:]))
        return ids[-num:]

    # ------------------------------------------------------------------ profiles
    async def get(self, tenant: str, name: str) -> Profile:
        """Return the profile of a name that the tenant sees; raises NotFound."""
        profile = await asyncio.to_thread(self._book.get, tenant, name)
        if profile is None:
            raise no_profile(name)
        return profile

    async def put(self, tenant: str, name: str, examples: Sequence[str] | None) -> Profile:
        """Make the name's profile from examples, or, without any, anew from those that it has.

        Raises NotFound, Forbidden for another tenant's name, InvalidRequest, and what the engine
        raises.
        """
        known = await asyncio.to_thread(self._book.get, tenant, name)
        if examples is None and known is None:
            raise no_profile(name)
        made = await self._make(known.examples if examples is None and known else examples or ())
        return await asyncio.to_thread(self._book.put, tenant, name, made)

    async def delete(self, tenant: str, name: str) -> None:
        """Forget the name's profile: nobody is given this adapter by choice any more."""
        await asyncio.to_thread(self._book.delete, tenant, name)

    def is_fresh(self, profile: Profile) -> bool:
        """Whether requests are compared with it; else it has to be made anew."""
        base_digest = self._text.info().base.digest
        return profile.space == space_digest(base_digest, BACKGROUND)

    def new_profile(self, tenant: str, name: str, examples: Sequence[str]) -> NewProfile:
        """Return what makes the profile of a name while its adapter is published.

        Without examples one that is not fresh is made anew from its own; None where nothing is
        to change.
        """

        async def make() -> Profile | None:
            known = await asyncio.to_thread(self._book.own, tenant, name)
            wanted = tuple(examples) or (known.examples if known else ())
            is_known = known is not None and known.examples == wanted and self.is_fresh(known)
            return None if is_known or not wanted else await self._make(wanted)

        return make

    async def _make(self, examples: Sequence[str]) -> Profile:
        prompts: list[tuple[int, ...]] = []
        for number, text in enumerate(examples):
            ids = await self._last_ids(TextPrompt(text))
            if not ids:
                raise InvalidRequest(
                    "the example is empty; send at least one token", param=f"examples[{number}]"
                )
            prompts.append(ids)
        space = await self._get_space()
        points = space.place(await self._vectors(prompts))
        centroids, own_scores = await asyncio.to_thread(
            lambda: (centroids_of(points), left_out_scores(points))
        )
        base_digest = self._text.info().base.digest
        return Profile(
            examples=tuple(examples),
            space=space_digest(base_digest, BACKGROUND),
            base_digest=base_digest,
            num_centroids=len(centroids),
            centroids=_bytes(centroids),
            own_scores=tuple(own_scores.tolist()),
        )

    async def _get_space(self) -> Space:
        """The space of the present base; its background is embedded once and then kept."""
        digest = space_digest(self._text.info().base.digest, BACKGROUND)
        async with self._space_lock:
            if self._space is None or self._space[0] != digest:
                kept = await asyncio.to_thread(self._book.space, digest)
                if kept is None:
                    prompts = [await self._last_ids(TextPrompt(text)) for text in BACKGROUND]
                    kept = _bytes(await self._vectors(prompts))
                    await asyncio.to_thread(self._book.keep_space, digest, kept)
                self._space = digest, Space(_array(kept, len(BACKGROUND)))
            return self._space[1]

    async def _vectors(self, prompts: Sequence[tuple[int, ...]]) -> np.ndarray:
        request_id = f"profile-{secrets.token_hex(8)}"
        found = await self._embedder.embed(request_id, prompts, priority=_LEAST_URGENT)
        return np.array([embedded.vector for embedded in found], np.float32)


def _asked(prompt: ChatPrompt) -> str:
    """The turns of the user, or all where there are none."""
    turns = [turn for turn in prompt.messages if turn.get("role") == "user"]
    texts = [turn.get("content") for turn in turns or prompt.messages]
    return "\n".join(text for text in texts if isinstance(text, str))


def _bytes(vectors: np.ndarray) -> bytes:
    return vectors.astype("<f4").tobytes()


def _array(content: bytes, num: int) -> np.ndarray:
    return np.frombuffer(content, "<f4").reshape(num, -1).astype(np.float32)
