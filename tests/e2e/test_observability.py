"""What an operator sees of a real server: its scrape, log and spans, and what reads them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tests.e2e.test_openai_client import upload
from tests.oracle.adapters import make_lora
from tests.support.otlp import otlp_receiver
from tests.support.servers import running_server

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "deploy" / "grafana").glob("*.json"))
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
CANARY = "canary-4471"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
# What Prometheus adds, and what names no label.
_NO_LABELS = {"instance", "job", "le"}


@dataclass(frozen=True)
class Observed:
    """Everything that one run of a server left."""

    metrics: str
    log: str
    spans: list[Span]

    @property
    def labels(self) -> dict[str, set[str]]:
        """The names that a query may ask for, with the labels that were seen of each."""
        found: dict[str, set[str]] = {}
        for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", self.metrics, re.M):
            suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            found |= {name + suffix: set() for suffix in suffixes}
        for name, labels in re.findall(r"^([a-z_:]+)\{(.*)\} ", self.metrics, re.M):
            found[name] |= set(re.findall(r'([a-z_]+)="', labels))
        return found


@pytest.fixture(scope="module")
def observed(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """A server that served an adapter to a stream and a wrong request, and was stopped."""
    model, root = tiny_model("llama"), tmp_path_factory.mktemp("observed")
    with otlp_receiver() as received:
        options = ("--log-format", "json", "--otlp-endpoint", received.url)
        with running_server(root / "home", model, *options) as server:
            upload(server, "poet", make_lora(model, root / "poet", 4))
            for body in ({"stream": True}, {"n": -1}):
                server.post(
                    "/v1/completions",
                    json={"model": "poet", "prompt": CANARY, "max_tokens": 4, "ignore_eos": True}
                    | body,
                    headers={
                        "x-request-id": "req-of-mine",
                        "traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01",
                    },
                )
            metrics = server.get("/metrics").text
        log = server.log.read_text()
    return Observed(metrics, log, received.spans)


def expressions() -> list[tuple[str, str]]:
    """Return every query of the dashboards and the rules, and where it stands."""
    found = []
    for file in DASHBOARDS:
        board = json.loads(file.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                found.append((f"{file.name}: {panel['title']}", target["expr"]))
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            found.append((rule.get("alert") or rule["record"], rule["expr"]))
    return found


def recorded() -> set[str]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def test_every_metric_that_a_panel_or_a_rule_names_is_in_the_scrape(observed: Observed) -> None:
    known = observed.labels
    assert len(expressions()) > 40
    for where, expression in expressions():
        names = re.findall(r"\b(?:polyadapt[_:]|vllm:)[a-z0-9_:]+", expression)
        assert names, f"{where} asks for nothing of ours"
        for name in names:
            assert name in known or name in recorded(), f"{where} names {name}"


def test_every_label_that_they_select_by_is_one_of_the_metric(observed: Observed) -> None:
    from polyadapt.api.meters import METERS

    known = observed.labels
    listed = {meter.sample: set(meter.labels) for meter in METERS.values()}
    for where, expression in expressions():
        used: set[str] = set()
        for name, selector in re.findall(r"([a-z_:]+)\{([^}]*)\}", expression):
            has = known[name] | listed.get(name, set()) | _NO_LABELS
            chosen = set(re.findall(r"([a-z_]+)\s*[=!]", selector))
            assert chosen <= has, f"{where}: {name} has no {chosen - has}"
        for name in re.findall(r"\b(?:polyadapt_|vllm:)[a-z0-9_:]+", expression):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            used |= known[name] | listed.get(name, set()) | listed.get(base, set())
        for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            wanted = {label.strip() for label in grouped.split(",")}
            assert wanted <= used | _NO_LABELS, f"{where}: nothing has {wanted - used}"


def test_every_alert_is_explained(observed: Observed) -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert alerts == set(re.findall(r"^### (\w+)$", page, re.M))


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "rules.yaml"), ("test", "rules", "rules.test.yaml"), ("panels",)],
    ids=["rules", "tests", "panels"],
)
def test_prometheus_own_tool_accepts_rules_and_panels(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian and Ubuntu: apt install prometheus)")
    folder = RULES.parent
    if arguments == ("panels",):  # a query is well formed when it could be recorded
        rules = [
            {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m")}
            for number, (_, query) in enumerate(expressions())
        ]
        group = {"groups": [{"name": "panels", "rules": rules}]}
        (tmp_path / "panels.yaml").write_text(yaml.safe_dump(group).replace("panel:", "panel_"))
        folder, arguments = tmp_path, ("check", "rules", "panels.yaml")
    done = subprocess.run(
        [promtool, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_have_places_of_their_own_and_a_word_of_explanation() -> None:
    for file in DASHBOARDS:
        panels = json.loads(file.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        for panel in panels:
            assert panel["type"] == "row" or panel["description"]
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            for other in panels:
                there = other["gridPos"]
                is_beside = any(
                    place[axis] + place[size] <= there[axis]
                    or there[axis] + there[size] <= place[axis]
                    for axis, size in (("x", "w"), ("y", "h"))
                )
                assert other is panel or is_beside, (panel["title"], other["title"])


def test_both_processes_write_json_and_a_request_one_line(observed: Observed) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in observed.log.splitlines()]
    assert {line["process"] for line in lines} == {"edge", "engine"}
    (line,) = [line for line in lines if line["message"] == "POST /v1/completions 200"]
    assert line["request_id"] == "req-of-mine"
    assert line["adapters"] == ["poet@1"]
    assert (line["generated_tokens"], line["tenant"]) == (4, "default")
    assert 0 < line["first_token_ms"] <= line["duration_ms"]
    assert CANARY not in observed.log


def test_a_callers_trace_reaches_the_engine_process(observed: Observed) -> None:
    assert {span.trace_id.hex() for span in observed.spans if span.name != "POST /v1/adapters"} == {
        TRACE_ID
    }
    by_name = {span.name: span for span in observed.spans}
    top = by_name["text_completion poet"]
    for name in ("queue", "adapter load", "prefill", "decode"):
        span = by_name[name]
        assert span.parent_span_id == top.span_id
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        # The engine's clock is the edge's: both are this machine's.
        assert top.start_time_unix_nano - 5e7 <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= top.end_time_unix_nano + 5e7
    steps = {
        item.key: item.value.int_value
        for name in ("prefill", "decode")
        for item in by_name[name].attributes
        if item.key.startswith("polyadapt.engine")
    }
    first, last = (steps[f"polyadapt.engine.{each}_step"] for each in ("first", "last"))
    assert last - first == 3
