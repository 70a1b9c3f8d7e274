"""X-LoRA's three forms of files against a naive reader and PEFT's own model; what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.oracle import adapters, peft_oracle, tiny, xlora_oracle
from tests.support.basespec import ModelWeights, base_spec
from tests.support.family_suite import change, check_refused, edit, load, problems_of

from polyadapt.adapters.adapter import Delta, Probe
from polyadapt.adapters.probe import choose, weigh
from polyadapt.adapters.registry import open_adapter
from polyadapt.adapters.validator import run_validator, validate
from polyadapt.errors import AdapterRejected
from polyadapt.ops.cells import Router
from polyadapt_store.checkpoint import Checkpoint
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import weight_files

CASES: dict[str, dict[str, Any]] = {
    "two layers": {},
    "one layer": {"xlora_depth": 1},
    "three layers, no dropout": {"xlora_depth": 3, "xlora_dropout_p": 0.0, "seed": 1},
    "the same weights at all modules": {"layerwise_scalings": False, "seed": 2},
    "top two": {"top_k_lora": 2, "seed": 3},
    "top two, softmax again": {"top_k_lora": 2, "enable_softmax_topk": True, "seed": 3},
    "raw scalings": {"enable_softmax": False, "global_scaling_weight": 0.5, "seed": 4},
    "sharp": {"softmax_temperature": 0.3, "seed": 5},
    "experts in the first pass": {"scaling_pass_value": 0.25, "seed": 6},
    "embedding": {"targets": ["embed_tokens", "k_proj"], "seed": 7},
    "head": {"targets": ["lm_head", "k_proj"], "seed": 8},
}


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def base(model_dir: Path) -> torch.nn.Module:
    return peft_oracle.load_base(model_dir)


@pytest.fixture(scope="module")
def made(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("xlora")
    return {
        name: xlora_oracle.make(model_dir, root / str(number), **config)
        for number, (name, config) in enumerate(CASES.items())
    }


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Path:
    """A directory of PEFT's form that a test may spoil."""
    return Path(shutil.copytree(made["two layers"], tmp_path / "copied"))


@pytest.fixture
def original(made: dict[str, Path], tmp_path: Path) -> Path:
    """The same in the original library's form."""
    return xlora_oracle.to_original(made["two layers"], tmp_path / "original")


def probe_of(directory: Path, base: torch.nn.Module) -> tuple[Probe, torch.Tensor]:
    """The probe and its tensors, flat, as the arena holds them."""
    spec, (family, config) = base_spec(base), open_adapter(directory)
    with Checkpoint(weight_files(directory, family.files)) as checkpoint:
        probe = family.plan(config, checkpoint.header, spec).traits.probe
        tensors = family.read_probe(config, checkpoint, spec)
        family.read(config, checkpoint, spec, ModelWeights(base))
        assert checkpoint.drained() == []
    assert probe is not None
    return probe, torch.cat([tensor.flatten() for tensor in tensors])


def assert_same(one: dict[int, Delta], other: dict[int, Delta]) -> None:
    assert one.keys() == other.keys()
    for site_id, delta in one.items():
        assert torch.equal(delta.a, other[site_id].a)
        assert torch.equal(delta.b, other[site_id].b)
        assert delta.routing == other[site_id].routing


# --------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"head"}))
def test_peft_computes_what_the_oracle_does(name, made, model_dir):
    """PEFT's model serves as witness for the oracle. It takes experts by number, which is how these
    files call them, wants the base's use_cache off, and cannot load a head's expert.
    """
    ids = tiny.prompt_ids(12, seed=3)
    base = peft_oracle.load_base(model_dir)
    base.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base, made[name], autocast_adapter_dtype=False)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    oracle = xlora_oracle.load(model_dir, made[name])
    peft_oracle.assert_matches(xlora_oracle.logits(model_dir, oracle, ids), expected)
    plain = peft_oracle.logits(model_dir, None, ids)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max(), "it changes nothing"


@pytest.mark.parametrize("name", CASES)
def test_cells_hold_the_experts_end_to_end(name, made, base, model_dir):
    plan, deltas = load(made[name], base)
    oracle, spec = xlora_oracle.load(model_dir, made[name]), base_spec(base)
    assert {spec.sites[site_id].path for site_id in deltas} == set(oracle.paths)
    num = len(oracle.experts)
    for number, path in enumerate(oracle.paths):
        site_id = next(i for i, site in enumerate(spec.sites) if site.path == path)
        delta = deltas[site_id]
        assert delta.routing is not None
        assert (delta.routing.router, delta.routing.num_scores) == (Router.TABLE, num)
        assert delta.routing.value == (number * num if oracle.is_layerwise else 0)
        parts = zip(delta.a.chunk(num), delta.b.chunk(num, 1), strict=True)
        for (a, b), expert in zip(parts, oracle.experts, strict=True):
            own_a, own_b, scale = expert[path]
            torch.testing.assert_close(b @ a, scale * own_b @ own_a)
    assert plan.rank == max(xlora_oracle.RANKS)
    assert plan.traits.is_scalable
    assert not plan.traits.is_kv_neutral


@pytest.mark.parametrize("name", CASES)
def test_the_probe_gives_the_oracles_scalings(name, made, base, model_dir):
    oracle, ids = xlora_oracle.load(model_dir, made[name]), tiny.prompt_ids(7, seed=1)
    expected = xlora_oracle.scalings_of(model_dir, oracle, ids)
    num_modules, num_experts = expected.shape[1:]
    constant = torch.full(expected.shape, oracle.resting)
    with torch.inference_mode(), xlora_oracle.hooked(base, oracle, constant):
        out = base(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    hidden = out.hidden_states[-1][0]
    probe, weights = probe_of(made[name], base)
    for is_exact in (False, True):
        found = weigh(hidden, weights, probe, is_exact=is_exact)
        found = choose(found, probe, probe.top_k, 2.0).view(len(ids), -1, num_experts) / 2
        torch.testing.assert_close(found.expand(-1, num_modules, -1), expected)
    alone = weigh(hidden[2:3], weights, probe, is_exact=True)
    assert torch.equal(alone[0], weigh(hidden, weights, probe, is_exact=True)[2])


def test_of_equal_scalings_the_first_are_kept(base, made):
    probe, _ = probe_of(made["top two"], base)
    weights = torch.full((2, probe.width), 0.25)
    kept = choose(weights, probe, 2, 1.0).view(2, -1, 3)
    assert torch.equal(kept, torch.tensor([0.25, 0.25, 0.0]).expand_as(kept))


def test_where_nobody_weighs_anything_a_second_softmax_gives_nothing(base, made):
    probe, _ = probe_of(made["top two, softmax again"], base)
    assert not choose(torch.zeros(1, probe.width), probe, 2, 1.0).any()


# --------------------------------------------------------------------------- the forms
def test_the_original_librarys_files_are_the_same_adapter(made, original, base):
    _, expected = load(made["two layers"], base)
    plan, found = load(original, base)
    assert_same(found, expected)
    one, other = probe_of(original, base), probe_of(made["two layers"], base)
    assert one[0] == other[0]
    assert torch.equal(one[1], other[1])
    assert any("stop_token_id" in note for note in plan.notes)


def test_a_classifier_without_relu_or_bias_is_read(original, base):
    path = original / "xlora_classifier.safetensors"
    tensors = load_file(path)
    kept = {key: tensor for key, tensor in tensors.items() if key.endswith(".weight")}
    save_file(kept, path)
    config = json.loads((original / "xlora_config.json").read_text().replace(",\n}", "\n}"))
    config |= {"use_bias": False, "enable_relu_and_dropout": False}
    (original / "xlora_config.json").write_text(json.dumps(config))
    probe, weights = probe_of(original, base)
    assert not probe.has_relu
    hidden = torch.randn(3, probe.sizes[0])
    expected = hidden @ tensors["inner.0.weight"].t() @ tensors["last.weight"].t()
    expected = expected.view(3, -1, 3).softmax(-1).flatten(1)
    torch.testing.assert_close(weigh(hidden, weights, probe, is_exact=False), expected)


@pytest.mark.parametrize("is_original", [False, True])
def test_an_ordering_numbers_the_modules(is_original, copied, original, base, model_dir):
    directory = original if is_original else copied
    names = ["adapter_1", "adapter_2", "adapter_3"] if is_original else ["0", "1", "2"]
    _, plain = load(directory, base)
    xlora_oracle.add_ordering(directory, model_dir, names, reverse=False)
    assert_same(load(directory, base)[1], plain)
    xlora_oracle.add_ordering(directory, model_dir, names, reverse=True)
    _, found = load(directory, base)
    columns = [delta.routing.value for delta in plain.values() if delta.routing]
    backwards = [delta.routing.value for delta in found.values() if delta.routing]
    assert backwards == columns[::-1]


def test_an_ordering_names_the_classes_that_the_config_does_not(original, base, model_dir):
    config = json.loads((original / "xlora_config.json").read_text().replace(",\n}", "\n}"))
    del config["adapters"]
    (original / "xlora_config.json").write_text(json.dumps(config))
    assert problems_of(base, original)
    names = ["adapter_3", "adapter_1", "adapter_2"]
    xlora_oracle.add_ordering(original, model_dir, names, reverse=False)
    _, deltas = load(original, base)
    rank = max(xlora_oracle.RANKS)
    filled = [[int(part.any(1).sum()) for part in d.a.chunk(3)] for d in deltas.values()]
    assert filled == [[4, 6, 3]] * len(deltas), "of the ranks 6, 3, 4"
    assert all(len(d.a) == 3 * rank for d in deltas.values())


@pytest.mark.parametrize(
    ("folders", "paths"),
    [
        (("x", "y", "z"), ("", "", "")),
        (("p", "q", "r"), ("some/where/p", "q", "./r/")),
        (("0", "1", "2"), ("hub/one", "hub/two", "hub/three")),
    ],
    ids=["by name", "by the end of a path", "by number"],
)
def test_an_experts_folder_is_found(folders, paths, copied, base):
    _, expected = load(copied, base)
    for number, folder in enumerate(folders):
        if folder != str(number):
            (copied / str(number)).rename(copied / folder)
    edit(copied, adapters=dict(zip("xyz", paths, strict=True)))
    assert_same(load(copied, base)[1], expected)


def test_the_classes_are_in_the_order_of_the_config(copied, base):
    _, plain = load(copied, base)
    for old, new in (("0", "x"), ("1", "y"), ("2", "z")):
        (copied / old).rename(copied / new)
    edit(copied, adapters={"z": "", "x": "", "y": ""})
    _, found = load(copied, base)
    for site_id, delta in found.items():
        z, x, y = delta.b.chunk(3, 1)
        assert torch.equal(torch.cat([x, y, z], 1), plain[site_id].b)


def test_the_validator_reads_all_files(copied, original, base):
    spec = base_spec(base)
    for directory in (copied, original):
        report = run_validator(directory, spec)
        assert (report.family, report.rank) == ("xlora", 6)
        assert report.num_tensors == 4 + 3 * 2 * len(report.target_modules) * 3
    tensors = load_file(copied / "1" / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors[key][0, 0] = torch.inf
    save_file(tensors, copied / "1" / "adapter_model.safetensors")
    with pytest.raises(AdapterRejected) as caught:
        validate(copied, spec, StoreLimits())
    (problem,) = caught.value.problems
    assert (problem.code, "1/adapter_model.safetensors/" in problem.where) == ("non_finite", True)


# --------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"use_magic": True}, "unknown_config_key", "use_magic"),
        ({"hidden_size": 65}, "shape_mismatch", "hidden_size is 65"),
        ({"xlora_depth": 1}, "shape_mismatch", "expected [36, 64]"),
        ({"xlora_depth": 3}, "missing_tensor", "layers.6.weight"),
        ({"xlora_depth": 0}, "invalid_config", "xlora_depth"),
        ({"xlora_depth": 99}, "invalid_config", "at most 32"),
        ({"xlora_size": 25}, "shape_mismatch", "expected [25, 64]"),
        ({"xlora_dropout_p": 0.0}, "missing_tensor", "layers.2.weight"),
        ({"layerwise_scalings": False}, "shape_mismatch", "expected [3, 24]"),
        ({"top_k_lora": 4}, "invalid_config", "from 1 to 3"),
        ({"top_k_lora": 0}, "invalid_config", "from 1 to 3"),
        ({"top_k_lora": True}, "invalid_config", "from 1 to 3"),
        ({"softmax_temperature": 0}, "invalid_config", "above 0"),
        ({"softmax_temperature": "1"}, "invalid_config", "a finite number"),
        ({"enable_softmax": 1}, "invalid_config", "true or false"),
        ({"scaling_pass_value": 0.5, "top_k_lora": 2}, "unsupported_config", "scaling_pass_value"),
        (
            {"scaling_pass_value": None, "enable_softmax_topk": True},
            "unsupported_config",
            "scaling_pass_value",
        ),
        ({"adapters": {}}, "invalid_config", "1 to 256 experts"),
        ({"adapters": None}, "invalid_config", "1 to 256 experts"),
        ({"adapters": 3}, "invalid_config", "the experts' names"),
        ({"adapters": ["0", "0", "1"]}, "invalid_config", "each once"),
        ({"adapters": ["0", 1, "2"]}, "invalid_config", "the experts' names"),
        ({"adapters": ["0", "1"]}, "unread_file", "folder '2' is no expert's"),
        ({"adapters": ["0", "1", "2", "3"]}, "missing_file", "lack some of the experts"),
        ({"adapters": ["2", "0", "1"]}, "missing_file", "in several ways"),
    ],
    ids=str,
)
def test_a_config_that_is_not_served_is_refused(changes, code, words, copied, base):
    edit(copied, **changes)
    check_refused(base, copied, code, words)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"use_dora": True}, "unsupported_config", "1: use_dora"),
        ({"lora_bias": True}, "unsupported_config", "ungated"),
        ({"alora_invocation_tokens": [3]}, "unsupported_config", "alora_invocation_tokens"),
        ({"modules_to_save": ["lm_head"]}, "unsupported_config", "modules_to_save"),
        ({"trainable_token_indices": [3]}, "unsupported_config", "trainable_token_indices"),
        ({"bias": "all"}, "unsupported_config", "bias"),
        ({"init_lora_weights": "pissa"}, "unsupported_config", "another base"),
        ({"target_parameters": ["x"]}, "unsupported_config", "target_parameters"),
        ({"r": 9}, "rank_mismatch", "1: "),
        ({"peft_type": "LOHA"}, "unsupported_config", "expected LORA"),
        ({"strange": 1}, "unknown_config_key", "1: "),
    ],
    ids=str,
)
def test_an_expert_that_would_be_changed_is_refused(changes, code, words, copied, base):
    edit(copied / "1", **changes)
    check_refused(base, copied, code, words)


def test_experts_of_other_modules_are_refused(copied, base, model_dir, tmp_path):
    shutil.rmtree(copied / "2")
    adapters.make_lora(model_dir, copied / "2", 4, ["q_proj", "k_proj", "v_proj"])
    check_refused(base, copied, "config_mismatch", "adapts other modules")


def test_files_that_are_missing_or_nobodys_are_named(copied, base):
    (copied / "1" / "adapter_config.json").unlink()
    check_refused(base, copied, "missing_file", "'1/adapter_config.json' is missing")
    shutil.copy(copied / "0" / "adapter_config.json", copied / "1")
    check_refused(base, copied, "rank_mismatch", "1: ")
    (copied / "1" / "adapter_model.safetensors").unlink()
    check_refused(base, copied, "no_tensors", "1: ")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("adapter_model.safetensors", "unread_tensor"),
        ("0/adapter_model.safetensors", "unknown_module"),
        ("xlora_classifier.safetensors", "unread_tensor"),
    ],
)
def test_tensors_that_nothing_reads_are_refused(name, code, copied, original, base):
    directory = copied if (copied / name).exists() else original
    tensors = load_file(directory / name)
    save_file({**tensors, "strange.weight": torch.ones(2)}, directory / name)
    check_refused(base, directory, code, "strange.weight")


def test_every_tensor_of_the_classifier_is_checked(copied, original, base):
    for directory, name in ((copied, "adapter_model"), (original, "xlora_classifier")):
        path = directory / f"{name}.safetensors"
        tensors = load_file(path)
        for key, tensor in tensors.items():
            save_file({k: t for k, t in tensors.items() if k != key}, path)
            check_refused(base, directory, "missing_tensor", key.removeprefix("base_model."))
            save_file({**tensors, key: torch.ones(len(tensor) + 1, *tensor.shape[1:])}, path)
            check_refused(base, directory, "shape_mismatch", key)
            save_file({**tensors, key: torch.ones(tensor.shape, dtype=torch.int32)}, path)
            check_refused(base, directory, "unsupported_dtype", key)
            save_file({**tensors, key: torch.full(tensor.shape, torch.nan)}, path)
            check_refused(base, directory, "non_finite", key)
        save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"use_mean_pool": True}, "unsupported_config", "later tokens included"),
        ({"use_bias": False}, "unread_tensor", "inner.0.bias"),
        ({"enable_relu_and_dropout": False, "xlora_depth": 3}, "missing_tensor", "inner.1.weight"),
        ({"strange": 1}, "unknown_config_key", "strange"),
    ],
    ids=str,
)
def test_an_original_config_that_is_not_served_is_refused(
    changes, code, words, made, base, tmp_path
):
    directory = xlora_oracle.to_original(made["two layers"], tmp_path / "x", **changes)
    check_refused(base, directory, code, words)


@pytest.mark.parametrize(
    ("ordering", "code", "words"),
    [
        ({"order": ["1", "0", "2"]}, "invalid_config", "the experts as they are: 0, 1, 2"),
        ({"layers": {"model.layers.0.self_attn.q_proj": 0}}, "config_mismatch", "0 to 11"),
        ({"layers": {"lm_head": "a"}}, "invalid_config", "modules and their numbers"),
        ({"preload": 3}, "unknown_config_key", "preload"),
    ],
    ids=str,
)
def test_an_ordering_that_does_not_fit_is_refused(ordering, code, words, copied, base, model_dir):
    xlora_oracle.add_ordering(copied, model_dir, ["0", "1", "2"], reverse=False)
    path = copied / "tiny-ordering.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ordering))
    check_refused(base, copied, code, words)


def test_both_forms_in_one_directory_are_refused(copied, original, base):
    shutil.copy(original / "xlora_classifier.safetensors", copied)
    check_refused(base, copied, "unread_tensor", "xlora_classifier.safetensors/last.weight")
    shutil.copy(original / "xlora_config.json", copied)
    check_refused(base, copied, "unknown_config_key", "xlora_config.json")


def test_more_components_than_a_kernel_takes_are_refused(copied, base):
    for expert in ("0", "1", "2"):
        edit(copied / expert, r=1400)
        path = copied / expert / "adapter_model.safetensors"
        tensors = load_file(path)
        wide = {
            key: torch.zeros(1400, t.shape[1]) if "lora_A" in key else torch.zeros(len(t), 1400)
            for key, t in tensors.items()
        }
        save_file(wide, path)
    check_refused(base, copied, "invalid_rank", "4200 components")


def test_what_peft_saves_itself_is_refused_with_the_reason(made, base, model_dir, tmp_path):
    """PEFT 0.21.2: some layers of the classifier are left out, and of the experts most tensors."""
    plain = peft_oracle.load_base(model_dir)
    plain.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(plain, made["two layers"])
        model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    found = dict(problems_of(base, tmp_path / "saved"))
    assert found
    check_refused(base, tmp_path / "saved", "missing_tensor", "PEFT 0.21.2 wrote these files")


def test_the_classifier_alone_may_be_mended(made, base, model_dir, tmp_path):
    """What PEFT's model holds in memory is what the message tells to save."""
    plain = peft_oracle.load_base(model_dir)
    plain.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(plain, made["two layers"])
    directory = Path(shutil.copytree(made["two layers"], tmp_path / "mended"))
    tensors = {k: t for k, t in model.state_dict().items() if "internal_xlora_classifier" in k}
    save_file(tensors, directory / "adapter_model.safetensors")
    assert_same(load(directory, base)[1], load(made["two layers"], base)[1])
    change(directory, **{next(iter(tensors)): None})
    check_refused(base, directory, "missing_tensor", "layers.0")
