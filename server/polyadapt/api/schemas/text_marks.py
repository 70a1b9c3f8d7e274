"""How texts are marked, and whose they are, on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from polyadapt.api.schemas.base import Body, Reply
from polyadapt.types import MarkScheme, MarkSettings
from polyadapt.watermark.text_reading import TextFinding, UserReading
from polyadapt_store.text_policies import TextPolicy

MAX_TEXT = 1 << 16  # characters: every user's key is held against every token
MAX_USERS = 10_000


class TextPolicyRequest(Body):
    """Whether and how every text of a tenant has to be marked."""

    tenant: str = Field(min_length=1, max_length=200)
    required: bool
    scheme: MarkScheme = Field(
        description="kgw: a green list's logits are raised; synthid: tournaments; gumbel: a race"
    )
    context_width: int | None = Field(
        None, ge=1, le=8, description="tokens that decide what is favoured behind them; kgw 2, "
        "others 4"
    )  # fmt: skip
    ratio: float = Field(0.25, ge=0.05, le=0.75, description="kgw: the green share")
    bias: float = Field(2.0, ge=0.5, le=10.0, description="kgw: added to a green token's logit")
    depth: int = Field(12, ge=1, le=32, description="synthid: rounds of a tournament")
    seeding: Literal["siphash", "lefthash"] = Field(
        "siphash", description="kgw: lefthash makes green lists that transformers' "
        "WatermarkDetector reads, which are not as secret and not read here"
    )  # fmt: skip
    key_version: int = Field(1, ge=1, le=1_000_000, description="another one: other users' keys")
    sharp: Literal["refuse", "kgw"] = Field(
        "refuse", description="synthid and gumbel: what becomes of requests that leave no choice, "
        "such as temperature 0; kgw marks them with ratio and bias"
    )  # fmt: skip

    @model_validator(mode="after")
    def _fits(self) -> TextPolicyRequest:
        if self.scheme != "kgw" and self.seeding == "lefthash":
            raise PydanticCustomError("no_such_form", "lefthash is a form of kgw alone")
        if self.seeding == "lefthash" and self.context_width not in (None, 1):
            raise PydanticCustomError("no_such_form", "lefthash has a context_width of 1")
        return self

    def settings(self) -> tuple[MarkSettings, ...]:
        """Return what texts are marked by, the one for draws without choice last."""
        is_lefthash = self.seeding == "lefthash"
        green = MarkSettings(
            "kgw",
            1 if is_lefthash else self.context_width or 2,
            ratio=self.ratio,
            bias=self.bias,
            is_lefthash=is_lefthash,
            key_version=self.key_version,
        )
        if self.scheme == "kgw":
            return (green,)
        own = MarkSettings(
            self.scheme,
            self.context_width or 4,
            depth=self.depth,
            key_version=self.key_version,
        )
        return (own, green) if self.sharp == "kgw" else (own,)


class TextSettings(Reply):
    """How a text is marked; what a scheme does not have is null."""

    scheme: MarkScheme
    context_width: int
    ratio: float | None
    bias: float | None
    depth: int | None
    seeding: Literal["siphash", "lefthash"]
    key_version: int

    @classmethod
    def of(cls, settings: MarkSettings) -> TextSettings:
        """Return the wire form."""
        is_green = settings.scheme == "kgw"
        return cls(
            scheme=settings.scheme,
            context_width=settings.context_width,
            ratio=settings.ratio if is_green else None,
            bias=settings.bias if is_green else None,
            depth=settings.depth if settings.scheme == "synthid" else None,
            seeding="lefthash" if settings.is_lefthash else "siphash",
            key_version=settings.key_version,
        )


class TextPolicyObject(Reply):
    """What holds from the tenant's next request on."""

    object: Literal["watermark.text_policy"] = "watermark.text_policy"
    tenant: str
    required: bool
    generation: int = Field(description="counted from 1")
    created: int
    settings: list[TextSettings] = Field(
        description="the first, or the second for requests that leave the first no choice"
    )

    @classmethod
    def of(cls, policy: TextPolicy) -> TextPolicyObject:
        """Return the wire form."""
        return cls(
            tenant=policy.tenant,
            required=policy.is_required,
            generation=policy.generation,
            created=policy.created,
            settings=[TextSettings.of(own) for own in policy.settings],
        )


class TextPolicyList(Reply):
    """The policies that hold, by tenant."""

    object: Literal["list"] = "list"
    data: list[TextPolicyObject]


class TextDetectRequest(Body):
    """One user's key against a text."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    user: str | None = Field(
        None, min_length=1, max_length=200, description="an API key's id; null: the caller's own"
    )
    alpha: float = Field(1e-3, gt=0.0, lt=0.5)
    tenant: str | None = Field(
        None, min_length=1, max_length=200, description="for admins: another than the caller's"
    )


class TextTraceRequest(Body):
    """All users' keys against a text."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    users: list[str] | None = Field(
        None, min_length=1, max_length=MAX_USERS,
        description="null: every API key of the tenant; admins can name deleted ones here",
    )  # fmt: skip
    alpha: float = Field(1e-3, gt=0.0, lt=0.5, description="chance of naming any innocent")
    tenant: str | None = Field(
        None, min_length=1, max_length=200, description="for admins: another than the caller's"
    )


class TextReadingObject(Reply):
    """One user's key against the text, by the settings that speak most for it."""

    user: str
    settings: TextSettings
    num_scored: int = Field(description="distinct tokens with their contexts")
    score: float
    expected: float = Field(description="of a key that has nothing to do with the text")
    z: float
    p_value: float = Field(description="exact or an upper bound, over all settings that were read")
    family_p_value: float = Field(description="over all users, by Holm's method")

    @classmethod
    def of(cls, found: UserReading) -> TextReadingObject:
        """Return the wire form."""
        reading = found.reading
        return cls(
            user=found.user,
            settings=TextSettings.of(found.settings),
            num_scored=reading.num_scored,
            score=reading.score,
            expected=reading.expected,
            z=reading.z,
            p_value=found.p_value,
            family_p_value=found.family_p_value,
        )


class TextFindingObject(Reply):
    """Whose text it is; nobody can be named where `accused` is empty."""

    object: Literal["watermark.text_finding"] = "watermark.text_finding"
    verdict: Literal["named", "nobody"]
    accused: list[TextReadingObject]
    ranked: list[TextReadingObject] = Field(description="the first ten, or all that are named")
    num_users: int
    num_tokens: int
    alpha: float
    unread: list[TextSettings] = Field(description="what only transformers' detector reads")
    evidence: str = Field(description="the signed record, as a file; see check-evidence")

    @classmethod
    def of(cls, found: TextFinding, signed: str) -> TextFindingObject:
        """Return the wire form."""
        return cls(
            verdict="nobody" if found.is_nobody else "named",
            accused=[TextReadingObject.of(one) for one in found.accused],
            ranked=[TextReadingObject.of(one) for one in found.ranked],
            num_users=found.num_users,
            num_tokens=found.num_tokens,
            alpha=found.alpha,
            unread=[TextSettings.of(own) for own in found.unread],
            evidence=signed,
        )
