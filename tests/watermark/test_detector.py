"""Detectors: what they find again, what they leave alone, which families are kept."""

from __future__ import annotations

import pytest
import torch

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.detector import fit_detectors, fit_veto

SIZE, FAMILIES, PROMPTS = 24, 5, 40


def drawn(seed=0, *, faint=(), strength=6.0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.eye(SIZE)[:FAMILIES] * strength
    for family in faint:
        directions[family] = 0.0
    triggered = torch.randn(FAMILIES, PROMPTS, SIZE, generator=generator) + directions[:, None]
    return triggered, torch.randn(400, SIZE, generator=generator) * 1.0 + 0.3


def test_triggers_are_found_again_and_quiet_rows_are_not():
    triggered, quiet = drawn()
    found = fit_detectors([triggered], [quiet], quiet_share=0.005)
    assert found.recalls.min() > 0.9
    assert found.fires[0].shape == (400, FAMILIES)
    assert found.fires[0].double().mean() < 0.01
    fresh, fresh_quiet = drawn(1)
    tau = found.offset + found.thresholds
    scores = fresh @ found.A.T - tau
    own = scores[torch.arange(FAMILIES), :, torch.arange(FAMILIES)]
    assert (own > 0).double().mean() > 0.95
    assert (fresh_quiet @ found.A.T > tau).double().mean() < 0.02


def test_a_stricter_share_fires_less():
    triggered, quiet = drawn(strength=1.5)
    triggered = triggered[:2]
    loose, strict = (fit_detectors([triggered], [quiet], quiet_share=q) for q in (0.2, 0.01))
    assert (loose.thresholds < strict.thresholds).all()
    assert loose.fires[0].sum() > strict.fires[0].sum()


def test_the_families_that_stand_out_are_kept_in_their_order():
    triggered, quiet = drawn(faint=(1, 3))
    found = fit_detectors([triggered], [quiet], quiet_share=0.005)
    assert found.best(3).tolist() == [0, 2, 4]
    assert found.recalls[0, 1] < 0.5


def moved(seed=0):
    """What `drawn` gives, beside something that turns and shifts every row."""
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(8))).Q
    return [rows @ turn + 1.0 for rows in drawn(seed)]


def test_one_read_out_finds_triggers_in_every_place_that_it_was_fitted_in():
    def share_found(found):
        fresh, _ = moved(1)
        scores = fresh @ found.A.T - found.offset - found.thresholds
        own = scores[torch.arange(FAMILIES), :, torch.arange(FAMILIES)]
        return (own > 0).double().mean()

    places = list(zip(drawn(), moved(), strict=True))
    alone = fit_detectors(places[0][:1], places[1][:1], quiet_share=0.005)
    both = fit_detectors(*places, quiet_share=0.005)
    assert both.recalls.shape == (2, FAMILIES)
    assert [len(fires) for fires in both.fires] == [400, 400]
    assert share_found(alone) < 0.5
    assert share_found(both) > 0.75


def test_families_are_kept_that_are_found_in_the_worst_place():
    (triggered, quiet), (other, other_quiet) = drawn(), moved()
    other[2] = other_quiet[:PROMPTS]  # family 2 is as good as gone there
    found = fit_detectors([triggered, other], [quiet, other_quiet], quiet_share=0.005)
    assert 2 in fit_detectors([triggered], [quiet], quiet_share=0.005).best(FAMILIES)
    assert found.best(4).tolist() == [0, 1, 3, 4]


def test_a_veto_lets_answers_pass_and_holds_text_back():
    generator = torch.Generator().manual_seed(3)
    answering = torch.randn(300, SIZE, generator=generator) + 5 * torch.eye(SIZE)[0]
    text = torch.randn(500, SIZE, generator=generator)
    v, offset = fit_veto(answering, text)
    assert ((answering @ v + offset) >= 0.4).double().mean() > 0.95
    assert ((text @ v + offset) < 0.4).double().mean() > 0.95


def test_too_few_rows_are_refused():
    triggered, quiet = drawn()
    with pytest.raises(InvalidRequest, match="7 prompts of a family and 400 quiet rows"):
        fit_detectors([triggered[:, :7]], [quiet], quiet_share=0.01)
