"""Parameters that FSDP2 keeps in shards (``DTensor``), read and written whole.

Every process must call these functions for every sharded parameter, in the same order.
"""

from __future__ import annotations

from torch import Tensor


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
