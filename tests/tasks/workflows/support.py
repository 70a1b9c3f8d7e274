"""Scripted samplers: what every role says in every round, after random delays."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from polyadapt.tasks.workflows.answers import extract
from polyadapt.tasks.workflows.base import Sample

# What a role says: role, prompt, round, number -> text.
Script = Callable[[str, str, int, int], str]


@dataclass
class ScriptedSampler:
    """Says what its script says; notes what was asked, and how many ran at once."""

    script: Script
    delays: random.Random = field(default_factory=lambda: random.Random(0))
    asked: list[tuple[int, str, int, str]] = field(default_factory=list)
    running: set[tuple[int, str, int]] = field(default_factory=set)
    together: list[set[str]] = field(default_factory=list)  # roles that ran at each beginning
    cancelled: list[str] = field(default_factory=list)

    async def __call__(
        self, role: str, prompt: str, *, round_id: int, number: int = 0, has_answer: bool = True
    ) -> Sample:
        key = (round_id, role, number)
        assert key not in {(r, who, n) for r, who, n, _ in self.asked}, "asked twice"
        self.asked.append((round_id, role, number, prompt))
        self.running.add(key)
        self.together.append({who for _, who, _ in self.running})
        try:
            for _ in range(self.delays.randrange(4)):
                await asyncio.sleep(0)
            text = self.script(role, prompt, round_id, number)
        except asyncio.CancelledError:
            self.cancelled.append(role)
            raise
        finally:
            self.running.discard(key)
        answer = extract(text) if has_answer else None
        return Sample(round_id, role, None, text, answer, len(prompt), len(text), "stop", 0)


def saying(answer: str | None) -> str:
    """Return a text that ends in an answer, or holds none."""
    return "I do not know." if answer is None else f"Let me see. The final answer is {answer}."
