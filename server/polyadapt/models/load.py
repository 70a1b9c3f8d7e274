"""Load a transformers causal language model, attach paged attention and wrap its sites.

Works from structure alone: any model that takes its attention from transformers' registry and
accepts packed rows. What cannot be served exactly is refused here with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyadapt.errors import StartupError
from polyadapt.models.base import BaseModel, LayerCache
from polyadapt.models.experts import adapt_experts
from polyadapt.models.mlp import list_mlps
from polyadapt.models.wrap import list_blocks, list_sites
from polyadapt.ops.attention import AttentionOptions
from polyadapt.types import BaseSpec

logger = logging.getLogger(__name__)

_PROBED = 3  # tokens
ATTENTION = "polyadapt"
# Their frequencies depend on the longest position in the batch, so that a packed neighbour would
# change a row's result.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def load_base(
    directory: Path,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    max_model_len: int | None,
) -> BaseModel:
    """Load the model in `directory`; raises StartupError with the reason when it cannot be
    served.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    register_attention()
    if not (directory / "config.json").is_file():
        raise StartupError(
            f"{directory} is not a transformers model directory: it has no config.json"
        )
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        _refuse_batch_dependent_rope(config)
        module = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"transformers cannot load {directory}: {error}") from error
    return adopt(
        module.to(device), name=name, digest=model_digest(directory), max_model_len=max_model_len
    )


@dataclass(frozen=True, slots=True)
class Outline:
    """A base model without its weights: its sites, and the bytes of what it keeps in memory."""

    spec: BaseSpec
    token_nbytes: int  # keys and values of one token over all layers
    weight_nbytes: int  # parameters and buffers


def outline_base(directory: Path, *, dtype: torch.dtype, max_model_len: int | None) -> Outline:
    """Read a model's config alone and make the model without memory; raises StartupError.

    Norms are as the module has them: nobody has seen them called. Weights of routed experts are no
    sites: nobody has proved their form. The digest is empty.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_attention()
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        _refuse_batch_dependent_rope(config)
        # Made in bfloat16, the one dtype whose products of experts have a form without memory.
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=ATTENTION, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"transformers cannot read {directory}: {error}") from error
    weight_nbytes = sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
    weight_nbytes += sum(buffer.nbytes for buffer in module.buffers())
    _expect_no_padding(module)
    layers = _attach_caches(module.eval())
    spec = _describe(module, directory.name, "", max_model_len)
    positions = torch.arange(_PROBED, device="meta")[None]
    with torch.inference_mode():
        module(input_ids=positions, position_ids=positions, use_cache=False)
    shapes = [layer.shape for layer in layers if layer.shape is not None]
    width = sum(s.num_kv_heads * (s.key_dim + s.value_dim) for s in shapes)
    if not shapes:
        raise StartupError(
            f"{spec.architecture} cannot be served: its attention does not go through "
            "transformers' attention registry"
        )
    return Outline(spec, width * dtype.itemsize, weight_nbytes)


def register_attention() -> None:
    """Let transformers' models be made with attn_implementation ATTENTION."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention_function)


def adopt(module: Any, *, name: str, digest: str, max_model_len: int | None) -> BaseModel:
    """Serve a transformers model that was made with ATTENTION and lies on its device, all of one
    dtype; raises StartupError with the reason when it cannot be served.
    """
    module, config = module.eval(), module.config
    _expect_no_padding(module)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    layers = _attach_caches(module)
    adapt_experts(module)
    spec = _describe(module, name, digest, max_model_len)
    base = BaseModel(
        module=module,
        spec=spec,
        layers=layers,
        blocks=list_blocks(module, spec.sites),
        eos_token_ids=_eos_token_ids(module, config.get_text_config()),
        dtype=module.dtype,
        device=module.device,
    )
    _probe(base)
    _settle_norms(base)
    base.spec = replace(base.spec, mlps=list_mlps(base.module, base.spec.sites))
    return base


def model_digest(directory: Path) -> str:
    """SHA-256 over the names, sizes and bytes of the config and weight files."""
    total = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\n{path.stat().st_size}\n{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _expect_no_padding(module: Any) -> None:
    """Some models look for padding in every forward, to warn of it: packed rows have none, and a
    device would be waited for.
    """
    module.warn_if_padding_and_no_attention_mask = lambda *_: None
    module.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None


def _describe(module: Any, name: str, digest: str, max_model_len: int | None) -> BaseSpec:
    """Say what the model is; raises StartupError."""
    limit = getattr(module.config.get_text_config(), "max_position_embeddings", None) or 2048
    if max_model_len is not None and max_model_len > limit:
        raise StartupError(
            f"--max-model-len {max_model_len} is more than the model's {limit} positions; "
            "give a smaller one"
        )
    paths = {id(submodule): path for path, submodule in module.named_modules()}
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    if head is None or id(head) not in paths:
        raise StartupError(f"{type(module).__name__} has no output head to sample from")
    return BaseSpec(
        name=name,
        digest=digest,
        architecture=type(module).__name__,
        vocab_size=head.weight.shape[0],
        max_model_len=max_model_len or limit,
        is_tied=head.weight is embedding.weight,
        embedding_path=paths[id(embedding)],
        head_path=paths[id(head)],
        sites=list_sites(module),
    )


def _attach_caches(module: nn.Module) -> list[LayerCache]:
    """Give every attention module its LayerCache; transformers numbers them by `layer_idx`."""
    layers: dict[int, LayerCache] = {}
    for _, submodule in module.named_modules():
        layer_id = getattr(submodule, "layer_idx", None)
        if isinstance(layer_id, int):
            submodule.polyadapt_cache = layers.setdefault(layer_id, LayerCache())
    return [layers[layer_id] for layer_id in sorted(layers)]


def _forward(base: BaseModel, num_tokens: int) -> torch.Tensor:
    """The logits of the last of some tokens, which differ: so their rows can be told apart."""
    positions = torch.arange(num_tokens, device=base.device)[None]
    keep = torch.tensor([num_tokens - 1], device=base.device)
    logits: torch.Tensor = base.module(
        input_ids=positions, position_ids=positions, use_cache=False, logits_to_keep=keep
    ).logits
    return logits


@torch.inference_mode()
def _probe(base: BaseModel) -> None:
    """Run a few tokens to learn each layer's cache shape, that the registry is honoured, and which
    dimension of a norm's input counts rows.
    """
    with _seen_row_dims(base, _PROBED) as dims:
        logits = _forward(base, _PROBED)
    if any(len(found) > 1 for found in dims.values()):  # as many heads, say, as tokens
        with _seen_row_dims(base, _PROBED - 1) as others:
            _forward(base, _PROBED - 1)
        dims = {site_id: found & others[site_id] for site_id, found in dims.items()}
    base.row_dims = {site_id: min(found) for site_id, found in dims.items() if len(found) == 1}
    base.layers = [layer for layer in base.layers if layer.shape is not None]
    if not base.layers or tuple(logits.shape[:2]) != (1, 1):
        raise StartupError(
            f"{base.spec.architecture} cannot be served: its attention does not go through "
            "transformers' attention registry, or it cannot return the logits of chosen rows"
        )


@contextlib.contextmanager
def _seen_row_dims(base: BaseModel, num_rows: int) -> Iterator[dict[int, set[int]]]:
    """Watch a forward of so many rows; by a norm's site id, the dimensions that may count them.

    None where the norm was not called as one, or does not take each row by itself.
    """
    seen: dict[int, set[int]] = {}

    def noting(site_id: int, width: int) -> Any:
        def note(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            found = set[int]()
            if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
                found = _row_dims(module, args[0], y, num_rows, width)
            seen[site_id] = seen.get(site_id, found) & found

        return note

    hooks = [
        base.module.get_submodule(site.path).register_forward_hook(
            noting(site_id, site.out_features), with_kwargs=True
        )
        for site_id, site in enumerate(base.spec.sites)
        if site.kind == "norm"
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _row_dims(module: nn.Module, x: torch.Tensor, y: Any, num_rows: int, width: int) -> set[int]:
    if not isinstance(y, torch.Tensor) or y.shape != x.shape or x.shape[-1] != width:
        return set()
    found = set()
    for dim in range(x.dim() - 1):
        if x.shape[dim] == num_rows:
            last, expected = x.narrow(dim, num_rows - 1, 1), y.narrow(dim, num_rows - 1, 1)
            # Not through the module's hooks, of which this is one.
            if torch.allclose(module.forward(last), expected, rtol=1e-2, atol=1e-4):
                found.add(dim)
    return found


def _settle_norms(base: BaseModel) -> None:
    """Leave out what looks like a norm and was not seen to be one: no adapter can change it."""
    kept = [
        site_id
        for site_id, site in enumerate(base.spec.sites)
        if site.kind != "norm" or site_id in base.row_dims
    ]
    if len(kept) == len(base.spec.sites):
        return
    left = [site.path for i, site in enumerate(base.spec.sites) if i not in set(kept)]
    logger.info("not taken as norms, so that adapters cannot change them: %s", ", ".join(left))
    base.row_dims = {
        new: base.row_dims[old] for new, old in enumerate(kept) if old in base.row_dims
    }
    base.blocks = [base.blocks[site_id] for site_id in kept]
    base.spec = replace(base.spec, sites=tuple(base.spec.sites[site_id] for site_id in kept))


def _attention_function(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, rows, dim] in, [1, rows, heads, dim] out."""
    cache: LayerCache = module.polyadapt_cache  # type: ignore[assignment]
    cache.options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        window=sliding_window or 0,
        # Kernels add them to float32 scores; a bfloat16 model keeps them narrower.
        sinks=None if s_aux is None else s_aux.detach().float().contiguous(),
    )
    out = cache.attend(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return out.unsqueeze(0), None


def _refuse_batch_dependent_rope(config: Any) -> None:
    for kind in _rope_types(getattr(config.get_text_config(), "rope_parameters", None)):
        if kind in _BATCH_DEPENDENT_ROPE:
            raise StartupError(
                f"the model uses '{kind}' rotary embeddings, whose values depend on the longest "
                "prompt in the batch; serving it would let one request change another's answer"
            )


def _rope_types(parameters: object) -> Iterator[str]:
    if isinstance(parameters, Mapping):
        for key, value in parameters.items():
            if key in ("rope_type", "type") and isinstance(value, str):
                yield value
            else:
                yield from _rope_types(value)


def _eos_token_ids(module: Any, config: Any) -> tuple[int, ...]:
    generation = getattr(module, "generation_config", None)
    for source in (generation, config):
        ids = getattr(source, "eos_token_id", None)
        if isinstance(ids, int):
            return (ids,)
        if ids:
            return tuple(ids)
    logger.warning("the model names no end-of-sequence token; requests end by max_tokens or stop")
    return ()
