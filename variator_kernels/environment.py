"""What our environment variables may say. A wrong value is an error that names all of it.

Nothing but the standard library: the build reads this file too, where there is no PyTorch.

    read by the build                          read at import
    VARIATOR_REQUIRE   cpu, cuda, or both      VARIATOR_REQUIRE         the same
    VARIATOR_CUDA      auto, on, off           VARIATOR_CPU_ISA         an instruction set
    VARIATOR_CUDA_ARCHS  such as 80;90a        VARIATOR_CPU_EXTENSION   a compiled module
    VARIATOR_SANITIZE  on, off                 VARIATOR_CUDA_EXTENSION  a compiled module
    VARIATOR_CMAKE_ARGS  arguments             VARIATOR_EMULATION_ORDER forward, reverse (tests)

An empty value is none.
"""

from __future__ import annotations

import os
import re
import shlex

NAMES = (
    "VARIATOR_CMAKE_ARGS",
    "VARIATOR_CPU_EXTENSION",
    "VARIATOR_CPU_ISA",
    "VARIATOR_CUDA",
    "VARIATOR_CUDA_ARCHS",
    "VARIATOR_CUDA_EXTENSION",
    "VARIATOR_EMULATION_ORDER",
    "VARIATOR_REQUIRE",
    "VARIATOR_SANITIZE",
)
PARTS = ("cpu", "cuda")
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")
_BELOW_VNNI = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE")
_BELOW_BF16 = (*_BELOW_VNNI, "AVX512_CORE_VNNI")
_ONEDNN_WITHOUT = {
    "vnni": _BELOW_VNNI,
    "bf16": _BELOW_BF16,
    "amx": (*_BELOW_BF16, "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"),
}
_ON, _OFF = ("1", "on", "yes", "true"), ("0", "off", "no", "false")


def get(name: str) -> str:
    """A variable's value without blanks around it; empty if it is not set."""
    return os.environ.get(name, "").strip()


def wrong(name: str, expected: str) -> ValueError:
    """The error for a variable's value."""
    return ValueError(f"{name} must be {expected}, got {os.environ.get(name, '')!r}")


def choice(name: str, allowed: tuple[str, ...]) -> str:
    """One of ``allowed``, in any case, or empty.

    Raises:
        ValueError: something else; so do the functions below.
    """
    value = get(name).lower()
    if value and value not in allowed:
        raise wrong(name, f"one of {', '.join(allowed)}")
    return value


def switch(name: str, *others: str) -> bool | str | None:
    """On, off, one of ``others``, or None if it is not set."""
    value = choice(name, (*_ON, *_OFF, *others))
    return value if value in others else None if not value else value in _ON


def required_parts() -> list[str]:
    """The parts that VARIATOR_REQUIRE names."""
    name = "VARIATOR_REQUIRE"
    parts = [part.strip().lower() for part in get(name).split(",") if part.strip()]
    if not set(parts) <= set(PARTS):
        raise wrong(name, f"some of {', '.join(PARTS)}, separated by commas")
    return parts


def cuda() -> bool | None:
    """VARIATOR_CUDA; None: as the machine is."""
    value = switch("VARIATOR_CUDA", "auto")
    return None if value == "auto" else bool(value) if value is not None else None


def cuda_architectures() -> str:
    """VARIATOR_CUDA_ARCHS as CMake's list, or empty; csrc/cuda/architectures.cmake reads it."""
    name = "VARIATOR_CUDA_ARCHS"
    wanted = [arch for arch in re.split(r"[;,\s]+", get(name)) if arch]
    for arch in wanted:
        match = re.fullmatch(r"(?:sm_)?(\d+)[af]?(-real|-virtual)?", arch)
        if match is None or int(match[1]) < 80:
            raise wrong(name, "GPU architectures from 80 on, such as 80;90a;100-real")
    return ";".join(wanted)


def cmake_arguments() -> list[str]:
    """VARIATOR_CMAKE_ARGS, split as a shell would."""
    name = "VARIATOR_CMAKE_ARGS"
    try:
        return shlex.split(get(name))
    except ValueError as error:
        raise wrong(name, f"arguments as a shell splits them ({error})") from None


def positive(name: str) -> int | None:
    """An integer from 1 on, or None if it is not set."""
    value = get(name)
    if value and not (value.isascii() and value.isdigit() and int(value) >= 1):
        raise wrong(name, "an integer >= 1")
    return int(value) if value else None


def onednn_allows(instructions: str) -> bool:
    """Whether oneDNN's own limit, ONEDNN_MAX_CPU_ISA or the older DNNL_MAX_CPU_ISA, leaves it these
    instructions, ``"vnni"``, ``"bf16"`` or ``"amx"``. What it does not know it ignores."""
    limit = get("ONEDNN_MAX_CPU_ISA") or get("DNNL_MAX_CPU_ISA")
    return limit.upper() not in _ONEDNN_WITHOUT[instructions]


def unknown_names() -> str:
    """A sentence about variables that look like ours and that nothing reads, or empty."""
    unknown = [name for name in sorted(os.environ) if name.startswith("VARIATOR_")]
    unknown = [name for name in unknown if name not in NAMES]
    return (
        f"variator_kernels reads no {', '.join(unknown)}: it has no effect. "
        f"What is read: {', '.join(NAMES)}"
        if unknown
        else ""
    )


def check_build() -> None:
    """Every variable that the build reads."""
    required_parts()
    cuda()
    cuda_architectures()
    cmake_arguments()
    switch("VARIATOR_SANITIZE")
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        positive(name)


def check_import() -> None:
    """Every variable that is read at import, as far as its text alone can be judged."""
    required_parts()
    choice("VARIATOR_CPU_ISA", INSTRUCTION_SETS)
    choice("VARIATOR_EMULATION_ORDER", ("forward", "reverse"))
