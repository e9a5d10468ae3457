"""The same on Ray Serve: replicas of the model behind an HTTP ingress, scaled by Ray.

``make serve`` starts it as ``config.yaml`` says.
"""

import asyncio
import logging
from typing import Any

import prometheus_client  # Ray copies classes with their globals, and no registry can be copied
from fastapi import FastAPI, HTTPException, Response
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from ray.serve.handle import DeploymentHandle

from .batcher import Batcher
from .engine import Engine
from .schema import Query, Reply, prepare, refused
from .settings import Settings

TRIES, PAUSE = 40, 0.5
"""Of a request whose replica died, and the seconds between them: another one may have to start."""
LOST = (RayActorError, ActorDiedError, ActorUnavailableError)
log = logging.getLogger("ray.serve")
api = prepare(FastAPI(title="Sentiment of English sentences"))


@serve.deployment(max_ongoing_requests=5000)
class Classifier:
    """A model with a controller of its own, which sees the requests of this replica."""

    def __init__(self) -> None:
        logging.getLogger("variator_kernels").setLevel(logging.INFO)
        name = serve.get_replica_context().replica_id.unique_id
        self.engine = Engine(Settings.read(), prometheus_client.REGISTRY, name)
        self.batcher: Batcher | None = None

    # Ray closes a batch after this time, whether or not the model is free; what waits then is
    # merged, sorted and cut by tokens in the Batcher. (Ray's batch_size_fn, which could count
    # tokens, puts a request that no longer fits behind all newer ones.)
    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.002, max_concurrent_batches=1000)
    async def many(self, queries: list[tuple[str, Any]]) -> list[Any]:
        if self.batcher is None:
            self.batcher = Batcher(self.engine)
        asked = (self.batcher.answer(*query) for query in queries)
        return await asyncio.gather(*asked, return_exceptions=True)

    async def classify(self, text: str, ratio: int | None) -> tuple[int, Any]:
        """An HTTP status, and an answer or what is wrong."""
        answer = await self.many((text, ratio))
        if isinstance(answer, ValueError | OverflowError):
            error = refused(answer)
            return error.status_code, error.detail
        if isinstance(answer, Exception):
            raise answer
        return 200, answer._asdict()

    def status(self) -> dict[str, Any]:
        return self.engine.controller.status()

    def metrics(self) -> bytes:
        return prometheus_client.generate_latest()


@serve.deployment(max_ongoing_requests=5000)
@serve.ingress(api)
class Ingress:
    """Takes HTTP, and keeps a request until a replica has answered it."""

    def __init__(self, classifier: DeploymentHandle) -> None:
        self.classifier = classifier

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Asks again where a replica died: the same question has the same answer."""
        for left in reversed(range(TRIES)):
            try:
                return await getattr(self.classifier, method).remote(*arguments)
            except LOST as error:
                log.warning("a replica was lost, %d tries left: %s", left, type(error).__name__)
                if not left:
                    raise HTTPException(503, "no replica of the model is left") from error
                await asyncio.sleep(PAUSE)

    @api.post("/classify")
    async def classify(self, query: Query) -> Reply:
        """The sentiment of a sentence."""
        status, answer = await self.ask("classify", query.text, query.ratio)
        if status != 200:
            raise HTTPException(status, answer)
        return Reply(**answer)

    @api.get("/health")
    async def health(self) -> dict[str, Any]:
        """What the controller of a replica does now."""
        return {"status": "ok", **await self.ask("status")}

    @api.get("/metrics")
    async def metrics(self) -> Response:
        """For Prometheus: of a replica, named in the label ``controller``."""
        kind = prometheus_client.CONTENT_TYPE_LATEST
        return Response(await self.ask("metrics"), media_type=kind)


app = Ingress.bind(Classifier.bind())  # type: ignore[attr-defined]
