"""Decoders with plugins: the benchmark ``python -m bench.decoder``, in pieces."""
