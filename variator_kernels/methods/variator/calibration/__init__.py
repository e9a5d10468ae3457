"""Initial values of plugins in closed form: moments, not training."""

from .inputs import LEAST
from .run import calibrate
from .table import Calibration, Row

__all__ = ["LEAST", "Calibration", "Row", "calibrate"]
