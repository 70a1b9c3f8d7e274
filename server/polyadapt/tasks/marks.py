"""Marks with their secrets: registered, issued from their codebook, verified and traced.

The secrets stay sealed in the registry and open under the KEK, which only the edge has. Torch-free;
knows no HTTP.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from polyadapt.adapters.registry import mark_adapter_config
from polyadapt.config import WatermarkConfig
from polyadapt.errors import (
    Conflict,
    Forbidden,
    InvalidRequest,
    SecretsUnavailable,
    StartupError,
    Unavailable,
)
from polyadapt.tasks.directory import AdapterDirectory, UploadedFile
from polyadapt.tasks.policy_admin import PolicyAdmin
from polyadapt.watermark.endpoint import Endpoint, EndpointLimits, EndpointUrl
from polyadapt.watermark.file_key import open_sealer
from polyadapt.watermark.keyset import Keyset
from polyadapt.watermark.mark_directory import (
    BRANCHES_NAME,
    BUNDLE_FILES,
    CONFIG_NAME,
    SECRETS_NAME,
    SECRETS_PURPOSE,
    MarkDirectory,
)
from polyadapt.watermark.prompts import Prose, load_prose
from polyadapt.watermark.queries import ChatQuery, queries_for
from polyadapt.watermark.records import read_model, read_record, read_samples, trace_record
from polyadapt.watermark.rotation import report_keys
from polyadapt.watermark.secrets import kek_id_of, kek_of, rewrap
from polyadapt.watermark.statistics import BitRule, SequentialRule
from polyadapt.watermark.trace import Trace
from polyadapt_store.manifest import PEFT_FORM, AdapterRecord
from polyadapt_store.marks import MarkBook, MarkRecord
from polyadapt_store.sealed_files import FileSealer
from polyadapt_store.signatures import Signature

logger = logging.getLogger(__name__)

_MAX_SMALL = 16 << 20  # bytes of a bundle's config, or of its secrets


class Store(Protocol):
    """What is needed of polyadapt_store.AdapterStore."""

    @property
    def marks(self) -> MarkBook: ...

    def is_live(self, digest: str) -> bool: ...

    def seal_marks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class StoredMark:
    """A mark that a tenant sees. `record` is None where only its branches are here."""

    adapter: AdapterRecord
    num_bits: int
    record: MarkRecord | None

    @property
    def has_secrets(self) -> bool:
        """Whether signatures are drawn from its codebook, and its bits can be read and traced."""
        return self.record is not None and self.record.secrets is not None


@dataclass(frozen=True, slots=True)
class Sample:
    """A question that somebody else has asked, and the beginning of the reply; None: no reply."""

    message: str
    reply: str | None


@dataclass(frozen=True, slots=True)
class Traced:
    """Who was named, out of whom, and the signed record of it."""

    trace: Trace
    record: str
    by_hand: tuple[str, ...]  # users with bits that are not the codebook's, or do not open


class MarkService:
    """Registers marks and works with their secrets."""

    def __init__(
        self,
        directory: AdapterDirectory,
        policies: PolicyAdmin,
        store: Store,
        config: WatermarkConfig,
        kek: Keyset | None,
    ) -> None:
        """kek: what marks' secrets are sealed under; None: this server has no key for them."""
        self._directory = directory
        self._policies = policies
        self._store = store
        self._kek = kek
        self._allowed = frozenset(
            EndpointUrl.parse(text).origin for text in config.verify_endpoints
        )
        # A reading asks for minutes and holds a thread.
        self._readings = asyncio.Semaphore(config.max_readings)
        self._prose: Prose | None = None

    # ------------------------------------------------------------------ what there is
    async def register(
        self, tenant: str, name: str, files: Sequence[UploadedFile]
    ) -> tuple[StoredMark, bool]:
        """Make a bundle's branches an adapter and keep its secrets, sealed under the newest key;
        return the mark and whether it is new.

        Raises InvalidRequest for what is no bundle, or is sealed under another key, Conflict where
        this server has no key, and what an upload raises.
        """
        kek = self._key()
        found = {file.name: file for file in files}
        if len(files) != len(BUNDLE_FILES) or set(found) != set(BUNDLE_FILES):
            raise InvalidRequest(
                f"the files are {sorted(found)}, expected a mark's bundle: "
                f"{', '.join(BUNDLE_FILES)}",
                param="files",
            )
        config, sealed = (_small(found[file]) for file in (CONFIG_NAME, SECRETS_NAME))
        try:
            mark = MarkDirectory.of(Path(name), config, sealed, kek)
            _ = mark.module, mark.prompts
            if kek_id_of(sealed, SECRETS_PURPOSE) != kek.primary.id:
                sealed = rewrap(sealed, kek, kek.primary, SECRETS_PURPOSE)
        except (StartupError, SecretsUnavailable) as error:
            raise InvalidRequest(
                f"the bundle cannot be served: {error.message}", param="files"
            ) from None
        head = json.dumps(mark_adapter_config(json.loads(config)), sort_keys=True).encode()
        parts = (io.BytesIO(head), found[BRANCHES_NAME].content)
        uploads = [
            UploadedFile(file, part) for file, part in zip(PEFT_FORM.required, parts, strict=True)
        ]
        adapter, is_new = await self._directory.upload(tenant, name, uploads)
        await asyncio.to_thread(
            self._store.marks.put, adapter.digest, config.decode(), sealed.decode()
        )
        return await self.get(tenant, name), is_new

    async def get(self, tenant: str, name: str) -> StoredMark:
        """Return a mark; raises ModelNotFound, and InvalidRequest for what is none."""
        adapter, option = await self._policies.mark(tenant, name)
        record = await asyncio.to_thread(self._store.marks.find, adapter.digest)
        return StoredMark(adapter, option.num_bits, record)

    async def list_all(self, tenant: str) -> tuple[StoredMark, ...]:
        """Return every mark that the tenant sees, by name."""
        found = await self._policies.list_marks(tenant)
        find = self._store.marks.find

        def read() -> list[StoredMark]:
            return [StoredMark(one, option.num_bits, find(one.digest)) for one, option in found]

        return tuple(await asyncio.to_thread(read))

    async def delete(self, tenant: str, name: str) -> tuple[AdapterRecord, ...]:
        """Delete a mark in all its versions, and its secrets here: what it issued can be traced no
        more. Its rows stay. Raises Conflict while a policy names it.
        """
        await self._policies.mark(tenant, name)
        records = await self._directory.delete(tenant, name, None, "drain")
        for digest in {record.digest for record in records}:
            if not await asyncio.to_thread(self._store.is_live, digest):
                await asyncio.to_thread(self._store.marks.forget, digest)
        return records

    # ------------------------------------------------------------------ signatures
    async def issue(
        self, tenant: str, name: str, users: Sequence[str]
    ) -> dict[str, tuple[Signature, bool]]:
        """Give users their rows of the codebook, all or none; return each and whether it is new.

        A row depends on the mark's key and the user's name alone. Raises Conflict for a mark
        without secrets here, and for two users whose rows are the same.
        """
        mark, stored = await self._open(tenant, name)
        bits = {user: "".join(map(str, mark.codebook.row(user).tolist())) for user in users}
        book = self._policies.signatures.book
        return await asyncio.to_thread(book.issue_all, stored.adapter.digest, bits)

    # ------------------------------------------------------------------ reading
    async def queries(self, tenant: str, name: str, num_per_bit: int) -> list[str]:
        """Return fresh questions for a suspect that only others can ask; they show triggers."""
        mark, _ = await self._open(tenant, name)
        rng = np.random.default_rng()
        prose = await self._get_prose()
        return [query.message for query in queries_for(mark.prompts, prose, num_per_bit, rng)]

    async def verify_samples(
        self, tenant: str, name: str, samples: Sequence[Sample], alpha: float, suspect: str
    ) -> str:
        """Return the signed reading of questions and replies. Raises InvalidRequest for a question
        that asks for no bit of this mark, or comes twice.
        """
        mark, _ = await self._open(tenant, name)
        if len({sample.message for sample in samples}) != len(samples):
            raise InvalidRequest("a question comes twice; each counts once", param="samples")
        queries = []
        for number, sample in enumerate(samples):
            asked = (i for i, p in enumerate(mark.prompts.phrases) if sample.message.endswith(p))
            bit = next(asked, None)
            if bit is None:
                raise InvalidRequest(
                    f"samples[{number}] asks for no bit of this mark; take its questions from "
                    "POST .../queries",
                    param=f"samples[{number}].message",
                )
            queries.append(ChatQuery(sample.message, bit))
        replies = [sample.reply for sample in samples]
        rule = BitRule(alpha=alpha)
        try:
            return await asyncio.to_thread(read_samples, mark, queries, replies, rule, suspect)
        except StartupError as error:  # the mark is not calibrated
            raise Conflict(error.message) from None

    async def verify_endpoint(
        self,
        tenant: str,
        name: str,
        endpoint: str,
        model: str,
        api_key: str | None,
        alpha: float,
        limits: EndpointLimits,
    ) -> str:
        """Return the signed reading of a model behind an endpoint that the operator has listed.

        Cancelling this ends the asking. Raises Forbidden for any other endpoint.
        """
        url = EndpointUrl.parse(endpoint)
        if url.origin not in self._allowed:
            raise Forbidden(
                f"{url.origin} is not among the endpoints that this server may ask; list it with "
                "--verify-endpoint, or ask it with `polyadapt mark verify --endpoint`"
            )
        mark, _ = await self._open(tenant, name)
        prose = await self._get_prose()
        rule = SequentialRule(alpha=alpha)
        async with self._readings:
            with closing(Endpoint(url, model, api_key, limits)) as suspect:
                reading = asyncio.ensure_future(
                    asyncio.to_thread(
                        read_model, mark, suspect.ask, prose, rule, f"{model} at {url.origin}"
                    )
                )
                try:
                    return await asyncio.shield(reading)
                except asyncio.CancelledError:
                    suspect.cancel()
                    await asyncio.wait({reading})
                    reading.exception()
                    raise
                except StartupError as error:  # the mark is not calibrated
                    raise Conflict(error.message) from None

    # ------------------------------------------------------------------ tracing
    async def trace(
        self,
        tenant: str,
        name: str,
        reading: dict[str, Any],
        alpha: float,
        *,
        among: Callable[[str], bool] = lambda user: True,
    ) -> Traced:
        """Compare what was read with everybody who ever had a signature from the codebook and is
        `among` those that the caller may see.

        reading: a signed reading, as verify gives it, or {"bits": [0, 1 or None, ...]}. Raises
        InvalidRequest for bits of another length, EvidenceRejected for a reading that this mark did
        not sign, Conflict where nobody has a signature, SecretsUnavailable where none opens.
        """
        mark, stored = await self._open(tenant, name)
        if set(reading) == {"bits"}:
            fields = {"bits": [{"value": bit} for bit in reading["bits"]], "kind": "given"}
        else:
            fields = read_record(mark, json.dumps(reading).encode())
        book = self._policies.signatures.book
        listed = await asyncio.to_thread(book.list, stored.adapter.digest, has_bits=True)
        issued = [one for one in listed if among(one.user)]

        def work() -> Traced:
            drawn, by_hand = [], []
            for user in dict.fromkeys(one.user for one in issued):
                row = "".join(map(str, mark.codebook.row(user).tolist()))
                had = {one.bits for one in issued if one.user == user}
                # A row that does not open may have been the codebook's. To compare a user too many
                # makes no accusation wrong.
                if had & {row, None}:
                    drawn.append(user)
                if had - {row}:
                    by_hand.append(user)
            if not drawn:
                raise Conflict("nobody has a signature from this mark's codebook; issue some first")
            found, record = trace_record(
                mark, fields, drawn, alpha, users_with_bits_by_hand=len(by_hand)
            )
            return Traced(found, record, tuple(by_hand))

        return await asyncio.to_thread(work)

    # ------------------------------------------------------------------ secrets
    async def seal_branches(self) -> None:
        """Seal what an older release left in the clear of marks' files; what cannot be reached now
        is logged, and tried again at the next start.
        """
        try:
            num = await asyncio.to_thread(self._store.seal_marks)
        except Unavailable as error:
            logger.error("branches of marks may lie in the clear: %s", error.message)
            return
        if num:
            logger.info("the branches of %d marks that lay in the clear are sealed", num)

    async def report_keys(self) -> None:
        """Log which of what is sealed in the registry does not open here, or not under the newest
        key.
        """
        await asyncio.to_thread(report_keys, self._store.marks, self._kek)

    def _key(self) -> Keyset:
        if self._kek is None:
            raise Conflict(
                "this server has no key for marks' secrets; start it with "
                "POLYADAPT_MARK_KEK_FILE, or POLYADAPT_MARK_KEK"
            )
        return self._kek

    async def _open(self, tenant: str, name: str) -> tuple[MarkDirectory, StoredMark]:
        kek = self._key()
        stored = await self.get(tenant, name)
        record = stored.record
        if record is None or record.config is None or record.secrets is None:
            raise Conflict(
                f"only the branches of {name[:200]!r} are here, not its secrets; register its "
                "bundle with POST /v1/watermarks, or issue signatures of your own"
            )
        config, secrets = record.config.encode(), record.secrets.encode()

        def read() -> MarkDirectory:
            try:
                return MarkDirectory.of(Path(name), config, secrets, kek)
            except StartupError as error:
                raise SecretsUnavailable(error.message) from None

        return await asyncio.to_thread(read), stored

    async def _get_prose(self) -> Prose:
        if self._prose is None:
            # What no training has seen, as whoever measured the null rates used.
            self._prose = (await asyncio.to_thread(load_prose)).split()[1]
        return self._prose


def read_kek(config: WatermarkConfig) -> Keyset | None:
    """Return the keys that the settings name, None for none; raises StartupError for a bad one."""
    if config.mark_kek is None and config.mark_kek_file is None:
        return None
    try:
        return kek_of(config)
    except InvalidRequest as error:
        raise StartupError(f"the key for marks' secrets cannot be used: {error.message}") from None


def find_sealer(config: WatermarkConfig, book: MarkBook) -> FileSealer | None:
    """Return what seals marks' files, None where there is no key that opens the registry's: that is
    logged, and only marks are not served. Raises StartupError for a key that cannot be read.
    """
    kek = read_kek(config)
    if kek is None:
        return None
    try:
        return open_sealer(kek, book)
    except SecretsUnavailable as error:
        logger.error("no mark is taken or brought to the device: %s", error.message)
        return None


def _small(file: UploadedFile) -> bytes:
    data = file.content.read(_MAX_SMALL + 1)
    if len(data) > _MAX_SMALL:
        raise InvalidRequest(f"{file.name} has more than {_MAX_SMALL} bytes", param="files")
    return data
