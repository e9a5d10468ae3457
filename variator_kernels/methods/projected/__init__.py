"""Projected Compression (arXiv 2506.22255): smaller matrices, made of frozen ones by projections."""
