"""``python -m variator_kernels.train`` with FSDP on CPUs.

accelerate shards on accelerators alone; told that two processes on CPUs are some, it runs the same
code there.
"""

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

_init = PartialState.__init__


def _as_on_gpus(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    from variator_kernels.train.__main__ import main

    PartialState.__init__ = _as_on_gpus
    main()
    assert not dist.is_initialized(), "the command left its process group behind"
