"""examples/serve: answers of the level that they name, and a message for each bad request."""

# ruff: noqa: E402 - what a missing package would break comes after the look for it
from __future__ import annotations

import asyncio
import json
import random
import threading
from pathlib import Path

import pytest
import torch

import variator_kernels as vk

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
prometheus = pytest.importorskip("prometheus_client")

from fastapi.testclient import TestClient

from examples.serve import app as served
from examples.serve import batcher, engine
from examples.serve.settings import Settings
from tests.examples.conftest import WORDS

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def made(folders: Path) -> engine.Engine:
    settings = Settings(
        model=str(folders / "model"), plugins=str(folders / "plugins"), levels="1,2,4",
        profile=str(folders / "profile.json"), most_tokens=24, batch_tokens=64, target=5.0,
    )  # fmt: skip
    return engine.Engine(settings, prometheus.REGISTRY, "test")


@pytest.fixture(scope="module")
def client(made: engine.Engine):
    with TestClient(served.create(made), raise_server_exceptions=False) as found:
        yield found


def sentences(count: int, most: int = 20) -> list[str]:
    source = random.Random(0)
    return [" ".join(source.choices(WORDS, k=source.randint(1, most))) for _ in range(count)]


@torch.no_grad()
def alone(made: engine.Engine, text: str, level: str) -> tuple[str, float]:
    inputs = made.tokenizer(text, return_tensors="pt")
    with vk.use_ratio(made.model, int(level)):
        best = made.model(**inputs).logits.softmax(-1)[0].max(-1)
    return made.labels[int(best.indices)], float(best.values)


@pytest.mark.parametrize("ratio", [None, 1, 2, 4])
def test_answers(client: TestClient, made: engine.Engine, ratio: int | None) -> None:
    for text in sentences(5):
        reply = client.post("/classify", json={"text": text, "ratio": ratio})
        assert reply.status_code == 200, reply.text
        body = reply.json()
        assert body["level"] == str(ratio or 1)
        label, probability = alone(made, text, body["level"])
        assert body["label"] == label
        assert body["probability"] == pytest.approx(probability, abs=1e-5)


def test_many_at_once(made: engine.Engine) -> None:
    """In batches of several lengths and levels; each gets its own answer."""
    texts = sentences(80)
    asks = [(None, 1, 2, 4)[i % 4] for i in range(len(texts))]

    async def all_of_them():
        ours = batcher.Batcher(made)
        asked = (ours.answer(*pair) for pair in zip(texts, asks, strict=True))
        found = await asyncio.gather(*asked)
        await ours.close()
        return found

    for text, ask, got in zip(texts, asks, asyncio.run(all_of_them()), strict=True):
        assert ask is None or got.level == str(ask)
        label, probability = alone(made, text, got.level)
        assert got.label == label and got.probability == pytest.approx(probability, abs=1e-5)
    assert made.controller.status()["waiting_requests"] == 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "JSON"),
        (b"", 422, "Field required"),
        (b"[]", 422, "body"),
        (b"\xff\xfe", 422, "JSON decode error"),
        (b'{"text": 3}', 422, "body.text: Input should be a valid string"),
        (b'{"text": null}', 422, "body.text"),
        (b'{"text": ["a"]}', 422, "body.text"),
        (b"{}", 422, "body.text: Field required"),
        (b'{"text": ""}', 422, "body.text: String should have at least 1 character"),
        (b'{"text": "  "}', 422, "text must hold a word"),
        (b'{"text": "word1", "ratio": 3}', 422, "ratio must be one of 1, 2, 4, got 3"),
        (b'{"text": "word1", "ratio": 0}', 422, "body.ratio"),
        (b'{"text": "word1", "ratio": true}', 422, "body.ratio"),
        (b'{"text": "word1", "level": 2}', 422, "body.level: Extra inputs"),
        (b'{"text": "\\ud800"}', 422, "body"),
        (json.dumps({"text": "word1 " * 30}).encode(), 422, "at most 24 tokens, got 32"),
        (json.dumps({"text": "a" * 4001}).encode(), 422, "at most 4000 characters"),
        (b" " * 70000, 413, "at most 65536 bytes"),
    ],
)
def test_bad_requests(client: TestClient, body: bytes, status: int, message: str) -> None:
    reply = client.post("/classify", content=body, headers=JSON)
    assert reply.status_code == status, reply.text
    assert message in reply.json()["detail"]
    assert client.get("/health").json()["waiting_requests"] == 0


def test_a_body_of_unknown_size(client: TestClient) -> None:
    reply = client.post("/classify", content=iter([b'{"text": "word1"}']), headers=JSON)
    assert reply.status_code == 411 and "Content-Length" in reply.json()["detail"]


def test_routes(client: TestClient) -> None:
    client.post("/classify", json={"text": "word1 word2"})
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["levels"] == ["1", "2", "4"]
    text = client.get("/metrics").text
    assert 'variator_requests_total{controller="test",level="1"}' in text
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/classify", "/health", "/metrics"}
    assert client.get("/docs").status_code == 200
    assert client.get("/classify").status_code == 405


def test_a_crowd_is_told_to_come_back(client: TestClient, made: engine.Engine) -> None:
    tickets = [made.controller.arrive(3) for _ in range(5)]
    kept, made.settings = made.settings, Settings(most_waiting=5)
    try:
        reply = client.post("/classify", json={"text": "word1"})
    finally:
        made.settings = kept
        for ticket in tickets:
            made.controller.cancel(ticket)
    assert reply.status_code == 503 and "come back" in reply.json()["detail"]
    assert reply.headers["retry-after"] == "1"


@pytest.mark.parametrize("where", ["pad", "model"])
def test_a_failure_harms_its_batch_alone(client, made, monkeypatch, where) -> None:
    """Before the controller has seen the batch, or within it: no ticket waits for ever."""

    def fails(*arguments, **named):
        raise MemoryError("once")

    with monkeypatch.context() as patched:
        target = (made.tokenizer, "pad") if where == "pad" else (made, "model")
        patched.setattr(*target, fails)
        assert client.post("/classify", json={"text": "word1"}).status_code == 500
    assert made.controller.status()["waiting_requests"] == 0
    assert client.post("/classify", json={"text": "word1"}).status_code == 200


def test_closing_leaves_nobody_waiting(made, monkeypatch) -> None:
    """Of a batch that runs, of one that was taken with it, and of those behind."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(jobs):
        begun.set()
        assert go_on.wait(10)
        return []

    monkeypatch.setattr(made, "forward", slow)

    async def ask_and_close():
        ours = batcher.Batcher(made)
        asked = [asyncio.create_task(ours.answer(text, 1 + i % 2)) for i, text in enumerate(texts)]
        while not begun.is_set():
            await asyncio.sleep(0.005)
        asked.append(asyncio.create_task(ours.answer("word1")))
        await asyncio.sleep(0)
        threading.Timer(0.05, go_on.set).start()
        await ours.close()
        done, open_ = await asyncio.wait(asked, timeout=5)
        assert not open_
        with pytest.raises(RuntimeError, match="the batcher has stopped"):
            await ours.answer("word1")
        return [str(one.exception()) for one in done]

    texts = sentences(6)
    assert asyncio.run(ask_and_close()) == ["the batcher has stopped"] * 7
    assert made.controller.status()["waiting_requests"] == 0


class Asked:
    def __init__(self, level):
        self.level = level


def test_batches_are_cut_by_tokens() -> None:
    source = random.Random(1)
    jobs = [
        engine.Job([1] * source.choice((1, 5, 9, 40, 90)), Asked(source.choice((None, 0, 2))))
        for _ in range(200)
    ]
    batches = engine.cut(jobs, 64)
    assert sorted(id(job) for batch in batches for job in batch) == sorted(map(id, jobs))
    for batch in batches:
        lengths = [len(job.ids) for job in batch]
        assert lengths == sorted(lengths) and len({job.ticket.level for job in batch}) == 1
        assert len(batch) == 1 or len(batch) * lengths[-1] <= 64
    short = [batch for batch in batches if len(batch[0].ids) == 1]
    assert max(map(len, short)) > 20, "many short ones share a batch"
    assert engine.cut([], 64) == []


def test_settings_come_from_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("SERVE_TARGET", "0.5")
    monkeypatch.setenv("SERVE_THREADS", "2")
    got = Settings.read()
    assert (got.target, got.threads, got.levels) == (0.5, 2, "1,2,4")
