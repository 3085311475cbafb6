"""The application: routes of an OpenAI-compatible server, and all that requests pass before and after them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from blspkd_fairseq.serving import chat, metrics, speech
from blspkd_fairseq.serving.engine import ClientLeft, as_api_error
from blspkd_fairseq.serving.errors import ApiError, as_invalid
from blspkd_fairseq.serving.middleware import Body, Count, Guard
from blspkd_fairseq.serving.service import Service, service_of
from blspkd_fairseq.version import __version__


def create_app(service: Service, key: str | None = None, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """Builds the application.

    Args:
        service: that answers; started and stopped with the application.
        key: that clients must send; None: nobody is asked.
        hosts: names by which clients may reach it. A page of another site cannot use a server that listens on this
            machine alone under a name of its own.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()

    app = FastAPI(title="blspkd", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(chat.router)
    app.include_router(speech.router)
    app.get("/v1/models")(list_models)
    app.get("/v1/models/{name:path}")(get_model)
    app.get("/health", response_model=None)(health)
    app.get("/metrics", response_model=None)(show_metrics)
    app.add_exception_handler(ApiError, _say_api_error)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.add_exception_handler(HTTPException, _say_http_error)
    app.add_exception_handler(ClientLeft, _say_nothing)
    app.add_exception_handler(Exception, _say_failure)
    # The last one that is added comes first.
    app.add_middleware(Body, limits=service.limits)
    app.add_middleware(Guard, key=key)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(Count, note=service.metrics.note_request)
    return app


async def list_models(request: Request) -> dict[str, Any]:
    """Lists the one model of this server."""
    return {"object": "list", "data": [_describe(service_of(request))]}


async def get_model(name: str, request: Request) -> dict[str, Any]:
    """Describes the model, asked for by its name."""
    service_of(request).check_model(name)
    return _describe(service_of(request))


async def health(request: Request) -> Response:
    """Says whether the server works."""
    alive = service_of(request).engine.alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)


async def show_metrics(request: Request) -> Response:
    """Shows the server's figures to Prometheus."""
    return Response(service_of(request).metrics.text(), media_type=metrics.CONTENT_TYPE)


def _describe(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "blspkd"}


async def _say_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _say_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return as_invalid(error.errors()).response()


async def _say_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else None
    return ApiError(error.status_code, str(error.detail), code).response()


async def _say_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _say_failure(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()
