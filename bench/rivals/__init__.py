"""What users would otherwise do to a model: each method one small file in plain PyTorch.

No part of the package: :mod:`bench.methods` trains and measures them beside the plugins.
"""
