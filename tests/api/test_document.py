"""The OpenAPI document: valid JSON Schema references, complete statuses, no foreign errors."""

from __future__ import annotations

from typing import Any

import pytest
from tests.api.conftest import Server

from polyadapt import errors
from polyadapt.api.routing import ScopedRoute

pytestmark = pytest.mark.anyio


async def document(server: Server) -> dict[str, Any]:
    body: dict[str, Any] = (await server.client.get("/openapi.json")).json()
    return body


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        found = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return found.union(*map(references, value.values()))
    if isinstance(value, list):
        return set().union(*map(references, value))
    return set()


async def test_every_reference_is_defined(server: Server) -> None:
    body = await document(server)
    defined = {f"#/components/schemas/{name}" for name in body["components"]["schemas"]}
    assert references(body) <= defined
    assert "HTTPValidationError" not in str(body)


async def test_every_operation_declares_its_errors_in_our_envelope(server: Server) -> None:
    body = await document(server)
    envelope = {"$ref": "#/components/schemas/ErrorReply"}
    num_operations = 0
    for path, methods in body["paths"].items():
        for operation in methods.values():
            num_operations += 1
            statuses = operation["responses"]
            assert {"403", "500"} <= set(statuses), path
            if operation["x-required-scope"] != "public":
                assert {"401", "503"} <= set(statuses), path
            if "requestBody" in operation:
                assert {"400", "413", "415"} <= set(statuses), path
            if any(p["in"] == "query" for p in operation.get("parameters", [])):
                assert "400" in statuses, path
            for status, answer in statuses.items():
                if int(status) >= 400:
                    assert answer["content"]["application/json"]["schema"] == envelope
    assert num_operations == sum(isinstance(r, ScopedRoute) for r in server.app.routes)


async def test_generation_declares_every_error_that_can_end_it(server: Server) -> None:
    body = await document(server)
    for path in ("/v1/chat/completions", "/v1/completions"):
        answers = body["paths"][path]["post"]["responses"]
        classes = [errors.ModelNotFound, errors.QueueFull, errors.RequestCancelled,
                   errors.AdapterDeleted, errors.NumericalError, errors.AdapterUnavailable,
                   errors.RequestTimeout, errors.ContextLengthExceeded,
                   errors.AdapterCold]  # fmt: skip
        assert {str(cls.status) for cls in classes} <= set(answers)
        assert {"application/json", "text/event-stream"} == set(answers["200"]["content"])
        assert "x-adapter-digest" in answers["200"]["headers"]


async def test_an_upload_is_described(server: Server) -> None:
    operation = (await document(server))["paths"]["/v1/adapters"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]) == {"name", "files", "metadata"}
    assert {"200", "201", "422"} <= set(operation["responses"])


async def test_requests_are_closed_and_bounded(server: Server) -> None:
    schemas = (await document(server))["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "ChatMessage", "AdapterChoice"):
        assert schemas[name]["additionalProperties"] is False
    fields = schemas["ChatRequest"]["properties"]
    assert fields["adapters"]["anyOf"][0]["maxItems"] == 4
    assert fields["n"]["anyOf"][0] == {"type": "integer", "maximum": 128, "minimum": 1}
