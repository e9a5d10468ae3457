"""Reading text and task data: plain text, TSV, JSON lines, or a ``datasets`` name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TEXT = "text"
"""The only column of a plain text file."""


class Row(NamedTuple):
    """One row: where it stands, for messages, and its columns."""

    place: str
    values: dict[str, str]


def read(source: str, columns: Sequence[str]) -> list[Row]:
    """All rows of ``source``, with these columns as text.

    Args:
        source: a ``.txt`` file (a paragraph a line; blank ones are skipped), a ``.tsv`` (a header
            line, no quoting), a ``.jsonl`` or ``.json`` (an object a line), or ``name[:config
            [:split]]`` of a data set that the ``datasets`` package finds.
        columns: what a row must have; ``("text",)`` for a ``.txt``.

    Raises:
        FileNotFoundError: there is no such file. ImportError: ``datasets`` is not installed.
        ValueError: there are no rows, a column is missing, or a line is not what it should be; the
        message says which.
    """
    path = Path(source)
    readers = {".txt": _text, ".tsv": _tsv, ".jsonl": _json, ".json": _json}
    if path.suffix in readers:
        if not path.is_file():
            raise FileNotFoundError(f"data must be a file or a data set's name, there is no {path}")
        try:
            rows = list(readers[path.suffix](path, columns))
        except UnicodeDecodeError as error:
            raise ValueError(f"data {path} is not UTF-8 text: {error}") from error
    elif path.is_file():
        raise ValueError(f"data must be a .txt, .tsv, .jsonl or .json file, got {path}")
    else:
        rows = list(_datasets(source, columns))
    if not rows:
        raise ValueError(f"data {source} is empty: there is no row in it")
    return rows


def _text(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    _require(columns, (TEXT,), path)
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Row(f"{path}:{number}", {TEXT: line.strip()})


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # Not the csv module: these files do not quote, and a quotation mark is a character like others.
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        names = file.readline().rstrip("\r\n").split("\t")
        if names == [""]:
            return
        _require(columns, names, path)
        for number, line in enumerate(file, 2):
            fields = line.rstrip("\r\n").split("\t")
            if fields == [""]:
                continue
            if len(fields) != len(names):
                raise ValueError(
                    f"{path}:{number} must have {len(names)} columns {names}, got {len(fields)}"
                )
            values = dict(zip(names, fields, strict=True))
            yield Row(f"{path}:{number}", {name: values[name] for name in columns})


def _json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                values = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place} is not JSON: {error}") from error
            if not isinstance(values, dict):
                raise ValueError(f"{place} must hold an object, got {type(values).__name__}")
            _require(columns, tuple(values), place)
            yield Row(place, {name: _text_of(values[name], name, place) for name in columns})


def _datasets(source: str, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"data must be a .txt, .tsv, .jsonl or .json file, got {source!r}; if it names a data "
            "set, install the datasets package: pip install datasets"
        ) from error
    name, config, split = (*source.split(":"), "", "")[:3]
    loaded = datasets.load_dataset(name, config or None, split=split or "train")
    _require(columns, loaded.column_names, source)
    feature = {name: loaded.features[name] for name in columns}
    for number, values in enumerate(loaded):
        place = f"{source} row {number}"
        named = {
            name: feature[name].int2str(value)
            if isinstance(feature[name], datasets.ClassLabel) and value is not None and value >= 0
            else _text_of(value, name, place)
            for name, value in ((name, values[name]) for name in columns)
        }
        yield Row(place, named)


def _text_of(value: object, column: str, place: str) -> str:
    if value is None:
        raise ValueError(f"{place} must have a value in column {column!r}, got none")
    return str(value)


def _require(columns: Sequence[str], found: Sequence[str], place: object) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise ValueError(f"{place} has no column {missing[0]!r}, its columns are {list(found)}")
