"""GET and DELETE /v1/streams/{stream_id}: the rest of a stream that was asked to be resumable."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..http.resumption import ResumableStream
from ..requests.state import state_of

router = APIRouter()


@router.get("/v1/streams/{stream_id}", response_model=None)
async def resume_stream(request: Request, stream_id: str) -> Response:
    """Go on after the event named by Last-Event-ID, or from the start without one.

    204 where the client has seen the end.
    """
    state = state_of(request)
    if (answer := state.siblings.forward(request, stream_id)) is not None:
        return answer
    stream = state.streams.find(stream_id, state.keys.owner(request))
    position = stream.position_after(request.headers.get("last-event-id"))
    if stream.ended and position == stream.end_number:
        return Response(status_code=204)
    return ResumableStream(
        state.streams,
        stream,
        position,
        request_id=request.state.request_id,
        keepalive=state.settings.sse_keepalive_interval,
        write_timeout=state.settings.stream_stall_timeout,
        headers={},
    )


@router.delete("/v1/streams/{stream_id}", response_model=None)
async def drop_stream(request: Request, stream_id: str) -> Response:
    """Abort the stream, if it runs, and forget it."""
    state = state_of(request)
    if (answer := state.siblings.forward(request, stream_id)) is not None:
        return answer
    stream = state.streams.find(stream_id, state.keys.owner(request))
    state.streams.drop(stream, "its client deleted it")
    return JSONResponse({"id": stream_id, "object": "stream.deleted", "deleted": True})
