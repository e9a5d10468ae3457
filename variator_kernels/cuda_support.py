"""Whether the CUDA kernels can run: what was built, and what the driver and the GPU are."""

from __future__ import annotations

import ctypes
import re

import torch

from . import extension

DTYPES = (torch.bfloat16, torch.float16)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver_version() -> int:
    """The newest CUDA that the driver supports, as 13000 for 13.0; 0: there is no driver.

    From libcuda itself: the runtime's cudaDriverGetVersion initialises CUDA, this does not.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _why_no_launch() -> str | None:
    """Why the kernels cannot run on any GPU here, or None.

    Called at import, so it asks nothing that would initialise CUDA: that would fix the visible
    devices, and a process that was forked later could not use them.
    """
    cuda = extension.load("cuda")
    if cuda is None:
        return extension.why_missing("cuda")
    if cuda.emulated:
        return None
    driver, runtime = _driver_version(), cuda.runtime_version
    # Without a driver there is no tensor on a GPU either: nothing to explain but to why_not_here().
    if 0 < driver // 1000 < runtime // 1000:
        return (
            f"the driver supports CUDA {_version(driver)}, the kernels were built with "
            f"{_version(runtime)}"
        )
    return None


def why_not_here() -> str | None:
    """Why the kernels cannot run in this process, as far as that is known without initialising
    CUDA; or None."""
    if _WHY_NO_LAUNCH is None and not EMULATED and _driver_version() == 0:
        return "NVIDIA's driver (libcuda.so.1) was not found"
    return _WHY_NO_LAUNCH


# At import, not at first use: torch.compile traces through why_not().
_WHY_NO_LAUNCH = _why_no_launch()
# The kernels' emulation on the CPU is loaded in their place (for tests).
EMULATED = _WHY_NO_LAUNCH is None and extension.load("cuda").emulated
_ARCHITECTURES = getattr(extension.load("cuda"), "architectures", "")


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a GPU of a compute capability runs code built for ``architectures``.

    The list is CMake's: ``80-real`` is machine code for 8.0 and later 8.x, ``80-virtual`` PTX for
    8.0 and everything later, ``80`` both; ``90a`` is for 9.0 alone, ``100f`` for 10.0 to 10.x.
    """
    for name in architectures.split(";"):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", name)
        if match is None:
            continue
        built = int(match[1]), int(match[2])
        if match[3] == "a":
            fits = capability == built
        elif match[3] == "f" or match[4] == "-real":
            fits = capability[0] == built[0] and capability[1] >= built[1]
        else:
            fits = capability >= built
        if fits:
            return True
    return False


def why_not(x: torch.Tensor) -> str | None:
    """Why the kernels cannot run on ``x``, or None."""
    if _WHY_NO_LAUNCH is not None:
        return _WHY_NO_LAUNCH
    if x.dtype not in DTYPES:
        return f"the input's dtype is {x.dtype}, expected one of {DTYPES}"
    if EMULATED:
        return None if x.device.type in ("cpu", "meta") else f"the emulation has no {x.device}"
    if x.device.type != "cuda":
        return f"the input is on device {x.device}, expected cuda"
    major, minor = torch.cuda.get_device_capability(x.device)
    if not runs_on((major, minor), _ARCHITECTURES):
        return f"the GPU is sm_{major}{minor}, the kernels were built for {_ARCHITECTURES}"
    return None


def describe() -> tuple[bool, str]:
    """Usable in this process or not, and what it uses or why not."""
    if _WHY_NO_LAUNCH is not None:
        return False, _WHY_NO_LAUNCH
    if EMULATED:
        return True, "emulated on the CPU"
    if not torch.cuda.is_available():
        return False, "PyTorch sees no GPU"
    name = f"{torch.cuda.get_device_name()}, kernels for {_ARCHITECTURES}"
    return runs_on(torch.cuda.get_device_capability(), _ARCHITECTURES), name
