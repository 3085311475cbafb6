"""A Python that has imported already what the commands import: recipes of many commands are tested in half the time.

Importing torch, transformers, peft and fairseq takes up to ten seconds, more than most commands of a recipe do on a few
rows. A server imports them once and forks for each command, which runs as it would: its own arguments, environment,
folder, files and process group. :func:`commands` is a folder with ``python`` and the installed scripts, to put first on
the PATH; what stands there hands its arguments and files to the server and ends as the command ends. How commands begin
and end by themselves is tested elsewhere, without this.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

SCRIPTS = ("fairseq-train", "fairseq-generate", "fairseq-validate", "blspkd")
_ENDED = "the server of warm_python.py has ended before the command"


def environment(**more: object) -> dict[str, str]:
    """For a recipe whose commands are warm."""
    path = os.pathsep.join([str(commands()), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "BLSPKD_VENV": "none", "PATH": path, **{name: str(value) for name, value in more.items()}}


@functools.cache
def commands() -> Path:
    """The folder for the PATH, of a server that lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    here = Path(__file__).resolve()
    for name in ("python", *SCRIPTS):
        shim = folder / name
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {here} ask {folder / "socket"} {name} "$@"\n')
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
    server = subprocess.Popen([sys.executable, str(here), "serve", str(folder / "socket")], stdin=subprocess.PIPE)
    atexit.register(server.kill)
    while not (folder / "socket").exists():
        if server.poll() is not None:
            raise RuntimeError(f"{here.name} serve ended with {server.returncode}")
        time.sleep(0.1)
    return folder


# ---- who asks --------------------------------------------------------------------------------------------------------


def ask(address: str, name: str, arguments: list[str]) -> None:
    """Runs a command at the server, hands signals on to it, and ends as it ends."""
    is_known = bool(arguments) and (arguments[0] in ("-c", "-m") or not arguments[0].startswith("-"))
    if name == "python" and not is_known:
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        request = {"name": name, "arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(server, [b"?"], [0, 1, 2])
        answers = server.makefile("rw")
        print(json.dumps(request), file=answers, flush=True)
        pid = int(answers.readline() or sys.exit(_ENDED))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda told, frame: os.kill(pid, told))
        status = int(answers.readline() or sys.exit(_ENDED))
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) != signal.SIGKILL:
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(os.WEXITSTATUS(status))


# ---- the server ------------------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Forks for each that asks; ends with the process that began it, and a command with the one that asked for it."""
    _import_all()
    asking: dict[socket.socket, int] = {}
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as selector:
        server.bind(address + ".new")
        server.listen(64)
        selector.register(server, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        os.rename(address + ".new", address)
        while True:
            for key, _ in selector.select(timeout=0.02 if asking else None):
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is server:
                    client, _ = server.accept()
                    asking[client] = _begin(client, server)
                    selector.register(client, selectors.EVENT_READ)
                else:  # it has gone, and says nothing else
                    _kill(asking[key.fileobj])  # type: ignore[index]
                    selector.unregister(key.fileobj)
            for client, pid in list(asking.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    _answer(client, status)
                    if client in selector.get_map():
                        selector.unregister(client)
                    client.close()
                    del asking[client]


def _import_all() -> None:
    import blspkd_fairseq

    blspkd_fairseq.register()
    import torch.nn.parallel.distributed
    import transformers.models.auto
    import transformers.models.llama.modeling_llama
    import transformers.models.whisper.modeling_whisper  # noqa: F401

    import blspkd_fairseq.cli
    import blspkd_fairseq.hub
    import blspkd_fairseq.tasks  # noqa: F401

    torch.set_num_threads(1)


def _begin(client: socket.socket, server: socket.socket) -> int:
    """The process of a command; the one who asks is told its number."""
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("r") as lines:
        request = json.loads(lines.readline())
    pid = os.fork()
    if not pid:
        server.close()
        client.close()
        try:
            status = _command(request, files)
        except BaseException:
            traceback.print_exc()
            status = 1
        os._exit(status)
    for file in files:
        os.close(file)
    _answer(client, pid)
    return pid


def _answer(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it has gone
        client.sendall(f"{number}\n".encode())


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _command(request: dict[str, Any], files: list[int]) -> int:
    """In the forked process: the exit status, as Python itself would end."""
    os.setsid()
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    status = 0
    try:
        _run(request["name"], request["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    return status & 0xFF


def _run(name: str, arguments: list[str]) -> None:
    if name != "python":
        script = str(Path(sys.executable).parent / name)
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    elif arguments[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif arguments[0] == "-m":
        sys.argv, sys.path[0] = ["-m", *arguments[2:]], os.getcwd()
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        ask(sys.argv[2], sys.argv[3], sys.argv[4:])
