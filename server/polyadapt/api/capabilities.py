"""GET /v1/capabilities: what this server can do and how far it goes, for clients that adapt."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response

from polyadapt.adapters.registry import FAMILIES
from polyadapt.api.replies import json_reply
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.capabilities import (
    CapabilitiesReply,
    FamilyObject,
    FeaturesObject,
    LimitsObject,
)
from polyadapt.api.services import Services, services_of
from polyadapt.tasks.workflows.kinds import KINDS
from polyadapt.types import MAX_ADAPTERS, EngineInfo

Has = Annotated[Services, Depends(services_of)]
_BYTES = {"float32": 4, "bfloat16": 2}


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    add_route(
        router, "GET", "/v1/capabilities", capabilities, needs="infer", reply=CapabilitiesReply
    )


async def capabilities(services: Has) -> Response:
    """Say which adapters, fields and sizes are served."""
    info, config = services.text.info(), services.config
    return json_reply(
        CapabilitiesReply(
            model=info.base.name,
            base_digest=info.base.digest,
            architecture=info.base.architecture,
            device=info.device,
            dtype=info.dtype,
            strategy=info.strategy,
            families=[FamilyObject(name=family.name) for family in FAMILIES],
            limits=LimitsObject(
                max_adapters_per_request=MAX_ADAPTERS,
                max_rank=max_rank(info),
                max_adapter_bytes=info.adapter_bytes,
                max_upload_bytes=int(config.limits.max_upload_bytes),
                max_upload_files=config.limits.max_upload_files,
                max_model_len=info.base.max_model_len,
                max_num_seqs=info.max_num_seqs,
                max_waiting=info.max_waiting,
                max_n=config.limits.max_n,
                max_prompts=config.limits.max_prompts,
            ),
            features=FeaturesObject(
                composition=True,
                on_cold=["wait", "base", "fallback", "fail"],
                prefix_cache=config.engine.prefix_cache,
                speculative_tokens=config.engine.speculative_tokens,
                automatic_choice=True,
                auto_threshold=config.server.auto_threshold,
                policies=True,
                exact=config.engine.exact,
                workflows=list(KINDS),
            ),
        )
    )


def max_rank(info: EngineInfo) -> int:
    """Return the largest rank at which A and B at every linear fit into the adapters' memory."""
    linears = [site for site in info.base.sites if site.kind == "linear"]
    per_rank = sum(site.in_features + site.out_features for site in linears) * _BYTES[info.dtype]
    return info.adapter_bytes // per_rank if per_rank else 0
