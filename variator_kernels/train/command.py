"""What the command lines share."""

from __future__ import annotations

import argparse
import difflib


def unknown_option(word: str, *parsers: argparse.ArgumentParser) -> str:
    """What to say of an option that none of ``parsers`` has."""
    known = [name for made in parsers for name in made._option_string_actions]
    near = difflib.get_close_matches(word.split("=")[0], known, 1)
    return f"unknown option {word}" + (f", is it {near[0]}?" if near else ": see --help")
