"""Parameters that FSDP2 keeps in shards (``DTensor``), read and written whole.

Every process must call :func:`whole` and :func:`fill` for every sharded parameter, in the same
order, after :func:`reshard`.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def reshard(model: nn.Module) -> None:
    """Put the shards back where a forward left whole parameters in their place.

    Those are copies, perhaps of another dtype.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def whole(parameter: Tensor) -> Tensor:
    """All of a parameter; itself if it is not sharded."""
    # Not isinstance: importing DTensor takes a while, and not every build of PyTorch has it.
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def fill(parameter: Tensor, value: Tensor) -> None:
    """Overwrite a parameter with ``value``, in its own dtype, device and shards."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        given = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(given, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
