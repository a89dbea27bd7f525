"""POST /v1/moderations."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request
from starlette.responses import Response

from edgellm.errors import GuardFailedError, ShuttingDownError
from guards import Turn
from serving.guarding import let_go
from serving.service import Service
from serving.streaming import run_until_disconnect
from serving.wire.guard import GuardReport
from serving.wire.moderations import ModerationRequest, ModerationResponse, ModerationResult, moderation_result

router = APIRouter()


async def _moderate(service: Service, request: ModerationRequest) -> ModerationResponse:
    if service.closing:
        raise ShuttingDownError("The server is shutting down")
    guarding = service.guarding
    results: list[ModerationResult] = []
    judgings = [guarding.judge([Turn("user", text)]) for text in request.texts]
    try:
        async with service.in_time(None, None):
            for judging in judgings:
                verdict = await judging
                if verdict is None:
                    raise GuardFailedError("The guard failed on this text; the server's log says more")
                guarding.metrics.count(verdict, "moderated")
                results.append(moderation_result(verdict, GuardReport.of(verdict, service.settings.guard_level)))
    finally:
        for judging in judgings:
            let_go(judging)
    model = f"edgellm-guard-{guarding.version}"
    return ModerationResponse(id=f"modr-{secrets.token_hex(12)}", model=model, results=results)


@router.post("/v1/moderations", response_model=ModerationResponse, summary="Judge texts")
async def moderations(body: ModerationRequest, http: Request) -> Response:
    """Whether texts should be answered, by the guard that also stands before chat and completions."""
    answer = await run_until_disconnect(http, _moderate(http.app.state.service, body))
    return Response(answer.to_json(), media_type="application/json")
