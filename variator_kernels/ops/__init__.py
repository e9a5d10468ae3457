"""The operations, one folder each; the same name in ops, tests and bench."""
