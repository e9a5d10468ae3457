"""Plain text that plugins are trained on, and text that none of them sees."""

import re
from pathlib import Path
from typing import Any

from . import tasks

TENTH = 10
"""One article in so many is held out, the first of each ten."""
LEAST_WORDS = 25
"""Of a paragraph that embeddings are measured on."""
_TITLE = re.compile(r"= [^=].* =")


def articles(data: Path) -> list[list[str]]:
    """The paragraphs of each article of wikitext2, headings left out."""
    found: list[list[str]] = []
    for name in tasks.PLAIN_TEXT:
        for line in (data / name).read_text(encoding="utf-8").splitlines():
            line = line.strip()
            if _TITLE.fullmatch(line):
                found.append([])
            elif line and not line.startswith("="):
                if not found:
                    raise ValueError(f"{data / name} must start with a title, '= Title ='")
                found[-1].append(line)
    return found


def training(data: Path) -> list[str]:
    """The paragraphs for training plugins, in their order."""
    return [text for i, texts in enumerate(articles(data)) if i % TENTH for text in texts]


def tokenized(
    texts: list[str], tokenizer: Any, longest: int, batch: int, **more: Any
) -> list[dict[str, Any]]:
    """Batches of rows of at most ``longest`` tokens, padded."""
    how: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt", **more}
    return [
        dict(tokenizer(texts[i : i + batch], max_length=longest, **how))
        for i in range(0, len(texts), batch)
    ]


def write(path: Path, lines: list[str]) -> None:
    """A paragraph a line, as the training command reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def held_out(data: Path, least: int = LEAST_WORDS) -> list[str]:
    """Paragraphs of at least ``least`` words, of articles that :func:`training` leaves out."""
    found = [text for texts in articles(data)[::TENTH] for text in texts]
    return [text for text in found if len(text.split()) >= least]
