"""All methods on one model and task: what the stages of ``bench.methods`` consist of."""
