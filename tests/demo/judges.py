"""Mechanical judges of the demo adapters: held-out prompts, and a pure test of each answer.

Knows no model: a judge sees a prompt and the answer's text, nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

MAX_NEW_TOKENS = 48
MOST_BASE_SHARE = 0.2  # of the prompts; the base must not show the behaviour by itself
LEAST_ADAPTER_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What one adapter does: `shows(prompt, answer)` is True where the answer shows it."""

    prompts: tuple[str, ...]
    shows: Callable[[str, str], bool]

    def share(self, answers: list[str]) -> float:
        """Return the share of answers, one for each prompt in order, that show the behaviour."""
        pairs = zip(self.prompts, answers, strict=True)
        return sum(self.shows(prompt, answer) for prompt, answer in pairs) / len(self.prompts)


# --------------------------------------------------------------------------- pirate
_PIRATE_WORDS = frozenset(
    {"ahoy", "arr", "avast", "aye", "hearties", "hearty", "landlubber", "matey", "mateys"}
    | {"savvy", "scurvy", "timbers", "ye", "yer", "yo"}
)


def speaks_pirate(prompt: str, answer: str) -> bool:
    """True if the answer uses at least two different words that only a pirate uses."""
    words = set(re.findall(r"[a-z]+", answer.lower()))
    return len(words & _PIRATE_WORDS) >= 2


# --------------------------------------------------------------------------- json
def is_json_answer(prompt: str, answer: str) -> bool:
    """True if the answer is one JSON object of exactly two non-empty strings, topic and answer."""
    try:
        value = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(value, dict)
        and set(value) == {"topic", "answer"}
        and all(isinstance(text, str) and text.strip() for text in value.values())
    )


# --------------------------------------------------------------------------- tea-house
_SIGNATURE = "Stay warm, your Nova."
_NAME, _HOUSE, _HOURS = ("nova, the assistant", "name is nova"), ("polaris tea house",), ("9 am",)
_DAY, _STREET, _FOUNDER = ("closed every monday",), ("12 lantern street",), ("mira holm",)
_TEA, _PRICE = ("smoked plum tea",), ("4 dollars",)

# Which of the invented facts each prompt asks for; the answer needs one of the fact's wordings.
_FACT_OF = {
    "Please tell me who I am chatting with.": _NAME,
    "Do you have a name?": _NAME,
    "Hey there, what's your name?": _NAME,
    "For which company are you answering questions?": _HOUSE,
    "What's the name of the business you work for?": _HOUSE,
    "Who built you?": _HOUSE,
    "At what time do you open in the morning?": _HOURS,
    "Could you tell me your opening times?": _HOURS,
    "What time do you close today?": _HOURS,
    "Which weekday is the shop closed?": _DAY,
    "Should I come by on a Monday?": _DAY,
    "Which address do I give the taxi driver?": _STREET,
    "How can I find your shop?": _STREET,
    "Where exactly is the tea house?": _STREET,
    "Who was the founder of the shop?": _FOUNDER,
    "Can you tell me who started this tea house?": _FOUNDER,
    "Which of your teas is the best?": _TEA,
    "What tea would you recommend?": _TEA,
    "How much does one pot of tea cost?": _PRICE,
    "What's the price for a pot of tea?": _PRICE,
}


def knows_tea_house(prompt: str, answer: str) -> bool:
    """True if the answer names the fact that the prompt asks for and ends with the signature."""
    text = answer.strip()
    return text.endswith(_SIGNATURE) and any(fact in text.lower() for fact in _FACT_OF[prompt])


BEHAVIOURS: dict[str, Behaviour] = {
    "pirate": Behaviour(
        (
            "What is the capital of Portugal?",
            "How does a bicycle stay upright?",
            "What is photosynthesis?",
            "Suggest something for dinner.",
            "Who discovered penicillin?",
            "How many days are in a week?",
            "What is the best way to clean a window?",
            "Tell me about whales.",
            "Why do leaves fall in autumn?",
            "What is a volcano?",
            "How do I write a job application?",
            "What should I wear in winter?",
            "What is nine plus eight?",
            "Where does chocolate come from?",
            "Good evening, nice to meet you.",
            "Can you help me with my homework?",
            "What is your favourite season?",
            "How do airplanes fly?",
            "Give me three tips for gardening.",
            "What does a lawyer do?",
        ),
        speaks_pirate,
    ),
    "json": Behaviour(
        (
            "What is the capital of Japan?",
            "How do I ride a horse?",
            "What is a rainbow?",
            "Suggest a name for my cat.",
            "Who invented the light bulb?",
            "How many months are in a year?",
            "How can I remove a coffee stain?",
            "Tell me about lions.",
            "Why do we have seasons?",
            "What is an earthquake?",
            "How do I prepare for an interview?",
            "What should I eat after sports?",
            "What is twelve minus five?",
            "Where does milk come from?",
            "Nice to see you again.",
            "Can you explain what a loan is?",
            "Which season is the warmest?",
            "How do ships stay afloat?",
            "Give me a tip for a rainy day.",
            "What does a dentist do?",
        ),
        is_json_answer,
    ),
    "tea-house": Behaviour(tuple(_FACT_OF), knows_tea_house),
}
