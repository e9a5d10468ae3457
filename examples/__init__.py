"""Small programs that use the package."""
