"""The numerical oracle: PEFT on transformers' eager attention, fp32, one sequence, no padding.

It reads the model and adapter directories itself and imports nothing of polyadapt. Tolerances of
the whole suite stand here and nowhere else.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils.warning import PeftWarning
from transformers import AutoModelForCausalLM

# Largest difference of a logit from the oracle's, as a part of the oracle's largest |logit|.
LOGIT_TOLERANCE = 1e-4
# Greedy tokens must agree until the oracle's own two best logits are closer than this.
MARGIN_FLOOR = 1e-3

_CACHE_BYTES = 3 << 30


def logits(model_dir: Path, adapter_dir: Path | None, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits [len(ids), vocabulary] fp32 of one sequence; adapter None is the base."""
    with torch.inference_mode():
        model = _model(Path(model_dir), adapter_dir)
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def mean_hidden(model_dir: Path, adapter_dir: Path | None, ids: Sequence[int]) -> torch.Tensor:
    """Return the mean over the tokens of what the head is given, [width] fp32."""
    with torch.inference_mode():
        model = _model(Path(model_dir), adapter_dir)
        seen: list[torch.Tensor] = []
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        try:
            model(input_ids=torch.tensor([list(ids)]), use_cache=False)
        finally:
            hook.remove()
        return seen[0][0].double().mean(0).float()


def greedy(
    model_dir: Path, adapter_dir: Path | None, ids: Sequence[int], n: int
) -> tuple[list[int], list[float]]:
    """Return the `n` likeliest next tokens, one after the other, and each step's top-2 margin.

    End-of-sequence tokens are tokens like any other. A margin is the difference of the two
    largest logits at its step.
    """
    tokens: list[int] = []
    margins: list[float] = []
    with torch.inference_mode():
        model = _model(Path(model_dir), adapter_dir)
        new_ids, past = torch.tensor([list(ids)]), None
        for _ in range(n):
            out = model(input_ids=new_ids, past_key_values=past, use_cache=True)
            best = out.logits[0, -1].float().topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            new_ids, past = torch.tensor([[tokens[-1]]]), out.past_key_values
    return tokens, margins


def assert_matches(ours: torch.Tensor, oracle: torch.Tensor) -> None:
    """Raise AssertionError unless both are finite, of one shape, and differ by at most 1e-4 of the
    oracle's largest |logit|."""
    assert ours.shape == oracle.shape, (
        f"shape {tuple(ours.shape)}, the oracle's {tuple(oracle.shape)}"
    )
    assert bool(torch.isfinite(oracle).all()), "the oracle's logits are not finite"
    assert bool(torch.isfinite(ours).all()), "our logits are not finite"
    difference = (ours.double() - oracle.double()).abs()
    allowed = LOGIT_TOLERANCE * float(oracle.abs().max())
    worst = float(difference.max())
    where = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
    assert worst <= allowed, f"logits differ by {worst:.3e} at {where}, allowed {allowed:.3e}"


def assert_greedy_equal(
    ours: Sequence[int], oracle_tokens: Sequence[int], margins: Sequence[float]
) -> int:
    """Compare up to the first step whose top-2 margin is below 1e-3; return the number of steps.

    Raises AssertionError when a token differs, when `ours` ends early, or when nothing could be
    compared because the very first margin is too small (choose another prompt then).
    """
    num_firm = next((i for i, m in enumerate(margins) if m < MARGIN_FLOOR), len(margins))
    assert num_firm > 0, f"nothing to compare: the first top-2 margin is {margins[:1]}"
    assert len(ours) >= num_firm, f"{len(ours)} tokens, the oracle has {num_firm} firm ones"
    for step in range(num_firm):
        assert ours[step] == oracle_tokens[step], (
            f"step {step}: token {ours[step]}, the oracle's {oracle_tokens[step]} "
            f"(margin {margins[step]:.3e})"
        )
    return num_firm


def load_base(model_dir: Path) -> torch.nn.Module:
    """Return a fresh fp32 model with eager attention in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


# Least recently used models first. Every adapter gets a copy of the base, because loading one can
# change base parameters (biases) and PEFT does not restore them.
_models: OrderedDict[tuple[Path, Path | None], torch.nn.Module] = OrderedDict()


def _model(model_dir: Path, adapter_dir: Path | None) -> torch.nn.Module:
    key = (model_dir, Path(adapter_dir) if adapter_dir is not None else None)
    if key in _models:
        _models.move_to_end(key)
        return _models[key]
    if adapter_dir is None:
        model = load_base(model_dir)
    else:
        base = copy.deepcopy(_model(model_dir, None))
        with warnings.catch_warnings():
            # As in adapters.py: deprecations inside PEFT, and warnings about merging.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=PeftWarning)
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            warnings.filterwarnings("ignore", message=".*did not match any targeted module.*")
            model = PeftModel.from_pretrained(base, str(adapter_dir), autocast_adapter_dtype=False)
        model = model.float().eval()
    _models[key] = model
    while len(_models) > 1 and sum(_nbytes(m) for m in _models.values()) > _CACHE_BYTES:
        _models.popitem(last=False)
    return model


def _nbytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
