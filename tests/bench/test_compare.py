"""The comparison with peers keeps its books: cells, ratios, reasons, plots, stopped processes."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import httpx
import psutil
import pytest
from bench.compare_report import (
    CellSpec,
    Row,
    parse_cell,
    render,
    row_of,
    target_rows,
)
from bench.loadgen import Load, LoadResult, run_load
from bench.peer_servers import base, peer_servers
from bench.peer_servers.base import CannotRun, Launch, Setup

from bench import adapters, compare, plots

FAKE = Path(__file__).with_name("fake_peer.py")
SVG = "{http://www.w3.org/2000/svg}"
RESULT = LoadResult(
    tokens_per_s=50.0,
    wall_s=2.0,
    num_requests=4,
    ttft_p50_s=0.5,
    ttft_p99_s=0.75,
    itl_p50_s=0.02,
    itl_p99_s=0.04,
    gap_p99_s=0.05,
    errors=(),
)


class FakePeer:
    """A peer whose server is fake_peer.py; with adapters it may die."""

    name = "fake"
    about = "fake 1"

    def __init__(self, root: Path, *, dies_with_adapters: bool = False, child: bool = False):
        self.bodies = root / "bodies"
        self.child = root / "child"
        self._dies = dies_with_adapters
        self._has_child = child
        self.registered = 0

    def install(self, root: Path) -> None: ...

    def prepare(self, setup: Setup) -> None: ...

    def launch(self, setup: Setup, port: int, *, has_adapters: bool) -> Launch:
        argv = [sys.executable, str(FAKE), "--port", str(port), "--bodies", str(self.bodies)]
        argv += ["--die"] if has_adapters and self._dies else []
        argv += ["--child", str(self.child)] if self._has_child else []
        return Launch(argv, start_timeout_s=60)

    def register(self, setup: Setup, url: str) -> None:
        self.registered += 1

    def body(self, setup: Setup, adapter: str | None, *, has_adapters: bool) -> dict:
        return {"model": "base", "adapter": adapter}


@pytest.fixture
def comparison(tmp_path):
    return compare.Comparison(
        model=tmp_path,
        adapters={"a": tmp_path / "a", "b": tmp_path / "b"},
        vocab_size=384,
        dtype="float32",
        threads=1,
        requests_per_stream=1,
        scratch=tmp_path,
    )


@pytest.fixture
def setup(tmp_path, comparison):
    return Setup(
        root=tmp_path,
        scratch=tmp_path,
        model=tmp_path,
        adapters=comparison.adapters,
        dtype="float32",
        threads=1,
        max_streams=2,
        max_rank=64,
    )


def row(server: str, cell: str, tokens_per_s: float | None, block: int = 0, **more) -> Row:
    return Row(server, block, parse_cell(cell), tokens_per_s, **{"other_cores": 0.0, **more})


@pytest.mark.parametrize(
    ("text", "cell"),
    [("base@8", CellSpec(0, 8)), ("1@1", CellSpec(1, 1)), ("8@32", CellSpec(8, 32))],
)
def test_a_cell_is_read_and_written_alike(text, cell):
    assert parse_cell(text) == cell
    assert str(cell) == text


@pytest.mark.parametrize("text", ["8", "9@8", "base@0", "-1@8", "x@8", "8@", "8@x"])
def test_a_cell_that_cannot_be_measured_is_refused(text):
    with pytest.raises(ValueError, match="is no cell; give ADAPTERS@STREAMS"):
        parse_cell(text)


def test_a_row_with_errors_has_no_throughput_and_says_the_first_error():
    failed = row_of("x", 0, CellSpec(0, 1), replace(RESULT, errors=("500: no", "500: no")), 0.0)
    assert failed.tokens_per_s is None
    assert failed.num_errors == 2
    assert not failed.is_valid
    assert failed.note == "2 errors: 500: no"


def test_a_cut_row_keeps_its_throughput_and_says_that_it_was_cut():
    cut = row_of("x", 0, CellSpec(0, 1), replace(RESULT, num_cut=2), 0.0, note="slow")
    assert cut.tokens_per_s == 50.0
    assert cut.note == "slow; cut at 2 s, 4 requests finished"


def verdicts(rows, cannot_run=None) -> dict[str, list[str]]:
    return {text: rest for text, *rest in target_rows(rows, cannot_run or {})}


def test_each_target_says_what_was_measured_and_whether_it_is_met():
    found = verdicts(
        [
            row("polyadapt", "base@8", 100.0, ttft_p50_s=1.0),
            row("polyadapt", "8@8", 90.0, ttft_p50_s=1.5),
            row("polyadapt", "1@8", 95.0),
            row("llama.cpp", "8@8", 20.0, block=1),
            row("llama.cpp", "1@8", 95.0, block=1),
            row("mistralrs", "8@8", 10.0, block=1),
        ],
        {"vllm (with adapters)": "SIGILL"},
    )
    assert found["8 distinct adapters to llama.cpp, 8 streams"] == [">= 3.0", "4.50", "met"]
    assert found["one adapter to llama.cpp, 8 streams"] == [">= 1.5", "1.00", "NOT met"]
    assert found["8 distinct adapters to mistral.rs, 8 streams"] == ["reported", "9.00", ""]
    assert found["one adapter to our base, 8 streams"] == [">= 0.9", "0.95", "met"]
    ttft = found["median TTFT with 8 distinct adapters to our base's, 8 streams"]
    assert ttft == ["<= 1.3", "1.50", "NOT met"]
    vllm = found["8 distinct adapters to vLLM with LoRA, 8 streams"]
    assert vllm == [">= 6.0", "-", "vllm cannot run here"]
    peft = found["8 distinct adapters to PEFT's mixed batch, 8 rows"]
    assert peft == [">= 6.0", "-", "not measured"]


def test_a_disturbed_run_counts_only_where_there_is_no_other():
    rows = [
        row("polyadapt", "8@8", 10.0, block=0, other_cores=0.9),
        row("llama.cpp", "8@8", 10.0, block=1),
        row("polyadapt", "8@8", 30.0, block=2),
        row("mistralrs", "8@8", 10.0, block=3, other_cores=0.9),
        row("polyadapt", "8@8", 50.0, block=4),
    ]
    found = verdicts(rows)
    assert found["8 distinct adapters to llama.cpp, 8 streams"][1:] == ["3.00", "met"]
    assert found["8 distinct adapters to mistral.rs, 8 streams"][1:] == ["4.00", "doubtful"]


def test_a_peer_is_compared_with_our_runs_beside_it_only():
    rows = [
        row("polyadapt", "8@8", 10.0, block=0),
        row("llama.cpp", "8@8", 10.0, block=1),
        row("polyadapt", "8@8", 30.0, block=2),
        row("mistralrs", "8@8", 10.0, block=3),
        row("polyadapt", "8@8", 70.0, block=4),
    ]
    found = verdicts(rows)
    assert found["8 distinct adapters to llama.cpp, 8 streams"][1] == "2.00"
    assert found["8 distinct adapters to mistral.rs, 8 streams"][1] == "5.00"


def test_a_busy_machine_makes_a_verdict_doubtful():
    rows = [row("polyadapt", "8@8", 90.0), row("llama.cpp", "8@8", 20.0, 1, other_cores=0.5)]
    found = verdicts(rows)["8 distinct adapters to llama.cpp, 8 streams"]
    assert found[-1] == "met, doubtful"


def test_failed_rows_and_points_of_the_curve_are_no_part_of_a_ratio():
    rows = [
        row("polyadapt", "8@8", 90.0),
        row("polyadapt", "8@8", 900.0, is_curve=True),
        row("polyadapt", "8@8", 600.0, is_valid=False),
        row("llama.cpp", "8@8", 30.0, 1),
    ]
    assert verdicts(rows)["8 distinct adapters to llama.cpp, 8 streams"][1] == "3.00"


def about_run() -> dict:
    return {
        "started": "2026-01-01T00:00:00+00:00",
        "machine": {"cpu": "CPU", "num_cores": 2, "memory_gib": 8, "features": [], "system": "x"},
        "method": {
            **dict.fromkeys(["model", "dtype", "threads", "adapters", "order"], "x"),
            "prompt_tokens": 128,
            "output_tokens": 64,
            "server_options": ["--exact"],
            "curve_streams": 64,
        },
    }


def test_the_page_has_a_table_for_each_variant_and_every_reason():
    rows = [
        row("polyadapt", "base@8", 100.0, ttft_p50_s=1.0, ttft_p99_s=2.0),
        row("polyadapt", "8@8", 80.0, distinct_adapters=8),
        row("llama.cpp", "8@8", 20.0, block=1, note="cut at 120 s"),
        row("polyadapt exact", "8@8", 60.0, block=2, distinct_adapters=8),
        row("polyadapt", "64@64", 60.0, block=3, is_curve=True),
    ]
    page = render(
        about_run(), rows, about={"llama.cpp": "1.0"}, cannot_run={"vllm": "SIGILL"}, plots={}
    )
    assert "- vllm **cannot run here**: SIGILL" in page
    assert "| base | 8 | 100 | 1.00 | - | - | 1.00 / 2.00 | - | 0 | 0.00 |  |" in page
    assert "| 8 | 8 | 80.0 | 0.80 | 4.00 | 8 |" in page
    assert "## polyadapt exact" in page
    assert "| 8 | 8 | 60.0 | - | 3.00 | 8 |" in page
    assert "cut at 120 s" in page
    assert "| 64 | 64 |" not in page


def test_results_are_saved_as_page_json_and_plot(tmp_path):
    rows = [row("polyadapt", f"{n}@64", 60.0 + n, is_curve=True) for n in (1, 8, 64)]
    rows.append(row("llama.cpp", "8@64", None, is_curve=True))
    page = compare.save(tmp_path, {**about_run(), "rows": []}, rows, {}, {})
    assert (tmp_path / "peers.md").read_text() == page
    assert "](peers-distinct-adapters.svg)" in page
    assert json.loads((tmp_path / "peers.json").read_text())["rows"] == []
    chart = ElementTree.fromstring((tmp_path / "peers-distinct-adapters.svg").read_text())
    assert len(chart.findall(f"{SVG}circle")) == 3


def test_a_chart_has_axes_legend_and_a_point_for_each_value():
    chart = plots.line_chart(
        "A & B", "count", "speed", {"x<y": [(100, 5.0), (1, 10.0)], "z": [(10, 0.0)], "none": []}
    )
    root = ElementTree.fromstring(chart)
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {"A & B", "count", "speed", "x<y", "z", "1", "10", "100"} <= set(texts)
    assert "none" not in texts
    by_place = sorted(
        (float(c.get("cx")), float(c.get("cy"))) for c in root.findall(f"{SVG}circle")
    )
    left, middle, right = by_place
    assert middle[0] - left[0] == pytest.approx(right[0] - middle[0], abs=0.2)  # logarithmic
    assert left[1] < right[1] < middle[1]  # 10 above 5 above 0
    for _, y in by_place:
        assert 0 < y < 420


@pytest.mark.parametrize("series", [{}, {"x": []}, {"x": [(0, 1.0)]}])
def test_a_chart_without_points_or_with_a_zero_is_refused(series):
    with pytest.raises(ValueError, match="a chart needs points with x > 0"):
        plots.registered_adapters_chart(series)


def test_the_chart_of_registered_adapters_is_drawn_from_the_residency_figures(
    tmp_path, monkeypatch
):
    figures = {"10 known, tokens/s": 50.0, "10000 known, tokens/s": 49.0, "10 known, us": 900}
    parts = [{"figures": {"cold, ms": 3.0}}, {"figures": figures}]
    (tmp_path / "residency.json").write_text(json.dumps({"parts": parts}))
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    plots.main()
    chart = ElementTree.fromstring((tmp_path / "registered-adapters.svg").read_text())
    assert len(chart.findall(f"{SVG}circle")) == 2
    with pytest.raises(ValueError, match="run the part `registered`"):
        plots.registered_series({"parts": parts[:1]})


def test_a_chart_of_one_point_at_zero_speed_is_drawn():
    ElementTree.fromstring(plots.distinct_adapters_chart({"x": [(8, 0.0)]}, 8))


def test_a_request_carries_the_fields_of_its_model_and_slow_ones_are_cut():
    seen: list[dict] = []

    class Stalled(httpx.AsyncByteStream):
        def __init__(self, num_chunks: int, end: bytes | None):
            self._num_chunks, self._end = num_chunks, end

        async def __aiter__(self):
            for _ in range(self._num_chunks):
                yield b'data: {"choices": [{"text": "a"}]}\n\n'
            if self._end is None:
                await asyncio.Event().wait()
            yield self._end

    async def reply(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
        end = f"data: {json.dumps(usage)}\n\n".encode()
        is_stalled = len(seen) > 2  # after the warm-up and one whole request
        stream = Stalled(3 if is_stalled else body["max_tokens"], None if is_stalled else end)
        return httpx.Response(200, stream=stream)

    load = Load(
        models=("a",),
        concurrency=1,
        num_requests=2,
        vocab_size=384,
        num_output_tokens=6,
        fields={"a": {"lora": 3, "model": "renamed"}},
        cut_after_s=1.0,
    )
    result = asyncio.run(run_load("http://test", load, transport=httpx.MockTransport(reply)))
    assert {(body["model"], body["lora"]) for body in seen} == {("renamed", 3)}
    assert (result.num_requests, result.num_cut, result.errors) == (1, 1, ())
    assert result.wall_s >= 1.0
    assert result.tokens_per_s == pytest.approx((6 + 3) / result.wall_s)


def test_a_peer_and_its_children_are_gone_afterwards(setup, tmp_path):
    peer = FakePeer(tmp_path, child=True)
    with base.running(peer, setup, tmp_path / "log", has_adapters=True) as server:
        child = psutil.Process(int(peer.child.read_text()))
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert peer.registered == 1
    assert not psutil.pid_exists(server.pid)
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_peer_that_dies_at_its_start_cannot_run_and_says_why(setup, tmp_path):
    peer = FakePeer(tmp_path, dies_with_adapters=True)
    with (
        pytest.raises(CannotRun, match=r"ended at its start with status 1.*lacks an instruction"),
        base.running(peer, setup, tmp_path / "log", has_adapters=True),
    ):
        pass


def test_a_peer_s_cells_are_measured_in_two_starts(comparison, setup, tmp_path):
    peer = FakePeer(tmp_path)
    cells = [CellSpec(2, 2), CellSpec(0, 1)]
    assert compare.theirs(comparison, peer, setup, 1, cells, time.monotonic() + 60)
    assert [(r.cell, r.block, r.num_errors) for r in comparison.rows] == [
        (CellSpec(0, 1), 1, 0),
        (CellSpec(2, 2), 1, 0),
    ]
    assert all(r.tokens_per_s and r.ttft_p50_s for r in comparison.rows)
    bodies = [json.loads(line) for line in peer.bodies.read_text().splitlines()]
    assert {b["adapter"] for b in bodies[:5]} == {None}  # one warm-up, four requests
    assert {b["adapter"] for b in bodies[5:]} == {"a", "b"}
    assert peer.registered == 1


def test_the_base_is_kept_when_the_adapters_cannot_run(comparison, setup, tmp_path):
    peer = FakePeer(tmp_path, dies_with_adapters=True)
    cells = [CellSpec(2, 2), CellSpec(0, 1)]
    assert compare.theirs(comparison, peer, setup, 1, cells, time.monotonic() + 60)
    assert [r.cell for r in comparison.rows] == [CellSpec(0, 1)]
    assert "lacks an instruction" in comparison.cannot_run["fake (with adapters)"]


def test_no_cell_starts_after_the_limit(comparison, setup, tmp_path):
    peer = FakePeer(tmp_path)
    assert not compare.theirs(comparison, peer, setup, 1, [CellSpec(0, 1)], time.monotonic() - 1)
    assert comparison.rows == []


def test_a_command_that_fails_or_is_missing_gives_the_reason(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(CannotRun, match=r"ended with status 3: no wheel"):
        base.call([sys.executable, "-c", "print('no wheel'); raise SystemExit(3)"], log)
    with pytest.raises(CannotRun, match="ended with SIGILL"):
        base.call([sys.executable, "-c", "import os; os.kill(os.getpid(), 4)"], log)
    with pytest.raises(CannotRun, match="no-such-tool is not installed"):
        base.call(["no-such-tool"], log)


def test_a_whole_installation_is_not_repeated(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing may be run")

    for name, peer in peer_servers().items():
        module = sys.modules[type(peer).__module__]
        monkeypatch.setattr(module, "call", refuse)
        monkeypatch.setattr(module, "make_venv", refuse, raising=False)
        with pytest.raises(AssertionError):
            peer.install(tmp_path)
        base.mark_installed(tmp_path, module.PACKAGE)
        peer.install(tmp_path)
        (tmp_path / "installed.txt").unlink()
        assert name == peer.name


def test_each_peer_names_an_adapter_in_its_way(setup):
    peers = peer_servers()
    llama = peers["llama.cpp"]
    assert llama.body(setup, None, has_adapters=False) == {"model": "base"}
    off = {"model": "base", "lora": [{"id": 0, "scale": 0.0}]}
    assert llama.body(setup, None, has_adapters=True) == off
    on = {"model": "b", "lora": [{"id": 1, "scale": 1.0}]}
    assert llama.body(setup, "b", has_adapters=True) == on
    for name in ("mistralrs", "vllm"):
        assert peers[name].body(setup, "b", has_adapters=True) == {"model": "b"}
        assert peers[name].body(setup, None, has_adapters=True) == {"model": "base"}


def test_every_peer_serves_on_loopback_without_a_prefix_cache(setup):
    for name, peer in peer_servers().items():
        for has_adapters in (False, True):
            line = " ".join(peer.launch(setup, 4321, has_adapters=has_adapters).argv)
            assert "4321" in line, name
            assert ("lora" in line or "adapters" in line) is has_adapters, name
    argv = {n: p.launch(setup, 1, has_adapters=False).argv for n, p in peer_servers().items()}
    assert "--no-cache-prompt" in argv["llama.cpp"]
    assert "--no-enable-prefix-caching" in argv["vllm"]
    for name in ("llama.cpp", "vllm"):
        assert argv[name][argv[name].index("--host") + 1] == "127.0.0.1"


def test_an_older_reader_finds_rope_and_dtype_at_the_top(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    config = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e5}, "_name_or_path": "x"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"weights")
    view = base.readable_by_older(model, tmp_path / "view")
    read = json.loads((view / "config.json").read_text())
    assert (read["rope_theta"], read["torch_dtype"]) == (1e5, "bfloat16")
    assert "_name_or_path" not in read
    assert (view / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((model / "config.json").read_text()) == config


def test_adapters_take_the_ranks_in_turn(tiny_model, tmp_path):
    made = adapters.make_adapters(tiny_model("llama"), tmp_path, 3, rank=(4, 8))
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in made.values()]
    assert [config["r"] for config in configs] == [4, 8, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "llama.cpp,nobody"], "['nobody'] are no peers"),
        (["--cells", "9@8"], "'9@8' is no cell"),
        (["--also", "exact"], "is not NAME=OPTIONS"),
        (["--peer-dtype", "vllm=int8"], "'vllm=int8' is not PEER=DTYPE"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_fix(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", *arguments])
    with pytest.raises(SystemExit):
        compare.main()
    assert message in capsys.readouterr().err
