"""attention_kv and attention by loops written from the specification."""

import math
from typing import NamedTuple

import torch

from tests.sites import zoo
from tests.sites.attention_models import ModernBert, bucket

K = 3


class Group(NamedTuple):
    start: int
    places: list[int]
    whole: bool = False


def groups_of(row, first, kept):
    """Of ``row``, bools of real tokens. What lies between kept tokens is cut every K places from
    its first real token on."""
    real = [t for t, there in enumerate(row) if there]
    whole = {*real[:first], *(t for t in real if t in kept)}
    made, begin = [], None
    for t in real:
        if t in whole:
            made.append(Group(t, [t], True))
            begin = None
            continue
        begin = t if begin is None else begin
        start = begin + (t - begin) // K * K
        if not made or made[-1].whole or made[-1].start != start:
            made.append(Group(start, []))
        made[-1].places.append(t)
    return made


def merged(plugin, h, group):
    if group.whole:
        return h[group.start]
    slots = torch.zeros(K, h.shape[-1], dtype=h.dtype)
    exists = torch.full((K,), -math.inf, dtype=h.dtype)
    for t in group.places:
        slots[t - group.start], exists[t - group.start] = h[t], 0
    scores = plugin.merge.weight @ slots.flatten() + plugin.merge.bias + exists
    return scores.softmax(0) @ slots


def attended(model, h, queries, keys, bias):
    """``queries``: (vector, position); ``keys``: (vector, position); ``bias(i, j, head, asks,
    answers)`` of the two's vectors in a head, before they are turned."""
    q, k, v, o = model.products
    out = []
    for i, (vector, place) in enumerate(queries):
        heads = []
        for head in range(zoo.HEADS):
            at = slice(head * model.size, (head + 1) * model.size)
            plain, scores, values = q(vector)[at], [], []
            asks = model.turn(plain, place, model.base) if model.base else plain
            for j, (source, where) in enumerate(keys):
                answers = k(source)[at]
                key = model.turn(answers, where, model.base) if model.base else answers
                scores.append(model.scale * (asks @ key) + bias(i, j, head, plain, answers))
                values.append(v(source)[at])
            scores = torch.stack(scores)
            weights = scores.softmax(0) if scores.isfinite().any() else torch.zeros_like(scores)
            heads.append(weights @ torch.stack(values))
        out.append(o(torch.cat(heads)))
    return out


def expected(model, plugin, placement, x, row, first, kept, number):
    """Of one row ``x [n, d]``, the ``number``th; padding as it came, or 0 without a residual."""
    y = x.clone() if not isinstance(model, ModernBert) else torch.zeros_like(x)
    groups = groups_of(row, first, kept)
    if not groups:
        return y
    h = model.before(torch.nan_to_num(x))
    vectors = [merged(plugin, h, group) for group in groups]
    means = [sum(g.places) / len(g.places) for g in groups]
    keys = list(zip(vectors, means, strict=True))

    def seen(distance):
        return model.window is None or abs(distance) < model.window

    if placement == "attention_kv":
        tokens = [t for t, there in enumerate(row) if there]

        def of_token(distance, head):
            if not seen(distance):
                return -math.inf
            if model.table is None:
                return 0.0
            return model.table[bucket(distance, *model.t5), head].item()

        further = model.sums(row, [(h[t], t, 1) for t in tokens])

        def bias(i, j, head, *both):
            if j >= len(groups):
                return model.of_block(row, tokens[i], j - len(groups), head)
            terms = [
                of_token(t - tokens[i], head) + model.pair(number, [tokens[i]], [t], head, *both)
                for t in groups[j].places
            ]
            return torch.tensor(terms, dtype=torch.float64).logsumexp(0)

        keys += [(vector, 0) for vector in further]
        out = attended(model, h, [(h[t], t) for t in tokens], keys, bias)
        for t, o in zip(tokens, out, strict=True):
            y[t] = model.after(x[t], o)
        return y

    tokens = [len(group.places) for group in groups]
    further = model.sums(row, list(zip(vectors, means, tokens, strict=True)))
    more = keys + [(vector, 0) for vector in further]

    def bias_of_means(i, j, head, *both):
        if j >= len(groups):
            return model.of_block(row, means[i], j - len(groups), head)
        distance = math.floor(means[j] - means[i] + 0.5)
        if not seen(distance):
            return -math.inf
        term = 0.0 if model.table is None else model.table[bucket(distance, *model.t5), head]
        term = term + model.pair(number, groups[i].places, groups[j].places, head, *both)
        return math.log(len(groups[j].places)) + term

    adapter = plugin.adapter
    for group, u in zip(groups, attended(model, h, keys, more, bias_of_means), strict=True):
        for t in group.places:
            inner = torch.tanh(adapter.w1 @ torch.cat([u, h[t]]) + adapter.b1)
            o = u if group.whole else u + adapter.w2 @ inner + adapter.b2
            y[t] = model.after(x[t], o)
    return y
