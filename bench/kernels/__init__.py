"""Each kernel alone, as pytest-benchmark cells: ``pytest bench/kernels --benchmark-only``."""
