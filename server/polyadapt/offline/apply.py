"""Brings a running server to a list of adapters in a file: plan, then reconcile entry by entry.

A client of the HTTP API: the server validates and stores as for every upload. Torch-free. Knows the
tags by which it finds again what it made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx
import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from polyadapt.adapters.registry import FILES
from polyadapt.errors import StartupError
from polyadapt_store.manifest import NAME_PATTERN, FileEntry, digest_of, is_read, list_shallow

# On everything that apply made: only that is ever pruned.
MANAGED = "applied"
_SOURCE = "applied-from-"  # and 12 hex digits of the URI's sha256
_PAGE = 1000
_POLL_S = 1.0

Action = Literal["create", "update", "unchanged", "delete", "failed"]


class Entry(BaseModel):
    """One adapter as the file says it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=NAME_PATTERN)
    source: str = Field(min_length=1)  # a directory beside the file, or a URI the server fetches
    description: str = ""
    tags: tuple[str, ...] = ()

    @property
    def is_uri(self) -> bool:
        """Whether the server has to fetch it."""
        return "://" in self.source

    @property
    def all_tags(self) -> list[str]:
        """Its own, and those that apply finds it by."""
        made = [MANAGED]
        if self.is_uri:
            made.append(_SOURCE + hashlib.sha256(self.source.encode()).hexdigest()[:12])
        return sorted({*self.tags, *made})


@dataclass(frozen=True, slots=True)
class Step:
    """What is done about one name, and why; what has been done, once it was."""

    name: str
    action: Action
    why: str
    entry: Entry | None = field(default=None, compare=False)


class Refused(Exception):
    """The server refused a call; the text is its message."""


def read_entries(file: Path) -> tuple[list[Entry], list[Step]]:
    """Return the entries that can be read, and a failed step for each that cannot.

    Raises StartupError when the file as a whole is no list of adapters.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"cannot read {file}: {error}") from None
    except yaml.YAMLError as error:
        raise StartupError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    items = found.get("adapters") if isinstance(found, dict) else None
    if not isinstance(items, list) or set(found) != {"adapters"}:
        raise StartupError(f"{file} is no mapping of the one key `adapters` to a list")
    entries, failed = [], []
    for number, item in enumerate(items):
        label = str(item.get("name", "")) if isinstance(item, dict) else ""
        try:
            entries.append(Entry.model_validate(item))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            why = f"adapters[{number}]{'.' if where else ''}{where}: {first['msg']}"
            failed.append(Step(label or f"adapters[{number}]", "failed", why))
    counts = Counter(entry.name for entry in entries)
    twice = {name for name, count in counts.items() if count > 1}
    failed += [Step(name, "failed", "the name is given twice") for name in sorted(twice)]
    return [entry for entry in entries if entry.name not in twice], failed


def plan(
    entries: Sequence[Entry], failed: Sequence[Step], server: Server, root: Path, *, prune: bool
) -> list[Step]:
    """Return what has to be done, in the file's order and deletions last. Changes nothing.

    root: where relative directories begin. What the server does not say is a failed step.
    """
    steps = list(failed)
    for entry in entries:
        try:
            steps.append(_plan_one(entry, server, root))
        except (Refused, OSError) as error:
            steps.append(Step(entry.name, "failed", str(error), entry))
    if prune:
        # What cannot be read may be meant to stay: it is not taken for absent.
        kept = {entry.name for entry in entries} | {step.name for step in failed}
        try:
            managed = server.managed()
        except Refused as error:
            managed = []
            steps.append(Step("--prune", "failed", f"what apply made is not known: {error}"))
        for name in managed:
            if name not in kept:
                steps.append(Step(name, "delete", "apply made it, and the file does not name it"))
    return steps


def carry_out(step: Step, server: Server, root: Path) -> Step:
    """Do what a step says; return it with what came of it, "failed" with the server's reason."""
    try:
        if step.action == "delete":
            server.delete(step.name)
            return Step(step.name, "delete", "deleted")
        if step.action in ("create", "update") and step.entry is not None:
            made = server.put(step.entry, root)
            return Step(step.name, step.action, f"{made['name']}@{made['version']}", step.entry)
    except (Refused, OSError) as error:
        return Step(step.name, "failed", str(error), step.entry)
    return step


class Server:
    """The calls of a running server that apply makes."""

    def __init__(self, client: httpx.Client, *, fetch_timeout_s: float = 900.0) -> None:
        self._client = client
        self._fetch_timeout_s = fetch_timeout_s

    def find(self, name: str) -> dict[str, Any] | None:
        """Return the adapter's newest version; None if there is none."""
        return self._call("GET", f"/v1/adapters/{quote(name, safe='')}", missing_is_none=True)

    def managed(self) -> list[str]:
        """Return the names that apply has made."""
        names: list[str] = []
        params: dict[str, Any] = {"tag": MANAGED, "limit": _PAGE}
        while True:
            page = self._call("GET", "/v1/adapters", params=params)
            assert page is not None
            names += [str(adapter["name"]) for adapter in page["data"]]
            if not page["has_more"]:
                return names
            params["after"] = page["last_id"]

    def put(self, entry: Entry, root: Path) -> dict[str, Any]:
        """Upload a directory, or have a URI fetched; return the adapter."""
        about = {"description": entry.description, "tags": entry.all_tags}
        if entry.is_uri:
            return self._fetch(entry, about)
        directory = root / entry.source
        with contextlib.ExitStack() as stack:
            files = [
                ("files", (name, stack.enter_context((directory / name).open("rb"))))
                for name in _names(directory)
            ]
            form = {"name": entry.name, "metadata": json.dumps(about)}
            made = self._call("POST", "/v1/adapters", data=form, files=files)
        assert made is not None
        return made

    def delete(self, name: str) -> None:
        """Delete a name; a name that is gone already is what was wanted."""
        self._call("DELETE", f"/v1/adapters/{quote(name, safe='')}", missing_is_none=True)

    def _fetch(self, entry: Entry, about: dict[str, Any]) -> dict[str, Any]:
        body = {"name": entry.name, "source": {"uri": entry.source}, **about}
        job = self._call("POST", "/v1/adapters", json=body)
        until = time.monotonic() + self._fetch_timeout_s
        while job is not None and job["status"] == "validating":
            if time.monotonic() > until:
                raise Refused(f"{entry.source} was not fetched in {self._fetch_timeout_s:g} s")
            time.sleep(_POLL_S)
            job = self._call("GET", f"/v1/imports/{job['id']}")
        assert job is not None
        if job["status"] != "ready":
            raise Refused(_message(job))
        found = self.find(entry.name)
        assert found is not None
        return found

    def _call(
        self, method: str, path: str, *, missing_is_none: bool = False, **options: Any
    ) -> dict[str, Any] | None:
        try:
            reply = self._client.request(method, path, **options)
        except httpx.TransportError as error:
            url = self._client.base_url
            raise Refused(f"the server at {url} does not answer: {error}") from None
        if reply.status_code == 404 and missing_is_none:
            return None
        try:
            body = reply.json()
        except ValueError:
            body = {}
        if reply.status_code >= 400:
            raise Refused(f"{reply.status_code}: {_message(body)}")
        assert isinstance(body, dict)
        return body


def _plan_one(entry: Entry, server: Server, root: Path) -> Step:
    found = server.find(entry.name)
    if entry.is_uri:
        if found is None:
            return Step(entry.name, "create", f"from {entry.source}", entry)
        if set(entry.all_tags) <= set(found["tags"]):
            return Step(entry.name, "unchanged", f"made from {entry.source}", entry)
        return Step(entry.name, "update", f"from {entry.source}", entry)
    digest = directory_digest(root / entry.source)
    if found is None:
        return Step(entry.name, "create", digest, entry)
    if found["digest"] == digest:
        drifted = [
            what
            for what, is_same in (
                ("description", found["description"] == entry.description),
                ("tags", set(entry.all_tags) <= set(found["tags"])),
            )
            if not is_same
        ]
        note = f"; its {' and '.join(drifted)} stay as first uploaded" if drifted else ""
        return Step(entry.name, "unchanged", f"{digest}{note}", entry)
    return Step(entry.name, "update", f"{found['digest']} -> {digest}", entry)


def _names(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is no directory; give that of an adapter, or a URI")
    names = list_shallow(directory)
    if not names:
        raise FileNotFoundError(f"{directory} holds no files")
    # A mounted ConfigMap or Secret keeps its files a second time below ..data.
    return [name for name in names if not name.startswith("..")]


def directory_digest(directory: Path) -> str:
    """The digest that the server gives what it stores of the directory."""
    entries = []
    for name in _names(directory):
        if not is_read(name, FILES):
            continue
        path = directory / name  # links are followed, as in a mounted volume
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append(FileEntry(name, path.stat().st_size, digest))
    return digest_of(entries)


def _message(body: dict[str, Any]) -> str:
    error = body.get("error") or {}
    problems = "; ".join(problem["message"] for problem in error.get("problems", []))
    return problems or str(error.get("message") or "no reason was given")
