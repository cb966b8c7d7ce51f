"""A server that listens: its socket, its token, and uvicorn behind both."""

from __future__ import annotations

import errno
import secrets
import socket
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from bmkit.duplex.recipe import DuplexRecipe
from bmkit.duplex.server.limits import FRAME_BYTES, is_local
from bmkit.errors import OutputTaken, RecipeError, ResourceError
from bmkit.report import Reporter

MISSING = "the server isn't installed"
HINT = "pip install 'bmkit[serve]'"


class Listening:
    """A socket that is bound before the model is opened.

    Raises ResourceError if the port is taken, the extra isn't installed or the folder can't be
    written, OutputTaken if that is a file, RecipeError if others could reach it without a token.
    """

    def __init__(self, recipe: DuplexRecipe, folder: Path | None) -> None:
        _require_extra()
        spec = recipe.serve
        if spec.auth == "none" and not is_local(spec.host):
            raise RecipeError(
                f"serve.host: others can reach {spec.host}, and no token is asked for",
                hint="-s serve.auth=token",
            )
        self.recipe, self.folder = recipe, folder
        self.token = secrets.token_urlsafe(24) if spec.auth == "token" else None
        if folder is not None:
            _require_writable(folder)
        self.socket = _bound(spec.host, spec.port)

    def address(self) -> dict[str, Any]:
        """Return where it listens: `url` of the page, `websocket` for programs."""
        host, port = self.socket.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        query = f"?token={self.token}" if self.token else ""
        return {
            "url": f"http://{name}:{port}/{query}",
            "websocket": f"ws://{name}:{port}/v1/realtime{query}",
        }

    def close(self) -> None:
        """Let the port go."""
        self.socket.close()


def _require_extra() -> None:
    try:
        import starlette
        import uvicorn
        import websockets  # noqa: F401 - uvicorn speaks through it
    except ImportError as exc:
        raise ResourceError(f"{MISSING}: {exc.name} is missing", hint=HINT) from None
    del starlette, uvicorn


def _require_writable(folder: Path) -> None:
    """Make the folder. Raises OutputTaken for a file, ResourceError if nothing can be written."""
    if folder.exists() and not folder.is_dir():
        raise OutputTaken(f"--sessions: {folder} is not a folder", hint="name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as exc:
        said = exc.strerror or "it refuses"
        raise ResourceError(
            f"--sessions: cannot write {folder}: {said}", hint="name another folder"
        ) from None


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise RecipeError(f"serve.host: `{host}` is not an address of this machine") from None
    found = socket.socket(family, kind)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(where)
        found.listen(128)
    except OSError as exc:
        found.close()
        if exc.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} of {host} is taken", hint="--port 0 takes a free one"
            ) from None
        raise ResourceError(f"cannot listen on {host}, port {port}: {exc.strerror}") from None
    return found


def serve(listening: Listening, model: Any, reporter: Reporter) -> None:
    """Serve the model's sessions until SIGINT or SIGTERM, which are raised again at the end."""
    import uvicorn

    from bmkit.duplex.server.app import application
    from bmkit.duplex.server.house import House

    class Server(uvicorn.Server):
        """Says to clients that their sessions are over before it closes their connections."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await house.farewell()
            await super().shutdown(sockets)

    recipe = listening.recipe
    house = House(
        model,
        recipe.serve,
        reporter,
        interrupt=recipe.policy.interrupt,
        folder=listening.folder,
    )
    config = uvicorn.Config(
        application(house, token=listening.token),
        log_level="warning",
        access_log=False,
        ws_max_size=FRAME_BYTES,
        ws_max_queue=64,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        timeout_graceful_shutdown=5,
        lifespan="on",
    )
    server = Server(config)
    sessions = "session" if recipe.serve.max_sessions == 1 else "sessions"
    reporter.info(
        f"{recipe.serve.max_sessions} {sessions} at a time, a slice every {model.period_ms} ms; "
        "Ctrl-C stops"
    )
    server.run(sockets=[listening.socket])
