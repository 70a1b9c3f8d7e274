"""The benchmark of a device: its program runs on a toy, and nothing that was found is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.gpu_report import charts, list_targets, render
from tests.support.fake_device import FakeDevice

from bench import gpu
from polyadapt.ops import native
from polyadapt.ops.device import Host


def toy(out: Path, seconds: float = 1e6) -> gpu.Bench:
    return gpu.Bench(Host(), "cpu", gpu.SMALL, "float32", out, seconds)


def saved(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu.json").read_text())


def test_every_part_runs_on_a_toy_shape_and_is_saved(tmp_path: Path):
    arguments = ["--tiny", "--device", "cpu", "--seconds", "1e6", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 0
    parts = saved(tmp_path)["parts"]
    assert list(parts) == list(gpu.PARTS)
    statuses = {name: part["status"] for name, part in parts.items()}
    assert statuses.pop("eager") == "skipped"
    assert set(statuses.values()) == {"done"}, statuses
    assert all(part["rows"] for name, part in parts.items() if name != "eager")
    assert all(row["met"] for row in parts["checks"]["rows"])
    assert [row["rows"] for row in parts["base"]["rows"]] == [1, 2]
    cells = [(row["targets"], row["adapters"]) for row in parts["adapters"]["rows"]]
    assert cells == [("none", 0), *((name, n) for name in gpu.TARGETS for n in (1, 2))]
    assert parts["peft"]["rows"][0]["ours over PEFT's"] > 0
    assert "not measured" not in {target.verdict for target in list_targets(saved(tmp_path))}
    page = (tmp_path / "gpu.md").read_text()
    assert "| a step outside the forward at 2 rows, ms |" in page
    for name in ("gpu-base-decode.svg", "gpu-adapters.svg"):
        assert (tmp_path / name).read_text().startswith("<svg")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_device_with_graphs_is_checked_and_measured_with_and_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Its tensors are no host tensors: the native kernels are not for them.
    monkeypatch.setattr(native, "serves", lambda _: False)
    monkeypatch.setattr(native, "is_available", lambda: False)
    bench = gpu.Bench(FakeDevice(), "cpu", gpu.SMALL, "float32", tmp_path, 1e6)
    names = ("checks", "bandwidth", "start", "base", "loads", "eager")
    assert bench.run(names, goes_on=False)
    assert [part.status for part in bench.parts.values()] == ["done"] * 6
    assert "with graphs" in " ".join(row["check"] for row in bench.parts["checks"].rows)
    cells = [(row["rows"], row["adapters"]) for row in bench.parts["eager"].rows]
    assert cells == [(1, 0), (2, 0), (2, 2)]
    assert bench.parts["eager"].rows[0]["over graphs"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_measures_nothing(tmp_path: Path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "finds no CUDA device" in told
    assert "Nothing was measured" in told
    assert "--tiny --device cpu" in told
    assert not list(tmp_path.iterdir())


def test_the_full_shape_is_not_for_the_cpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "goes with --tiny" in capsys.readouterr().err


def test_a_setting_reaches_every_engine_and_an_unknown_one_is_refused(tmp_path: Path, capsys):
    arguments = ["--tiny", "--device", "cpu", "--seconds", "1e6", "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--parts", "start", "--set", "max_waiting=7"]) == 0
    assert saved(tmp_path)["method"]["engine"].endswith(", max_waiting=7")
    with pytest.raises(SystemExit):
        gpu.main([*arguments, "--set", "max_wating=7"])
    assert "'max_wating=7' is no NAME=VALUE" in capsys.readouterr().err


def run(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch, **parts: Any) -> bool:
    monkeypatch.setattr(gpu, "PARTS", {name: (60.0, part) for name, part in parts.items()})
    return bench.run(list(parts), goes_on=False)


def test_a_part_that_fails_costs_the_others_nothing_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def broken(bench: gpu.Bench) -> None:
        bench._add(rows=1)
        raise ValueError("no luck\nat all")

    assert not run(toy(tmp_path), monkeypatch, broken=broken, bandwidth=gpu.Bench.bandwidth)
    parts = saved(tmp_path)["parts"]
    assert (parts["broken"]["status"], parts["broken"]["rows"]) == ("failed", [{"rows": 1}])
    assert parts["broken"]["note"] == "ValueError: no luck"
    assert parts["bandwidth"]["status"] == "done"
    assert "no luck" in capsys.readouterr().err


def test_what_was_found_before_the_time_was_up_stays_and_later_parts_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bench = toy(tmp_path)

    def slow(bench: gpu.Bench) -> None:
        bench._add(rows=1)
        assert saved(tmp_path)["parts"]["slow"]["rows"] == [{"rows": 1}], "written at once"
        bench._deadline = bench._end = 0.0
        bench.check_time()
        bench._add(rows=2)

    assert not run(bench, monkeypatch, slow=slow, bandwidth=gpu.Bench.bandwidth)
    parts = saved(tmp_path)["parts"]
    assert (parts["slow"]["status"], parts["slow"]["rows"]) == ("cut", [{"rows": 1}])
    assert (parts["bandwidth"]["status"], parts["bandwidth"]["rows"]) == ("cut", [])


def test_rows_that_a_part_leaves_behind_are_gone_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def broken(bench: gpu.Bench) -> None:
        bench._need().start(2)
        raise ValueError("between two steps")

    def looks(bench: gpu.Bench) -> None:
        assert not bench._need().engine.has_work
        bench._need().engine.check_integrity()

    bench = toy(tmp_path)
    run(bench, monkeypatch, start=gpu.Bench.start, broken=broken, looks=looks)
    assert bench.parts["looks"].status == "done"


def test_nothing_is_timed_where_a_check_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def checks(bench: gpu.Bench) -> None:
        bench._add(check="a", met=True)
        bench._add(check="b", met=False)

    parts = {"checks": checks, "bandwidth": gpu.Bench.bandwidth}
    assert not run(toy(tmp_path), monkeypatch, **parts)
    assert list(saved(tmp_path)["parts"]) == ["checks"]
    assert "nothing is timed" in saved(tmp_path)["parts"]["checks"]["note"]
    bench = toy(tmp_path)
    assert not bench.run(list(parts), goes_on=True)
    assert bench.parts["bandwidth"].status == "done"


def test_a_wrong_product_misses_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from bench import gpu_checks

    original = gpu_checks._answers

    def mixed_up(driver: Any, batches: Any) -> Any:
        found = original(driver, batches)
        if len(batches) == 1:  # the mixed batch: two requests have each other's answers
            found["check-0"], found["check-4"] = found["check-4"], found["check-0"]
        return found

    monkeypatch.setattr(gpu_checks, "_answers", mixed_up)
    monkeypatch.setattr(gpu_checks, "LENGTHS", (9, 9, 17, 33, 9, 40))
    bench = toy(tmp_path)
    assert not run(bench, monkeypatch, checks=gpu.Bench.checks)
    assert [row["met"] for row in bench.parts["checks"].rows] == [False, False, False]


def result(**parts: list[dict[str, Any]]) -> dict[str, Any]:
    scale = {"adapter_rows": 64, "adapters": [1, 64], "rows": [1, 256], "targets": ["q"]}
    method = dict.fromkeys(("shape", "dtype", "context", "rank", "engine", "versions"), "x")
    whole = {
        name: {"status": "done", "seconds": 1.0, "note": "", "rows": rows}
        for name, rows in parts.items()
    }
    method |= {"notes": ["a note"]}
    return {"device": "d", "started": "s", "method": method, "scale": scale, "parts": whole}


def test_targets_are_met_missed_or_not_measured():
    adapters = [
        {"targets": "none", "adapters": 0, "step, ms": 1.0},
        {"targets": "q", "adapters": 1, "of base": 0.98, "step, ms": 1.0, "ideal, ms": 1.0},
        {"targets": "q", "adapters": 64, "over ideal": 1.21, "step, ms": 2.0, "ideal, ms": 1.6},
    ]
    base = [{"rows": 64, "part of limit": 0.7, "step, ms": 3.0, "limit, ms": 2.1}]
    found = result(base=base, adapters=adapters, peft=[{"ours over PEFT's": 9.9}])
    assert [target.verdict for target in list_targets(found)] == [
        "met", "missed", "met", "missed", "not measured",
    ]  # fmt: skip
    page = render(found)
    assert (
        "| base decode at 64 rows, part of the bandwidth limit | 0.7 | at least 0.7 | met |" in page
    )
    assert "| a step outside the forward at 256 rows, ms |  | at most 0.5 | not measured |" in page
    assert set(charts(found)) == {"gpu-base-decode.svg", "gpu-adapters.svg"}
    assert charts(result()) == {}
