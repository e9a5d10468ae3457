"""bench.dynamic_load: latencies from the intended time, no number for a wrong answer, and a queue
that is simulated as it is served."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("fastapi")

from aiohttp import web

from bench.dynamic_load import __main__ as command
from bench.dynamic_load import bursts, generator, simulation, soak, summary, table, trace
from bench.dynamic_load.answers import Truth
from tests.examples.conftest import WORDS, folders  # noqa: F401 - a fixture
from tests.runtime import simulated

TEXTS = ["one", "two", "three"]
TRUTH = Truth(
    TEXTS, [5, 9, 30], ["yes", "no", "yes"],
    {"1": [("yes", 0.9), ("no", 0.8), ("yes", 0.5003)],
     "4": [("yes", 0.7), ("yes", 0.6), ("yes", 0.9)]},
)  # fmt: skip
PARTS = [trace.Phase("half", 2, 50), trace.Phase("burst", 2, 130), trace.Phase("half again", 2, 50)]


def test_a_trace_is_drawn_beforehand():
    parts = trace.phases(100, 10, 1.3)
    made = trace.poisson(parts, 7)
    assert made == trace.poisson(parts, 7) != trace.poisson(parts, 7, seed=1)
    assert [request.at for request in made] == sorted(request.at for request in made)
    counts = [sum(request.phase == i for request in made) for i in range(3)]
    assert counts == pytest.approx([500, 1300, 500], rel=0.15)
    assert all(10 * r.phase <= r.at < 10 * (r.phase + 1) for r in made)
    assert {r.sentence for r in made[:7]} == set(range(7)), "all before one comes again"


def replies(requests, level="1", seconds=0.1):
    made = []
    for request in requests:
        label, p = TRUTH.given[level][request.sentence]
        answer = {"label": label, "probability": p, "level": level}
        made.append(generator.Reply(request, seconds, 0.0, 200, answer))
    return made


def test_no_number_for_what_is_lost_or_wrong():
    good = replies(trace.poisson(PARTS, 3))
    assert summary.wrong(good, TRUTH, "1") == summary.wrong(good, TRUTH, None) == ""
    assert f"{len(good)} are of other levels" in summary.wrong(good, TRUTH, "4")
    lost = [good[0]._replace(status=0, answer={"detail": "why"}), *good[1:]]
    assert f"1 of {len(good)} requests have no answer: {{'0 why': 1}}" in summary.wrong(
        lost, TRUTH, None
    )
    for change in ({"probability": 0.2}, {"level": "8"}, {"level": "4"}):
        other = [good[0]._replace(answer=good[0].answer | change), *good[1:]]
        assert "1 answers are not the model's" in summary.wrong(other, TRUTH, None)
    assert TRUTH.agrees(2, "1", "no", 0.5001), "either label, where both are as likely"
    assert not TRUTH.agrees(0, "1", "no", 0.9)


def test_accuracy_is_beside_that_of_dense_on_the_same_sentences():
    requests = trace.poisson(PARTS, 3)
    made = summary.row(
        [r for q in requests for r in replies([q], "4" if q.phase == 1 else "1", 0.1 + q.phase)],
        TRUTH, "1", PARTS, 1.0,
    )  # fmt: skip
    half, burst, again = made["phases"]
    assert half["accuracy"] == half["dense_accuracy"] == 100
    assert burst["accuracy"] == pytest.approx(200 / 3, abs=1) and burst["dense_accuracy"] == 100
    assert half["levels"] == again["levels"] == {"1": 1.0, "4": 0.0}
    assert (half["p99"], burst["p50"]) == pytest.approx((0.1, 1.1))
    assert len(made["over_time"]) == 6
    assert table.lost(burst) == pytest.approx(100 / 3, abs=1)
    row = made | {"case": "trace", "arm": "controlled"}
    assert table.note(row) == "missed: late in the burst, points in the burst, points over all"
    assert table.note(row | {"arm": "dense"}) == "misses the target 1.1x, less than 3x"
    assert len(table.tables_of({"rows": [row]})) == 1


def test_compressed_until_the_last_such_answer_came():
    """Wherever its request was sent."""
    sent = [trace.Request(at, 0, phase) for at, phase in ((0.5, 0), (3.5, 1), (4.5, 2))]

    def compressed_for(*given):
        some = [
            r for q, (level, s) in zip(sent, given, strict=True) for r in replies([q], level, s)
        ]
        return summary.row(some, TRUTH, "1", PARTS, 1.0)["compressed_for"]

    assert compressed_for(("1", 0.1), ("4", 0.2), ("1", 0.1)) == 0
    assert compressed_for(("1", 0.1), ("4", 3.0), ("1", 2.5)) == pytest.approx(2.5)
    assert compressed_for(("1", 0.1), ("4", 0.2), ("4", 2.5)) == pytest.approx(3.0)


@pytest.fixture
def slow_server():
    """Answers one request at a time, each after 30 ms."""
    ready, stopped, found = threading.Event(), threading.Event(), {}

    def run():
        async def serve():
            busy = asyncio.Lock()

            async def classify(request):
                body = await request.json()
                async with busy:
                    await asyncio.sleep(0.03)
                if body["text"] == "two":
                    return web.json_response({"detail": "no"}, status=500)
                return web.json_response({"label": "yes", "probability": 0.9, "level": "1"})

            app = web.Application()
            app.router.add_post("/classify", classify)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            found["url"] = f"http://127.0.0.1:{runner.addresses[0][1]}"
            ready.set()
            while not stopped.is_set():
                await asyncio.sleep(0.02)
            await runner.cleanup()

        asyncio.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    yield found["url"]
    stopped.set()
    thread.join()


def test_the_load_waits_for_nobody(slow_server):
    """Twenty within 0.1 s: the last one is answered after 20 times 30 ms, and counts so."""
    requests = [trace.Request(0.005 * i, 1 if i == 3 else 0, 0) for i in range(20)]
    begin = time.perf_counter()
    found = generator.send(slow_server, requests, generator.bodies(TEXTS, 1))
    assert time.perf_counter() - begin >= 0.6
    assert [reply.request for reply in found] == requests
    assert max(reply.seconds for reply in found) >= 0.45
    assert [reply.status for reply in found].count(500) == 1 and found[3].status == 500
    assert "1 of 20 requests have no answer" in summary.wrong(found, TRUTH, None)


def test_capacity(slow_server):
    sent = generator.bodies(["one"], 1)
    assert 15 <= generator.capacity(slow_server, sent, 1.0, clients=4) <= 34
    with pytest.raises(RuntimeError, match="the server answered 500"):
        generator.capacity(slow_server, generator.bodies(["two"], 1), 1.0, clients=1)


def test_bursts_are_bisected():
    asked = []

    def ask(requests):
        asked.append(sum(r.phase == 1 for r in requests) / bursts.BURST / 100)
        return replies(requests, seconds=0.1 if asked[-1] < 1.55 else 9.0)

    good = bursts.largest(ask, lambda found: "", 100, 3, 1.0, 2.4)
    assert good["status"] == "ok" and good["largest"] == pytest.approx(1.5, abs=0.11)
    assert len(asked) <= 5
    assert good["bound"] == ""
    for limit, held, bound in ((0.3, None, "below 0.5"), (0.55, 0.5, ""), (9, 1.2, "1.2 or more")):
        tried = []

        def up_to(requests, limit=limit, tried=tried):
            tried.append(round(sum(r.phase == 1 for r in requests) / bursts.BURST / 100, 1))
            return replies(requests, seconds=0.1 if tried[-1] < limit else 9.0)

        row = bursts.largest(up_to, lambda found: "", 100, 3, 1.0, 1.2)
        assert (row["largest"], row["bound"]) == (held, bound)
        assert (held or 0.5) in [round(one["factor"], 6) for one in row["tried"]]
        row |= {"case": "bursts", "arm": "k=4"}
        assert table.line(row) == f"bursts k=4, holds {bound or held} x"
        assert table.tables_of({"rows": [row]})[0].columns[1]._cells == [bound or str(held)]
    bad = bursts.largest(ask, lambda found: "lost", 100, 3, 1.0, 2.4)
    assert bad == {"status": "failed", "reason": "lost"}


@pytest.mark.parametrize(("growth", "status"), [(0.0, "ok"), (0.1, "failed")])
def test_a_soak_looks_at_memory(growth, status, monkeypatch):
    monkeypatch.setattr(soak, "LEAST", 0.5)
    monkeypatch.setattr(soak, "EVERY", 0.025)

    class Server:
        looks = 0

        def memory(self):
            self.looks += 1
            return int(1e9 * (1 + growth * self.looks / 40))

    def ask(requests):
        time.sleep(1.0)
        return replies(requests)

    made = soak.soak(Server(), ask, TRUTH, "1", 50, 1.0)
    assert made["status"] == status and made["requests"] > 20
    if status == "failed":
        assert made["reason"].startswith("memory grew by")


def world():
    return simulation.World(simulated.times(), 1.0, [20] * 10, 0.15, 320)


def test_a_simulated_controller_needs_fewer_machines():
    rows = simulation.rows(world(), simulated.CAPACITY, (2,), 3.0)
    machines = {row["arm"]: row["machines"] for row in rows}
    assert machines["controlled"] < machines["dense"]
    assert machines["controlled"] <= min(machines.values())
    controlled = rows[-1]
    assert controlled["p99"] <= 0.15 and 0 < controlled["levels"]["1"] < 1
    assert sum(controlled["levels"].values()) == pytest.approx(1)


def test_machines_are_counted_only_where_they_do():
    hopeless = world()._replace(target=1e-3)
    rows = simulation.rows(hopeless, simulated.CAPACITY, (1,), 0.5)
    assert {(row["status"], row["reason"]) for row in rows} == {
        ("failed", "more than 3 machines are needed")
    }
    assert not any("machines" in row for row in rows)
    assert table.tables_of({"rows": rows})


def test_a_simulation_answers_everybody():
    parts = [trace.Phase("burst", 2.0, 3 * simulated.CAPACITY)]
    found = simulation.simulate(world(), 2, parts, None)
    assert sorted(arrived for arrived, _, _ in found) == [r.at for r in trace.poisson(parts, 10)]
    assert found == simulation.simulate(world(), 2, parts, None)
    assert min(seconds for _, seconds, _ in found) > 0
    fixed = simulation.simulate(world(), 2, parts, 3)
    assert {level for _, _, level in fixed} == {3}


@pytest.mark.slow
def test_the_real_server(folders: Path, tmp_path: Path):  # noqa: F811
    lines = [f"{' '.join(WORDS[i : i + 3 + i % 9])}\t{i % 2}" for i in range(20)]
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    arguments = ["--quick", "--parts", "trace,simulation,soak", "--levels", "1,4"]
    arguments += ["--folder", folders, "--data", tmp_path, "--output", tmp_path / "out"]
    assert command.main([str(word) for word in arguments]) == 0
    content = json.loads((tmp_path / "out" / "dynamic_load.json").read_text())
    arms = [row["arm"] for row in content["rows"] if row["case"] == "trace"]
    assert arms == ["dense", "k=4", "controlled"]
    assert all(row["status"] == "ok" for row in content["rows"])
    assert (tmp_path / "out" / "dynamic_load.png").read_bytes().startswith(b"\x89PNG")
    assert content["capacity"] > 0 and content["times"]["names"] == ["1", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--parts", "all"), "parts must be of"), (("--folder", "none"), "holds no plugins")],
)
def test_refuses(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments, "--output", str(tmp_path)])
    assert message in " ".join(capsys.readouterr().err.split())
