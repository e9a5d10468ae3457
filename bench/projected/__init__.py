"""Projected Compression: what its starts and its training keep of a model."""
