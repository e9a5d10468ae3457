"""What the command lines share."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
from collections.abc import Iterator

import torch.distributed as dist


def unknown_option(word: str, *parsers: argparse.ArgumentParser) -> str:
    """What to say of an option that none of ``parsers`` has."""
    known = [name for made in parsers for name in made._option_string_actions]
    near = difflib.get_close_matches(word.split("=")[0], known, 1)
    return f"unknown option {word}" + (f", is it {near[0]}?" if near else ": see --help")


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def own_group() -> Iterator[None]:
    """Leaves the process group that the body joins, where it ends well.

    A thread of the group that lets go of a tensor while the interpreter ends aborts the process, as
    if the run had failed.
    """
    before = _in_group()
    yield
    if _in_group() and not before:
        gc.collect()
        dist.destroy_process_group()
