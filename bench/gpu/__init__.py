"""What the GPU report measures, and how (``python -m bench.gpu_report``)."""
