"""The server: a WebSocket for sessions, and one page to try it."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from bmkit.duplex.server.house import House
from bmkit.duplex.server.limits import host_is_expected, origin_is_known
from bmkit.duplex.server.link import Link

FORBIDDEN = 4403
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self' ws: wss:; img-src data:; base-uri 'none'; frame-ancestors 'none'"
)
"""What the page may load: nothing from elsewhere."""


def application(house: House, *, token: str | None = None) -> Starlette:
    """Return the ASGI application of a house. With `token`, who doesn't know it stays outside."""
    spec = house.spec

    def knows(connection: HTTPConnection) -> bool:
        if token is None:
            return True
        said = connection.query_params.get("token", "")
        header = connection.headers.get("authorization", "")
        given = header.removeprefix("Bearer ") if header.startswith("Bearer ") else said
        return hmac.compare_digest(given.encode(), token.encode())

    def means_us(connection: HTTPConnection) -> bool:
        return host_is_expected(connection.headers.get("host"), spec.host)

    def is_welcome(connection: HTTPConnection) -> bool:
        host, origin = connection.headers.get("host"), connection.headers.get("origin")
        return means_us(connection) and origin_is_known(origin, host, spec.origins)

    async def realtime(socket: WebSocket) -> None:
        if not (is_welcome(socket) and knows(socket)):
            await socket.close(FORBIDDEN)  # before it is accepted: HTTP 403
            return
        await socket.accept()
        await Link(socket, house).run()

    async def page(request: Request) -> Response:
        if not means_us(request):
            return Response(status_code=403)
        text = (resources.files(__package__) / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    async def health(request: Request) -> Response:
        if not (means_us(request) and knows(request)):
            return Response(status_code=403)
        sessions = [
            {"slices": live.timing.slices, "late": live.timing.late, "worst_ms": live.timing.worst}
            for live in house.lives.values()
        ]
        return JSONResponse({"sessions": sessions, "free": len(house.seats.free)})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await house.close()

    return Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            WebSocketRoute("/v1/realtime", realtime),
        ],
        lifespan=lifespan,
    )
