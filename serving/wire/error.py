"""OpenAI's error envelope."""

from __future__ import annotations

from pydantic import Field

from serving.wire.common import ResponseModel


class ErrorBody(ResponseModel):
    message: str = Field(description="One readable sentence.")
    type: str = Field(description="Whose fault it is: invalid_request_error or server_error.")
    param: str | None = Field(default=None, description="The field at fault, such as messages[0].content.")
    code: str | None = Field(default=None, description="A stable name for programs to look at.")

    null_sent = frozenset({"param", "code"})


class ErrorEnvelope(ResponseModel):
    error: ErrorBody
