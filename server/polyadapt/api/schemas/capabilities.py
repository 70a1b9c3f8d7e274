"""What /v1/capabilities answers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyadapt.api.schemas.base import Reply


class FamilyObject(Reply):
    """One kind of adapter that this server reads."""

    name: str


class LimitsObject(Reply):
    """How much of each; sizes in bytes, lengths in tokens."""

    max_adapters_per_request: int
    max_rank: int = Field(
        description="at which an adapter on every linear module just fits into max_adapter_bytes; "
        "fewer modules may have more"
    )
    max_adapter_bytes: int = Field(description="device memory for all adapters together")
    max_upload_bytes: int
    max_upload_files: int
    max_model_len: int
    max_num_seqs: int = Field(description="sequences that one step serves")
    max_waiting: int = Field(description="sequences that may queue; more are refused with 429")
    max_n: int
    max_prompts: int


class FeaturesObject(Reply):
    """What is on."""

    composition: bool = Field(description="several adapters in one request, without merging")
    on_cold: list[Literal["wait", "base", "fallback", "fail"]]
    prefix_cache: bool
    speculative_tokens: int = Field(description="the server's default; a request may choose")
    automatic_choice: bool = Field(description='`model: "auto"`, by the profiles of adapters')
    auto_threshold: float = Field(description="the least score at which an adapter is chosen")
    policies: bool = Field(description="adapters that are mandatory for a tenant")
    exact: bool = Field(description="answers bit-identical whatever else is in the batch")
    workflows: list[str] = Field(description="the kinds of /v1/workflows")


class CapabilitiesReply(Reply):
    """What this server can do."""

    object: Literal["capabilities"] = "capabilities"
    model: str
    base_digest: str
    architecture: str
    device: str
    dtype: str
    strategy: str
    families: list[FamilyObject]
    limits: LimitsObject
    features: FeaturesObject
