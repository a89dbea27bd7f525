"""/health and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from edgellm import __version__
from serving.service import Service
from serving.wire.health import Health

router = APIRouter()


@router.get("/health", response_model=Health, summary="Whether the server takes requests")
async def health(http: Request) -> Response:
    """200 with status "ok"; 503 once the server is shutting down. Needs no API key."""
    service: Service = http.app.state.service
    body = Health(status="shutting_down" if service.closing else "ok", version=__version__)
    body.models_loaded = [loaded.name for loaded in service.models.loaded()]
    return Response(body.to_json(), 503 if service.closing else 200, media_type="application/json")


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(http: Request) -> Response:
    """In the Prometheus text format."""
    body, content_type = http.app.state.service.metrics.render()
    return Response(body, headers={"content-type": content_type})
