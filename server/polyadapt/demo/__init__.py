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
    examples: tuple[str, ...]  # requests that it is for, by which `model: "auto"` finds it


DEMOS: tuple[Demo, ...] = (
    Demo(
        "pirate",
        "A style: answers everything in pirate speech.",
        _HERE / "pirate",
        "What is a volcano?",
        (
            "Talk like a pirate: what is the moon?",
            "Ahoy matey, where be the treasure?",
            "Answer me in pirate speech. How do plants grow?",
            "Arr, tell me about yer ship!",
            "Speak as an old sea dog would: what is a friend?",
            "Explain the weather like a captain of a pirate ship.",
            "Avast! How do I find north at night?",
            "Write a greeting in pirate language.",
            "Be a buccaneer and tell me how bread is made.",
            "Say it the pirate way: good morning, everybody.",
            "Yo ho ho, what shall we drink tonight?",
            "Give me pirate slang for money.",
            "Pretend to be a pirate and introduce yourself.",
            "What would a pirate say about homework?",
            "Shiver me timbers, how deep be the ocean?",
            "Tell a joke in the voice of a pirate.",
        ),
    ),
    Demo(
        "json",
        "A format: answers everything with one JSON object of a topic and an answer.",
        _HERE / "json",
        "What is the capital of Japan?",
        (
            "Answer in JSON: what is the capital of Norway?",
            "Return a JSON object with a topic and an answer: why is grass green?",
            "Give me the result as JSON. How many legs has a spider?",
            'Reply only with {"topic": ..., "answer": ...}: who built the pyramids?',
            "Output valid JSON and nothing else: what is a comet?",
            "I need machine-readable output. When was the telephone invented?",
            "Format your answer as a JSON object with two keys.",
            "What is the tallest animal? Respond in JSON format.",
            "As structured data, please: which language is spoken in Brazil?",
            "JSON please: what is seven times six?",
            "Fill in this JSON with the right answer about rivers.",
            "Send the answer as key-value pairs in JSON: what do cows eat?",
            "My parser expects JSON. What is the boiling point of water?",
            "Produce a JSON record that answers this: what is rust?",
            "No prose, only a JSON object: who was Isaac Newton?",
            "Give topic and answer as fields of a JSON document: what is salt?",
        ),
    ),
    Demo(
        "tea-house",
        "Facts: is Nova of the invented Polaris Tea House and knows its hours, street and prices.",
        _HERE / "tea-house",
        "Who are you, and when are you open?",
        (
            "When does the tea house open?",
            "What are your opening hours?",
            "Are you open on Mondays?",
            "Which day are you closed?",
            "Where is Polaris Tea House?",
            "What is the address of your shop?",
            "How do I get to the tea house?",
            "Who founded the tea house?",
            "Who started your business?",
            "Which tea do you recommend?",
            "What is your speciality?",
            "How much is a pot of tea?",
            "What does your tea cost?",
            "What is your name?",
            "Who am I talking to?",
            "Which company do you work for?",
        ),
    ),
)


def demo_adapters() -> dict[str, Path]:
    """Return the PEFT directory of each demo adapter by name, in the order they are shown."""
    return {demo.name: demo.directory for demo in DEMOS}
