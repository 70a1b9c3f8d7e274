"""Tiny random decoder models of every dense family served here, saved as transformers directories.

Built from configs with a fixed seed; nothing is downloaded. Weights are drawn so that logits are
spread (top-2 margins are mostly above 1e-3), attention looks past a neighbour, and every constant
of the architecture (softcaps, windows, second rope base, biases, norms) changes the output.
Each directory holds a real byte-level BPE tokenizer and a chat template, so a server starts on it.
Imports nothing of polyadapt.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 384
HIDDEN_SIZE = 64
MAX_POSITIONS = 512
# Shorter than the prompts of the tests, so that a forgotten window is seen.
SLIDING_WINDOW = 12

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
PAD_ID, START_ID, END_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and runs to the river",
    "a small model answers a short question with a short answer",
    "user assistant system: hello, how are you today? I am fine, thank you.",
    "one two three four five six seven eight nine ten eleven twelve",
    '{"name": "value", "list": [1, 2, 3], "text": "nothing else matters"}',
    "Grüße aus Köln, déjà vu, 東京, мир, 🙂 and some more bytes: äöüß",
    "def add(left, right):\n    return left + right\n",
)

_GQA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
}
_IDS = {"pad_token_id": PAD_ID, "bos_token_id": START_ID, "eos_token_id": END_ID}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_GQA, "num_hidden_layers": 3, "head_dim": 16}),
    "qwen2": ("qwen2", {**_GQA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 24, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GQA, "head_dim": 16, "sliding_window": SLIDING_WINDOW}),
    "gemma2": (
        "gemma2",
        {
            **_GQA,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": SLIDING_WINDOW,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 12.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **_GQA,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "default", "rope_theta": 100_000.0},
            },
        },
    ),
    "phi3": (
        "phi3",
        {**_GQA, "original_max_position_embeddings": MAX_POSITIONS},
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB_SIZE,
            "n_positions": MAX_POSITIONS,
            "n_embd": HIDDEN_SIZE,
            "n_layer": 2,
            "n_head": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    # Its MLP is plain, and stands beside attention.
    "phi": (
        "phi",
        {**_GQA, "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "resid_pdrop": 0.0},
    ),
    "mixtral": (
        "mixtral",
        {**_GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_GQA,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_GQA,
            "head_dim": 16,
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    # Rotary embeddings that depend on the sequence's own length: serve exactly or refuse.
    "llama_dynamic_rope": (
        "llama",
        {
            **_GQA,
            "head_dim": 16,
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
        },
    ),
    "phi3_longrope": (
        "phi3",
        {
            **_GQA,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 32,
                "factor": MAX_POSITIONS / 32,
                "short_factor": [1.0 + 0.05 * i for i in range(8)],
                "long_factor": [1.0 + 0.5 * i for i in range(8)],
            },
        },
    ),
}

# The families that must be served; each is exact in a mixed batch.
ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2",
    "mixtral", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
# Their rotary embedding depends on how long one sequence is.
LENGTH_DEPENDENT_ROPE = ("llama_dynamic_rope", "phi3_longrope")


def build(architecture: str, out_dir: Path, *, seed: int = 0) -> Path:
    """Write the model, tokenizer and chat template into `out_dir` (fp32 safetensors); return it."""
    model_type, options = _CONFIGS[architecture]
    config = AutoConfig.for_model(model_type, **options, **_IDS, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_weights(model, seed)
    model.generation_config = GenerationConfig(**_IDS)
    model.save_pretrained(out_dir)
    build_tokenizer().save_pretrained(out_dir)
    return out_dir


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most VOCAB_SIZE tokens that encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def prompt_ids(length: int, seed: int) -> list[int]:
    """Return `length` random token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(END_ID + 1, VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: unit-gain matrices, rough norms, logits of standard deviation about 4.

    A tied embedding is small, with a large final norm, so that a token's own embedding in the
    residual stream does not decide the next token.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    is_tied = embedding is head
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is embedding or parameter is head:
            parameter.copy_(noise * (0.04 if is_tied else 0.5))
        elif name.endswith("bias"):
            parameter.copy_(0.3 * noise)
        elif parameter.dim() == 1:
            # Added to the initial value: norms centred on one and on zero both stay sensible.
            is_final = name in ("model.norm.weight", "transformer.ln_f.weight")
            parameter.add_(0.2 * noise + (9.0 if is_tied and is_final else 0.0))
        else:
            is_conv1d = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
            fan_in = parameter.shape[0] if is_conv1d else parameter.shape[-1]
            parameter.copy_(noise * (1.3 / math.sqrt(fan_in)))
