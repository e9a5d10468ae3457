"""The folder of a run: whose it is, and what stands in it besides what was trained."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .. import files
from . import checkpoints

SETTINGS, METRICS = "run.json", "metrics.json"
CONTENTS = (".safetensors", ".bin", ".model", ".py")
"""Endings of the files that say what a folder's model, its tokenizer or its plugins are."""
WORDS = ("config", "tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "modules",
         "sentence_", "plugins")  # fmt: skip
"""And how the names of the others begin: of JSON and text."""
LOG = logging.getLogger(__name__)


def settings_of(job: Any, fingerprint: dict[str, Any], **read: Any) -> dict[str, Any]:
    """What a run is known by: the job, the trainer's ``fingerprint``, and digests of the files that
    it reads, ``read`` among them."""
    digests = {name: digest(getattr(job, name)) for name in ("data", "eval_data")}
    for name in ("model", "plugins"):
        folder = Path(getattr(job, name, None) or "")
        if folder.resolve() != Path(job.output).resolve():  # else a run's own end would change it
            digests[name] = of_folder(folder)
    digests |= read
    found = {**asdict(job), **fingerprint, "sha256": digests}
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def finished(
    output: Path, settings: dict[str, Any], kinds: tuple[Any, ...]
) -> dict[str, float] | None:
    """The metrics of the run of ``settings``, where ``output`` holds it to its end.

    Raises:
        ValueError: as :func:`check_same`.
    """
    check_same(output, settings, kinds)
    if not (output / METRICS).is_file():
        return None
    LOG.info("%s holds this run, finished: there is nothing to do", output)
    return _read(output / METRICS)


def _read(path: Path) -> dict[str, Any]:
    """``ValueError``, with the file's name, for one that was cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} holds no JSON, remove it or name another output: {error}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, remove it or name another output")
    return found


def goes_on_by_itself(config: Any) -> None:
    """A run finds its newest checkpoint; the trainer's configuration may name none.

    Raises:
        ValueError: it names one.
    """
    if config.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint must not be given: a run goes on from output's newest "
            f"checkpoint by itself, got {config.resume_from_checkpoint!r}"
        )


def digest(source: str | None) -> str | None:
    """Of a file's content; None for what is no file."""
    path = Path(source or "")
    return _of_file(path) if path.is_file() else None


def of_folder(folder: Path) -> str | None:
    """Of the model or the plugins in it, whole, parts in folders too; None where there are none."""
    if folder == Path() or not folder.is_dir():
        return None
    lines = []
    for path in sorted(folder.rglob("*")):
        own = path.relative_to(folder)
        counts = path.suffix in CONTENTS or path.name.startswith(WORDS)
        if counts and path.is_file() and not own.parts[0].startswith(("checkpoint-", ".")):
            lines.append(f"{own.as_posix()} {_of_file(path)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None


def _of_file(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(2**20):
            found.update(block)
    return found.hexdigest()


def check_same(output: Path, settings: dict[str, Any], kinds: tuple[Any, ...]) -> None:
    """A folder that holds a run must hold this one. ``kinds``: dataclasses of the settings, whose
    defaults stand for what the version that wrote them did not have.

    Raises:
        ValueError: it is another run's, or no folder of runs.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    if (output / "config.json").is_file():
        raise ValueError(f"output must be a folder of its own, {output} holds a model")
    if not (output / SETTINGS).is_file():
        if checkpoints.every(output):
            raise ValueError(f"output {output} holds another program's checkpoints: name another")
        return
    before: dict[str, Any] = {f.name: f.default for kind in kinds for f in fields(kind)}
    before = {name: before[name] for name in settings if name in before}
    before |= _read(output / SETTINGS)
    _check_read(output, before.pop("sha256", {}), settings["sha256"])
    for name in {**before, **settings}:
        if name not in ("output", "sha256") and before.get(name) != settings.get(name):
            raise ValueError(
                f"output {output} holds a run with {name}={before.get(name)!r}, now it is "
                f"{settings.get(name)!r}: name another folder, or the same settings"
            )


def _check_read(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """What the run read is what it would read now. Older versions did not note all of it."""
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise ValueError(
                f"output {output} holds a run whose {name} had another content (sha256 "
                f"{before[name]}, now {now[name]}): name another folder, or the same files"
            )


def write(path: Path, content: Any) -> None:
    """JSON, at once or not at all."""
    text = json.dumps(content, indent=1) + "\n"
    files.replace(path, lambda to: to.write_text(text, encoding="utf-8"))
