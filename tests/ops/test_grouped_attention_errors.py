"""What grouped_attention refuses, and when it takes the reference instead of kernels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.attention_cases import options, qkv, t5_table
from tests.ops.cases import needs_cpu
from variator_kernels import functional as vf
from variator_kernels.ops.grouped_attention import op

SHAPE = (2, 9, 6, 4, 2, 8)
Q, K, V = qkv(SHAPE)
POSITIONS, STARTS = torch.arange(9).expand(2, 9), torch.arange(6).expand(2, 6)


def attend(q=Q, k=K, v=V, **given):
    return vf.grouped_attention(q, k, v, **given)


def distances(**given):
    given = {"table": t5_table(4), "queries": POSITIONS, "keys": STARTS} | given
    return vf.distance_bias(given.pop("table"), **given)


BAD = {
    r"queries must be a torch.Tensor, got list": lambda: attend([1.0]),
    r"queries must be \[rows, ., heads, d\], got \[9, 4, 8\]": lambda: attend(Q[0]),
    r"keys must have the queries' dtype torch.float32, got torch.bfloat16": lambda: attend(
        k=K.bfloat16()
    ),
    r"queries must be a floating point tensor, got torch.int64": lambda: attend(Q.long()),
    r"keys must have shape \[2, 6, 2, 8\], got \[2, 6, 2, 5\]": lambda: attend(k=K[..., :5]),
    r"values must have shape \[2, 6, 2, 8\], got \[2, 5, 2, 8\]": lambda: attend(v=V[:, :5]),
    r"keys must have heads that divide the queries' 3, got 2": lambda: attend(Q[:, :, :3]),
    r"values must be on queries's device": lambda: attend(v=V.to("meta")),
    r"bias must have shape \[2, 6\], got \[2, 9\]": lambda: attend(bias=torch.zeros(2, 9)),
    r"bias must be a floating point tensor": lambda: attend(bias=torch.zeros(2, 6).long()),
    r"first must be int32 or int64, got torch.float32": lambda: attend(first=torch.zeros(2, 6)),
    r"dropout_p must be >= 0 and < 1, got 1.5": lambda: attend(dropout_p=1.5),
    r"backend must be one of": lambda: attend(backend="gpu"),
    r"relative must have values \[P, 1 or 4, W\], got \[1, 3, 257\]": lambda: attend(
        relative=distances(table=t5_table(3))
    ),
    r"relative.keys must have shape \[2, 6\], got \[2, 5\]": lambda: attend(
        relative=distances(keys=STARTS[:, :5])
    ),
    r"queries must be integers, float32 or float64, got torch.bfloat16": lambda: distances(
        queries=POSITIONS.bfloat16()
    ),
    r"keys must be integers, got torch.float32": lambda: distances(
        keys=STARTS.float(), members=torch.ones(2, 6, 3, dtype=torch.bool)
    ),
    r"members must be bool \[2, 6, k\], got torch.int64 \[2, 6, 3\]": lambda: distances(
        members=torch.ones(2, 6, 3).long()
    ),
    r"keys must have the queries' 2 rows, got 1": lambda: distances(keys=STARTS[:1]),
    r"table must be floating \[buckets, heads\], got \[32\]": lambda: distances(
        table=torch.zeros(32)
    ),
    r"window must be \(left, right\), each >= 0, got \(-1, 3\)": lambda: distances(window=(-1, 3)),
    r"max_distance must be >= 1, got 0": lambda: distances(max_distance=0),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


def test_auto_takes_the_reference_where_kernels_lack_something(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(op, "grouped_attention", forbidden)
    table = t5_table(4).requires_grad_()
    relative = distances(table=table)
    attend(relative=relative, scale=1.0).sum().backward()
    assert table.grad is not None and table.grad.isfinite().all()
    dropped = attend(Q.double(), K.double(), V.double(), dropout_p=0.5)
    assert dropped.isfinite().all()


@needs_cpu
def test_an_explicit_choice_says_why_it_cannot_run():
    with pytest.raises(ValueError, match=r"'cpu' cannot run here: .* no dropout"):
        attend(dropout_p=0.1, backend="cpu")
    relative = distances(table=t5_table(4).requires_grad_())
    with pytest.raises(ValueError, match=r"'cpu' cannot run here: .* no gradient .* table"):
        attend(relative=relative, backend="cpu")
    with torch.no_grad():
        attend(relative=relative, backend="cpu")


@needs_cpu
def test_the_op_itself_refuses_what_does_not_fit():
    """It reads addresses: a wrong shape must not become a wrong address."""
    given = options("t5 attention_kv", SHAPE)
    relative = given["relative"]
    call = op.Attention(Q, K, V, op.Visible(torch.zeros(2, 6)), relative, 1.0)
    assert op.grouped_attention(call, "cpu").shape == Q.shape
    wrong = [
        call._replace(keys=K[:, :5]),
        call._replace(values=V[..., :4]),
        call._replace(queries=Q[:1]),
        call._replace(queries=Q[:, :, :3]),
        call._replace(visible=op.Visible(torch.zeros(2, 5))),
        call._replace(visible=op.Visible(None, torch.zeros(6, 2).int())),
        call._replace(relative=relative._replace(keys=STARTS[:1])),
        call._replace(relative=relative._replace(queries=STARTS)),
        call._replace(relative=relative._replace(values=relative.values[:, :3])),
        call._replace(relative=relative._replace(pattern=relative.pattern + 1000)),
        call._replace(relative=relative._replace(pattern=relative.pattern - 1)),
    ]
    for other in wrong:
        with pytest.raises(ValueError, match="does not fit"):
            op.grouped_attention(other, "cpu")
