"""Initial values of plugins in closed form: moments, not training."""

from .calibrate_model import calibrate
from .inputs import LEAST
from .table import Calibration, Row

__all__ = ["LEAST", "Calibration", "Row", "calibrate"]
