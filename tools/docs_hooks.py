"""What mkdocs is told besides mkdocs.yml: the pages made from code, and what the repository adds.

Reference pages are made at every build, so that none can be out of date. Links of a page that leave
docs/ name files of the repository, which the site does not hold: they become plain names.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1]))  # mkdocs runs this file by its path

from tools.docs_reference import PAGES

_LEAVING = re.compile(r"(!?)\[([^\]]*)\]\((?:\.\./)+([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from code, and list what the nav does not name."""
    for name, make in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    named = set(_named(config.nav or []))
    rest = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri not in named)
    if rest:
        config.nav = [*(config.nav or []), {"More": rest}]
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page without links to files that are not on the site."""
    return _LEAVING.sub(_plain, markdown)


def _plain(link: re.Match[str]) -> str:
    label, path = link.group(2), link.group(3)
    return label if path in label else f"{label} (`{path}`)"


def _named(nav: Any) -> list[str]:
    """Return the pages that a nav names, at any depth."""
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [page for item in items for page in _named(item)]
