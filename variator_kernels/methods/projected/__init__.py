"""Projected Compression (arXiv 2506.22255): smaller matrices, made of frozen ones."""

from .project_model import Projection, is_projected, merge, project

__all__ = ["Projection", "is_projected", "merge", "project"]
