"""LoRA adapters for the tests: made and saved by PEFT itself, with random A and B that matter.

Imports nothing of polyadapt.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.warning import PeftWarning
from transformers import AutoConfig, AutoModelForCausalLM

# Standard deviation of an adapter's contribution, as a part of the base product's.
STRENGTH = 0.3

# Every linear of a block, by the model type of config.json.
_FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BLOCK_LINEARS: dict[str, tuple[str, ...]] = {
    "llama": _SEVEN,
    "qwen2": _SEVEN,
    "qwen3": _SEVEN,
    "mistral": _SEVEN,
    "gemma2": _SEVEN,
    "gemma3_text": _SEVEN,
    "phi3": _FUSED,
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    # The experts are one parameter a projection, not linears.
    "mixtral": _ATTENTION,
    "qwen2_moe": _SEVEN,  # of the shared expert
    "qwen3_moe": _ATTENTION,
}
# The input embedding, by the model type.
EMBEDDINGS = dict.fromkeys(BLOCK_LINEARS, "embed_tokens") | {"gpt2": "wte"}


def make_lora(
    model_dir: Path,
    out_dir: Path,
    rank: int = 8,
    targets: Sequence[str] | str | None = None,
    seed: int = 0,
    *,
    alpha: int | None = None,
    strength: float = STRENGTH,
    saves_embedding: bool = False,
    **options: Any,
) -> Path:
    """Write a PEFT LoRA directory for the model and return it.

    `targets` is anything PEFT takes as target_modules (None: every linear of a block). `alpha`
    defaults to rank + 3, so that no scale is one by chance. `options` go to LoraConfig.
    A ~ N(0, 1/in); B's deviation makes the contribution `strength` times the base product's.
    `saves_embedding` stores the whole base embedding beside an adapter on it, as PEFT does unless
    told otherwise. Trained biases (bias="all" or "lora_only") and lora_bias are random as well.
    """
    model_type = AutoConfig.from_pretrained(model_dir).model_type
    if targets is None:
        targets = BLOCK_LINEARS[model_type]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank + 3 if alpha is None else alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        # lm_head is a Linear in every model.
        fan_in_fan_out=model_type == "gpt2" and "lm_head" not in targets,
        **options,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True
    )
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 deprecates, and warns of adapters
        # that cannot be merged or share a tied weight. Nothing is merged here.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=PeftWarning)
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # It is said of every pattern that means a parameter, and the pattern is followed.
        warnings.filterwarnings("ignore", message=".*did not match any targeted module.*")
        model = get_peft_model(base, config)
        _draw(model, seed, strength)
        # PEFT's default, "auto", asks the hub; say it instead.
        model.save_pretrained(out_dir, save_embedding_layers=saves_embedding)
    _make_repeatable(Path(out_dir) / "adapter_config.json", model_type)
    return Path(out_dir)


def _make_repeatable(path: Path, model_type: str) -> None:
    """Leave nothing in the file that another run writes otherwise: where the model lay, and lists
    that PEFT makes of sets. An adapter's digest decides much, its home among engines for one.
    """
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = f"tests/{model_type}"
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


@torch.no_grad()
def _draw(model: PeftModel, seed: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * std

    num_layers = 0
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        for name, scaling in module.scaling.items():
            # A wrapped parameter is no module's weight.
            is_parameter = hasattr(module, "get_param")
            weight = module.get_param() if is_parameter else module.get_base_layer().weight
            rms = float(weight.float().square().mean().sqrt())
            if name in module.lora_embedding_A:
                a, b = module.lora_embedding_A[name], module.lora_embedding_B[name]
                rank = a.shape[0]
                a.copy_(noise(a, 1.0))
                b.copy_(noise(b, strength * rms / (scaling * math.sqrt(rank))))
            else:
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                rank, fan_in = a.shape
                a.copy_(noise(a, 1.0 / math.sqrt(fan_in)))
                if is_parameter:
                    rank //= module.num_experts  # of one expert, as each row meets one
                gain = strength * rms * math.sqrt(fan_in)
                b.copy_(noise(b, gain / (scaling * math.sqrt(rank))))
                if module.lora_B[name].bias is not None:
                    bias = module.lora_B[name].bias
                    bias.copy_(noise(bias, strength / scaling))
            num_layers += 1
    assert num_layers > 0, "the adapter adapts nothing"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(".bias") and "lora_" not in name:
            parameter.add_(noise(parameter, strength))


def _family(model_dir: Path) -> str:
    return AutoConfig.from_pretrained(model_dir).model_type


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def experts(
    model_dir: Path, out_dir: Path, seed: int = 0, parameters: Sequence[str] = EXPERTS
) -> Path:
    """The weights of the routed experts, of two ranks, and two linears of attention."""
    return make_lora(
        model_dir, out_dir, 6, ["q_proj", "o_proj"], seed=seed,
        target_parameters=list(parameters), rank_pattern={"experts.down_proj": 3},
    )  # fmt: skip


def rslora(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """Scale alpha / sqrt(rank)."""
    return make_lora(model_dir, out_dir, 16, seed=seed, use_rslora=True)


def patterns(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """Another rank for one kind of module and another alpha for a second one."""
    first, second, *_ = BLOCK_LINEARS[_family(model_dir)]
    return make_lora(
        model_dir, out_dir, 4, seed=seed, rank_pattern={first: 11}, alpha_pattern={second: 29}
    )


def lora_bias(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """B has a bias, scaled like B itself, also where the base has none."""
    return make_lora(model_dir, out_dir, 8, seed=seed, lora_bias=True)


def bias_all(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """Every bias of the base is replaced, also those of norms and modules without A and B."""
    first = BLOCK_LINEARS[_family(model_dir)][0]
    return make_lora(model_dir, out_dir, 8, [first], seed=seed, bias="all")


def bias_lora_only(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """The base biases of the adapted modules are replaced."""
    return make_lora(model_dir, out_dir, 8, seed=seed, bias="lora_only")


def embedding(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """The input embedding and one kind of linear."""
    family = _family(model_dir)
    return make_lora(
        model_dir, out_dir, 8, [EMBEDDINGS[family], BLOCK_LINEARS[family][0]], seed=seed
    )


def embedding_with_base(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """The input embedding, with the base's own embedding weight saved beside A and B."""
    targets = [EMBEDDINGS[_family(model_dir)]]
    return make_lora(model_dir, out_dir, 8, targets, seed=seed, saves_embedding=True)


def lm_head(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """The output head alone; a tied embedding stays the base's."""
    return make_lora(model_dir, out_dir, 8, ["lm_head"], seed=seed)


def regex_targets(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """target_modules as one pattern over whole module paths: layer 0's linears only."""
    names = "|".join(BLOCK_LINEARS[_family(model_dir)])
    return make_lora(model_dir, out_dir, 8, rf".*\.0\..*\.({names})", seed=seed)


def all_linear(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """The word that means every linear but the head."""
    return make_lora(model_dir, out_dir, 8, "all-linear", seed=seed)


def one_layer(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """layers_to_transform: layer 1 only."""
    return make_lora(model_dir, out_dir, 8, seed=seed, layers_to_transform=[1])


def excluded(model_dir: Path, out_dir: Path, seed: int = 0) -> Path:
    """exclude_modules takes one kind of linear out again."""
    first = BLOCK_LINEARS[_family(model_dir)][0]
    return make_lora(model_dir, out_dir, 8, "all-linear", seed=seed, exclude_modules=[first])


# Name -> maker(model_dir, out_dir, seed). The fused modules of phi3 and gpt2 are what `None`
# targets mean there.
VARIANTS: dict[str, Callable[[Path, Path, int], Path]] = {
    "rslora": rslora,
    "patterns": patterns,
    "lora_bias": lora_bias,
    "bias_all": bias_all,
    "bias_lora_only": bias_lora_only,
    "embedding": embedding,
    "embedding_with_base": embedding_with_base,
    "lm_head": lm_head,
    "regex_targets": regex_targets,
    "all_linear": all_linear,
    "one_layer": one_layer,
    "excluded": excluded,
}
