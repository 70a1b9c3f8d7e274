"""The site: its pages of reference are what the code says, it is complete and needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tools.docs_reference import PAGES

from polyadapt import errors
from polyadapt.api.meters import FLEET_METERS, METERS
from polyadapt.config import Config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_setting_has_a_row_with_its_variable_and_meaning() -> None:
    page = PAGES["configuration"]()
    leaves = [
        leaf
        for name, field in Config.model_fields.items()
        for leaf in getattr(field.annotation, "model_fields", {name: None})
    ]
    assert len(leaves) > 40
    for leaf in leaves:
        (line,) = [row for row in page.splitlines() if f"`POLYADAPT_{leaf.upper()}`" in row]
        meaning = line.rstrip("| ").rpartition("|")[2].strip()
        assert len(meaning) > 8, f"{leaf}: write what it means behind it in config.py"


def test_an_option_and_a_comment_of_the_code_are_told() -> None:
    page = PAGES["configuration"]()
    assert "| `server.port` | `--port` | `POLYADAPT_PORT` | `8000` |" in page
    assert "Comment lines on silent streams" in page
    assert "`1.0GiB`" in page


def test_every_command_is_on_its_page_with_its_options() -> None:
    page = PAGES["cli"]()
    for command in ("serve", "inspect", "convert", "model fetch", "keys create"):
        assert f"## `polyadapt {command}`" in page
    assert "| `--adapter` | `NAME=DIR` | Register a PEFT directory. |" in page
    assert "polyadapt convert SOURCE OUT" in page


def test_every_metric_and_every_error_is_on_its_page() -> None:
    page = PAGES["metrics"]()
    meters = [*METERS.values(), *FLEET_METERS.values()]
    assert all(f"`{meter.sample}`" in page and meter.text in page for meter in meters)
    page = PAGES["errors"]()
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.PolyadaptError):
            is_told = kind not in (errors.PolyadaptError, errors.StartupError)
            assert (f"| {kind.status} | `{kind.code}` |" in page) >= is_told, kind


class _Page(HTMLParser):
    """Collects what a page fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        is_loaded = tag in ("script", "img", "iframe") or (
            tag == "link" and given.get("rel") not in ("canonical", "next", "prev")
        )
        self.fetched += [given.get("src") or given.get("href") or ""] if is_loaded else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(out)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_in_the_nav_of_the_site(site: Path) -> None:
    home = (site / "index.html").read_text()
    linked = set(re.findall(r'href="([a-z0-9_/-]+)\.html"', home))
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    assert pages - linked <= {"index"}, "they are in no menu"
    assert {f"reference/{name}" for name in PAGES} <= linked


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        parser = _Page()
        parser.feed(page.read_text())
        assert parser.fetched
        for address in parser.fetched:
            assert not re.match(r"(https?:)?//", address), f"{page.name} fetches {address}"


def test_links_into_the_repository_are_names_on_the_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r'href="(\.\./)+(server|bench|tests|deploy)/', page.read_text()), page


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "deploy/README.md"])
def test_links_of_pages_outside_the_site_are_files(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{name} links to {target}"
