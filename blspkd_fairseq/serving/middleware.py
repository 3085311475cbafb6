"""What every request passes before it is read: who asks, how much is sent, how long that takes, and what is counted."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from blspkd_fairseq.serving.errors import ApiError, overloaded
from blspkd_fairseq.serving.limits import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BODIES_AT_ONCE = 16  # of the largest size: what all bodies that are being received may take together
_DRAIN_SECONDS = 5.0


class Count:
    """Tells ``note`` the path, status and seconds of every request."""

    def __init__(self, app: App, note: Callable[[str, int, float], None]) -> None:
        self.app = app
        self.note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 499  # nginx's code for a client that left before the answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = scope.get("route")
            self.note(getattr(route, "path", "other"), status, time.perf_counter() - start)


class Guard:
    """Asks for the key under ``/v1`` and ``/demo``.

    Args:
        key: that clients send as ``Authorization: Bearer KEY``; None: nobody is asked.
    """

    def __init__(self, app: App, key: str | None) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(("/v1/", "/demo/"))
        if self.key is None or not guarded or self._is_right(dict(scope["headers"]).get(b"authorization", b"")):
            return await self.app(scope, receive, send)
        error = ApiError(
            401, "the API key is missing or wrong", "invalid_api_key", None, {"WWW-Authenticate": "Bearer"}
        )
        await error.response()(scope, receive, send)

    def _is_right(self, header: bytes) -> bool:
        kind, _, key = header.partition(b" ")
        assert self.key is not None
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key.encode())


class Body:
    """Receives the whole request within its limits before the application sees any of it."""

    def __init__(self, app: App, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self._held = 0  # bytes of all bodies that are being received

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._receive(scope, receive)
        except TimeoutError:
            late = f"the request was not received within {self.limits.body_seconds:g} s"
            return await ApiError(408, late, "request_timeout", None, _CLOSE).response()(scope, receive, send)
        except ApiError as error:
            await _drain(receive, self.limits.body_bytes)
            return await error.response()(scope, receive, send)
        if body is None:
            return  # the client left
        first = True

        async def replay() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, send)

    async def _receive(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None: the client left."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limits.body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunk = message.get("body", b"")
                size += len(chunk)
                self._held += len(chunk)
                if size > self.limits.body_bytes:
                    raise self._too_large()
                if self._held > _BODIES_AT_ONCE * self.limits.body_bytes:
                    raise overloaded()
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
        finally:
            self._held -= size

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self.limits.body_mib:g} MiB: send shorter or compressed (FLAC, MP3) audio",
            "request_too_large",
            None,
            _CLOSE,
        )


async def _drain(receive: Receive, most: int) -> None:
    """Reads on for a while, since many clients read the answer only when they have sent everything."""
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while most > 0:
                message = await receive()
                if not message.get("more_body", False):
                    return
                most -= len(message.get("body", b""))
    except TimeoutError:
        return


_CLOSE = {"Connection": "close"}
