"""The controller in a plain FastAPI app: ``python -m examples.serve.app --port 8000``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from .batcher import Batcher
from .engine import Engine
from .schema import Query, Reply, prepare, refused
from .settings import Settings


def create(engine: Engine) -> FastAPI:
    """The app around an engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(engine)
        yield
        await app.state.batcher.close()

    app = prepare(FastAPI(title="Sentiment of English sentences", lifespan=lifespan))

    @app.post("/classify")
    async def classify(query: Query) -> Reply:
        """The sentiment of a sentence."""
        try:
            answer = await app.state.batcher.answer(query.text, query.ratio)
        except (ValueError, OverflowError) as error:
            raise refused(error) from error
        return Reply(**answer._asdict())

    @app.get("/health")
    def health() -> dict[str, Any]:
        """What the controller does now."""
        return {"status": "ok", **engine.controller.status()}

    @app.get("/metrics")
    def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.serve.app", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    app = create(Engine(Settings.read(), REGISTRY))
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        access_log=False,
        backlog=4096,
        timeout_keep_alive=75,
    )
