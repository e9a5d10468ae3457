"""The load: requests leave at their times, whether or not others were answered."""

import asyncio
import json
import resource
import time
from typing import Any, NamedTuple

import aiohttp

from .trace import Request

PATIENCE = 600.0
"""Seconds for which an answer is waited for."""
MOST_IN_FLIGHT = 15_000


class Reply(NamedTuple):
    """``seconds``: from the time at which it should have been sent to the answer; ``late``: how
    much later it was sent. ``status`` is 0 where there was no answer; ``answer`` says why."""

    request: Request
    seconds: float
    late: float
    status: int
    answer: dict[str, Any]


def bodies(texts: list[str], ratio: int | None) -> list[bytes]:
    return [json.dumps({"text": text, "ratio": ratio}).encode() for text in texts]


def _session(url: str) -> aiohttp.ClientSession:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 20_000)), hard))
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # before a server would
    headers = {"content-type": "application/json"}
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout, headers=headers)


async def _ask(session: aiohttp.ClientSession, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        async with session.post("/classify", data=body) as reply:
            return reply.status, await reply.json()
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
        return 0, {"detail": type(error).__name__}


async def _open_loop(url: str, trace: list[Request], sent: list[bytes]) -> list[Reply]:
    tasks: list[asyncio.Task[Reply]] = []
    flying = 0
    async with _session(url) as session:
        begin = time.perf_counter() + 0.1

        async def one(request: Request) -> Reply:
            nonlocal flying
            late = time.perf_counter() - begin - request.at
            flying += 1
            try:
                status, answer = await _ask(session, sent[request.sentence])
            finally:
                flying -= 1
            return Reply(request, time.perf_counter() - begin - request.at, late, status, answer)

        for request in trace:
            wait = begin + request.at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            if flying >= MOST_IN_FLIGHT:
                raise RuntimeError(f"{flying} requests have no answer: the server is stuck")
            tasks.append(asyncio.create_task(one(request)))
        return list(await asyncio.gather(*tasks))


async def _closed_loop(url: str, sent: list[bytes], seconds: float, clients: int) -> float:
    """Answers a second while ``clients`` ask without pause; the first fifth does not count."""
    counted, begin = 0, time.perf_counter()
    counts_from, end = begin + seconds / 5, begin + seconds

    async with _session(url) as session:

        async def client(number: int) -> None:
            nonlocal counted
            i = number
            while time.perf_counter() < end:
                status, answer = await _ask(session, sent[i % len(sent)])
                if status != 200:
                    raise RuntimeError(f"the server answered {status}: {answer}")
                counted += counts_from <= time.perf_counter() < end
                i += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
    return counted / (end - counts_from)


def send(url: str, trace: list[Request], sent: list[bytes]) -> list[Reply]:
    """All replies, in the order of the requests."""
    return asyncio.run(_open_loop(url, trace, sent))


def capacity(url: str, sent: list[bytes], seconds: float, clients: int = 48) -> float:
    """Requests a second that the server answers when it never has to wait for one."""
    return asyncio.run(_closed_loop(url, sent, seconds, clients))
