"""Tools beside the benchmarks: they compile, tune, inspect and report."""
