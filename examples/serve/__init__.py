"""A sentiment server whose compression follows the load."""
