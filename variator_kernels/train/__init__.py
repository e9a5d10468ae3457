"""Training plugins by distillation (paper section 3.3): ``pip install variator-kernels[train]``."""

from .config import DistillationConfig, config_for
from .job import Job
from .run import run
from .trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer", "Job", "config_for", "run"]
