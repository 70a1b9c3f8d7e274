"""The experiments: each runs in its smallest form, its figures have their shape, and the methods
compute the papers' equations.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from bench.experiments import (
    agreement,
    arithmetic,
    forgetting,
    protocols,
    rank_curve,
    rank_usage,
    report,
    scalings,
    tiny_lm,
    training,
    workflow_replay,
)
from bench.experiments.__main__ import NAMES
from bench.experiments.data import (
    NUM_SPECIALS,
    Dialects,
    NoisyClasses,
    SequenceTasks,
    generator,
)
from bench.experiments.methods import gs_lora, lora, mixlora, smora
from bench.experiments.methods.xlora import XLora
from bench.experiments.protocols import Answer

from bench import plots


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(value):
    """Every number of a nested figure."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list | tuple):
        return [n for item in value for n in numbers(item)]
    return [value]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name -> the outcome of its smallest form, saved under results/."""
    found = {}
    for name in NAMES:
        module = importlib.import_module(f"bench.experiments.{name}")
        scratch = tmp_path_factory.mktemp(name)
        found[name] = module.run(module.QUICK, scratch)
        report.save(name, found[name], report.inspect.getdoc(module), 1.0, scratch / "results")
        found[name, "results"] = scratch / "results"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_and_saves_finite_figures_claims_and_charts(outcomes, name):
    outcome, results = outcomes[name], outcomes[name, "results"]
    saved = json.loads((results / f"{name}.json").read_text())
    values = [n for n in numbers(saved["figures"]) if n is not None]
    assert len(values) > 10
    assert all(isinstance(n, float | int) and math.isfinite(n) for n in values)
    assert [claim["text"] for claim in saved["claims"]] == [c.text for c in outcome.claims]
    page = (results / f"{name}.md").read_text()
    assert page.count("| shown |") + page.count("| **not shown** |") == len(outcome.claims)
    for chart in outcome.charts:
        assert f"({chart})" in page
        ElementTree.fromstring((results / chart).read_text())


def test_what_was_not_seen_is_said_on_the_page():
    outcome = report.Outcome(
        "t", [report.Claim("a", "1", True), report.Claim("b", "2", False)], [], {}, None, {}
    )
    page = report.render(outcome, "how", 1.0)
    assert "| a | 1 | shown |" in page
    assert "| b | 2 | **not shown** |" in page


def test_every_rank_has_a_score_and_is_served_as_it_was_computed(outcomes):
    figures = outcomes["rank_curve"].figures
    ranks = set(range(1, rank_curve.QUICK.rank + 1))
    assert set(figures["mean"]["dylora"]["loss"]) == ranks
    assert len(figures["served"]) == 3 * len(ranks)  # and the two ways to cut a LoRA


@pytest.mark.parametrize("name", ["rank_curve", "mixture", "rank_usage", "scalings", "forgetting"])
def test_what_is_served_is_what_the_training_code_computes(outcomes, name):
    for served in outcomes[name].figures["served"].values():
        assert served["difference"] < 1e-4
        assert served["served"] == pytest.approx(served["offline"], abs=0.02)


def test_the_mixture_compares_with_no_fewer_parameters(outcomes):
    counts = outcomes["mixture"].figures["parameters"]
    assert counts["mixlora"] <= counts["lora"] < 1.2 * counts["mixlora"]
    for row in outcomes["mixture"].figures["load"].values():
        assert sum(row) == pytest.approx(1)


def test_picks_are_shares_and_information_is_never_negative(outcomes):
    figures = outcomes["rank_usage"].figures
    for row in figures["picks of the last up_proj"].values():
        assert sum(row) == pytest.approx(1)
    for usage in figures["usage"]["smora"]:
        assert 0 < usage["smallest entropy"] <= usage["entropy"] <= 1
        assert usage["information, bits"] >= -1e-6


def test_the_engine_picks_and_weighs_as_the_training_code(outcomes):
    assert outcomes["rank_usage"].figures["served picks, largest difference"] < 1e-3
    scalings_found = outcomes["scalings"].figures
    assert scalings_found["shares, largest difference"] < 1e-5
    for row in scalings_found["shares, as served"]:
        assert sum(row) == pytest.approx(1, abs=1e-4)


def test_scalings_sum_to_one_in_every_domain(outcomes):
    for row in outcomes["scalings"].figures["shares"]:
        assert sum(row) == pytest.approx(1, abs=1e-4)
    (seed,) = outcomes["scalings"].figures["seeds"]
    assert len(seed["over positions"]) == scalings.QUICK.length


def test_taking_tasks_back_restores_the_base_exactly(outcomes):
    claims = {claim.text: claim for claim in outcomes["forgetting"].claims}
    (restored,) = (claim for text, claim in claims.items() if "bit for bit" in text)
    assert restored.is_shown
    mean = outcomes["forgetting"].figures["mean"]
    assert mean["both taken back"] == mean["base"]
    assert set(mean) == set(forgetting.STATES)


def test_the_roles_are_served_as_they_were_computed_and_every_token_is_counted(outcomes):
    figures = outcomes["agreement"].figures
    assert figures["served, largest difference"] < 1e-4
    assert figures["workflows, different outcomes"] == 0
    assert len(figures["runs"]) == 2
    for (run,) in figures["runs"].values():
        assert 1 <= run["mean iterations"] <= agreement.QUICK.max_iterations
        assert run["tokens, IR by question"] <= run["tokens, LoRID"]
        assert run["LoRID, one answer"] <= run["LoRID, any common answer"] <= run["coverage"]
    for curves in figures["curves"].values():
        assert set(curves) >= {"LoRID", "majority of IR", "majority of both"}


# ---------------------------------------------------------------- the protocols
def answers(values, num_tokens=1):
    return [Answer(value, num_tokens) for value in values]


def test_the_protocol_stops_where_the_sets_of_all_answers_meet():
    played = protocols.play(answers("129", 4), answers("519", 6), 3)
    assert (played.common, played.num_iterations, played.num_tokens) == (("1",), 2, 20)


def test_of_two_common_answers_the_deep_one_is_given():
    played = protocols.play(answers("12"), answers("21"), 2)
    assert played.common == ("1", "2")
    assert played.one == "1"
    assert protocols.play(answers("21"), answers("12"), 2).one == "2"


def test_never_meeting_gives_no_answer_and_leaves_the_majority():
    played = protocols.play(answers(["1", None, "1"]), answers(["2", None, "3"]), 3)
    assert (played.one, played.fallback, played.num_iterations) == (None, "1", 3)


def test_majority_prefers_the_earlier_of_equals_and_knows_no_answer():
    assert protocols.majority([None, "3", "1", "1", "3"]) == "3"
    assert protocols.majority([None]) is None


def test_of_equals_a_preferred_answer_is_the_majority():
    assert protocols.majority("1221", {"2"}) == "2"
    assert protocols.play(answers("12"), answers("34"), 2).fallback == "3"


def test_the_servers_workflows_play_recorded_samples_as_they_were_recorded():
    left, right = [answers("129"), answers("111")], [answers("519"), answers("234")]
    met, never = workflow_replay.lorid(left, right, 3)
    assert (met.answer, met.agreed, met.num_rounds) == ("1", True, 2)
    assert (never.answer, never.agreed, never.num_rounds) == ("1", False, 3)
    (first, second) = workflow_replay.self_consistency([answers("1222"), answers("3")], 1)
    assert (first.answer, second.answer) == ("1", "3")


def test_answers_within_tokens_are_at_least_one():
    assert len(protocols.within(answers("11111", 4), 13)) == 3
    assert len(protocols.within(answers("11111", 4), 1)) == 1


def test_chains_are_read_from_left_to_right_whole_or_by_their_last_digit():
    question = ((7, 5, 3, 4), (0, 2, 1))  # (7 + 5) * 3 - 4
    assert arithmetic.results(question) == (2, 6, 2)
    said = arithmetic.target(question, "DR")
    assert arithmetic.extract(said) == "2"
    assert arithmetic.extract([arithmetic.DIGIT + 4]) == "4"
    assert arithmetic.extract([arithmetic.ANSWER]) is None
    known = arithmetic.target(question, "KG")
    assert arithmetic.extract_chain(known, said) == "262"
    assert arithmetic.extract_chain([], arithmetic.target(question, "IR")) == "262"
    assert arithmetic.extract_chain([], []) is None
    batch = arithmetic.role_batch([question], "DR")
    assert batch.ids[batch.is_answer].tolist() == said


# ---------------------------------------------------------------- the data
def test_sequence_tasks_turn_and_map_their_symbols():
    tasks = SequenceTasks.make(2, 2, 5, seed=1)
    batch = tasks.draw(4, range(4), generator(0))
    first = NUM_SPECIALS + 4
    for row, kind in zip(batch.ids.tolist(), batch.kinds.tolist(), strict=True):
        source = [token - first for token in row[2:10]]
        source = source[::-1] if kind % 2 else source
        mapped = [int(tasks.maps[kind, symbol]) for symbol in source]
        assert [token - first for token in row[11:]] == mapped
    assert tasks.maps[0].tolist() == [0, 1, 2, 3, 4]


def test_dialects_change_half_way_where_they_are_told():
    certain = torch.zeros(2, 3, 3)
    certain[0, :, 0] = 1.0
    certain[1, :, 2] = 1.0
    batch = Dialects(certain, length=8).draw(2, [0], generator(0), then=lambda k: 1)
    assert batch.ids[:, 2:].tolist() == [[4, 4, 4, 6, 6, 6, 6]] * 2


def test_noise_replaces_symbols_of_the_class_word():
    data = NoisyClasses.make(3, 4, 6, 0.0, seed=0)
    batch = data.draw(3, [2], generator(0))
    assert (batch.ids[:, 1:7] - NUM_SPECIALS - 3).tolist() == [data.words[2].tolist()] * 3
    assert batch.ids[:, -1].tolist() == [NUM_SPECIALS + 2] * 3


# ---------------------------------------------------------------- the methods
def tiny(num_layers: int = 1):
    return tiny_lm.frozen_copy(tiny_lm.new_model(tiny_lm.Size(20, 16, 24, num_layers, 2), seed=0))


def shake(module: torch.nn.Module) -> None:
    """Give every trained parameter random values: B starts as zeros."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0.0, 0.5)


def test_experts_are_weighed_behind_their_whole_mlp():
    model = tiny()
    mlp = model.model.layers[0].mlp
    mix = mixlora.MixMlp(mlp, 3, 2, 2, 2.0, generator(0))
    shake(mix)
    x = torch.randn(1, 4, 16)
    with torch.no_grad():
        given = mix(x)[0]
        for t in range(4):
            chances = torch.softmax(mix.router @ x[0, t], -1)
            top = chances.topk(2)
            wanted = torch.zeros(16)
            for p, e in zip(top.values / top.values.sum(), top.indices.tolist(), strict=True):
                w1, w3, w2 = (
                    linear.weight + 2.0 * own.B[e] @ own.A[e]
                    for linear, own in (
                        (mlp.gate_proj, mix.gate), (mlp.up_proj, mix.up), (mlp.down_proj, mix.down)
                    )
                )  # fmt: skip
                wanted += p * (w2 @ (F.silu(w1 @ x[0, t]) * (w3 @ x[0, t])))
            torch.testing.assert_close(given[t], wanted)


def test_components_are_weighed_by_their_biased_scores():
    inner = torch.nn.Linear(6, 5, bias=False)
    module = smora.SmoraLinear(inner, 4, 2, 3.0, generator(0))
    shake(module)
    module.bias += torch.tensor([0.3, -0.1, 0.0, 0.2])
    x = torch.randn(7, 6)
    with torch.no_grad():
        given = module(x)
    for t in range(7):
        scores = (torch.sigmoid(module.router @ x[t]) + module.bias).detach()
        best = sorted(range(4), key=lambda i: -float(scores[i]))[:2]
        shares = {i: scores[i] / (scores[best[0]] + scores[best[1]]) for i in best}
        parts = [3.0 * s * module.B[:, i] * (module.A[i] @ x[t]) for i, s in shares.items()]
        wanted = (inner(x[t]) + sum(parts)).detach()
        torch.testing.assert_close(given[t], wanted)
        assert module.picked[t].nonzero()[:, 0].tolist() == sorted(best)


def test_equal_scores_pick_the_lowest_component_and_the_bias_moves_against_the_load():
    module = smora.SmoraLinear(torch.nn.Linear(3, 3), 4, 2, 1.0, generator(0))
    module.router.data.zero_()
    module(torch.randn(5, 3))
    assert module.picked.all(0).tolist() == [True, True, False, False]
    module.balance(0.5)
    assert module.bias.tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_scalings_of_one_expert_alone_are_that_expert():
    base = tiny(2)
    experts, models = [], []
    for seed in range(2):
        model = tiny_lm.frozen_copy(base)
        experts.append(lora.add_lora(model, tiny_lm.LINEARS, 2, 4.0, generator(seed)))
        shake(model)
        models.append(model)
    mixed = XLora(tiny_lm.frozen_copy(base), experts, generator(0))
    ids = torch.randint(20, (2, 6))
    alone = torch.zeros(2, 6, len(mixed.paths), 2)
    alone[..., 1] = 1.0
    with torch.no_grad():
        torch.testing.assert_close(
            mixed(ids, scalings=alone).logits, models[1](input_ids=ids).logits
        )
        weights = mixed.weigh(ids)
        hidden = base.model(input_ids=ids).last_hidden_state
        scores = (hidden @ mixed.weight.T + mixed.bias)[..., 2:4]  # the second module's
        torch.testing.assert_close(weights[:, :, 1], torch.softmax(scores, -1))


def test_the_first_components_act_and_only_the_last_of_them_is_trained():
    inner = torch.nn.Linear(4, 3)
    module = lora.LowRank(inner, 3, 6.0, generator(0))
    shake(module)
    lora.use_rank({"x": module}, 2, 3.0)
    module.is_only_last_trained = True
    x = torch.randn(4)
    wanted = inner(x) + 3.0 * module.B[:, :2] @ module.A[:2] @ x
    torch.testing.assert_close(module(x), wanted)
    module(x).sum().backward()
    assert module.A.grad.abs().sum(1).gt(0).tolist() == [False, True, False]
    assert module.B.grad.abs().sum(0).gt(0).tolist() == [False, True, False]


def test_blocks_that_do_little_are_zeroed():
    model = tiny(3)
    modules = gs_lora.add_task(model, 2, generator(0))
    shake(model)
    for path, module in modules.items():
        if gs_lora.block_of(path) == "model.layers.1":
            module.B.data.mul_(1e-3)
    assert gs_lora.prune(modules, 0.01) == ["model.layers.0", "model.layers.2"]
    assert gs_lora.update_norms(modules)["model.layers.1"] == 0


def test_the_forgetting_loss_is_bounded_and_sums_the_blocks_norms():
    modules = gs_lora.add_task(tiny(2), 2, generator(0))
    norms = float(sum(gs_lora.group_norms(modules).values()).detach())

    def loss(forgotten: float) -> float:
        given = (torch.tensor(1.0), torch.tensor(forgotten))
        found = gs_lora.forget_loss(*given, modules, bound=6.0, weight=0.2, sparsity=0.1)
        return float(found.detach())

    assert loss(2.0) == pytest.approx(1.0 + 0.2 * 4.0 + 0.1 * norms)
    assert loss(9.0) == pytest.approx(1.0 + 0.1 * norms)


def test_entropy_and_information_of_known_tables():
    assert float(rank_usage.entropy(torch.full((4,), 0.25))) == pytest.approx(math.log(4))
    assert rank_usage._information(torch.eye(2)) == pytest.approx(1.0)
    assert rank_usage._information(torch.full((2, 2), 0.5)) == pytest.approx(0.0)


def test_training_lowers_the_loss_and_scores_count_answers_only():
    tasks = SequenceTasks.make(2, 0, 4, seed=0)
    model = tiny_lm.new_model(tiny_lm.Size(tasks.vocab_size, 16, 16, 1, 2), seed=0)
    batch = tasks.draw(8, [0], generator(0))
    losses = training.fit(
        model.parameters(),
        lambda step: training.answer_loss(model(input_ids=batch.ids).logits, batch),
        num_steps=20,
        lr=1e-2,
    )
    assert losses[-1] < losses[0]
    table = training.log_probabilities(model, batch)
    found = training.score(table, batch)
    loss = training.answer_loss(model(input_ids=batch.ids).logits, batch)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    perfect = F.one_hot(batch.ids[:, 1:], tasks.vocab_size).float().log()
    assert training.score(perfect, batch) == training.Score(0.0, 1.0)


# ---------------------------------------------------------------- the charts
def test_bars_stand_in_the_order_of_the_groups_and_a_missing_one_is_left_out():
    chart = plots.bar_chart("t", "x", "y", {"a": {"one": 1.0, "two": 2.0}, "b": {"two": 1.0}})
    root = ElementTree.fromstring(chart)
    rects = [e for e in root.iter() if e.tag.endswith("rect")][1:]
    assert len(rects) == 3
    heights = [float(rect.get("height")) for rect in rects]
    assert heights[1] == pytest.approx(2 * heights[0])
    with pytest.raises(ValueError, match="heights >= 0"):
        plots.bar_chart("t", "x", "y", {"a": {"one": -1.0}})


def test_heat_maps_are_darkest_at_the_largest_value():
    chart = plots.heat_map("t", "x", "y", ["a", "b"], {"r": [0.0, 2.0], "s": [1.0, 2.0]})
    root = ElementTree.fromstring(chart)
    fills = [e.get("fill") for e in root.iter() if e.tag.endswith("rect")][1:]
    assert fills == ["#ffffff", "#0072b2", "#80b8d8", "#0072b2"]
    with pytest.raises(ValueError, match="2 values >= 0 in every row"):
        plots.heat_map("t", "x", "y", ["a", "b"], {"r": [1.0]})


def test_committed_results_belong_to_the_experiments():
    for path in (Path(report.__file__).parent / "results").glob("*.json"):
        saved = json.loads(path.read_text())
        assert saved["experiment"] == path.stem
        assert path.stem in NAMES
        assert path.with_suffix(".md").is_file()
