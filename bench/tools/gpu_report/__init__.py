"""The GPU report, unattended: ``make gpu-report`` or ``python -m bench.tools.gpu_report``."""
