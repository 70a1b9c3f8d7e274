"""The page about marks shows what was measured, and the tables are made from the saved figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import (
    mark_classifier,
    mark_codes,
    mark_lm,
    mark_lm_beside,
    mark_lm_http,
    mark_lm_robustness,
    mark_robustness,
    mark_serving,
    mark_tracing,
    mark_who,
    text_marks,
)
from polyadapt.demo import demo_adapters

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "2026-11-22-2-core-amd-epyc"


@pytest.mark.parametrize(
    "bench",
    [
        mark_classifier,
        mark_codes,
        mark_lm,
        mark_lm_beside,
        mark_lm_http,
        mark_lm_robustness,
        mark_robustness,
        mark_tracing,
    ],
)
def test_the_page_shows_the_table_of_the_saved_run(bench):
    name = bench.__name__.rpartition(".")[2].replace("_", "-")
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    table = bench.to_markdown(rows)
    assert table == (RESULTS / f"{name}.md").read_text()
    page = "attribution.md" if bench is mark_tracing else "watermarks.md"
    assert table in (ROOT / "docs" / page).read_text()


def test_every_setting_of_the_benches_was_run():
    rows = json.loads((RESULTS / "mark-codes.json").read_text())["rows"]
    assert {(row["design"], row["length"]) for row in rows} == {
        (setting.design, setting.length) for setting in mark_codes.SETTINGS
    }
    rows = json.loads((RESULTS / "mark-classifier.json").read_text())["rows"]
    assert {row["num_bits"] for row in rows} == {16, 32}
    assert {row["seed"] for row in rows} == set(range(5))
    rows = json.loads((RESULTS / "mark-lm.json").read_text())["rows"]
    seeds = {row["seed"] for row in rows if row["num_bits"] == 16}
    assert seeds >= {mark_lm.FIRST_SEED, mark_lm.FIRST_SEED + 1}


def test_a_served_language_model_says_what_was_measured_offline():
    found = json.loads((RESULTS / "mark-lm-served.json").read_text())
    num_messages = found["queries"] + found["questions"]
    assert found["base_first_tokens_as_offline"] == num_messages
    for user in found["users"].values():
        assert user["first_tokens_as_offline"] == num_messages
        assert user["readings_equal"]
        assert "".join(map(str, user["bits_served"])) == user["signature"]


def test_over_http_nobody_else_is_named_and_a_copy_answers_as_its_user_is_served():
    rows = json.loads((RESULTS / "mark-lm-http.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"smollm2", *demo_adapters()}
    assert not any(row["wrong"] or row["another_named"] or row["unmarked_decided"] for row in rows)
    exported = json.loads((RESULTS / "mark-lm-copy.json").read_text())["exported"]
    assert exported["same_first_token"] == exported["answers"]
    assert exported["largest_difference_of_a_logprob"] < 1e-4


def test_no_bit_of_a_language_models_mark_is_decided_on_an_unmarked_model():
    others = json.loads((RESULTS / "mark-lm.json").read_text())["unmarked_and_beside"]
    assert set(others) == {"base", *demo_adapters(), "random"}
    assert {each["decided"] for each in others.values()} == {0}


def test_a_mark_fitted_beside_adapters_is_never_read_wrong_and_spares_their_own_tests():
    rows = json.loads((RESULTS / "mark-lm-beside.json").read_text())["rows"]
    assert not any(row["bits_wrong"] or row["unmarked_bits_decided"] for row in rows)
    seen = [row for row in rows if row["was_seen"]]
    assert {row["read_beside"] for row in seen} == {"base", *demo_adapters()}
    assert {row["read_beside"] for row in rows if not row["was_seen"]} == {*demo_adapters()}
    assert all(max(row["own_changed"]) <= row["own_prompts"] / 20 for row in seen)
    default = [row for row in seen if row["num_steps"] == mark_lm_beside.LOOSE[1]]
    assert all(row["bits_right"] == 1.0 for row in default if row["read_beside"] != "json")


def test_tracing_found_every_lone_leaker_and_one_of_each_pair_and_kept_its_alpha():
    rows = json.loads((RESULTS / "mark-tracing.json").read_text())["rows"]
    outside = [row for row in rows if row["is_outside"]]
    assert {row["alpha"] for row in outside} == set(mark_tracing.ALPHAS)
    assert all(mark_tracing.holds(row) for row in rows)
    missed = {
        (row["length"], row["flip_rate"]): row["num_trials"] - row["num_caught_any"]
        for row in rows
        if not row["is_outside"]
    }
    assert missed.pop((48, 0.05)) <= 3  # too few bits for so much noise, as the page says
    assert set(missed.values()) == {0}
    # The bound is one: far more innocents than alpha allows are noticed.
    assert not mark_tracing.holds({**outside[0], "num_accused_innocent": 40, "alpha": 0.05})


def test_no_attack_of_the_matrix_had_an_innocent_named():
    rows = json.loads((RESULTS / "mark-robustness.json").read_text())["rows"]
    assert {row["form"] for row in rows} == set(mark_robustness.FORMS)
    assert not any(row["names_innocent"] for row in rows)
    for form in mark_robustness.FORMS:
        attacks = {row["attack"] for row in rows if row["form"] == form}
        assert attacks >= set(mark_robustness.ATTACKS)


def test_no_bit_is_read_wrong_or_of_an_unmarked_model_and_no_innocent_named_of_language_models():
    found = json.loads((RESULTS / "mark-lm-robustness.json").read_text())
    rows = found["rows"]
    changes = {row["change"] for row in rows}
    assert changes >= {"none", "int8", "60 % pruned", "weights of 2 copies averaged"}
    assert not any(row["wrong"] or row["names_innocent"] for row in rows)
    assert all(row["right"] == found["num_bits"] for row in rows if row["change"] == "none")
    assert {entry["bits_decided"] for entry in found["unmarked"].values()} == {0}


def test_the_picture_of_the_page_is_drawn_from_the_saved_scores():
    found = json.loads((RESULTS / "mark-who.json").read_text())
    assert mark_who.draw(found) == mark_who.PICTURE.read_text()
    page = (ROOT / "docs" / "attribution.md").read_text()
    words = found["words"]
    for text in (words["verdict"], words["how_sure"], *words["why"]):
        assert text in page
    assert len(found["scores"]) == 1000


def test_the_page_shows_what_was_measured_of_texts():
    result = json.loads((RESULTS / "text-marks.json").read_text())
    table = text_marks.to_markdown(result)
    assert table in (ROOT / "docs" / "watermarks.md").read_text()
    assert text_marks.chart(result) == (ROOT / "docs" / "text-marks.svg").read_text()
    assert {row["scheme"] for row in result["power"]} == set(text_marks.SCHEMES)
    assert all(row["num_texts"] == text_marks.NUM_UNMARKED for row in result["null"])


def test_unmarked_texts_are_held_for_a_keys_no_more_often_than_stated():
    """Counts that alpha explains with a chance below 1 % would say that p-values are no such."""
    result = json.loads((RESULTS / "text-marks.json").read_text())
    for row in result["null"]:
        assert row["chance_of_so_many_named"] >= 0.01, row
        for level in row["levels"]:
            most = {1e-2: 124, 1e-3: 18}[level["alpha"]]
            assert level["num_held_for_marked"] <= most, row
    assert sum(row["innocent_named"] for row in result["power"]) == 0


def test_marked_rows_reach_the_throughput_that_the_page_says():
    found = json.loads((RESULTS / "mark-serving.json").read_text())
    assert {row["form"] for row in found["rows"]} == set(mark_serving.FORMS)
    assert (found["method"]["rows"], found["method"]["bits"]) == (32, 64)
    assert all(row["relative"] >= mark_serving.TARGET for row in found["rows"])
    page = (ROOT / "docs" / "watermarks.md").read_text()
    linear, hinge, first = (f"{row['relative']:.2f}" for row in found["rows"])
    assert (
        f"{linear} (linear), {hinge} (hinge) and {first} (hinge, first answer token only)" in page
    )
