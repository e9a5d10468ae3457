"""Write the plain text that plugins for embeddings are trained on, a paragraph a line.

Every tenth article of wikitext2 is left out: ``bench.quality_vs_k --task embeddings`` measures
there.
"""

import argparse
from pathlib import Path

from ..harness import machine
from ..quality import text


def main(arguments: list[str] | None = None) -> None:
    made = argparse.ArgumentParser("python -m bench.tools.training_text", description=__doc__)
    made.add_argument("output", type=Path, help="the file to write, train.txt for example")
    made.add_argument("--data", type=Path, default=machine.DATA, help="folder with wikitext2/")
    args = made.parse_args(arguments)
    found = text.training(args.data)
    text.write(args.output, found)
    words = sum(len(line.split()) for line in found)
    print(f"{args.output}: {len(found)} paragraphs, {words} words")


if __name__ == "__main__":
    main()
