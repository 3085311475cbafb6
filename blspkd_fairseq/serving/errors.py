"""Errors as OpenAI's API words them: a status code, and an object that says what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP status code.
        message: one sentence that says what is wrong, and what to do.
        code: an identifier for programs, such as ``invalid_audio``.
        param: the parameter that is to blame, if one is.
        headers: of the reply, besides the usual ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers

    @property
    def body(self) -> dict[str, Any]:
        """The error object of the API."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The reply."""
        return JSONResponse(self.body, self.status, self.headers)


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The client's mistake, status 400."""
    return ApiError(400, message, code, param)


def as_invalid(errors: Sequence[Any]) -> ApiError:
    """Turns errors that pydantic found in a request into one of the API."""
    worst = max(errors, key=lambda error: len(error["loc"]))
    if worst["type"] == "json_invalid" or worst["loc"] == ("body",):
        return invalid("the request must be a JSON object, with Content-Type: application/json")
    names = [str(name) for name in worst["loc"] if name != "body"]
    # The kind of a part stands before its fields, and may have the name of one.
    names = [name for index, name in enumerate(names) if not index or name != names[index - 1]]
    param = "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in names).removeprefix(".") or None
    if worst["type"] == "extra_forbidden":
        return ApiError(400, f"the parameter {param} is unknown: leave it out", "unknown_parameter", param)
    code = "missing_required_parameter" if worst["type"] == "missing" else "invalid_value"
    reason = worst["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the request'}: {reason}", code, param)


def overloaded() -> ApiError:
    """More requests than may wait; official clients try again by themselves."""
    return ApiError(503, "the server has as much to do as it may: try again later", "overloaded", None, _SOON)


def timed_out(seconds: float) -> ApiError:
    """An answer that took too long."""
    return ApiError(
        504,
        f"the answer was not ready within {seconds:g} s: ask for less, or from a server with larger --answer-seconds",
        "timeout",
    )


_SOON = {"Retry-After": "1"}
