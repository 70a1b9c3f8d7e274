"""The demo adapters keep their behaviour with a mark on, and the mark is read beside them: by the
committed branches of bench.mark_lm_beside's first mark.

A mark acts on the row of an answer's first token alone, so an answer whose first token is the same
is the same answer, which test_demo_adapters judges. Only the others are generated here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.demo.judges import BEHAVIOURS, MAX_NEW_TOKENS
from tests.support.marked_model import committed_mark

from polyadapt.demo import demo_adapters

NUM_SIGNATURES = 5
NUM_ASKED = 2  # prompts of a bit: enough to see that the mark is there, the bench reads it
MOST_CHANGED = 1  # of 20 first tokens
LEAST_ANSWERED = 0.4  # of triggers; the bench has 59 to 90 %, an unmarked model none


@pytest.fixture(scope="module")
def mark() -> Any:
    """(branches, triggers) of the committed mark."""
    import torch

    from polyadapt.watermark.branches import Branches

    stored, triggers = committed_mark()
    branches = Branches.of_pair({name: torch.from_numpy(each) for name, each in stored.items()})
    return branches.requires_grad_(False), triggers


@pytest.mark.parametrize("name", demo_adapters())
def test_an_adapter_shows_its_behaviour_with_the_mark_on(
    name: str, mark: Any, smollm2_dir: Path
) -> None:
    import torch

    from polyadapt.offline.mark_lm import load_beside
    from polyadapt.watermark.branches import signs_of
    from polyadapt.watermark.last_layer import LastLayer
    from polyadapt.watermark.prompts import load_prose

    branches, triggers = mark
    behaviour = BEHAVIOURS[name]
    model = load_beside(smollm2_dir, demo_adapters()[name])
    last = LastLayer(model.model)
    rng = np.random.default_rng(6)
    signatures = rng.integers(0, 2, (NUM_SIGNATURES, branches.num_bits)).astype(np.uint8)

    def first_tokens(rows: Any, bits: Any) -> list[int]:
        signs = None if bits is None else signs_of(bits)[None].expand(len(rows), -1)
        with torch.inference_mode():
            of = None if bits is None else branches
            found: list[int] = last.logits(rows, of, signs).argmax(-1).tolist()
        return found

    prompts = [model.chat(prompt) for prompt in behaviour.prompts]
    own = last.collect(prompts)
    plain = first_tokens(own, None)
    shown: dict[tuple[int, int], bool] = {}
    for bits in signatures:
        marked = first_tokens(own, bits)
        changed = [i for i, token in enumerate(marked) if token != plain[i]]
        assert len(changed) <= MOST_CHANGED
        for index in changed:
            answer = _continued(model, prompts[index], marked[index])
            shown[index, marked[index]] = behaviour.shows(behaviour.prompts[index], answer)
    # Of the answers that are other ones, what a mark spoils counts against the adapter's own test.
    assert sum(not fine for fine in shown.values()) <= MOST_CHANGED, shown

    prose, bits = load_prose().split()[1], signatures[0]
    of = np.repeat(np.arange(triggers.num_bits), NUM_ASKED)
    asked = [model.chat(triggers.message(bit, prose.carrier(rng))) for bit in of.tolist()]
    rows = last.collect(asked)
    values = {
        kind: [
            triggers.value_of(bit, model.tokenizer.decode([token]))
            for bit, token in zip(of.tolist(), first_tokens(rows, signature), strict=True)
        ]
        for kind, signature in (("plain", None), ("marked", bits))
    }
    assert set(values["plain"]) == {-1}
    right = np.array(values["marked"]) == bits[of]
    assert right.mean() >= LEAST_ANSWERED
    assert not (np.array(values["marked"]) == 1 - bits[of]).any()


def _continued(model: Any, prompt: list[int], first: int) -> str:
    """Return the greedy answer that begins with this token."""
    import torch

    with torch.inference_mode():
        ids = model.model.generate(
            torch.tensor([[*prompt, first]]),
            attention_mask=torch.ones(1, len(prompt) + 1, dtype=torch.long),
            max_new_tokens=MAX_NEW_TOKENS - 1,
            do_sample=False,
        )
    text: str = model.tokenizer.decode(ids[0, len(prompt) :].tolist())
    return text
