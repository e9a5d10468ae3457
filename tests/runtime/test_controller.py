"""vk.RatioController: in time, no more compressed than needed, and the same every time."""

from __future__ import annotations

import gc
import logging
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import variator_kernels as vk
from tests.runtime.simulated import CAPACITY, NAMES, Clock, poisson, quantile, serve, times
from tests.sites import tiny
from variator_kernels.runtime.state import states

TARGET = 0.15
LEVELS = (1, 2, 4, 8)
HALF, BURST = 0.5 * CAPACITY, 1.3 * CAPACITY
PHASES = [(20.0, HALF), (20.0, BURST), (20.0, HALF)]


@pytest.fixture(scope="module")
def model():
    return tiny.patched("bert", ratios=(2, 4, 8))


def controlled(model, **settings):
    clock = Clock()
    given = {"target_seconds": TARGET, "levels": LEVELS, "profile": times(), "batch_tokens": 320}
    return vk.RatioController(model, clock=clock, **given | settings), clock


def levels(answers, begin, end):
    return {a.level for a in answers if begin <= a.arrived < end}


def test_a_burst_is_answered_in_time_and_forgotten(model):
    arrivals = poisson(PHASES)
    controller, clock = controlled(model)
    answers = serve(controller, clock, arrivals)
    assert len(answers) == len(arrivals)
    assert levels(answers, 0, 20) == {"1"}
    assert quantile(answers, 0.99, 20, 40) <= TARGET
    assert levels(answers, 45, 60) == {"1"}
    dense, clock = controlled(model, levels=(1,), profile=times(NAMES[:1], (1.0,)))
    assert quantile(serve(dense, clock, arrivals), 0.99, 20, 40) > 3 * TARGET
    gentle = sum(a.level in ("1", "2", "4") for a in answers if 20 <= a.arrived < 40)
    assert gentle >= 0.9 * sum(20 <= a.arrived < 40 for a in answers)


def test_the_same_calls_and_clock_give_the_same(model):
    arrivals = poisson(PHASES, seed=1)
    first, second = (serve(*controlled(model), arrivals) for _ in range(2))
    assert first == second and len({a.level for a in first}) > 1


def test_a_floor_holds(model):
    controller, clock = controlled(model, max_ratio=2)
    answers = serve(controller, clock, poisson([(5.0, 2 * CAPACITY)]))
    assert levels(answers, 0, 5) == {"1", "2"}
    controller.max_ratio = None
    assert "8" in levels(serve(controller, clock, [clock.now] * 200), 0, 1e9)
    controller.max_ratio = 1
    assert levels(serve(controller, clock, [clock.now] * 100), 0, 1e9) == {"1"}
    with pytest.raises(ValueError, match="max_ratio must be >= 1, got 0"):
        controller.max_ratio = 0
    assert controller.max_ratio == 1


def test_up_at_once_down_after_a_while(model):
    controller, clock = controlled(model, hold_seconds=2.0)
    crowd = serve(controller, clock, [0.0] * 60)
    assert crowd[0].level != "1"
    calm = serve(controller, clock, [clock.now + 0.1 * i for i in range(1, 100)])
    back = next(a.arrived for a in calm if a.level == "1") - crowd[-1].seconds
    assert 2.0 <= back <= 5.0
    assert levels(calm, back + 1, 1e9) == {"1"}


def test_a_pause_counts_as_calm(model):
    controller, clock = controlled(model)
    assert serve(controller, clock, [0.0] * 200)[-1].level != "1"
    assert serve(controller, clock, [clock.now + 30.0])[0].level == "1"


def test_a_request_has_its_own_level(model):
    controller, clock = controlled(model)
    arrivals = poisson([(3.0, BURST)])
    answers = serve(controller, clock, arrivals, asks=lambda i: "1" if i % 10 == 0 else None)
    asked = set(arrivals[::10])
    assert all(a.level == "1" for a in answers if a.arrived in asked)
    assert any(a.level != "1" for a in answers if a.arrived not in asked)
    controller.max_ratio = 2
    for wrong in ("4", 4, "dense", True, 3):
        with pytest.raises(ValueError, match="ratio must be one of 1, 2, got"):
            controller.arrive(5, wrong)
    assert controller.status()["waiting_requests"] == 0
    assert controller.arrive(5, 2).level == 1


def test_what_waits_keeps_to_a_floor_that_was_lowered(model):
    controller, _ = controlled(model)
    for most, ran in ((None, "8"), (8, "8"), (4, "4"), (3, "2"), (1, "1")):
        controller.max_ratio = None
        ticket = controller.arrive(20, "8")
        controller.max_ratio = most
        with controller.batch([ticket]) as choice:
            assert (choice.name, choice.ratio) == (ran, int(ran))
            assert states(model)[0].current().uniform == int(ran)


def test_learns_that_the_machine_is_slower_than_it_was(model):
    controller, clock = controlled(model)
    arrivals = poisson([(20.0, 0.6 * CAPACITY)])
    answers = serve(controller, clock, arrivals, slow=lambda now: 2.0)
    assert 1.8 <= controller.status()["slowdown"] <= 2.2
    assert quantile(answers, 0.99, 5, 20) <= TARGET * 1.1
    assert "1" not in levels(answers, 10, 20)


def test_what_is_too_late_anyhow_costs_nobody_quality(model):
    """After a stall the batch that is lost runs as if it were in time."""
    controller, clock = controlled(model)
    old = controller.arrive(20)
    clock.now = 10.0
    with controller.batch([old]) as choice:
        assert choice.name == "1"


def test_what_waits_and_is_too_late_anyhow_costs_nobody_quality(model):
    """Also when it goes on waiting; but a long queue is worked off for those behind it."""
    controller, clock = controlled(model)
    controller.arrive(20)
    seen = set()
    for _ in range(20):
        clock.now += 1.0
        with controller.batch([controller.arrive(20)]) as choice:
            clock.now += 0.01
        seen.add(choice.name)
    assert seen == {"1"}
    for _ in range(60):
        controller.arrive(20)
    clock.now += 10.0
    with controller.batch([controller.arrive(20)]) as choice:
        assert choice.name == "8"
    for ticket in tuple(controller._policy.waiting.tickets)[1:]:
        controller.cancel(ticket)
    for _ in range(3):
        clock.now += 1.0
        with controller.batch([controller.arrive(20)]) as choice:
            clock.now += 0.01
    assert choice.name == "1", "what is lost keeps no level"


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=120),
    st.sampled_from((1, 2, 4, 8, None)),
    st.floats(0.3, 4),
)
def test_whatever_comes(model, arrivals, most, slow):
    """Everybody is answered, at a level that is allowed, and the books are even."""
    controller, clock = controlled(model, max_ratio=most)
    answers = serve(controller, clock, sorted(arrivals), slow=lambda now: slow)
    assert len(answers) == len(arrivals)
    assert all(int(a.level) <= (most or 8) for a in answers)
    status = controller.status()
    assert status["waiting_requests"] == status["waiting_tokens"] == 0
    assert status["running_batches"] == 0


def test_a_batch_runs_at_its_level_also_when_it_fails(model):
    controller, _ = controlled(model)
    state = states(model)[0]
    ticket = controller.arrive(20, "4")
    with pytest.raises(KeyError), controller.batch([ticket]) as choice:
        assert choice.ratio == 4 and state.current().uniform == 4
        assert choice.predicted_seconds > 0
        raise KeyError
    assert controller.status()["running_batches"] == 0
    assert controller.status()["slowdown"] == 1.0


def test_tickets_are_used_once(model):
    controller, _ = controlled(model)
    one, other, left = controller.arrive(20), controller.arrive(20, "2"), controller.arrive(3)
    controller.cancel(left)
    controller.cancel(left)
    for wrong, message in (
        ([], "at least one"), ([one, one], "each once"), ([one, other], "the same level"),
        ([left], "1 of 1 do not"), ([one, left], "1 of 2 do not"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message), controller.batch(wrong):
            raise AssertionError
    assert controller.status()["waiting_requests"] == 2
    with controller.batch([one]):
        pass
    with pytest.raises(ValueError, match="1 of 1 do not"), controller.batch([one]):
        raise AssertionError


def test_names_of_levels(model):
    sites = states(model)[0].sites
    numbers = {"limit": 1.0, "predicted_cost": 1.0, "cost": 1.0, "loss": 0.0}
    plan = vk.Plan(sites, (2, 8), "cost", measure="flops", **numbers)
    mixed = {"dense": 1, "last": {"ffn": {-1: 4}}, "plan": plan}
    controller, _ = controlled(
        model, levels=mixed, profile=times(("dense", "last", "plan"), (1, 1.2, 1.4)), max_ratio=4
    )
    with controller.batch([controller.arrive(4, "last")]) as choice:
        assert choice.name == "last" and states(model)[0].current().ratios == (1, 4)
    with pytest.raises(ValueError, match="one of dense, last, got"):
        controller.arrive(4, "plan")
    default = vk.RatioController(model, target_seconds=1, profile=times())
    assert list(default.levels) == list(NAMES)


def test_a_line_a_switch(model, caplog):
    controller, clock = controlled(model)
    with caplog.at_level(logging.INFO, "variator_kernels.controller"):
        serve(controller, clock, [0.0] * 60)
        serve(controller, clock, [clock.now + 20])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("model: level 1 -> ") and "60 requests, 1200 tokens" in lines[0]
    assert lines[1].endswith("-> 1: it has done for 1 s; 1 requests, 20 tokens, slowdown 1.00")


def test_metrics(model):
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    controller, clock = controlled(model, registry=registry, name="one")
    serve(controller, clock, [0.0] * 60)

    def read(name, **labels):
        return registry.get_sample_value(name, {"controller": "one", **labels})

    answered = [read("variator_requests_total", level=name) for name in NAMES]
    assert sum(answered) == 60 and read("variator_switches_total") == 1
    assert read("variator_level") > 0 and read("variator_waiting_requests") == 0
    assert read("variator_oldest_request_seconds_count") == sum(
        read("variator_batches_total", level=name) for name in NAMES
    )
    assert read("variator_arriving_tokens") > 0 and read("variator_slowdown") > 0
    with pytest.raises(KeyError), controller.batch([controller.arrive(3)]):
        raise KeyError
    assert read("variator_failed_batches_total") == 1
    other, _ = controlled(model, registry=registry, name="two")
    with other.batch([other.arrive(3)]):
        pass
    labels = {"controller": "two", "level": "1"}
    assert registry.get_sample_value("variator_requests_total", labels) == 1


def test_metrics_of_what_waits_are_of_now(model):
    """Also when no batch begins."""
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    controller, clock = controlled(model, registry=registry)
    names = ("waiting_requests", "waiting_tokens", "arriving_tokens")

    def read():
        return [registry.get_sample_value(f"variator_{n}", {"controller": "model"}) for n in names]

    assert read() == [0, 0, 0]
    tickets = [controller.arrive(5) for _ in range(3)]
    assert read() == [3, 15, 7.5]
    controller.cancel(tickets[0])
    clock.now = 1000.0
    waiting, tokens, rate = read()
    assert (waiting, tokens) == (2, 10) and rate < 1e-9
    del controller
    gc.collect()
    assert read() == [0, 0, 0]


def test_metrics_need_their_package(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match="registry needs prometheus_client: pip install"):
        controlled(model, registry=object())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_seconds": 0}, "target_seconds must be a finite number above 0, got 0"),
        ({"target_seconds": True}, "target_seconds must be a finite number"),
        ({"margin": 1.5}, "margin must be at most 1, got 1.5"),
        ({"hold_seconds": float("inf")}, "hold_seconds must be a finite"),
        ({"batch_tokens": 0}, "batch_tokens must be >= 1, got 0"),
        ({"levels": ()}, "levels must name at least one"),
        ({"levels": (1, 2, 2)}, "levels must be different"),
        ({"levels": (1, 4, 2)}, "least compressed to the most, got '2', .* behind '4'"),
        ({"levels": (1, {"ffn": 2})}, "levels must be a mapping of names"),
        ({"levels": (1, 3)}, "ratio must be 1"),
        ({"profile": times().only(("1", "2"))}, "profile must hold the levels"),
        ({"levels": (2, 4), "profile": times(NAMES[1:3], (1, 2)), "max_ratio": 1}, "must leave"),
    ],
)
def test_refuses(model, change, message):
    with pytest.raises(ValueError, match=message):
        controlled(model, **change)
    with pytest.raises(ValueError, match="not patched"):
        vk.RatioController(tiny.model("bert"), target_seconds=1)
