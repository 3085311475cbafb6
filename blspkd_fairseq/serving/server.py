"""Runs the application until it is told to end."""

from __future__ import annotations

import ipaddress
import signal
import socket

import uvicorn
from fastapi import FastAPI

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def allowed_hosts(host: str) -> list[str]:
    """By what names clients may reach a server that listens on ``host``: any, unless only this machine can."""
    return [*LOOPBACK_NAMES, host] if is_loopback(host) else ["*"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reserve(host: str, port: int) -> socket.socket:
    """The address to serve on, before a model is loaded; port 0: any that is free.

    Raises:
        ValueError: the address cannot be used.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"cannot listen on {host} port {port}: choose one up to 65535 with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
    except OSError as error:
        raise _unusable(host, port, error) from error
    return server


def listen(server: socket.socket) -> None:
    """Lets clients connect.

    Raises:
        ValueError: another server, which reserved the same address meanwhile, was first.
    """
    try:
        server.listen()
    except OSError as error:
        host, port = server.getsockname()[:2]
        raise _unusable(host, port, error) from error


def _unusable(host: str, port: int, error: OSError) -> ValueError:
    return ValueError(f"cannot listen on {host} port {port} ({error}): choose others with --host and --port")


def run(app: FastAPI, server: socket.socket, patience: float) -> None:
    """Serves until SIGTERM or SIGINT; then refuses what is new, finishes what runs, and returns.

    Args:
        app: to serve.
        server: where to listen.
        patience: seconds that running requests are given to end.
    """
    # uvicorn sends itself the signal again when it has ended, for whoever handled it before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=int(patience) + 1,
        limit_concurrency=1024,
        server_header=False,
        proxy_headers=False,
    )
    uvicorn.Server(config).run([server])
