"""What runtimes start from, and where what they make of it is kept."""

import hashlib
import importlib.util
import inspect
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..cases import Call, models
from ..cases.encoder import Batch, Encoder, LastHidden
from ..harness import machine
from ..harness.compiling import Unavailable


@dataclass
class Source:
    """An encoder in fp32 and its inputs."""

    encoder: Encoder
    work: Path
    """Under it each model has a folder. Another model, version or processor has another one."""
    calibration: Callable[[], list[Batch]]

    @property
    def config(self) -> Any:
        return self.encoder.model.config

    @property
    def module(self) -> LastHidden:
        """A new one on the same weights: what changes its modules changes no other arm."""
        return LastHidden(models.sharing(self.encoder.sdpa, "sdpa")).eval()

    @property
    def example(self) -> Batch:
        """Two rows to trace, one padded: the same whatever is measured."""
        ids = models.tokens(2, 24, self.config.vocab_size)
        mask = torch.ones_like(ids)
        mask[1, -8:] = 0
        return ids, mask

    @cached_property
    def folder(self) -> Path:
        digest = hashlib.sha256()
        for name, value in sorted(self.encoder.sdpa.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.contiguous().numpy())
        about = [self.config.to_dict(), machine.versions(), machine.isa_flags()]
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        return self.work / f"{self.encoder.model.name}-{digest.hexdigest()[:12]}"

    def kept(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder made once; another one if the code of ``make`` changes. What fails leaves
        nothing behind."""
        written = Path(inspect.getsourcefile(make) or "").read_bytes()
        code = hashlib.sha256(written).hexdigest()
        final = self.folder / f"{name}-{code[:8]}"
        part = final.with_suffix(".part")
        if not final.is_dir():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # tracing warns of every branch
                    make(part)
            except BaseException:
                shutil.rmtree(part)
                raise
            part.rename(final)
        return final

    def call(self, run: Callable[[Any, Any], Any]) -> Call:
        """``run`` on the NumPy arrays of each batch."""
        arrays = [(ids.numpy(), mask.numpy()) for ids, mask in self.encoder.inputs]
        return lambda: tuple(torch.from_numpy(run(*batch)) for batch in arrays)


def need(name: str) -> Any:
    """A peer's module; ``Unavailable`` where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        reason = f"cannot be imported: {error}" if importlib.util.find_spec(package) else ""
        raise Unavailable(f"{package} {reason or 'is not installed'}") from error
