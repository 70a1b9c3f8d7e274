"""What a server says, as frozen dataclasses. Fields that are new to this client are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Tier = Literal["device", "host", "store"]


@dataclass(frozen=True, slots=True)
class Residency:
    """Where an adapter's weights are."""

    tier: Tier
    pinned: bool
    leases: int
    last_used: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What validation found."""

    num_tensors: int
    num_elements: int
    is_scalable: bool
    base_digest: str
    notes: tuple[str, ...]
    unused_files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One thing that a request may choose in `Use.options`; without it `default` stands."""

    name: str
    kind: str
    summary: str
    expected: str
    default: Any


@dataclass(frozen=True, slots=True)
class Traits:
    """What a request may choose of an adapter, and the tokens from which on it acts."""

    ranks: tuple[int, int] | None  # least and most; None: it has one rank
    invocation_tokens: tuple[int, ...]  # empty: it acts everywhere
    options: tuple[Option, ...]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Traits:
        """Read the API's object; raises KeyError if a field is missing."""
        ranks = body["ranks"]
        return cls(
            ranks=None if ranks is None else (ranks["least"], ranks["most"]),
            invocation_tokens=tuple(body["invocation_tokens"]),
            options=tuple(
                Option(one["name"], one["kind"], one["summary"], one["expected"], one["default"])
                for one in body["options"]
            ),
        )


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of one adapter."""

    id: str
    name: str
    version: int
    digest: str
    family: str
    base_model: str
    rank: int
    target_modules: tuple[str, ...]
    bytes: int
    status: str
    report: Report
    residency: Residency
    tenant: str
    created: int
    description: str
    tags: tuple[str, ...]
    traits: Traits | None = None  # None: the server does not know them

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Adapter:
        """Read the API's adapter object; raises KeyError if a field is missing."""
        report, residency, traits = body["report"], body["residency"], body.get("traits")
        return cls(
            id=body["id"],
            name=body["name"],
            version=body["version"],
            digest=body["digest"],
            family=body["family"],
            base_model=body["base_model"],
            rank=body["rank"],
            target_modules=tuple(body["target_modules"]),
            bytes=body["bytes"],
            status=body["status"],
            report=Report(
                num_tensors=report["num_tensors"],
                num_elements=report["num_elements"],
                is_scalable=report["is_scalable"],
                base_digest=report["base_digest"],
                notes=tuple(report["notes"]),
                unused_files=tuple(report["unused_files"]),
            ),
            residency=Residency(
                tier=residency["tier"],
                pinned=residency["pinned"],
                leases=residency["leases"],
                last_used=residency["last_used"],
            ),
            tenant=body["tenant"],
            created=body["created"],
            description=body["description"],
            tags=tuple(body["tags"]),
            traits=None if traits is None else Traits.of(traits),
        )


@dataclass(frozen=True, slots=True)
class Use:
    """One adapter of a request: `name` or `name@version`; `rank` only for nested adapters."""

    name: str
    scale: float = 1.0
    rank: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """The API's form of it, without what is left at its default."""
        body: dict[str, Any] = {"name": self.name, "scale": self.scale}
        if self.rank is not None:
            body["rank"] = self.rank
        if self.options:
            body["options"] = dict(self.options)
        return body


@dataclass(frozen=True, slots=True)
class Served:
    """An adapter that a reply was made with; `tier` is where it lay when the request began.
    Mandatory: the tenant's policy names it.

    is_approximate: an option of the request had it compute less than it would by itself.
    """

    name: str
    version: int
    digest: str
    tier: Tier
    load_ms: float
    mandatory: bool = False
    is_approximate: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that model "auto" could have chosen."""

    name: str
    score: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What model "auto" chose: an adapter's name, or None for the base."""

    adapter: str | None
    reason: str
    score: float | None
    threshold: float
    candidates: tuple[Candidate, ...]

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Choice:
        """Read a reply's `choice`; raises KeyError if a field is missing."""
        return cls(
            adapter=body["adapter"],
            reason=body["reason"],
            score=body["score"],
            threshold=body["threshold"],
            candidates=tuple(Candidate(c["name"], c["score"]) for c in body["candidates"]),
        )


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One sample of a workflow's run; `adapter` is name@version, None the base."""

    round: int
    role: str
    adapter: str | None
    text: str
    answer: str | None
    tokens: int
    prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    seed: int


@dataclass(frozen=True, slots=True)
class WorkflowRun:
    """How a workflow came to its answer, which is None when no member gave one.

    `rule` is "agreement", "majority" (without agreement) or "none"; more than one of `candidates`
    is a tie, of which the first was taken. `total_tokens` counts all samples.
    """

    name: str
    kind: str
    version: int
    answer: str | None
    agreed: bool
    rule: str
    candidates: tuple[str, ...]
    rounds: int
    trace: tuple[TraceEntry, ...]
    total_tokens: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> WorkflowRun:
        """Read a reply's `workflow`, also of OpenAI's client; raises KeyError."""
        entries = (
            TraceEntry(**{name: entry[name] for name in TraceEntry.__dataclass_fields__})
            for entry in body["trace"]
        )
        return cls(
            name=body["name"],
            kind=body["kind"],
            version=body["version"],
            answer=body["answer"],
            agreed=body["agreed"],
            rule=body["rule"],
            candidates=tuple(body["candidates"]),
            rounds=body["rounds"],
            trace=tuple(entries),
            total_tokens=body["usage"]["total_tokens"],
        )


@dataclass(frozen=True, slots=True)
class Workflow:
    """A named way of answering with several generations; `definition` as the API has it."""

    id: str
    name: str
    kind: str
    version: int
    definition: Mapping[str, Any]
    description: str
    tenant: str
    created: int
    updated: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Workflow:
        """Read the API's workflow object; raises KeyError if a field is missing."""
        return cls(**{name: body[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Completion:
    """A text that was continued, and what served it: no adapter means the base."""

    text: str
    finish_reason: Literal["stop", "length"]
    adapters: tuple[Served, ...]
    workflow: WorkflowRun | None = None  # when `model` was a workflow
    choice: Choice | None = None  # with model "auto"


@dataclass(frozen=True, slots=True)
class Profile:
    """What a name's requests look like; "auto" leaves out whose profile is not fresh."""

    name: str
    examples: tuple[str, ...]
    num_centroids: int
    is_fresh: bool
    base_digest: str
    own_share: float | None
    created: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Profile:
        """Read the API's profile object; raises KeyError if a field is missing."""
        return cls(
            name=body["name"],
            examples=tuple(body["examples"]),
            num_centroids=body["num_centroids"],
            is_fresh=body["is_fresh"],
            base_digest=body["base_digest"],
            own_share=body["own_share"],
            created=body["created"],
        )


@dataclass(frozen=True, slots=True)
class MandatoryAdapter:
    """One adapter of a policy: a version of a tenant's or a shared name."""

    name: str
    version: int
    digest: str
    tenant: str
    scale: float
    rank: int | None
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Policy:
    """What every request of a tenant is served through besides its own adapters."""

    tenant: str
    adapters: tuple[MandatoryAdapter, ...]
    created: int

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Policy:
        """Read the API's policy object; raises KeyError if a field is missing."""
        return cls(
            tenant=body["tenant"],
            adapters=tuple(
                MandatoryAdapter(
                    a["name"],
                    a["version"],
                    a["digest"],
                    a["tenant"],
                    a["scale"],
                    a["rank"],
                    a["options"],
                )
                for a in body["adapters"]
            ),
            created=body["created"],
        )


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server can do. `limits` and `features` hold what it says, by name."""

    model: str
    families: tuple[str, ...]
    limits: Mapping[str, int]
    features: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A text's token ids."""

    tokens: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Version:
    """What a server is; the fields after `version` are None while its engine starts."""

    version: str
    model: str | None
    base_digest: str | None
    device: str | None
    dtype: str | None
    strategy: str | None
