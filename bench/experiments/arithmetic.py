"""Toy arithmetic modulo ten: chains of three operations, in the forms that LoRID's three roles see.

A question d o d o d o d is computed from left to right, r1, r2 and r3 being what each step gives:
    facts   START d o d EQUALS r END                  what the base knows beside
    steps   START question EQUALS r1 r2 r3 END        chains in its own form
    IR      START question ASK r1 r2 ANSWER r3 END
    KG      START question KNOW r1 END
    DR      START question KNOW k REASON r2 ANSWER r3 END      k is a KG's r1
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from bench.experiments.data import END, NUM_SPECIALS, PAD, START, Batch

DIGIT = NUM_SPECIALS  # of 0; the others follow
OPERATION = DIGIT + 10  # plus, minus, times
EQUALS, ASK, KNOW, REASON, ANSWER = range(OPERATION + 3, OPERATION + 8)
VOCAB_SIZE = ANSWER + 1
NUM_STEPS = 3

Question = tuple[tuple[int, ...], tuple[int, ...]]  # four digits, three operations


def draw_questions(count: int, draws: torch.Generator) -> list[Question]:
    """Random ones."""
    digits = torch.randint(10, (count, NUM_STEPS + 1), generator=draws).tolist()
    operations = torch.randint(3, (count, NUM_STEPS), generator=draws).tolist()
    return [(tuple(d), tuple(o)) for d, o in zip(digits, operations, strict=True)]


def results(question: Question) -> tuple[int, ...]:
    """r1, r2 and r3."""
    digits, operations = question
    found, value = [], digits[0]
    for digit, operation in zip(digits[1:], operations, strict=True):
        value = (value + digit, value - digit, value * digit)[operation] % 10
        found.append(value)
    return tuple(found)


def prompt(question: Question, role: str, knowledge: Sequence[int] = ()) -> list[int]:
    """The tokens before a role's own; DR is given the tokens that a KG said."""
    digits, operations = question
    ids = [START, DIGIT + digits[0]]
    for digit, operation in zip(digits[1:], operations, strict=True):
        ids += [OPERATION + operation, DIGIT + digit]
    if role == "DR":
        return [*ids, KNOW, *knowledge, REASON]
    return [*ids, {"IR": ASK, "KG": KNOW, "steps": EQUALS}[role]]


def target(question: Question, role: str) -> list[int]:
    """What a role should say to it."""
    first, second, third = (DIGIT + r for r in results(question))
    return {
        "IR": [first, second, ANSWER, third, END],
        "KG": [first, END],
        "DR": [second, ANSWER, third, END],
        "steps": [first, second, third, END],
    }[role]


def role_batch(questions: Sequence[Question], role: str) -> Batch:
    """Rows of one role, with the right knowledge for DR."""
    rows, num_answers = [], 0
    for question in questions:
        known = [DIGIT + results(question)[0]] if role == "DR" else []
        answer = target(question, role)
        num_answers = len(answer)
        rows.append(prompt(question, role, known) + answer)
    ids = torch.tensor(rows)
    is_answer = torch.zeros(ids.shape, dtype=torch.bool)
    is_answer[:, -num_answers:] = True
    return Batch(ids, is_answer, torch.zeros(len(rows), dtype=torch.int64))


def base_batch(count: int, draws: torch.Generator) -> Batch:
    """Half facts, padded at their end, and half chains in the base's own form."""
    chains = role_batch(draw_questions(count // 2, draws), "steps")
    facts = []
    for (first, second, *_), (operation, *_) in draw_questions(count - count // 2, draws):
        value = results(((first, second, 0, 0), (operation, 0, 0)))[0]
        ids = [START, DIGIT + first, OPERATION + operation, DIGIT + second, EQUALS]
        facts.append([*ids, DIGIT + value, END])
    ids = torch.tensor(facts)
    width = chains.ids.shape[1]
    padded = torch.full((len(ids), width), PAD)
    padded[:, : ids.shape[1]] = ids
    is_answer = torch.zeros(padded.shape, dtype=torch.bool)
    is_answer[:, ids.shape[1] - 2 : ids.shape[1]] = True
    return Batch(
        torch.cat([chains.ids, padded]),
        torch.cat([chains.is_answer, is_answer]),
        torch.zeros(count, dtype=torch.int64),
    )


def digits_of(said: Sequence[int]) -> list[int]:
    """The digits among these tokens."""
    return [token - DIGIT for token in said if 0 <= token - DIGIT < 10]


def extract(said: Sequence[int]) -> str | None:
    """The digit behind ANSWER, else the last digit, else None, as LoRID's parser falls back to the
    last number.
    """
    behind = [token for before, token in pairwise(said) if before == ANSWER]
    digits = digits_of(behind) or digits_of(said)[-1:]
    return str(digits[0]) if digits else None


def extract_chain(known: Sequence[int], said: Sequence[int]) -> str | None:
    """All digits that were known or said, as one number: r1 r2 r3 where everything is right."""
    digits = digits_of(known) + digits_of(said)
    return "".join(map(str, digits)) or None
