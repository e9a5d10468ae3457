"""Requests of an event loop in batches: whatever waits when the model is free goes in."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .engine import Answer, Engine, Job, cut

log = logging.getLogger(__name__)
Waiting = tuple[Job, "asyncio.Future[Answer]"]


class Batcher:
    """One thread runs the model; the loop stays free for arrivals, which the controller sees."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting: deque[Waiting] = deque()
        self._come = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)
        self._task = asyncio.create_task(self._run())

    async def answer(self, text: str, ratio: Any = None) -> Answer:
        """Raises what :meth:`Engine.accept` and the model raise."""
        if self._task.done():
            raise RuntimeError("the batcher has stopped")
        job = self.engine.accept(text, ratio)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        self._come.set()
        return await future

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown()

    def _take(self) -> list[Waiting]:
        """The oldest ones, as many tokens as a few batches: enough to sort, too few to overtake."""
        taken, tokens = [], 0
        while self._waiting and tokens < 2 * self.engine.settings.batch_tokens:
            job, future = self._waiting.popleft()
            if future.cancelled():  # whoever asked has gone
                self.engine.controller.cancel(job.ticket)
                continue
            taken.append((job, future))
            tokens += len(job.ids)
        return taken

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._come.wait()
            taken = self._take()
            futures = {job.ticket: future for job, future in taken}
            if not self._waiting:
                self._come.clear()
            for batch in cut([job for job, _ in taken], self.engine.settings.batch_tokens):
                try:
                    answers: Any = await loop.run_in_executor(
                        self._thread, self.engine.forward, batch
                    )
                except Exception as error:  # of this batch alone
                    log.exception("a batch of %d requests failed", len(batch))
                    answers = [RuntimeError(f"the model failed: {error}")] * len(batch)
                for job, answer in zip(batch, answers, strict=True):
                    future = futures[job.ticket]
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
