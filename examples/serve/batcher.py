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
        taken: list[Waiting] = []
        try:
            while True:
                await self._come.wait()
                taken = self._take()
                if not self._waiting:
                    self._come.clear()
                await self._answer(taken)
        finally:  # closed, or broken: whoever waits is told
            self._refuse([*taken, *self._waiting], RuntimeError("the batcher has stopped"))
            self._waiting.clear()

    async def _answer(self, taken: list[Waiting]) -> None:
        loop = asyncio.get_running_loop()
        futures = {job.ticket: future for job, future in taken}
        for batch in cut([job for job, _ in taken], self.engine.settings.batch_tokens):
            asked = [(job, futures[job.ticket]) for job in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self.engine.forward, batch)
            except Exception as error:  # of this batch alone
                log.exception("a batch of %d requests failed", len(batch))
                self._refuse(asked, RuntimeError(f"the model failed: {error}"))
                continue
            for (_, future), answer in zip(asked, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def _refuse(self, asked: list[Waiting], error: Exception) -> None:
        """Tickets that never came to a batch would be counted as waiting for ever."""
        for job, future in asked:
            self.engine.controller.cancel(job.ticket)
            if not future.done():
                future.set_exception(error)
