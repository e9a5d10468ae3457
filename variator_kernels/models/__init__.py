"""Hugging Face model families: where they keep their sublayers, and how to patch them."""
