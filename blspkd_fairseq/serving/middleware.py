"""Checks every request before it is read: who sends it, how large it is and how long that takes. Counts requests."""

from __future__ import annotations

import asyncio
import contextlib
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

_BODIES_AT_ONCE = 16  # of the largest size: what the bodies of all requests that are not answered yet may take
_DRAIN_SECONDS = 5.0
_LEFT = 499  # nginx's status for a client that left before the answer


class Count:
    """Tells ``note`` the path, status and seconds of every request."""

    def __init__(self, app: App, note: Callable[[str, int, float], None]) -> None:
        self.app = app
        self.note = note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), _LEFT

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
    """Asks for the key under ``/v1`` and ``/demo``, and refuses what pages of other sites send from a user's browser.

    Args:
        key: that clients send as ``Authorization: Bearer KEY``; None: nobody is asked.
    """

    def __init__(self, app: App, key: str | None) -> None:
        self.app = app
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(("/v1/", "/demo/"))
        error = self._problem(dict(scope["headers"])) if guarded else None
        await (self.app if error is None else error.response())(scope, receive, send)

    def _problem(self, headers: dict[bytes, bytes]) -> ApiError | None:
        origin = headers.get(b"origin", b"").partition(b"://")[2]
        if b"origin" in headers and origin != headers.get(b"host"):
            return ApiError(403, "pages of other sites are not answered", "wrong_origin")
        if self.key is None or self._is_right(headers.get(b"authorization", b"")):
            return None
        challenge = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, "the API key is missing or wrong", "invalid_api_key", None, challenge)

    def _is_right(self, header: bytes) -> bool:
        kind, _, key = header.partition(b" ")
        assert self.key is not None
        return kind.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key.encode())


class Body:
    """Receives the whole request within its limits before the application sees any of it."""

    def __init__(self, app: App, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self._held = 0  # bytes of the bodies of all requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        body = bytearray()
        try:
            error = await self._problem(scope, receive, body)
            if error is None:
                await self.app(scope, _replay(bytes(body), receive), send)
            elif error.status != _LEFT:
                await error.response()(scope, receive, send)
        finally:
            self._held -= len(body)

    async def _problem(self, scope: Scope, receive: Receive, body: bytearray) -> ApiError | None:
        """Fills ``body``; why it cannot be had, if it cannot."""
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                await self._receive(scope, receive, body)
        except TimeoutError:
            late = f"the request was not received within {self.limits.body_seconds:g} s"
            return ApiError(408, late, "request_timeout", None, _CLOSE)
        except ApiError as error:
            if error.status != _LEFT:
                await _drain(receive)
            return error
        return None

    async def _receive(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.limits.body_bytes:
            raise self._too_large()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(_LEFT, "the client left")
            chunk = message.get("body", b"")
            body += chunk
            self._held += len(chunk)
            if len(body) > self.limits.body_bytes:
                raise self._too_large()
            if self._held > _BODIES_AT_ONCE * self.limits.body_bytes:
                raise overloaded()
            if not message.get("more_body", False):
                return

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self.limits.body_mib:g} MiB: send shorter or compressed (FLAC, MP3) audio",
            "request_too_large",
            None,
            _CLOSE,
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body at once, and then what else comes: that the client leaves."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _drain(receive: Receive) -> None:
    """Reads on and keeps nothing: many clients read the answer only when they have sent everything."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while (await receive()).get("more_body", False):
                pass


_CLOSE = {"Connection": "close"}
