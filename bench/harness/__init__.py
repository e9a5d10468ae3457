"""How it is measured: the runner, its clocks, the check of outputs, tables and files."""
