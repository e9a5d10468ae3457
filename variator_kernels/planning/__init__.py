"""Choosing a ratio for every site of a model: the least loss at a cost, or the least cost."""

from .plan_model import plan

__all__ = ["plan"]
