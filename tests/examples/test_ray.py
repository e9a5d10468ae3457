# ruff: noqa: E402 - what a missing package would break comes after the look for it
"""examples/serve on Ray: a replica that is killed loses no request."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("ray.serve")
aiohttp = pytest.importorskip("aiohttp")
psutil = pytest.importorskip("psutil")

from bench.dynamic_load.server import Server, running

REQUESTS, APART = 60, 0.05


def kill_replicas(server: Server) -> int:
    family = psutil.Process(server.process.pid).children(recursive=True)
    found = [p for p in family if "ServeReplica:sentiment:Classifier" in " ".join(p.cmdline())]
    for process in found:
        os.kill(process.pid, signal.SIGKILL)
    return len(found)


async def ask(server: Server) -> tuple[list[tuple[int, dict]], int]:
    """Replies to requests that come while all replicas are killed, and how many these were."""
    killed = 0
    patience = aiohttp.ClientTimeout(total=240)
    async with aiohttp.ClientSession(server.url, timeout=patience) as session:

        async def one(number: int) -> tuple[int, dict]:
            await asyncio.sleep(APART * number)
            text = " ".join(f"word{i}" for i in range(number % 9 + 1))
            async with session.post("/classify", json={"text": text}) as reply:
                return reply.status, await reply.json()

        async def kill() -> None:
            nonlocal killed
            await asyncio.sleep(APART * REQUESTS / 3)
            killed = kill_replicas(server)

        *found, _ = await asyncio.gather(*map(one, range(REQUESTS)), kill())
        async with session.post("/classify", json={"text": " "}) as reply:
            found.append((reply.status, await reply.json()))
        async with session.get("/openapi.json") as reply:
            found.append((reply.status, await reply.json()))
    return found, killed


@pytest.mark.slow
def test_a_killed_replica_loses_no_request(folders: Path, tmp_path: Path) -> None:
    settings = {
        "model": folders / "model", "plugins": folders / "plugins", "levels": "1,2,4",
        "profile": tmp_path / "profile.json",
    }  # fmt: skip
    with running("ray", settings, tmp_path / "log") as server:
        assert server.health()["status"] == "ok"
        replies, killed = asyncio.run(ask(server))
    *answers, bad, schema = replies
    assert killed == 1
    assert [status for status, _ in answers] == [200] * REQUESTS
    assert all(body["label"] in ("negative", "positive") for _, body in answers)
    assert bad == (422, {"detail": "text must hold a word"})
    assert schema[0] == 200 and "/classify" in schema[1]["paths"]
