"""Training plugins by distillation (paper section 3.3), and projected models:
``pip install variator-kernels[train]``."""

from .config import DistillationConfig, config_for
from .job import Job
from .projection import ProjectionTrainer
from .projection_config import ProjectionConfig
from .run import run
from .trainer import DistillationTrainer

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "Job",
    "ProjectionConfig",
    "ProjectionTrainer",
    "config_for",
    "run",
]
