"""Measures one case: checks every arm against float64 first, then times what passed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.common.checks import Truth, factor_of, judge, truth
from bench.common.timing import quartiles, ratio
from variator_kernels import functional
from variator_kernels.ops.feed_forward import FeedForward, PluginWeights, normalize, products

from .cases import OURS, Case
from .clock import Clock
from .sublayers import MODELS, Model, Sublayer

Row = dict[str, Any]
Outputs = tuple[Tensor, ...]


def wide(weights: Any) -> Any:
    """A NamedTuple of weights in float64."""
    return type(weights)(*(v.double() if isinstance(v, Tensor) else v for v in weights))


def dense_exact(layer: Sublayer) -> Tensor:
    """The dense sublayer in float64."""
    ffn, x = wide(layer.ffn), layer.x.double()
    norm = (ffn.norm, ffn.norm_weight, ffn.norm_bias, ffn.eps)
    if ffn.post_norm:
        return normalize(x + products(x, ffn), *norm)
    return x + products(normalize(x, *norm), ffn)


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """``mode="max-autotune"`` but for its CUDA graphs: every arm here is captured the same way."""
    return torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)


def in_launches(call: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """The CUDA kernels in several launches, also for few groups."""
    from variator_kernels.ops.compressed_ffn import cuda as sublayer

    def run() -> Outputs:
        with mock.patch.object(sublayer, "ONE_LAUNCH_GROUPS", 0):
            return call()

    return run


class Arms:
    """The calls of one case at one ratio."""

    def __init__(self, layer: Sublayer, k: int, backward: bool, kernels: str) -> None:
        self.layer, self.backward, self.kernels = layer, backward, kernels
        self.weights = layer.plugin(k)
        self.dy = torch.randn_like(layer.x)

    def plugged(
        self, backend: str, x: Tensor, weights: PluginWeights, ffn: FeedForward
    ) -> Callable[[], Outputs]:
        """The compressed sublayer; with ``backward`` also gradients of x and of the plugin."""

        def forward() -> Outputs:
            with torch.no_grad():
                return (functional.compressed_ffn(x, weights, ffn, backend=backend),)

        def both() -> Outputs:
            leaves: Any = [t.detach().requires_grad_() for t in (x, *weights[:6])]
            plugin = PluginWeights._make([*leaves[1:], weights.activation])
            y = functional.compressed_ffn(leaves[0], plugin, ffn, backend=backend)
            return (y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype)))

        return both if self.backward else forward

    def call(self, arm: str) -> Callable[[], Outputs]:
        layer = self.layer
        if arm.startswith("hf"):
            dense = compiled(layer.dense) if arm.endswith("compiled") else layer.dense

            def run() -> Outputs:
                with torch.no_grad():
                    return (dense(layer.x),)

            return run
        backend = "cuda" if arm.startswith("cuda") else "reference"
        backend = self.kernels if arm == "ours" else backend
        run = self.plugged(backend, layer.x, self.weights, layer.ffn)
        run = in_launches(run) if arm == "cuda-launches" else run
        return compiled(run) if arm.endswith("compiled") else run

    def truth(self, arm: str) -> Truth:
        """float64, and the error of plain PyTorch in the dtype under test."""
        layer = self.layer
        if arm.startswith("hf"):
            return truth((dense_exact(layer),), self.call("hf")())
        exact = self.plugged("reference", layer.x.double(), wide(self.weights), wide(layer.ffn))
        return truth(exact(), self.call("reference")())


def measure(
    case: Case, clock: Clock, ceilings: dict[str, float], *, rounds: int, kernels: str,
    model: Model | None = None,
) -> list[Row]:  # fmt: skip
    """A row an arm and ratio; one without a green check has no number."""
    layer = Sublayer(model or MODELS[case.model], case.batch, case.length, clock.device,
                     torch.bfloat16)  # fmt: skip
    rows: list[Row] = []
    for k in case.ratios:
        torch._dynamo.reset()  # it stops compiling a function that it compiled too often
        arms = Arms(layer, k, case.backward, kernels)
        measures: dict[bool, Truth] = {}
        group: dict[str, Row] = {}
        calls: dict[str, Any] = {}
        for arm in case.arms:
            row = {**case._asdict(), "arm": arm, "k": k, "status": "failed", "reason": ""}
            del row["ratios"], row["arms"]
            group[arm] = row
            try:
                call = arms.call(arm)
                dense = arm.startswith("hf")
                if dense not in measures:
                    measures[dense] = arms.truth(arm)
                verdict = judge(call(), measures[dense], factor_of(arm))
            except Exception as error:
                row["reason"] = f"{type(error).__name__}: {error}"[:500]
                continue
            row.update(error=verdict.error, allowed=verdict.allowed)
            if verdict.ok:
                row["status"], calls[arm] = "ok", call
            else:
                row["reason"] = f"error {verdict.error:.2e}, allowed {verdict.allowed:.2e}"
        measures.clear()
        _time(group, calls, clock, rounds)
        _compare(group, layer, k, ceilings)
        rows += group.values()
    return rows


def _time(group: dict[str, Row], calls: dict[str, Any], clock: Clock, rounds: int) -> None:
    """Device time by graph replay, wall time of eager calls, peak memory."""
    replays = {}
    for arm, call in calls.items():
        try:
            replays[arm] = clock.graphed(call)
            group[arm]["captured"] = clock.gpu
        except Exception as error:
            clock.synchronize()
            group[arm].update(captured=False, reason=f"not captured: {error}"[:500])
            replays[arm] = call
    for arm, samples in clock.interleaved(replays, rounds).items():
        group[arm].update(seconds=quartiles(samples), samples=samples)
    for arm, samples in clock.wall(calls, max(1, rounds // 4)).items():
        group[arm].update(wall=quartiles(samples), wall_samples=samples)
    for arm, call in calls.items():
        group[arm]["memory"] = clock.peak_memory(call)


def _compare(group: dict[str, Row], layer: Sublayer, k: int, ceilings: dict[str, float]) -> None:
    """How much faster each of ours is than each arm of its round, and its time over the floor."""
    for name in OURS:
        ours = group.get(name)
        if ours is None or ours["status"] != "ok":
            continue
        ours["speedup"], ours["wall_speedup"] = {}, {}
        for arm, row in group.items():
            if row["status"] == "ok" and arm != name:
                ours["speedup"][arm] = ratio(row["samples"], ours["samples"])
                ours["wall_speedup"][arm] = ratio(row["wall_samples"], ours["wall_samples"])
        if not ours["backward"]:
            floor = layer.bytes() / ceilings["copy"] + 2 * layer.macs(k) / ceilings["matrix"]
            ours["floor"] = floor
            ours["over_floor"] = ours["seconds"]["median"] / floor
        reference = group.get("reference", {})
        if ours["memory"] and reference.get("memory"):
            ours["memory_of_reference"] = ours["memory"] / reference["memory"]
