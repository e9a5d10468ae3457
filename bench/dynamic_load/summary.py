"""Replies in numbers: checked first, then quantiles, shares of levels, accuracy."""

from collections import Counter

import numpy as np

from ..harness.results import Row
from .answers import Truth
from .generator import Reply
from .trace import Phase


def wrong(replies: list[Reply], truth: Truth, level: str | None) -> str:
    """Why these replies have no numbers; empty if they have. ``level``: the only one allowed."""
    lost = [reply for reply in replies if reply.status != 200]
    if lost:
        kinds = Counter(f"{r.status} {str(r.answer.get('detail'))[:60]}" for r in lost)
        return f"{len(lost)} of {len(replies)} requests have no answer: {dict(kinds)}"
    others = differ = 0
    for reply in replies:
        answer = reply.answer
        others += level is not None and answer["level"] != level
        same = truth.agrees(
            reply.request.sentence, answer["level"], answer["label"], answer["probability"]
        )
        differ += not same
    if others or differ:
        return f"{differ} answers are not the model's at their level, {others} are of other levels"
    return ""


def quantiles(replies: list[Reply]) -> dict[str, float]:
    """Seconds."""
    values = np.quantile([reply.seconds for reply in replies], (0.5, 0.95, 0.99))
    return dict(zip(("p50", "p95", "p99"), map(float, values), strict=True))


def of(replies: list[Reply], truth: Truth, dense: str) -> Row:
    """Requests, latencies in seconds, the share of each level, and the accuracy of the answers
    beside that of the dense model on the very same requests, in percent."""
    answers = [reply.answer for reply in replies]
    sentences = [reply.request.sentence for reply in replies]
    levels = Counter(answer["level"] for answer in answers)
    right = [truth.right[i] == a["label"] for i, a in zip(sentences, answers, strict=True)]
    as_dense = [truth.right[i] == truth.given[dense][i][0] for i in sentences]
    return {
        "requests": len(replies),
        **quantiles(replies),
        "late_p99": float(np.quantile([reply.late for reply in replies], 0.99)),
        "levels": {name: levels[name] / len(replies) for name in truth.given},
        "accuracy": 100 * float(np.mean(right)),
        "dense_accuracy": 100 * float(np.mean(as_dense)),
    }


def row(replies: list[Reply], truth: Truth, dense: str, parts: list[Phase], target: float) -> Row:
    """Of one arm over a trace: whole, by phase, by second, and how soon it was dense again."""
    made: Row = {"status": "ok", "target": target, **of(replies, truth, dense), "phases": []}
    for number, phase in enumerate(parts):
        here = [reply for reply in replies if reply.request.phase == number]
        made["phases"].append({"phase": phase.name, "rate": phase.rate, **of(here, truth, dense)})
    seconds = int(sum(phase.seconds for phase in parts) + 0.5)
    made["over_time"] = [_second(replies, truth, s) for s in range(seconds)]
    end = parts[0].seconds + parts[1].seconds
    answered = [r.request.at + r.seconds for r in replies if r.answer["level"] != dense]
    made["compressed_for"] = max([0.0, *(at - end for at in answered)])
    return made


def _second(replies: list[Reply], truth: Truth, second: int) -> Row:
    here = [reply for reply in replies if second <= reply.request.at < second + 1]
    if not here:
        return {"second": second, "requests": 0}
    levels = Counter(reply.answer["level"] for reply in here)
    latency = [reply.seconds for reply in here]
    return {
        "second": second,
        "requests": len(here),
        "p50": float(np.median(latency)),
        "most": max(latency),
        "levels": {name: levels[name] / len(here) for name in truth.given},
    }
