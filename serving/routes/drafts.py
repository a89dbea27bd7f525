"""/v1/drafts: what drafting remembers of earlier answers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from serving.service import Service
from serving.wire.drafts import DraftsForgotten

router = APIRouter()


@router.delete("/v1/drafts", response_model=DraftsForgotten, summary="Forget what drafting has learned")
def forget(http: Request) -> Response:
    """Extension. Earlier answers and all that was learned from them, in memory and on disk, for every model."""
    service: Service = http.app.state.service
    service.forget_drafts()
    return Response(DraftsForgotten().to_json(), media_type="application/json")
