"""Command lines: the options that benchmarks share, their defaults, and what a run says first."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from ..cases import encoder, models, sublayer
from . import machine, results
from .results import Row

DENSE_ARMS = sublayer.DENSE_ARMS + encoder.DENSE_ARMS
ARMS = tuple(dict.fromkeys(DENSE_ARMS + sublayer.PLUGIN_ARMS + encoder.PLUGIN_ARMS))
SIZES = ("d_kv", "feed_forward_proj", "max_position_embeddings")
"""Of some families."""


def words(text: str) -> list[str]:
    """A comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def count(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def ratios(text: str) -> list[int]:
    """Compression ratios, each at least 2."""
    values = sorted({int(word) for word in words(text)})
    if not values or values[0] < 2:
        raise argparse.ArgumentTypeError(f"ratios must be integers of at least 2, got {text!r}")
    return values


def parser(name: str, text: str | None, threads: int | None = None) -> argparse.ArgumentParser:
    """The command line of ``python -m bench.<name>``: so far threads, and where the result goes."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=text)
    shown = f"of torch; default {threads or 'as many as it takes'}"
    made.add_argument("--threads", type=count, default=threads, help=shown)
    where = made.add_mutually_exclusive_group()
    where.add_argument("--output", help="folder; default bench/results/local/<this machine>")
    committed = "write to the committed bench/results/<this machine>"
    where.add_argument("--publish", action="store_true", help=committed)
    return made


def add_common(parser: argparse.ArgumentParser) -> None:
    """Model, input, dtypes, and whether it is only a look."""
    built_in = ", ".join(models.NAMES)
    parser.add_argument(
        "--model", default="t5-base", help=f"{built_in}, or a folder with config.json"
    )
    parser.add_argument("--batch", type=count, help="rows; default 8")
    parser.add_argument("--length", type=count, help="tokens a row; default 512")
    parser.add_argument("--bottleneck", type=count, default=64, help="r; default 64")
    dtypes = f"some of {', '.join(models.DTYPES)}; default fp32, and bf16 if the processor has it"
    parser.add_argument("--dtype", type=words, help=dtypes)
    parser.add_argument("--quick", action="store_true", help="little work: does everything run?")


def set_threads(args: argparse.Namespace) -> None:
    """What was asked for, or what torch takes."""
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)


@contextmanager
def refusals(parser: argparse.ArgumentParser, *also: type[Exception]) -> Iterator[None]:
    """What there is not ends the command with one line: ``ValueError``, ``OSError``, and others."""
    refused: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    try:
        yield
    except refused as error:
        parser.error(str(error))


def settle(args: argparse.Namespace, defaults: Row) -> None:
    """Fill in what was not asked for."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def named(model: str) -> str:
    """What a result calls a built-in model, or a folder."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def settings(args: argparse.Namespace, *left_out: str) -> Row:
    """What was asked for, but for where results go."""
    hidden = ("output", "publish", "name", "cell", *left_out)
    return {name: value for name, value in vars(args).items() if name not in hidden}


def chosen(args: argparse.Namespace, *names: str) -> Row:
    """These of them."""
    return {name: getattr(args, name) for name in names}


def settle_common(args: argparse.Namespace) -> models.Architecture:
    """Fill in what was not asked for, set the threads; ``ValueError`` for what there is not."""
    args.batch = args.batch or (2 if args.quick else 8)
    args.length = args.length or (64 if args.quick else 512)
    settle_dtypes(args)
    return models.architecture(args.model)


def settle_dtypes(args: argparse.Namespace) -> None:
    """The same of dtypes and threads alone."""
    set_threads(args)
    args.dtype = args.dtype or (["fp32", "bf16"] if machine.has_bf16() else ["fp32"])
    check("dtype", args.dtype, models.DTYPES, "one of")


def check(what: str, names: Iterable[str], known: Iterable[str], words: str = "of") -> None:
    """``ValueError`` for a name that is not known."""
    known = tuple(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what} must be {words} {known}, got {name!r}")


def check_arms(arms: Any) -> list[str]:
    """The arms in their fixed order; ``ValueError`` for an unknown one."""
    check("arms", arms, ARMS)
    return [name for name in ARMS if name in arms]


def describe(model: models.Architecture) -> Row:
    """The model, for the result file."""
    config = model.config
    sizes = {"d_model": config.hidden_size, "d_ff": models.inner_size(config)}
    sizes |= {"num_heads": config.num_attention_heads, "num_layers": config.num_hidden_layers}
    own = {name: getattr(config, name) for name in SIZES if hasattr(config, name)}
    family = {"name": model.name, "weights": model.weights, "family": config.model_type}
    return {**family, **sizes, **own}


def quiet() -> None:
    """No warnings and bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def shown(path: Path) -> str:
    """A path as short as it goes."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def begin(benchmark: str, settings: Row, model: models.Architecture) -> tuple[Row, Console]:
    """An empty result and the screen, on which it says machine, versions, commit and model."""
    content = results.result(benchmark, settings, describe(model))
    console = screen()
    here, git = content["machine"], content["git"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    commit = f"{git['commit'] or 'none'}{', with local changes' if git['dirty'] else ''}"
    console.print(
        f"[bold]{model.name}[/bold], weights {model.weights}; {settings['threads']} threads\n"
        f"{here['cpu']}, {here['cores']} cores, kernels: {here['kernels_isa'] or 'not built'}\n"
        f"{versions}\ncommit {commit}\n",
        highlight=False,
    )
    return content, console


def screen() -> Console:
    """Wide enough for tables where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 150)


def path_of(args: argparse.Namespace, name: str) -> Path:
    """The file of a result."""
    return results.folder(args.output, args.publish) / f"{name}.json"


def finish(
    content: Row, path: Path, console: Console, *texts: Any,
    draw: Callable[[Row, Path], Path] | None = None,
) -> int:  # fmt: skip
    """Write the result and its figure, print the texts; 1 if an arm failed."""
    results.write(path, content)
    written = [path, draw(content, path)] if draw else [path]
    console.print(*texts, f"written: {', '.join(map(shown, written))}", sep="\n")
    failed = results.pick(content["rows"], status="failed")
    if failed:
        console.print(f"[red]{len(failed)} failed: their numbers are withheld[/red]")
    return int(bool(failed))
