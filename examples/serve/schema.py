"""What comes in and what goes out, and what a bad request is told."""

from __future__ import annotations

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.types import ASGIApp, Receive, Scope, Send

MOST_BYTES, MOST_CHARACTERS = 1 << 16, 4000


class Query(BaseModel):
    """A sentence; ``ratio`` asks for a certain level, 1 being the uncompressed model."""

    model_config = ConfigDict(extra="forbid")
    text: StrictStr = Field(min_length=1, max_length=MOST_CHARACTERS, examples=["A fine film."])
    ratio: StrictInt | None = Field(default=None, ge=1, examples=[1])


class Reply(BaseModel):
    """``level``: the ratio at which the model answered."""

    label: str
    probability: float
    level: str


class Limit:
    """Refuses bodies that no query needs, before they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            headers = dict(scope["headers"])
            size = headers.get(b"content-length", b"")
            status = 0
            if not size.isdigit():
                status, text = 411, "Content-Length must say how long the body is"
            elif int(size) > MOST_BYTES:
                status, text = (
                    413,
                    f"the body must have at most {MOST_BYTES} bytes, got {int(size)}",
                )
            if status:
                await JSONResponse({"detail": text}, status)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def prepare(app: FastAPI) -> FastAPI:
    """Bad requests get a 4xx with a message that repeats nothing of theirs."""
    app.add_middleware(Limit)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = [
            f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()
        ]
        text = "; ".join(found).encode(errors="replace").decode()
        return JSONResponse({"detail": text[:1000]}, 422)

    return app


def refused(error: Exception) -> HTTPException:
    """What :meth:`Engine.accept` raised, as HTTP says it."""
    if isinstance(error, OverflowError):
        return HTTPException(503, str(error), headers={"Retry-After": "1"})
    return HTTPException(422, str(error))
