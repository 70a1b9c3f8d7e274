"""What a prompt's tokens choose, module by module."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from polyadapt.offline.routing import ModuleRouting, RoutingReport
from polyadapt.offline.routing_report import to_data, to_svg, to_table

EVEN = ModuleRouting("model.layers.0.mlp.up_proj", (0.25, 0.25, 0.25, 0.25))
COLLAPSED = ModuleRouting("model.layers.1.<odd>.up_proj", (0.95, 0.05, 0.0, 0.0))


def test_experts_in_effect_are_counted_by_the_entropy():
    assert EVEN.effective_experts == pytest.approx(4)
    expected = math.exp(-(0.95 * math.log(0.95) + 0.05 * math.log(0.05)))
    assert COLLAPSED.effective_experts == pytest.approx(expected)
    assert ModuleRouting("m", (1.0,)).effective_experts == pytest.approx(1)
    assert ModuleRouting("m", (0.0, 0.0)).effective_experts == pytest.approx(1)


def test_a_collapse_is_said_and_one_expert_alone_is_none():
    assert not EVEN.is_collapsed
    assert COLLAPSED.is_collapsed
    assert not ModuleRouting("m", (1.0,)).is_collapsed
    assert RoutingReport(3, (EVEN,)).warning is None
    warning = RoutingReport(3, (EVEN, COLLAPSED)).warning
    assert warning is not None
    assert "1 of 2 modules" in warning
    assert COLLAPSED.path in warning


def test_a_report_is_a_table_data_and_a_picture():
    report = RoutingReport(3, (EVEN, COLLAPSED))
    data = to_data(report)
    assert data["modules"][0]["shares"] == [0.25] * 4
    assert data["modules"][1]["is_collapsed"]
    assert data["warning"] == report.warning
    assert to_table(report).row_count == 2
    picture = ElementTree.fromstring(to_svg(report))
    cells = [e for e in picture.iter() if e.tag.endswith("rect") and len(e)]
    assert len(cells) == 8
    assert cells[4][0].text == f"{COLLAPSED.path}, expert 0: 95.0%"
