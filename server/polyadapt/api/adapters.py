"""Routes about adapters: upload, look, load, unload, delete; and vLLM's two calls."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

import pydantic
from fastapi import APIRouter, Body, Depends, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.datastructures import FormData, UploadFile

from polyadapt.api.access import RequiredScope
from polyadapt.api.idempotency import fingerprint_of, once
from polyadapt.api.replies import json_reply
from polyadapt.api.routing import add_route
from polyadapt.api.schemas.adapters import (
    AdapterList,
    AdapterObject,
    DeletedAdapter,
    ImportObject,
    ImportRequest,
    LoadLoraRequest,
    LoadRequest,
    UnloadLoraRequest,
    UploadMetadata,
)
from polyadapt.api.services import Services, principal_of, services_of
from polyadapt.errors import (
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PayloadTooLarge,
    UnsupportedField,
    UnsupportedMediaType,
)
from polyadapt.tasks.directory import DeleteMode, UploadedFile
from polyadapt.tasks.model_name import NamedAdapter, parse_adapter
from polyadapt_store.manifest import NAME_PATTERN, AdapterRecord
from polyadapt_store.store import check_name

logger = logging.getLogger(__name__)

Has = Annotated[Services, Depends(services_of)]
AdapterPath = Annotated[str, Path(max_length=200, description="an adapter's name, or name@version")]

_MAX_FIELD_BYTES = 64 << 10
_MAX_FIELDS = 8
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with its own definitions in place of the references to them."""
    definitions = schema.pop("$defs", {})

    def replace(value: Any) -> Any:
        if isinstance(value, list):
            return [replace(item) for item in value]
        if not isinstance(value, dict):
            return value
        if (reference := value.get("$ref")) is not None:
            return replace(definitions[reference.removeprefix("#/$defs/")])
        return {key: replace(item) for key, item in value.items()}

    inlined: dict[str, Any] = replace(schema)
    return inlined


_UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["name", "files"],
                "properties": {
                    "name": {"type": "string", "pattern": NAME_PATTERN},
                    "files": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "the files of a PEFT directory; a file name may hold one "
                        "folder",
                    },
                    "metadata": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": UploadMetadata.model_json_schema(),
                    },
                },
            }
        },
        "application/json": {"schema": _inlined(ImportRequest.model_json_schema())},
    },
}


def add_routes(router: APIRouter) -> None:
    """Add this module's routes."""
    write: RequiredScope = "adapters:write"
    read: RequiredScope = "adapters:read"
    add_route(
        router, "POST", "/v1/adapters", upload_adapter, needs=write, reply=AdapterObject,
        status=201, also=200, errors=(400, 409, 413, 415, 422, 429, 499, 504),
        request_body=_UPLOAD_BODY, more={202: ImportObject},
    )  # fmt: skip
    add_route(
        router, "GET", "/v1/imports/{import_id}", get_import,
        needs=read, reply=ImportObject, errors=(404,),
    )  # fmt: skip
    add_route(
        router, "GET", "/v1/adapters", list_adapters, needs=read, reply=AdapterList, errors=(400,)
    )
    add_route(
        router, "GET", "/v1/adapters/{name}", get_adapter,
        needs=read, reply=AdapterObject, errors=(404,),
    )  # fmt: skip
    add_route(
        router, "GET", "/v1/adapters/{name}/versions", list_versions,
        needs=read, reply=AdapterList, errors=(404,),
    )  # fmt: skip
    add_route(
        router, "DELETE", "/v1/adapters/{name}", delete_adapter,
        needs=write, reply=DeletedAdapter, errors=(400, 404, 409),
    )  # fmt: skip
    add_route(
        router, "POST", "/v1/adapters/{name}/load", load_adapter,
        needs=write, reply=AdapterObject, errors=(404, 422), has_body=True,
    )  # fmt: skip
    add_route(
        router, "POST", "/v1/adapters/{name}/unload", unload_adapter,
        needs=write, reply=AdapterObject, errors=(404,),
    )  # fmt: skip
    add_route(
        router, "POST", "/v1/load_lora_adapter", load_lora_adapter,
        needs=write, reply=None, errors=(404, 409, 422), has_body=True, content=_TEXT,
    )  # fmt: skip
    add_route(
        router, "POST", "/v1/unload_lora_adapter", unload_lora_adapter,
        needs=write, reply=None, errors=(404, 409), has_body=True, content=_TEXT,
    )  # fmt: skip


async def upload_adapter(request: Request, services: Has) -> Response:
    """Store, validate and publish a PEFT directory: 201, or 200 when these bytes are known. With a
    source instead of files it is fetched: 202, and `GET /v1/imports/{id}` says what came of it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await _import_adapter(request, services)
    if kind != "multipart/form-data":
        raise UnsupportedMediaType(
            f"the body's type is {kind[:100]!r}, expected multipart/form-data or application/json"
        )
    limits = services.config.limits
    async with (
        services.uploads,
        request.form(
            max_files=limits.max_upload_files,
            max_fields=_MAX_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        ) as form,
    ):
        name, metadata, files = _read_form(form)
        check_name(name)

        async def make() -> Response:
            tenant = principal_of(request).tenant
            record, is_new = await services.directory.upload(
                tenant,
                name,
                files,
                description=metadata.description,
                tags=metadata.tags,
                new_profile=services.auto.new_profile(tenant, name, metadata.examples),
            )
            return json_reply(_object(services, record), status=201 if is_new else 200)

        async def fingerprint() -> str:
            hashes = await asyncio.to_thread(_hash_files, files)
            return fingerprint_of((name, metadata.model_dump_json(), *hashes))

        return await once(request, services, fingerprint, make)


async def _import_adapter(request: Request, services: Services) -> Response:
    body = _read_import(await _small_body(request))

    async def make() -> Response:
        tenant = principal_of(request).tenant
        job = await services.importer.begin(
            tenant,
            body.name,
            body.source.uri,
            description=body.description,
            tags=body.tags,
            new_profile=services.auto.new_profile(tenant, body.name, body.examples),
        )
        where = {"location": f"/v1/imports/{job.id}"}
        return json_reply(ImportObject.of(job), status=202, headers=where)

    async def fingerprint() -> str:
        return body.model_dump_json()

    return await once(request, services, fingerprint, make)


async def get_import(
    request: Request, services: Has, import_id: Annotated[str, Path(max_length=200)]
) -> Response:
    """Say what came of an adapter that was to be fetched; known for a day."""
    found = await services.importer.get(principal_of(request).tenant, import_id)
    return json_reply(ImportObject.of(found))


async def list_adapters(
    request: Request,
    services: Has,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(max_length=200)] = None,
    status: Annotated[Literal["ready", "revoked"], Query()] = "ready",
    tag: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """List the newest version of every name, by name; the next page begins `after` `last_id`."""
    tenant = principal_of(request).tenant
    page = await asyncio.to_thread(
        services.store.list, tenant, limit=limit, after=after, status=status, tag=tag
    )
    return json_reply(_list(services, page.records, has_more=page.has_more))


async def get_adapter(request: Request, services: Has, name: AdapterPath) -> Response:
    """Return the newest version of a name, or the version after `@`, with each server's state."""
    named = _named(name)
    record = await asyncio.to_thread(
        services.store.resolve, principal_of(request).tenant, named.name, named.version
    )
    states = await asyncio.to_thread(services.replicas.states, record.digest)
    residency = services.directory.residency(record)
    return json_reply(AdapterObject.of(record, residency, states))


async def list_versions(request: Request, services: Has, name: AdapterPath) -> Response:
    """List all versions of a name, newest first."""
    tenant = principal_of(request).tenant
    records = await asyncio.to_thread(services.store.versions, tenant, _named(name).name)
    return json_reply(_list(services, records, has_more=False))


async def delete_adapter(
    request: Request,
    services: Has,
    name: AdapterPath,
    mode: Annotated[DeleteMode, Query()] = "drain",
) -> Response:
    """Delete a name or a version; answers when its requests have ended and its bytes are gone."""
    named = _named(name)
    records = await services.directory.delete(
        principal_of(request).tenant, named.name, named.version, mode
    )
    versions = sorted(record.version for record in records)
    return json_reply(DeletedAdapter(name=named.name, versions=versions))


async def load_adapter(
    request: Request,
    services: Has,
    name: AdapterPath,
    body: Annotated[LoadRequest | None, Body()] = None,
) -> Response:
    """Bring an adapter to the device; `pin` keeps it there."""
    _named(name)
    record = await services.directory.load(
        principal_of(request).tenant, name, is_pinned=body is not None and body.pin
    )
    return json_reply(_object(services, record))


async def unload_adapter(request: Request, services: Has, name: AdapterPath) -> Response:
    """Release an adapter's memory once its running requests have ended; the name stays."""
    _named(name)
    record = await services.directory.unload(principal_of(request).tenant, name)
    return json_reply(_object(services, record))


async def load_lora_adapter(
    request: Request, body: Annotated[LoadLoraRequest, Body()], services: Has
) -> Response:
    """Register an adapter from a folder below one of the operator's adapter roots."""
    tenant = principal_of(request).tenant
    try:
        await asyncio.to_thread(services.store.resolve, tenant, body.lora_name)
        exists = True
    except ModelNotFound:
        exists = False
    if exists and not body.load_inplace:
        raise InvalidRequest(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the "
            "adapter in place, set 'load_inplace' to True.",
            param="lora_name",
        )
    folder = await asyncio.to_thread(
        _allowed_folder, body.lora_path, services.config.server.adapter_roots
    )
    await services.directory.register_directory(
        tenant,
        body.lora_name,
        folder,
        new_profile=services.auto.new_profile(tenant, body.lora_name, ()),
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_lora_adapter(
    request: Request, body: Annotated[UnloadLoraRequest, Body()], services: Has
) -> Response:
    """Delete an adapter's name; its running requests end first."""
    named = _named(body.lora_name)
    await services.directory.delete(
        principal_of(request).tenant, named.name, named.version, "drain"
    )
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _small_body(request: Request) -> bytes:
    """Read a JSON body where a larger one of another kind would be allowed too."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FIELD_BYTES:
            raise PayloadTooLarge(f"a JSON body has at most {_MAX_FIELD_BYTES} bytes here")
    return body


def _read_import(body: bytes) -> ImportRequest:
    try:
        return ImportRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:64]
        kind = UnsupportedField if first["type"] == "extra_forbidden" else InvalidRequest
        raise kind(f"{where or 'the body'}: {first['msg']}", param=where or None) from None


def _hash_files(files: list[UploadedFile]) -> list[str]:
    """Return each file's name and hash; they are read from the beginning afterwards."""
    found = []
    for file in files:
        digest = hashlib.sha256()
        while chunk := file.content.read(1 << 20):
            digest.update(chunk)
        file.content.seek(0)
        found += [file.name, digest.hexdigest()]
    return found


def _read_form(form: FormData) -> tuple[str, UploadMetadata, list[UploadedFile]]:
    """Return name, metadata and files of an upload; raises InvalidRequest for anything else."""
    names: list[str] = []
    metadata = UploadMetadata()
    files: list[UploadedFile] = []
    for field, value in form.multi_items():
        if field == "files" and isinstance(value, UploadFile):
            files.append(UploadedFile(value.filename or "", value.file))
        elif field == "name" and isinstance(value, str):
            names.append(value)
        elif field == "metadata" and isinstance(value, str):
            metadata = _read_metadata(value)
        elif field in ("files", "name", "metadata"):
            raise InvalidRequest(
                "files are sent with a file name, name and metadata without one", param=field
            )
        else:
            raise UnsupportedField(
                f"the form field {field[:64]!r} is not known; expected name, files, metadata",
                param=field[:64],
            )
    if len(names) != 1:
        raise InvalidRequest(f"{len(names)} fields `name`, expected one", param="name")
    if not files:
        raise InvalidRequest("no file was sent; send a PEFT directory's as `files`", param="files")
    return names[0], metadata, files


def _read_metadata(text: str) -> UploadMetadata:
    try:
        return UploadMetadata.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:64]
        place = f"metadata.{where}" if where else "metadata"
        raise InvalidRequest(f"{place}: {first['msg']}", param="metadata") from None


def _allowed_folder(path: str, roots: tuple[FilePath, ...]) -> FilePath:
    """Return the folder behind `path`; raises Forbidden unless it lies below an allowed root."""
    if not roots:
        raise Forbidden(
            "loading from a path is off; the operator allows folders with --adapter-root",
            param="lora_path",
        )
    if "\0" in path:
        raise InvalidRequest("lora_path holds a null character", param="lora_path")
    for root in roots:
        folder = (root / path).resolve()  # an absolute path replaces the root and is judged alike
        if folder.is_relative_to(root.resolve()):
            if folder.is_dir():
                return folder
            raise NotFound("lora_path is no folder below an allowed root", param="lora_path")
    raise Forbidden("lora_path lies outside the folders that are allowed", param="lora_path")


def _named(text: str) -> NamedAdapter:
    named = parse_adapter(text)
    if named is None:
        raise ModelNotFound(
            f"no adapter {text[:200]!r}; GET /v1/adapters lists what there is", param="name"
        )
    return named


def _object(services: Services, record: AdapterRecord) -> AdapterObject:
    return AdapterObject.of(record, services.directory.residency(record))


def _list(services: Services, records: tuple[AdapterRecord, ...], *, has_more: bool) -> AdapterList:
    data = [_object(services, record) for record in records]
    return AdapterList(
        data=data,
        has_more=has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )
