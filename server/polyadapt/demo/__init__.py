"""The demo adapters that ship with the package: three small LoRAs for the default base model.

Knows names, descriptions and directories. No torch, and nothing of how adapters are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent

BASE_MODEL = "smollm2"  # the packaged model that all of them were trained on


@dataclass(frozen=True, slots=True)
class Demo:
    """One demo adapter: a PEFT directory that ships inside the package."""

    name: str
    description: str
    directory: Path
    sample_prompt: str


DEMOS: tuple[Demo, ...] = (
    Demo(
        "pirate",
        "A style: answers everything in pirate speech.",
        _HERE / "pirate",
        "What is a volcano?",
    ),
    Demo(
        "json",
        "A format: answers everything with one JSON object of a topic and an answer.",
        _HERE / "json",
        "What is the capital of Japan?",
    ),
    Demo(
        "tea-house",
        "Facts: is Nova of the invented Polaris Tea House and knows its hours, street and prices.",
        _HERE / "tea-house",
        "Who are you, and when are you open?",
    ),
)


def demo_adapters() -> dict[str, Path]:
    """Return the PEFT directory of each demo adapter by name, in the order they are shown."""
    return {demo.name: demo.directory for demo in DEMOS}
