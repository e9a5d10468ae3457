"""How near a compressed model's embeddings are to the original's, and how alike they rank texts."""

import numpy as np
from numpy.typing import NDArray

from ..harness.results import Row

NEIGHBOURS = 10
Embeddings = NDArray[np.floating]
"""``[texts, e]``."""


def compare(found: Embeddings, original: Embeddings, neighbours: int = NEIGHBOURS) -> Row:
    """Cosine to the original's embedding (mean, 5 % quantile); Spearman's correlation of the
    similarities of all pairs of texts; the part of each text's nearest neighbours that stays.

    Raises:
        ValueError: there are too few texts. ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise ImportError("correlations need scipy: pip install scipy") from error
    if len(original) <= neighbours:
        raise ValueError(f"texts must be more than {neighbours}, got {len(original)}")
    a, b = _unit(found), _unit(original)
    cosines = (a * b).sum(-1)
    pairs = np.triu_indices(len(a), 1)
    ours, theirs = a @ a.T, b @ b.T
    near = [_nearest(similar, neighbours) for similar in (ours, theirs)]
    kept = [len(np.intersect1d(x, y)) for x, y in zip(*near, strict=True)]
    return {
        "cosine": float(cosines.mean()),
        "cosine_q05": float(np.quantile(cosines, 0.05)),
        "spearman": float(spearmanr(ours[pairs], theirs[pairs]).statistic),
        "neighbours": float(np.mean(kept)) / neighbours,
    }


def _unit(rows: Embeddings) -> NDArray[np.float64]:
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _nearest(similar: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    others = similar.copy()
    np.fill_diagonal(others, -np.inf)
    return np.argsort(-others, axis=-1, kind="stable")[:, :count]
