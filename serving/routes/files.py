"""/v1/files: upload, list, show, read and delete the files of fine-tuning jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.responses import Response, StreamingResponse

from edgellm.errors import RequestError, ShuttingDownError
from edgellm.tune.files import StoredFile
from serving.faults import shown
from serving.multipart import UploadForm
from serving.service import Service
from serving.wire.files import File, FileDeleted, FileList

router = APIRouter()
LIST_MAX = 10_000
_PIECE_BYTES = 1 << 20  # parsed, hashed and written in one go, in a thread
_PURPOSE: Literal["fine-tune"] = "fine-tune"
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSONL, at most --max-file bytes.",
                        },
                        "purpose": {"type": "string", "enum": [_PURPOSE]},
                    },
                }
            }
        },
    }
}


def _wire(file: StoredFile) -> File:
    return File(id=file.id, bytes=file.bytes, created_at=file.created_at, filename=file.filename, purpose=file.purpose)


@router.post("/v1/files", response_model=File, summary="Upload a file", openapi_extra=_FORM)
async def upload_file(http: Request) -> Response:
    """Its examples are checked when a job is created with it."""
    service: Service = http.app.state.service
    if service.closing:
        raise ShuttingDownError("The server is shutting down")
    files = await asyncio.to_thread(service.tuning.files)
    begin = partial(files.writer, service.settings.max_file_bytes)
    with UploadForm(http.headers.get("content-type", ""), begin) as form:
        async for piece in _pieces(http):
            await asyncio.to_thread(form.feed, piece)
        writer = form.end()
        _check(form.fields)
        if not writer.bytes:
            raise RequestError("The file is empty", "file")
        stored = await asyncio.to_thread(files.keep, writer, form.filename, _PURPOSE)
    return Response(_wire(stored).to_json(), media_type="application/json")


async def _pieces(http: Request) -> AsyncIterator[bytes]:
    """The body in pieces of about _PIECE_BYTES."""
    held = bytearray()
    async for data in http.stream():
        held.extend(data)
        if len(held) >= _PIECE_BYTES:
            yield bytes(held)
            held.clear()
    yield bytes(held)


def _check(fields: dict[str, str]) -> None:
    purpose = fields.get("purpose")
    if purpose is None:
        raise RequestError("Missing required parameter: 'purpose'.", "purpose")
    if purpose != _PURPOSE:
        raise RequestError(f"Invalid value for 'purpose': must be '{_PURPOSE}', not {shown(purpose)}.", "purpose")
    if any(name.partition("[")[0] == "expires_after" for name in fields):
        raise RequestError("Files do not expire here; delete them instead", "expires_after")


@router.get("/v1/files", response_model=FileList, summary="List the files")
def list_files(
    http: Request,
    after: Annotated[str | None, Query(description="Begin after the file of this id.")] = None,
    limit: Annotated[int, Query(ge=1, le=LIST_MAX)] = LIST_MAX,
    order: Annotated[Literal["asc", "desc"], Query(description="By age; desc: the newest first.")] = "desc",
    purpose: Annotated[str | None, Query(description="Only files of this purpose.")] = None,
) -> Response:
    """Uploaded files, and the results that jobs have written."""
    service: Service = http.app.state.service
    page = service.tuning.files().list(after, limit, order, purpose)
    data = [_wire(file) for file in page.items]
    body = FileList(data=data, has_more=page.has_more)
    if data:
        body.first_id, body.last_id = data[0].id, data[-1].id
    return Response(body.to_json(), media_type="application/json")


@router.get("/v1/files/{file_id}", response_model=File, summary="One file")
def show_file(file_id: str, http: Request) -> Response:
    """404 `file_not_found` if there is none of that id."""
    service: Service = http.app.state.service
    return Response(_wire(service.tuning.files().get(file_id)).to_json(), media_type="application/json")


@router.get("/v1/files/{file_id}/content", response_class=StreamingResponse, summary="The content of a file")
def read_file(file_id: str, http: Request) -> Response:
    """Byte for byte as it was uploaded or written."""
    service: Service = http.app.state.service
    files = service.tuning.files()
    stored = files.get(file_id)
    headers = {
        "content-length": str(stored.bytes),
        "content-disposition": f"attachment; filename*=utf-8''{quote(stored.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_content(files.open(file_id)), headers=headers, media_type="application/octet-stream")


async def _content(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
            yield piece


@router.delete("/v1/files/{file_id}", response_model=FileDeleted, summary="Delete a file")
def delete_file(file_id: str, http: Request) -> Response:
    """Jobs that still need it fail."""
    service: Service = http.app.state.service
    service.tuning.files().delete(file_id)
    return Response(FileDeleted(id=file_id).to_json(), media_type="application/json")
