"""How an answer ends: its status, and whether its client leaves before."""

from __future__ import annotations

from starlette.types import Message, Receive, Send


class AnswerEnd:
    """Watches the messages of one request.

    An answer that begins after its client has left has the status 499. `receive` and `send` take
    the places of the request's own.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.status: int | None = None
        """None until the answer begins."""
        self.left = False
        """Whether the application has been told that the client has left."""

    async def receive(self) -> Message:
        """Return the client's next message."""
        message = await self._receive()
        self.left = self.left or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the answer."""
        if message["type"] == "http.response.start":
            self.status = 499 if self.left else message["status"]
        await self._send(message)
