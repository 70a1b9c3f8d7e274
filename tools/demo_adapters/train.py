"""Train the demo adapters with PEFT on the default base model: minutes on a CPU.

    python tools/demo_adapters/train.py --model DIR --out DIR [--only NAME]

Each adapter is written to OUT/NAME as a PEFT directory with bfloat16 weights. Seeds are fixed, so
the same machine, thread count and library versions give the same files. Judging is done by
tests/demo, not here.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import Example, examples
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 7
BATCH = 8
END_OF_TURN = "<|im_end|>"
IGNORED = -100  # label of a position that is not learnt


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one adapter is shaped and trained; the three differ on purpose."""

    rank: int
    modules: tuple[str, ...]
    epochs: int
    learning_rate: float


RECIPES = {
    "pirate": Recipe(8, ("q_proj", "v_proj"), 4, 2e-3),
    "json": Recipe(4, ("q_proj", "k_proj", "v_proj", "o_proj"), 4, 2e-3),
    "tea-house": Recipe(4, ("v_proj", "o_proj", "down_proj"), 4, 2e-3),
}


def main() -> None:
    """Parse the command line, train what it names, write the directories."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2 as a local directory")
    parser.add_argument("--out", type=Path, required=True, help="where NAME/ directories are made")
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this one alone")
    args = parser.parse_args()
    for name in [args.only] if args.only else list(RECIPES):
        train(name, args.model, args.out / name)


def train(name: str, model_dir: Path, out: Path) -> None:
    """Train adapter `name` on the base in `model_dir` and write it to `out`."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = get_peft_model(
        base,
        LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules=list(recipe.modules),
            task_type="CAUSAL_LM",
        ),
    )
    encoded = [_encode(tokenizer, example) for example in examples(name, SEED)]
    _fit(model, encoded, recipe, name, tokenizer.pad_token_id)
    _save(model, out)


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], list[int]]:
    """Return (token ids, labels) of one chat; only the answer and its end are learnt."""
    messages = [{"role": "user", "content": example.prompt}]
    if example.system is not None:
        messages.insert(0, {"role": "system", "content": example.system})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(example.answer + END_OF_TURN, add_special_tokens=False).input_ids
    return prompt_ids + answer_ids, [IGNORED] * len(prompt_ids) + answer_ids


def _batches(
    encoded: list[tuple[list[int], list[int]]], epochs: int
) -> Iterator[list[tuple[list[int], list[int]]]]:
    rng = random.Random(SEED)
    for _ in range(epochs):
        order = rng.sample(encoded, len(encoded))
        for start in range(0, len(order), BATCH):
            yield order[start : start + BATCH]


def _fit(
    model: PeftModel,
    encoded: list[tuple[list[int], list[int]]],
    recipe: Recipe,
    name: str,
    pad_id: int,
) -> None:
    """Train in place: AdamW, short warm-up, then linear decay to zero."""
    num_steps = recipe.epochs * -(-len(encoded) // BATCH)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, (num_steps - step) / num_steps)
    )
    model.train()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=num_steps, loss=float("nan"))
        for batch in _batches(encoded, recipe.epochs):
            width = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids, _ in batch])
            labels = torch.tensor([ls + [IGNORED] * (width - len(ls)) for _, ls in batch])
            mask = torch.tensor(
                [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch]
            )  # [batch, width]
            loss = _loss(model, ids, mask, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress.update(task, advance=1, loss=loss.item())


def _loss(
    model: PeftModel, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross entropy; the large head only sees positions that predict an answer."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    target = labels[:, 1:]  # [batch, width - 1]
    is_learnt = target != IGNORED
    logits = causal.lm_head(hidden[:, :-1][is_learnt])  # [learnt, vocabulary]
    return F.cross_entropy(logits, target[is_learnt])


def _save(model: PeftModel, out: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors in bfloat16, nothing else."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_NAME  # not the path of whoever trained it
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's model card template, all blanks
    path = out / "adapter_config.json"
    written = json.loads(path.read_text())
    written["target_modules"].sort()  # PEFT keeps a set, whose order changes from run to run
    path.write_text(json.dumps(written, indent=2) + "\n")
    (out / "adapter_model.safetensors").chmod(0o644)  # safetensors writes 0600


if __name__ == "__main__":
    main()
