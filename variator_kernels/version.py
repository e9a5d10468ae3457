"""The version of the package: written into plugin files, read by the build."""

__version__ = "0.2.0"
