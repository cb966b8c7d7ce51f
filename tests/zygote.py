"""A process that has imported what every command imports, and forks one that runs a command.

`python zygote.py SOCKET`: each connection sends a JSON line of arguments, directory and
environment, with the descriptors for stdin, stdout and stderr, and gets the exit status. Importing
torch and transformers takes seconds, which some two hundred tests would spend again; what a command
does after it is the same. Tests of memory, signals and start-up begin a process of their own.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from typing import Any

PRELOADED = (
    "torch",
    "numpy",
    "safetensors.torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "transformers.trainer",
    "tokenizers",
    "accelerate",
    "peft",
    "compressed_tensors",
    "jinja2",
    "numba",
    "bmkit.infer.run",
    "bmkit.specdec.run",
    "bmkit.compress.run",
    "bmkit.tune.run",
    "bmkit.runtime.cpu.load",
    "bmkit.runtime.placed.model",
    "bmkit_cli.main",
)


def serve(path: str) -> None:
    """Answer connections until the one who started this is gone."""
    import importlib
    import warnings

    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("LOGURU_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)  # as the command does before it imports them
    warnings.simplefilter("ignore")
    for name in PRELOADED:
        importlib.import_module(name)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + ".new")
    server.listen(16)
    os.rename(path + ".new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = os.getppid()
    server.settimeout(5)
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            server.close()
            _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run one command in a child of this process, and tell how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection.settimeout(None)
    request, handles = _receive(connection)
    child = os.fork()
    if child == 0:
        connection.close()
        _run(request, handles)
    _, status = os.waitpid(child, 0)
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    handles = array.array("i")
    text = b""
    while not text.endswith(b"\n"):
        part, extra, _, _ = connection.recvmsg(2**20, socket.CMSG_LEN(3 * handles.itemsize))
        for level, kind, data in extra:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                handles.frombytes(data[: len(data) - len(data) % handles.itemsize])
        text += part
    return json.loads(text), list(handles)


def _run(request: dict[str, Any], handles: list[int]) -> None:
    """Become the command."""
    import atexit

    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["bmkit", *request["arguments"]]
    code: Any = 1
    try:
        from bmkit_cli.main import main

        main()
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
