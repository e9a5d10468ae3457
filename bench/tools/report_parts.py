"""The blocks about parts (memory, packing, products, attention alone) and about decoders."""

from collections.abc import Callable
from pathlib import Path

from bench import attention, keeping, memory, packing, products
from bench.decoder import table as decoder
from bench.harness import tables
from bench.harness.results import Row, pick

from .report_speed import Machine, named, processor


def of_memory(found: Machine, folder: Path) -> str:
    """Temporary memory and its share of the dense sublayer's."""
    rows = found.rows("memory")
    return tables.markdown(memory.columns(rows), pick(rows, status="ok"))


def of_packing(found: Machine, folder: Path) -> str:
    """What noticing writes costs, and what memory packed weights leave behind."""
    content = found.files.get("packing")
    if content is None:
        return ""
    here, settings = content["machine"], content["settings"]
    rows = pick(content["rows"], status="ok")
    looking = tables.markdown(packing.LOOKING, pick(rows, case="looking"))
    kept = tables.markdown(packing.MEMORY, [row for row in rows if row["case"] in packing.CELLS])
    return (
        f"{here['cpu']}, {here['cores']} cores, {settings['threads']} threads, "
        f"{content['model']['name']}, k={settings['k']}, {settings['lengths']:,} lengths:\n\n"
        f"{looking}\n\n{kept}"
    )


def of_products(found: Machine, folder: Path) -> str:
    """GFLOP/s of one product, ours beside oneDNN's."""
    content = found.files.get("products")
    if content is None:
        return ""
    here, settings, rows = content["machine"], content["settings"], content["rows"]
    table = tables.markdown(products.columns(rows), products.lines(rows))
    return f"{here['cpu']}, {settings['threads']} threads, {here['kernels_isa']}:\n\n{table}"


def of_keeping(found: Machine, folder: Path) -> str:
    """What a first token that stays whole costs a sublayer."""
    content = found.files.get("keeping")
    if content is None:
        return ""
    here, settings, model = content["machine"], content["settings"], content["model"]
    table = tables.markdown(keeping.COLUMNS, keeping.shown(content["rows"]))
    return (
        f"{here['cpu']}, {here['cores']} cores, {settings['threads']} threads, {model['name']}, "
        f"{settings['batch']} x {settings['length']}:\n\n{table}"
    )


def of_attention(found: Machine, folder: Path) -> str:
    """grouped_attention beside SDPA, and what both take."""
    content = found.files.get("attention")
    if content is None:
        return ""
    rows = pick(content["rows"], status="ok")
    return processor(content) + tables.markdown(attention.COLUMNS, rows)


def of_decoder(found: Machine, folder: Path) -> str:
    """A row a level of every run of ``bench.decoder``."""
    parts = []
    for content in _decoders(found).values():
        measured = pick(content["rows"], status="ok")
        parts.append(tables.markdown(decoder.columns(content), measured))
    return "\n\n".join(parts)


def decoder_figure(found: Machine, folder: Path) -> str:
    """Perplexity against the cache and the time to first token."""
    text = "Perplexity against cache memory and time to first token"
    return "\n".join(found.picture(name, text, folder) for name in _decoders(found))


def _decoders(found: Machine) -> dict[str, Row]:
    runs = named(found, "decoder").items()
    return {name: content for name, content in runs if content["benchmark"] == "decoder"}


def of_decoder_task(found: Machine, folder: Path) -> str:
    """Points that levels of a fine-tuned decoder lose."""
    parts = []
    for content in named(found, "decoder_task").values():
        parts.append(
            tables.markdown(decoder.task_columns(content), pick(content["summary"], status="ok"))
        )
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[Machine, Path], str]] = {
    "memory": of_memory, "packing": of_packing, "keeping": of_keeping, "products": of_products,
    "attention": of_attention, "decoder": of_decoder, "decoder-figure": decoder_figure,
    "decoder-task": of_decoder_task,
}  # fmt: skip
