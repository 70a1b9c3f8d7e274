"""The synchronous client: one method for each call."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

import httpx

from polyadapt_client.errors import error_of
from polyadapt_client.types import (
    Adapter,
    Capabilities,
    Choice,
    Completion,
    Policy,
    Profile,
    Served,
    Tokenized,
    Use,
    Version,
    Workflow,
    WorkflowRun,
)

_PAGE = 100


class Polyadapt:
    """A connection to one server; use it as a context manager or close() it.

    Every method raises an ApiError for a refusal and httpx's exceptions for a broken connection.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float | None = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`base_url` is the root, without /v1; `transport` replaces the network in tests."""
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(
            base_url=base_url, headers=headers, timeout=timeout_s, transport=transport
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Polyadapt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ adapters
    def upload(
        self,
        name: str,
        source: Path | Mapping[str, bytes],
        *,
        description: str = "",
        tags: Sequence[str] = (),
        examples: Sequence[str] = (),
    ) -> Adapter:
        """Upload a PEFT directory, or its files by name, as the next version of `name`.

        The same bytes again give the version that they are. `examples` are requests that the
        adapter is for, see put_profile. Raises AdapterRejected with every problem, and ValueError
        when there is nothing to send.
        """
        about: dict[str, Any] = {"description": description, "tags": list(tags)}
        if examples:
            about["examples"] = list(examples)
        metadata = json.dumps(about)
        with contextlib.ExitStack() as stack:
            files = [
                ("files", (file_name, content)) for file_name, content in _contents(source, stack)
            ]
            if not files:
                raise ValueError(f"{source} holds no files; expected a PEFT adapter's directory")
            reply = self._http.post(
                "/v1/adapters", data={"name": name, "metadata": metadata}, files=files
            )
        return Adapter.of(_body(reply))

    def adapters(self, *, tag: str | None = None) -> Iterator[Adapter]:
        """Yield the newest version of every name, by name."""
        yield from map(Adapter.of, self._pages("/v1/adapters", {"tag": tag}))

    def adapter(self, name: str) -> Adapter:
        """Return an adapter by `name` or `name@version`; raises NotFound."""
        return Adapter.of(self._get(_path(name)))

    def versions(self, name: str) -> list[Adapter]:
        """Return all versions of a name, newest first; raises NotFound."""
        return [Adapter.of(item) for item in self._get(f"{_path(name)}/versions")["data"]]

    def delete(self, name: str, *, mode: Literal["drain", "now"] = "drain") -> list[int]:
        """Delete a name or `name@version` and return the versions that are gone.

        Returns when the last request has ended; `now` ends running requests.
        """
        reply = self._http.delete(_path(name), params={"mode": mode}, timeout=None)
        return list(_body(reply)["versions"])

    def load(self, name: str, *, pin: bool = False) -> Adapter:
        """Bring an adapter to the device; `pin` keeps it there."""
        return Adapter.of(_body(self._http.post(f"{_path(name)}/load", json={"pin": pin})))

    def unload(self, name: str) -> Adapter:
        """Release an adapter's memory once its running requests have ended; the name stays."""
        return Adapter.of(_body(self._http.post(f"{_path(name)}/unload", timeout=None)))

    # ------------------------------------------------------------------ workflows
    def create_workflow(
        self, name: str, definition: Mapping[str, Any], *, description: str = ""
    ) -> Workflow:
        """Make a workflow under a name that no adapter, workflow or base has."""
        body = {"name": name, "definition": definition, "description": description}
        return Workflow.of(_body(self._http.post("/v1/workflows", json=body)))

    def put_workflow(
        self, name: str, definition: Mapping[str, Any], *, description: str = ""
    ) -> Workflow:
        """Make a workflow, or replace the one of this name; runs under way do not change."""
        body = {"definition": definition, "description": description}
        return Workflow.of(_body(self._http.put(_workflow_path(name), json=body)))

    def workflows(self) -> Iterator[Workflow]:
        """Yield every workflow, by name."""
        yield from map(Workflow.of, self._pages("/v1/workflows", {}))

    def workflow(self, name: str) -> Workflow:
        """Return a workflow; raises NotFound."""
        return Workflow.of(self._get(_workflow_path(name)))

    def delete_workflow(self, name: str) -> None:
        """Delete a workflow; runs under way end as they began. Raises NotFound."""
        _body(self._http.delete(_workflow_path(name)))

    # ------------------------------------------------------------------ profiles and policies
    def put_profile(self, name: str, examples: Sequence[str] | None = None) -> Profile:
        """Say by examples which requests a name is for, so that the model "auto" finds it; without
        them its profile is made anew for the server's present base.
        """
        body = {} if examples is None else {"examples": list(examples)}
        return Profile.of(_body(self._http.put(f"{_path(name)}/profile", json=body, timeout=None)))

    def profile(self, name: str) -> Profile:
        """Return a name's profile; raises NotFound."""
        return Profile.of(self._get(f"{_path(name)}/profile"))

    def delete_profile(self, name: str) -> None:
        """Forget a name's profile: "auto" does not choose it any more; raises NotFound."""
        _body(self._http.delete(f"{_path(name)}/profile"))

    def put_policy(self, tenant: str, adapters: Sequence[Use | str]) -> Policy:
        """Have every request of a tenant served through these adapters too, in their present
        versions, from its next request on. For admins.
        """
        wanted = generation_fields(adapters)
        return Policy.of(_body(self._http.put(_policy_path(tenant), json=wanted)))

    def policy(self, tenant: str) -> Policy:
        """Return a tenant's policy; raises NotFound."""
        return Policy.of(self._get(_policy_path(tenant)))

    def policies(self) -> Iterator[Policy]:
        """Yield all policies, by tenant."""
        yield from map(Policy.of, self._pages("/v1/policies", {}))

    def delete_policy(self, tenant: str) -> None:
        """Remove a tenant's policy: its next request is served as it asks; raises NotFound."""
        _body(self._http.delete(_policy_path(tenant)))

    # ------------------------------------------------------------------ text
    def complete(
        self,
        prompt: str,
        *,
        model: str,
        adapters: Sequence[Use | str] | None = None,
        on_cold: str | None = None,
        cold_timeout_ms: int | None = None,
        **fields: Any,
    ) -> Completion:
        """Continue a text with several adapters at once; see generation_fields. The model "auto"
        has the server choose among those that have a profile.

        `fields` are the call's others, such as max_tokens and temperature. Chats, streams and
        several choices (`n`, `best_of`) are for OpenAI's client: ValueError. Raises Unavailable
        with on_cold "fail" and a cold adapter. A `model` that is a workflow answers the prompt as
        a question, and `workflow` says how.
        """
        if unfit := sorted({"stream", "n", "best_of"} & fields.keys()):
            raise ValueError(f"complete() returns one text; {unfit[0]} is for OpenAI's client")
        body = {"model": model, "prompt": prompt, **fields}
        body |= generation_fields(adapters, on_cold=on_cold, cold_timeout_ms=cold_timeout_ms)
        reply = _body(self._http.post("/v1/completions", json=body))
        (choice,) = reply["choices"]
        served = tuple(
            Served(
                name=s["name"],
                version=s["version"],
                digest=s["digest"],
                tier=s["tier"],
                load_ms=s["load_ms"],
                mandatory=bool(s.get("mandatory")),
                is_approximate=bool(s.get("approximate")),
            )
            for s in reply["adapters"]
        )
        run = reply.get("workflow")
        chosen = reply.get("choice")
        return Completion(
            choice["text"],
            choice["finish_reason"],
            served,
            None if run is None else WorkflowRun.of(run),
            None if chosen is None else Choice.of(chosen),
        )

    # ------------------------------------------------------------------ tokens
    def tokenize(self, prompt: str, *, model: str | None = None) -> Tokenized:
        """Return the ids of a text, with what the tokenizer puts around it."""
        reply = _body(self._http.post("/tokenize", json={"prompt": prompt, "model": model}))
        return Tokenized(tuple(reply["tokens"]), reply["max_model_len"])

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """Return the text of ids, with special tokens shown."""
        reply = self._http.post("/detokenize", json={"tokens": list(tokens), "model": model})
        return str(_body(reply)["prompt"])

    # ------------------------------------------------------------------ the server
    def is_healthy(self) -> bool:
        """Whether the engine advances or is idle."""
        return self._http.get("/health").status_code == 200

    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._http.get("/ready").status_code == 200

    def version(self) -> Version:
        """Return what the server is."""
        body = self._get("/version")
        return Version(
            version=body["version"],
            model=body["model"],
            base_digest=body["base_digest"],
            device=body["device"],
            dtype=body["dtype"],
            strategy=body["strategy"],
        )

    def capabilities(self) -> Capabilities:
        """Return what the server serves, and how much of it."""
        body = self._get("/v1/capabilities")
        return Capabilities(
            model=body["model"],
            families=tuple(family["name"] for family in body["families"]),
            limits=dict(body["limits"]),
            features=dict(body["features"]),
        )

    def _pages(self, path: str, params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the items of a list, page by page; parameters that are None are not sent."""
        after: str | None = None
        while True:
            wanted = {**params, "limit": _PAGE, "after": after}
            page = self._get(path, {key: v for key, v in wanted.items() if v is not None})
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["last_id"]

    def _get(self, path: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return _body(self._http.get(path, params=params))


def generation_fields(
    adapters: Sequence[Use | str] | None = None,
    *,
    on_cold: str | None = None,
    cold_timeout_ms: int | None = None,
) -> dict[str, Any]:
    """Return the fields that OpenAI's calls do not have, for the `extra_body` of its client.

    `adapters` are served together, without merging, in place of the adapter that `model` names; []
    is the base. `on_cold` is "wait", "base", "fail" or "fallback:<name>".
    """
    body: dict[str, Any] = {}
    if adapters is not None:
        uses = [Use(adapter) if isinstance(adapter, str) else adapter for adapter in adapters]
        body["adapters"] = [use.body for use in uses]
    if on_cold is not None:
        body["on_cold"] = on_cold
    if cold_timeout_ms is not None:
        body["cold_timeout_ms"] = cold_timeout_ms
    return body


def _workflow_path(name: str) -> str:
    return f"/v1/workflows/{quote(name, safe='')}"


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='@')}"


def _policy_path(tenant: str) -> str:
    return f"/v1/policies/{quote(tenant, safe='')}"


def _body(reply: httpx.Response) -> dict[str, Any]:
    if reply.status_code >= 400:
        raise error_of(reply)
    body: dict[str, Any] = reply.json()
    return body


def _contents(
    source: Path | Mapping[str, bytes], stack: contextlib.ExitStack
) -> Iterator[tuple[str, Any]]:
    """Yield each file's name and bytes, or its open file; a directory is read one folder deep."""
    if not isinstance(source, Path):
        yield from source.items()
        return
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if path.is_file() and len(relative.parts) <= 2:
            yield relative.as_posix(), stack.enter_context(path.open("rb"))
