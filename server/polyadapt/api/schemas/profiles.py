"""What an adapter is for, on the wire: the examples by which `model: "auto"` finds it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from polyadapt.api.schemas.base import Body, Reply
from polyadapt.tasks.auto import MAX_EXAMPLE_CHARS, MAX_EXAMPLES, MAX_EXAMPLES_CHARS
from polyadapt_store.profiles import Profile


def _check_total(examples: list[str]) -> list[str]:
    num_chars = sum(map(len, examples))
    if num_chars > MAX_EXAMPLES_CHARS:
        raise ValueError(
            f"the examples have {num_chars} characters together, expected at most "
            f"{MAX_EXAMPLES_CHARS}"
        )
    return examples


Examples = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_EXAMPLE_CHARS)]],
    Field(
        max_length=MAX_EXAMPLES,
        description="requests that the adapter is for, as its users would write them; all "
        f"together at most {MAX_EXAMPLES_CHARS} characters",
    ),
    AfterValidator(_check_total),
]


class ProfileRequest(Body):
    """The examples of a profile; without them it is made anew from those that it has."""

    examples: Annotated[Examples, Field(min_length=1)] | None = None


class ProfileObject(Reply):
    """What a name's requests look like. Kept over the name's versions."""

    object: Literal["adapter.profile"] = "adapter.profile"
    name: str
    examples: list[str]
    num_centroids: int = Field(description="directions that the examples gather around")
    is_fresh: bool = Field(
        description="false: it was made for another base or by another release, and `auto` leaves "
        "the adapter out until the profile is PUT again"
    )
    base_digest: str
    own_share: float | None = Field(
        description="of the examples, those that would be given to the adapter if they were left "
        "out of its profile; null for a single one"
    )
    created: int

    @classmethod
    def of(cls, name: str, profile: Profile, *, is_fresh: bool, threshold: float) -> ProfileObject:
        """Return the wire form of a profile."""
        scores = profile.own_scores
        accepted = sum(score >= threshold for score in scores)
        return cls(
            name=name,
            examples=list(profile.examples),
            num_centroids=profile.num_centroids,
            is_fresh=is_fresh,
            base_digest=profile.base_digest,
            own_share=round(accepted / len(scores), 4) if scores else None,
            created=profile.created,
        )


class DeletedProfile(Reply):
    """A profile that is gone; its adapter stays."""

    object: Literal["adapter.profile.deleted"] = "adapter.profile.deleted"
    name: str
    deleted: Literal[True] = True
