"""Quality against k: what the stages of ``bench.quality_vs_k`` consist of."""
