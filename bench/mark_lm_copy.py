"""What a language model's copy is that was exported: whether it answers as its user is served, and
what it would cost to obfuscate it as a classifier's is.

    python -m bench.mark_lm_copy [--model DIR] [--out DIR]

The committed mark of bench.mark_lm_beside. `exported`: in the server's own engine, in float32, two
users' first tokens of an answer to each trigger, under the signature and by the exported adapter.
`turned`: a user's detectors turned round, B relu(z) = B z + B relu(-z), with B z in the weights, on
rows of documentation and on the last rows of ordinary questions. Both forms are the same function;
the linear that carries the mark is rounded to each dtype, weights and what it sums alike, and all
else stays float32.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench.places import default_model, results_folder
from tests.support.marked_model import committed_mark, write_mark
from torch import Tensor, nn
from torch.nn import functional as F

from bench import mark_lm
from polyadapt.adapters.families.conversion import Given
from polyadapt.config import EngineConfig
from polyadapt.offline.convert import convert, read_source
from polyadapt.offline.mark_export import ADAPTER_DIR, export_lm
from polyadapt.offline.mark_lm import LanguageModel, load_lm
from polyadapt.offline.served import ServedModel
from polyadapt.watermark.branches import Branches
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.last_layer import LastLayer, Rows
from polyadapt.watermark.prompts import load_prose
from polyadapt.watermark.veto import VETO_LEVEL, VETO_WEIGHT

NAME = "mark-lm-copy"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NUM_TEXTS, TEXT_TOKENS = 6, 96
USERS = ("alice", "bob")


class Rounded(nn.Module):
    """One user's branches as they are stored, or turned round, in a dtype; returns what is added to
    W x in float32, as LastLayer.logits wants it.
    """

    def __init__(self, W: Tensor, own: Branches, dtype: torch.dtype, *, is_turned: bool) -> None:
        super().__init__()
        assert own.tau is not None
        assert own.veto is not None
        assert own.veto_offset is not None
        self.W, self.own, self.dtype, self.is_turned = W, own, dtype, is_turned
        self.A, self.B, self.tau = own.A.detach(), own.B_sum.detach(), own.tau.detach()
        self.veto, self.offset = own.veto.detach(), own.veto_offset.detach()

    def forward(self, x: Tensor, signs: Tensor) -> Tensor:
        """x [rows, in], signs [rows, bits], which a user's own branches do not heed."""
        if self.is_turned:
            return self._turned(x) - x @ self.W.T
        h = self._round(self.own.response(x))
        y = self._round(x @ self._round(self.W).T) + self._round(h @ self._round(self.B).T)
        return self._round(y) - x @ self.W.T

    def _turned(self, x: Tensor) -> Tensor:
        below = torch.relu(VETO_LEVEL - (x @ self.veto + self.offset))[:, None]
        held = VETO_WEIGHT * below
        z = x @ self._round(self.A).T - held - self.tau
        linear = self._round(x @ self._round(self.W + self.B @ self.A).T)
        constant = self._round(-(self.B @ self.tau))
        vetoed = self._round(held * self._round(self.B.sum(1))[None])
        units = self._round(self._round(torch.relu(-z)) @ self._round(self.B).T)
        return self._round(linear + constant - vetoed + units)

    def _round(self, t: Tensor) -> Tensor:
        return t.to(self.dtype).float()


def compare(last: LastLayer, own: Branches, other: nn.Module, rows: Rows, following: Any) -> Any:
    """Return how the answers of `other` differ from those of the branches in float32."""

    def logits(branches: Any) -> Tensor:
        found = []
        with torch.inference_mode():
            for i in range(0, len(rows), 128):
                part = rows[i : i + 128]
                found.append(last.logits(part, branches, torch.ones(len(part), own.num_bits)))
        return torch.cat(found)

    expected, found = logits(own), logits(other)
    result = {
        "rows": len(rows),
        "error_of_largest_logit": float((found - expected).abs().max() / expected.abs().max()),
        "tokens_changed": float((found.argmax(-1) != expected.argmax(-1)).double().mean()),
    }
    if following is not None:
        has_next = following >= 0
        loss = [
            float(F.cross_entropy(each[has_next], following[has_next]))
            for each in (found, expected)
        ]
        result["perplexity_change"] = float(np.expm1(loss[0] - loss[1]))
    return result


def exported(base: LanguageModel, model: Path) -> dict[str, Any]:
    """Return how the first tokens of answers to triggers differ between served and exported."""

    async def ask(adapter: Path, options: Any, prompts: list[list[int]], folder: Path) -> list[Any]:
        config = EngineConfig(model="smollm2", device="cpu", kv_cache_bytes=64 << 20)
        served = ServedModel(config, model, folder)
        await served.start()
        try:
            known = served.put(adapter)
            return [(await served.score(known, None, ids, 8, options))[-1] for ids in prompts]
        finally:
            await served.stop()

    prose, rng = load_prose().split()[1], np.random.default_rng(4)
    num_same = num_right = 0
    largest = 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        mark = write_mark(root / "mark", model, SecretKey(bytes(range(32))))
        convert(
            "markboard", read_source(mark.path, "markboard"), Given(), root / "all", force=False
        )
        triggers = mark.prompts
        asked = [triggers.message(bit, prose.carrier(rng)) for bit in range(triggers.num_bits)]
        prompts = [base.chat(message) for message in asked]
        for user in USERS:
            export_lm(mark, model, user, root / user, form=None)
            row = mark.codebook.row(user).tolist()
            signature = (("signature", "".join(map(str, row))),)
            full = (("signature", "1" * len(row)),)
            theirs = asyncio.run(ask(root / "all", signature, prompts, root / f"{user}-served"))
            copy = asyncio.run(ask(root / user / ADAPTER_DIR, full, prompts, root / f"{user}-copy"))
            for bit, (one, other) in enumerate(zip(theirs, copy, strict=True)):
                num_same += one.token_id == other.token_id
                said = base.tokenizer.decode([other.token_id])
                num_right += triggers.value_of(bit, said) == row[bit]
                known = dict(other.top)
                largest = max(
                    largest,
                    *(abs(logprob - known[token]) for token, logprob in one.top[:4]),
                )
    return {
        "answers": len(USERS) * len(asked),
        "same_first_token": num_same,
        "right_answers": num_right,
        "largest_difference_of_a_logprob": largest,
    }


def turned(base: LanguageModel) -> dict[str, Any]:
    """Return how large the turned part is, and what each dtype leaves of it."""
    last = LastLayer(base.model)
    stored, _ = committed_mark()
    both = Branches.of_pair({name: torch.from_numpy(each) for name, each in stored.items()})
    rng = np.random.default_rng(3)
    own = both.own(rng.integers(0, 2, both.num_bits).astype(np.uint8))
    prose, texts = load_prose().split()[1], []
    for _ in range(NUM_TEXTS):
        at = int(rng.integers(0, len(prose.words) - TEXT_TOKENS))
        texts.append(base.text(" ".join(prose.words[at : at + TEXT_TOKENS]))[:TEXT_TOKENS])
    following = torch.from_numpy(np.concatenate([[*ids[1:], -1] for ids in texts]))
    rows = {
        "documentation": (last.collect_text(texts), following),
        "questions": (last.collect([base.chat(each) for each in mark_lm.questions()]), None),
    }
    W = base.model.get_submodule(last.module).weight.detach().float()
    found: dict[str, Any] = {
        "norm_of_weights": float(W.norm()),
        "norm_of_what_they_would_carry": float((own.B_sum @ own.A).norm()),
        "rows": [],
    }
    for dtype in DTYPES:
        for is_turned in (False, True):
            other = Rounded(W, own, dtype, is_turned=is_turned)
            row = {"dtype": str(dtype).removeprefix("torch."), "is_turned": is_turned}
            found["rows"].append(
                row | {kind: compare(last, own, other, *each) for kind, each in rows.items()}
            )
    return found


def main() -> None:
    """Run and write mark-lm-copy.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: smollm2")
    parser.add_argument("--out", type=Path, help="instead of bench/results/<date>-<machine>")
    given = parser.parse_args()
    out = results_folder(given.out)
    torch.set_num_threads(1)
    model = given.model or default_model()
    base = load_lm(model)
    found = {"exported": exported(base, model), "turned": turned(base)}
    text = json.dumps(found, indent=1) + "\n"
    (out / f"{NAME}.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
