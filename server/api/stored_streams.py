"""GET and DELETE /v1/streams/{stream_id}: continue a resumable stream, or drop it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response

from ..http.resumption import ResumableStream
from ..http.route_docs import answers, errors, event_stream
from ..http.sse import Pace
from ..requests.state import state_of
from .answers import DELETED

router = APIRouter(tags=["streams"])

LastEventId = Annotated[str | None, Header(alias="Last-Event-ID")]


@router.get(
    "/v1/streams/{stream_id}",
    response_model=None,
    response_class=Response,
    responses={
        **event_stream(),
        204: {"description": "The client has received every event"},
        **errors(400, 404, 410),
    },
)
async def resume_stream(
    request: Request, stream_id: str, last_event_id: LastEventId = None
) -> Response:
    """Continue a stream after the event named by Last-Event-ID, or from its start.

    Answer 204 if the client has received every event.
    """
    state = state_of(request)
    if (answer := state.siblings.forward(request, stream_id)) is not None:
        return answer
    stream = state.streams.find(stream_id, state.keys.owner(request))
    position = stream.position_after(last_event_id)
    if stream.ended and position == stream.end_number:
        return Response(status_code=204)
    return ResumableStream(
        state.streams,
        stream,
        position,
        request_id=request.state.request_id,
        pace=Pace.of(state.settings),
        headers={},
    )


@router.delete(
    "/v1/streams/{stream_id}",
    response_model=None,
    responses={**answers(DELETED), **errors(400, 404, 410)},
)
async def drop_stream(request: Request, stream_id: str) -> Response:
    """Abort the stream if it is still running, and forget it."""
    state = state_of(request)
    if (answer := state.siblings.forward(request, stream_id)) is not None:
        return answer
    stream = state.streams.find(stream_id, state.keys.owner(request))
    state.streams.drop(stream, "its client deleted it")
    return JSONResponse({"id": stream_id, "object": "stream.deleted", "deleted": True})
