"""Where plugins go: the sublayers of Hugging Face models, as data, and how their classes change."""
