"""`lockstep view`: the report of a run that goes on, on loopback and behind a token."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.cli.report.page import build_page
from lockstep.cli.report.record import read_run
from lockstep.runs.database import FILE

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_HOST = "127.0.0.1"


def state_of(run: Path) -> str:
    """A text that changes with the run's metrics and rollouts."""
    files = [run / FILE, run / f"{FILE}-wal", *sorted((run / "trajectories").glob("*/[0-9]*.parquet"))]
    stamps = [f"{file.name} {file.stat().st_mtime_ns}" for file in files if file.exists()]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]


def page_app(run: Path, token: str) -> Starlette:
    """GET / is the page, GET /changed a text that changes with the run; both want ?token=."""
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse, PlainTextResponse
    from starlette.routing import Route

    made: dict[str, str] = {}

    def allowed(request: Request) -> bool:
        return hmac.compare_digest(request.query_params.get("token", "").encode(), token.encode())

    async def page(request: Request) -> Response:
        if not allowed(request):
            return PlainTextResponse("open the whole address that lockstep view printed, token included", 401)
        state = await asyncio.to_thread(state_of, run)
        if state not in made:
            made.clear()
            made[state] = await asyncio.to_thread(build_page, run, True)
        return HTMLResponse(made[state], headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})

    async def changed(request: Request) -> Response:
        if not allowed(request):
            return PlainTextResponse("no", 401)
        return PlainTextResponse(await asyncio.to_thread(state_of, run))

    return Starlette(routes=[Route("/", page), Route("/changed", changed)])


async def serve_page(run: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. `say` gets the address. Raises StoreError for a folder that is no run."""
    import uvicorn

    run = run.expanduser().resolve()
    read_run(run)
    token = secrets.token_urlsafe(16)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, port))
        say(f"http://{_HOST}:{listener.getsockname()[1]}/?token={token}")
        config = uvicorn.Config(page_app(run, token), log_level="warning", access_log=False)
        await uvicorn.Server(config).serve(sockets=[listener])
