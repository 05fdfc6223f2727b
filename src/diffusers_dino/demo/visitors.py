"""Who still waits for a result: one waiting job a visitor, and no work for those who left or took another image."""

from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection
from typing import Any
from urllib.parse import parse_qs

__all__ = ["GoneError", "Visitors"]

_PATIENCE = 5.0  # seconds from asking for a job to listening for its result
_MOST_BYTES = 8 << 20  # of a request for a job; images are uploaded before
_REMEMBERED = 10_000  # visitors
_REFUSAL = "You have a job in the queue already: wait until it has begun."

App = Callable[[dict, Callable, Callable], Awaitable[None]]


class GoneError(Exception):
    """Nobody waits for the result any more."""


class Visitors:
    """What visitors ask for and whether they still listen, as their requests tell: `watch` reads all of them.

    A visitor is a page in a browser, which Gradio knows by a session hash.

    Attributes:
        model_calls: Numbers of Gradio's functions that run the model.
    """

    def __init__(self) -> None:
        self.model_calls: Collection[int] = ()
        self._streams: Counter[str] = Counter()  # open ones, in which a visitor hears of all jobs
        self._waiting: dict[str, float] = {}  # when the job was asked for that has not begun
        self._images: OrderedDict[str, int] = OrderedDict()  # how many each visitor has chosen

    def replace_image(self, visitor: str) -> None:
        """Note that a visitor has chosen another image: results of the one before are of no use."""
        self._images[visitor] = self._images.pop(visitor, 0) + 1
        if len(self._images) > _REMEMBERED:
            self._images.popitem(last=False)

    def begin(self, visitor: str) -> Callable[[], None]:
        """Note that a visitor's job begins; what is returned raises `GoneError` once its result is of no use."""
        asked, image = self._waiting.pop(visitor, time.monotonic()), self._images.get(visitor)

        def check() -> None:
            listens = self._streams[visitor] > 0 or time.monotonic() - asked < _PATIENCE
            if not listens or self._images.get(visitor) != image:
                raise GoneError

        check()
        return check

    def watch(self, app: App) -> App:
        """The server's application (ASGI), with an eye on who listens, and with one waiting job for each visitor."""

        async def watched(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
            path = scope.get("path", "").rstrip("/")
            if scope["type"] == "http" and path.endswith("/queue/data"):
                visitor = parse_qs(scope["query_string"].decode(errors="replace")).get("session_hash", [""])[0]
                self._streams[visitor] += 1
                try:
                    await app(scope, receive, send)
                finally:
                    self._streams[visitor] -= 1
                    if self._streams[visitor] <= 0:
                        del self._streams[visitor]
                        self._waiting.pop(visitor, None)  # Gradio drops the jobs of those who left
            elif scope["type"] == "http" and path.endswith("/queue/join"):
                await self._join(app, scope, receive, send)
            else:
                await app(scope, receive, send)

        return watched

    async def _join(self, app: App, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > _MOST_BYTES:
                return await _refuse(send, 413, "The request is too large.")
        visitor = self._model_call_of(body)
        if visitor in self._waiting:
            return await _refuse(send, 429, _REFUSAL)
        if visitor is not None:
            self._waiting[visitor] = time.monotonic()

        async def replay(messages=iter([{"type": "http.request", "body": body, "more_body": False}])) -> dict:  # noqa: B008
            return next(messages, None) or await receive()

        async def answer(message: dict) -> None:
            if visitor is not None and message["type"] == "http.response.start" and message["status"] != 200:
                self._waiting.pop(visitor, None)  # such as when the queue is full
            await send(message)

        await app(scope, replay, answer)

    def _model_call_of(self, body: bytes) -> str | None:
        """The visitor who asks for a run of the model; None for other requests, which Gradio checks."""
        try:
            asked = json.loads(body)
            return str(asked["session_hash"]) if int(asked["fn_index"]) in self.model_calls else None
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None


async def _refuse(send: Callable, status: int, reason: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": reason}).encode()})
