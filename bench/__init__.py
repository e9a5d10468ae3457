"""Benchmarks: speed against k, memory, each kernel alone, and the figures made of their results."""
