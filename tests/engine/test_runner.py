"""The runner's host side: the page table follows the sequences, whatever happens to them, and the
plans the positions of their rows.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from polyadapt.adapters.gates import NEVER, GatedAdapter, Probing
from polyadapt.engine.request import RequestGroup, Sequence
from polyadapt.engine.runner import ModelRunner, PageTable, _idle_rows, _plans
from polyadapt.engine.token_table import TokenTable
from polyadapt.ops.plan import BatchPlan, PlanBuffers
from polyadapt.ops.strategy import choose
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams


def new_sequence(pages: list[int]) -> Sequence:
    request = Request("r", (1, 2), SamplingParams(max_tokens=100))
    (sequence,) = RequestGroup.of(request, 0.0).sequences
    sequence.pages = pages
    return sequence


def check(table: PageTable, sequences: list[Sequence]) -> None:
    found = table.of(sequences)
    assert found.shape == (len(sequences), max(len(s.pages) for s in sequences))
    for row, sequence in zip(found.tolist(), sequences, strict=True):
        assert row[: len(sequence.pages)] == sequence.pages


@pytest.mark.parametrize("seed", range(20))
def test_the_page_table_is_what_the_sequences_hold(seed):
    rng = random.Random(seed)
    table, running = PageTable(), [new_sequence([7])]
    check(table, running)
    for _ in range(60):
        for sequence in running:
            if rng.random() < 0.3:
                sequence.pages.append(rng.randrange(5000))
            if rng.random() < 0.1:  # a page that proved to be another sequence's
                sequence.pages[rng.randrange(len(sequence.pages))] = rng.randrange(5000)
            if rng.random() < 0.05:  # preempted and admitted again
                sequence.pages = [rng.randrange(5000)]
        running = [sequence for sequence in running if rng.random() < 0.95]
        while not running or rng.random() < 0.6:
            running.append(new_sequence([rng.randrange(5000) for _ in range(rng.randrange(1, 9))]))
        if rng.random() < 0.1:
            rng.shuffle(running)
        # A step of some of them only, as when the budget ends.
        check(table, rng.sample(running, rng.randrange(1, len(running) + 1)))
        check(table, running)


def test_a_table_is_the_callers_own():
    table, sequence = PageTable(), new_sequence([1, 2])
    first = table.of([sequence])
    sequence.pages[0] = 9
    second = table.of([sequence])
    assert first.tolist() == [[1, 2]]
    assert second.tolist() == [[9, 2]]


# --------------------------------------------------------------------------- the plans
def new_gated(rng: random.Random, position: int) -> Sequence:
    """A running sequence with up to three adapters, some of which act on some positions alone, or
    have weights.
    """
    uses = [
        AppliedAdapter(AdapterId("x", 1, str(i)), rng.choice([1.0, 0.5, 0.0]))
        for i in range(rng.randrange(4))
    ]
    firsts = [rng.choice([0, 0, rng.randrange(12), NEVER]) for _ in uses]
    lanes = tuple(
        GatedAdapter(
            use,
            place,
            first=firsts[place],
            stop=rng.choice([NEVER, max(firsts[place], 1) + rng.randrange(9)]),
            weights=tuple(rng.choice([(), (), (2.0, 0.0), (0.5,) * 4])),
        )
        for place, use in enumerate(uses)
    )
    request = Request("r", (1,), SamplingParams(max_tokens=100), tuple(uses))
    (sequence,) = RequestGroup.of(request, 0.0).sequences
    sequence.group.settle(lanes)
    sequence.slots = tuple(rng.randrange(3) for _ in uses)
    sequence.num_computed = position
    return sequence


def rows_of(plan: BatchPlan) -> list[dict[tuple[int, float, tuple[float, ...]], int]]:
    """What acts on each row, and how often: (slot, scale, the first four weights)."""
    found: list[Counter[tuple[int, float, tuple[float, ...]]]] = [
        Counter() for _ in range(plan.num_rows)
    ]
    for lane in plan.lanes:
        for segment in range(lane.num_segments):
            for row in lane.rows[lane.bounds[segment] : lane.bounds[segment + 1]].tolist():
                own = [] if lane.gate is None else lane.gate[row].tolist()
                weights = (*own, *[1.0] * (4 - len(own)))
                found[row][int(lane.slots[segment]), float(lane.scales[segment]), weights] += 1
    return [dict(row) for row in found]


@pytest.mark.parametrize("seed", range(30))
def test_the_plans_hold_what_acts_on_each_row_by_its_position(seed):
    rng = random.Random(seed)
    sequences = [new_gated(rng, rng.choice([0, 3, 11, 40])) for _ in range(rng.randint(1, 6))]
    lengths = [rng.choice([1, 1, 2, 9]) for _ in sequences]
    outputs = [rng.choice([0, 1, length, min(2, length)]) for length in lengths]
    expected_tokens, expected_outputs = [], []
    for sequence, length, num_outputs in zip(sequences, lengths, outputs, strict=True):
        own = []
        for row in range(length):
            position = sequence.num_computed + row
            acting: Counter[tuple[int, float, tuple[float, ...]]] = Counter()
            for lane, slot in zip(sequence.group.lanes or (), sequence.slots, strict=True):
                if lane.applied.scale and lane.first <= position < lane.stop:
                    weights = (*lane.weights, *[1.0] * (4 - len(lane.weights)))
                    acting[slot, lane.applied.scale, weights] += 1
            own.append(dict(acting))
        expected_tokens += own
        expected_outputs += own[length - num_outputs :]
    num_tokens, num_outputs = np.array(lengths), np.array(outputs)
    idle = _idle_rows(sequences, num_tokens)
    tokens, kept = _plans(sequences, num_tokens, num_outputs, idle, 4)
    assert rows_of(tokens) == expected_tokens
    assert rows_of(kept)[: len(expected_outputs)] == expected_outputs


def test_ordinary_sequences_cost_no_gate():
    rng = random.Random(0)
    sequences = [new_gated(rng, 0) for _ in range(4)]
    for sequence in sequences:
        lanes = sequence.group.lanes or ()
        sequence.group.settle(tuple(GatedAdapter(lane.applied, lane.place) for lane in lanes))
    lengths = np.array([3, 1, 2, 1])
    assert _idle_rows(sequences, lengths) == {}
    tokens, _ = _plans(sequences, lengths, lengths, {}, 4)
    assert all(lane.gate is None for lane in tokens.lanes)


def new_probed(width: int, first: int, stop: int) -> Sequence:
    """A running sequence one of whose adapters has weights of its experts for [first, stop)."""
    use = AppliedAdapter(AdapterId("x", 1, "x"))
    lanes = (GatedAdapter(use, 0), GatedAdapter(use, 1, probing=Probing(width, 0, 1.0, 0.0)))
    (sequence,) = RequestGroup.of(
        Request("r", (1,) * stop, SamplingParams(max_tokens=9), (use, use)), 0.0
    ).sequences
    sequence.group.settle(lanes)
    sequence.slots, sequence.num_computed = (0, 1), first
    table = sequence.expert_weights.setdefault(1, TokenTable())
    rows = np.arange(first, stop, dtype=np.float32)[:, None] + np.arange(width) / 8
    table.put(first, rows.astype(np.float32))
    return sequence


def test_the_weights_of_experts_are_loaded_anew_for_the_same_rows():
    runner = ModelRunner.__new__(ModelRunner)
    runner.tokens, runner.outputs = (PlanBuffers(16, torch.device("cpu")) for _ in range(2))
    runner.strategy, runner._planned = choose(torch.float32, is_exact=False), ()
    runner._ranks = np.array([4, 4])
    wide, narrow = new_probed(4, 3, 9), new_probed(2, 5, 9)
    lengths, num_outputs = np.array([2, 3]), np.array([1, 0])
    for _ in range(2):
        runner._load_plans([wide, narrow], lengths, num_outputs)
        plain, probed = runner.tokens.lanes
        assert plain.table is None
        assert probed.table is not None
        for sequence, start, width in ((wide, 0, 4), (narrow, 2, 2)):
            at = sequence.num_computed
            length = 2 if sequence is wide else 3
            expected = sequence.weights_at(1, at, at + length)
            assert probed.table[start : start + length, :width].tolist() == expected.tolist()
        (_, head) = runner.outputs.lanes
        assert head.table is not None
        assert head.table[0, :4].tolist() == wide.weights_at(1, 4, 5)[0].tolist(), "its last row"
        wide.expert_weights[1].put(3, np.full((6, 4), 7.0, np.float32))
        narrow.expert_weights[1].put(5, np.full((4, 2), 8.0, np.float32))


def test_a_resting_adapter_weighs_all_experts_alike():
    sequence = new_probed(3, 0, 4)
    (_, lane) = sequence.lanes
    assert lane.probing is not None
    resting = replace(lane, probing=replace(lane.probing, resting=0.25), is_resting=True)
    sequence.lanes = (sequence.lanes[0], resting)
    assert sequence.weights_at(1, 7, 9).tolist() == [[0.25] * 3] * 2
