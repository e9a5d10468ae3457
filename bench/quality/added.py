"""Results of earlier runs, of this machine or another, whose seeds count too."""

from collections.abc import Iterable

from ..harness.results import Row

FREE = {"threads", "rounds", "bf16"}
"""Settings that may differ: those of the clock, and what the processor trains best in."""


def subject(content: Row) -> tuple[str, str, tuple[str, ...], int | None]:
    """What a result is of: model, task, placements, tokens that stay whole."""
    settings = content["settings"]
    where = tuple(settings["placements"]), settings["keep_first"]
    return (content["model"]["name"], content["task"], *where)


def check(earlier: list[Row], contents: list[Row]) -> None:
    """``ValueError`` if one of ``earlier`` is of something else than all that are to be made."""
    wanted = {subject(content) for content in contents}
    for other in earlier:
        if subject(other) not in wanted:
            here = sorted(wanted, key=str)
            raise ValueError(f"add holds results of {subject(other)}, and this run makes {here}")


def of(content: Row, earlier: list[Row], seeds: Iterable[tuple[str, int]]) -> Row:
    """``rows`` of those that measured what ``content`` does, and where they come from (``added``).

    Raises:
        ValueError: trained otherwise; a variant's seed that ``seeds`` or another of them has too.
    """
    made: Row = {"rows": [], "added": []}
    taken = set(seeds)
    for other in filter(lambda other: subject(other) == subject(content), earlier):
        mine, its = (_settings(which) for which in (content, other))
        changed = [name for name in {**mine, **its} if mine.get(name) != its.get(name)]
        if changed:
            raise ValueError(f"add holds results of another {', '.join(sorted(changed))}")
        found = {(row["variant"], row["seed"]) for row in other["rows"]}
        if taken & found:
            variant, seed = min(taken & found)
            raise ValueError(f"add holds seed {seed} of variant {variant!r} once more")
        taken |= found
        made["rows"] += other["rows"]
        about = {name: other[name] for name in ("date", "machine", "versions", "git")}
        made["added"] += [*other.get("added", ()), about | {"bf16": other["settings"]["bf16"]}]
    return made


def _settings(content: Row) -> Row:
    return {name: value for name, value in content["settings"].items() if name not in FREE}
