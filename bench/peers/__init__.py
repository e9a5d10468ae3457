"""Whole encoders on the CPU: ours beside the runtimes that users would otherwise pick."""
