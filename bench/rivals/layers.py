"""Fewer layers.

Dropping the top ones (Sajjad et al. 2023, arXiv 2004.03844: of the ways to drop, the best), and a
student that starts from evenly spread ones and is distilled (DistilBERT, Sanh et al. 2019, arXiv
1910.01108; with the hidden states of the layers behind which its own stand).
"""

from typing import Any

from torch import nn


def drop(model: Any, keep: int, spread: bool = False) -> Any:
    """``model`` itself with ``keep`` of its layers: the lowest, or ``spread`` up to the last.

    ``model.matched`` says which of the original's hidden states each of its own stands for.
    """
    layers = model.base_model.encoder.layer
    if not 1 <= keep <= len(layers):
        raise ValueError(f"keep must be from 1 to {len(layers)}, got {keep}")
    kept = list(range(keep))
    if spread:
        kept = [round((i + 1) * len(layers) / keep) - 1 for i in kept]
    model.base_model.encoder.layer = nn.ModuleList([layers[i] for i in kept])
    model.config.num_hidden_layers = keep
    model.matched = (0, *(i + 1 for i in kept))
    return model
