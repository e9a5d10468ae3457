"""What the benchmarks share: machine, models, arms, checks, timing, tables and files."""
