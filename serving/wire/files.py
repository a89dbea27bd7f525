"""/v1/files: what is told of an uploaded file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from serving.wire.common import ResponseModel


class File(ResponseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="In Unix seconds.")
    filename: str
    purpose: str = Field(description="fine-tune, or fine-tune-results for what a job has written.")
    status: Literal["processed"] = "processed"


class FileList(ResponseModel):
    object: Literal["list"] = "list"
    data: list[File]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None

    null_sent = frozenset({"first_id", "last_id"})


class FileDeleted(ResponseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True
