"""The adapter object and the bodies of the calls about adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from polyadapt.api.schemas.base import MAX_NAME, Body, ErrorDetail, Reply, is_none
from polyadapt.api.schemas.profiles import Examples
from polyadapt.types import Residency
from polyadapt_store.imports import Import
from polyadapt_store.manifest import NAME_PATTERN, AdapterRecord, ReportedTraits
from polyadapt_store.replicas import ReplicaState


class ReportObject(Reply):
    """What validation found."""

    num_tensors: int
    num_elements: int
    is_scalable: bool
    base_digest: str
    notes: list[str]
    unused_files: list[str]


class RanksObject(Reply):
    """The ranks that a request may choose, both included."""

    least: int
    most: int


class OptionObject(Reply):
    """One thing that a request may choose in `options`; without it `default` stands."""

    name: str
    kind: str
    summary: str
    expected: str
    default: str | bool | int | float | list[str] | None


class TraitsObject(Reply):
    """What a request may choose of the adapter, and from which tokens on it acts."""

    ranks: RanksObject | None = Field(description="null: it has one rank")
    invocation_tokens: list[int] = Field(
        description="it acts from the last occurrence of these tokens in the prompt on, and where "
        "they do not occur not at all; empty: everywhere"
    )
    options: list[OptionObject]

    @classmethod
    def of(cls, traits: ReportedTraits) -> TraitsObject:
        """Return the wire form."""
        ranks = None
        if traits.ranks is not None:
            ranks = RanksObject(least=traits.ranks[0], most=traits.ranks[1])
        return cls(
            ranks=ranks,
            invocation_tokens=list(traits.invocation_tokens),
            options=[
                OptionObject(
                    name=option.name,
                    kind=option.kind,
                    summary=option.summary,
                    expected=option.expected,
                    default=list(option.default)
                    if isinstance(option.default, tuple)
                    else option.default,
                )
                for option in traits.options
            ],
        )


class ResidencyObject(Reply):
    """Where the weights are; `last_used` is None when nobody used them since the engine started.

    With several engines `tier` is the best of them and `engines` has each one's that holds any.
    """

    tier: Literal["device", "host", "store"]
    pinned: bool
    leases: int
    last_used: float | None
    engines: dict[str, Literal["device", "host", "store"]] | None = Field(
        default=None, description="engine -> tier; null: the server has one engine"
    )


class ReplicaObject(Reply):
    """One of the servers that share the registry, as of its last heartbeat."""

    id: str
    tier: Literal["device", "host", "store"]
    is_current: bool = Field(description="it has seen the registry's last write")
    seen: int = Field(description="when it was heard last, in unix seconds")


class AdapterObject(Reply):
    """One version of one adapter."""

    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    version: int
    digest: str
    family: str
    base_model: str
    rank: int
    target_modules: list[str]
    bytes: int
    status: Literal["validating", "ready", "rejected", "revoked"]
    traits: TraitsObject | None = Field(description="null: uploaded before they were recorded")
    report: ReportObject
    residency: ResidencyObject
    replicas: list[ReplicaObject] | None = Field(
        None, exclude_if=is_none, description="each server's state; absent in lists"
    )
    tenant: str
    created: int
    description: str
    tags: list[str]

    @classmethod
    def of(
        cls,
        record: AdapterRecord,
        residency: Residency,
        replicas: Sequence[ReplicaState] | None = None,
    ) -> AdapterObject:
        """Return the wire form of a record."""
        report = record.report
        assert record.status != "deleted", "a deleted version is shown to nobody"
        return cls(
            id=record.id,
            name=record.name,
            version=record.version,
            digest=record.digest,
            family=record.family,
            base_model=record.base_model,
            rank=record.rank,
            target_modules=list(record.target_modules),
            bytes=record.nbytes,
            status=record.status,
            traits=None if report.traits is None else TraitsObject.of(report.traits),
            report=ReportObject(
                num_tensors=report.num_tensors,
                num_elements=report.num_elements,
                is_scalable=report.is_scalable,
                base_digest=report.base_digest,
                notes=list(report.notes),
                unused_files=list(report.unused_files),
            ),
            residency=ResidencyObject(
                tier=residency.tier,
                pinned=residency.is_pinned,
                leases=residency.num_leases,
                last_used=residency.last_used or None,
                engines=dict(residency.engines) or None,
            ),
            replicas=None
            if replicas is None
            else [
                ReplicaObject(id=r.id, tier=r.tier, is_current=r.is_current, seen=r.seen)
                for r in replicas
            ],
            tenant=record.tenant,
            created=record.created,
            description=record.description,
            tags=list(record.tags),
        )


class AdapterList(Reply):
    """One page of adapters; the next begins `after` `last_id`."""

    object: Literal["list"] = "list"
    data: list[AdapterObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


class DeletedAdapter(Reply):
    """The versions that are gone."""

    object: Literal["adapter.deleted"] = "adapter.deleted"
    name: str
    versions: list[int]
    deleted: Literal[True] = True


class UploadMetadata(Body):
    """The optional `metadata` field of an upload."""

    description: str = ""
    tags: list[str] = Field(default_factory=list)
    examples: Examples = Field(
        default_factory=list, description="make the name's profile: see ProfileObject"
    )


class SourceObject(Body):
    """Where an adapter is fetched from."""

    uri: str = Field(
        min_length=1,
        max_length=1024,
        description="file://, hf://OWNER/REPO@REVISION, s3://, gs:// or https://, as allowed",
    )


class ImportRequest(UploadMetadata):
    """An adapter to fetch."""

    name: str = Field(pattern=NAME_PATTERN)
    source: SourceObject


class ImportObject(Reply):
    """An adapter that is being fetched, and what came of it."""

    id: str
    object: Literal["adapter.import"] = "adapter.import"
    name: str
    source: SourceObject
    status: Literal["validating", "ready", "rejected"]
    version: int | None = Field(description="once it is ready")
    error: ErrorDetail | None = Field(description="why it was rejected")
    created: int

    @classmethod
    def of(cls, found: Import) -> ImportObject:
        """Return the wire form."""
        error = None if found.error is None else ErrorDetail(**found.error["error"])
        done: Literal["ready", "validating"] = "validating" if found.version is None else "ready"
        return cls(
            id=found.id,
            name=found.name,
            source=SourceObject(uri=found.uri),
            status=done if error is None else "rejected",
            version=found.version,
            error=error,
            created=found.created,
        )


class LoadRequest(Body):
    """`pin` keeps the adapter on the device until it is unloaded or loaded without it."""

    pin: bool = False


class LoadLoraRequest(Body):
    """vLLM's call: register an adapter from a folder that the operator has allowed."""

    lora_name: str = Field(min_length=1, max_length=MAX_NAME)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadLoraRequest(Body):
    """vLLM's call: forget an adapter. `lora_int_id` is accepted; names are the identity here."""

    lora_name: str = Field(min_length=1, max_length=MAX_NAME)
    lora_int_id: int | None = None


class ModelObject(Reply):
    """The base model, an adapter or a workflow; `root` and `parent` of the others name the base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "polyadapt"
    root: str
    parent: str | None
    max_model_len: int
    workflow: str | None = Field(None, exclude_if=is_none, description="the kind, of a workflow")


class ModelList(Reply):
    """The base model first, then the adapters by name, then the workflows by name."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
