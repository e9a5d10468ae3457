"""The CUDA kernels' launches for a model's sublayer, as data: symbol, grid, parameters as bytes.

The layout of the parameters is read from ``csrc/cuda/params.h``, and what the host decides comes
from the extension (or its emulation), so neither is written down twice. Addresses are made up:
tensors lie far apart, each at a multiple of 256 bytes.
"""

import ctypes
import functools
import importlib.util
import itertools
import re
from typing import Any, NamedTuple

from bench.harness.machine import ROOT
from bench.tools.triton_cases import Model
from variator_kernels import extension

SOURCES = ROOT / "csrc" / "cuda"
SIMPLE: dict[str, Any] = {
    "int64_t": ctypes.c_int64, "int": ctypes.c_int, "bool": ctypes.c_bool,
    "float": ctypes.c_float, "DType": ctypes.c_int, "Norm": ctypes.c_int, "Phi": ctypes.c_int,
    "Activation": ctypes.c_int,
}  # fmt: skip


@functools.cache
def structs() -> dict[str, Any]:
    """The parameter structs of ``params.h``, by name."""
    text = re.sub(r"//[^\n]*", "", (SOURCES / "params.h").read_text())
    types = dict(SIMPLE)
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.MULTILINE | re.DOTALL):
        body = re.split(r"\bstruct\b|\bVARIATOR_HD\b", body)[0]
        fields = []
        for declaration in filter(str.strip, body.split(";")):
            kind, members = re.match(
                r"\s*((?:const )?\w+\s*\*?)\s*(.*)", declaration, re.DOTALL
            ).groups()  # type: ignore[union-attr]
            of = ctypes.c_uint64 if "*" in kind else types[kind.strip()]
            fields += [(member.strip(), of) for member in members.split(",")]
        types[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return {name: of for name, of in types.items() if name not in SIMPLE}


def filled(name: str, **values: Any) -> ctypes.Structure:
    """A struct of ``params.h``; what is not named is 0."""
    return structs()[name](**values)


@functools.cache
def host_code() -> Any:
    """What the host decides: the extension, or the emulation that ``make emulation`` builds.

    Raises:
        FileNotFoundError: neither was built.
    """
    if (built := extension.load("cuda")) is not None:
        return built
    found = sorted((ROOT / "build" / "emulation").glob("_cuda*.so"))
    if not found:
        raise FileNotFoundError("neither the CUDA extension nor its emulation is built")
    spec = importlib.util.spec_from_file_location("variator_kernels._cuda", found[0])
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


class CudaLaunch(NamedTuple):
    """A launch: of ``csrc/cuda/<file>.cu`` the kernel whose symbol contains ``symbol``; CUTLASS's
    of bf16 by the names of ``make cuda-table``."""

    kernel: str
    file: str
    symbol: str
    grid: tuple[int, int, int]
    arguments: bytes
    moved: int  # bytes of every tensor, once
    threads: int = 256


class Case:
    """One sublayer: sizes, made-up addresses and the bytes behind them."""

    def __init__(self, model: Model, k: int, size: tuple[int, int, int], processors: int) -> None:
        self.model, self.k, (self.rows, self.n, self.r) = model, k, size
        self.processors = processors
        self.per_row = -(-self.n // k)
        self.groups, self.tokens = self.rows * self.per_row, self.rows * self.n
        self.places = itertools.count(0x7F0000000000, 1 << 32)
        self.cuda = host_code()

    def tensor(self, elements: int, size: int = 2) -> int:
        self.moved += elements * size
        return next(self.places)

    def _groups(self) -> ctypes.Structure:
        return filled("Groups", n=self.n, per_row=self.per_row, count=self.groups,
                      launched=self.groups, k=self.k)  # fmt: skip

    def _vector(self, elements: int) -> ctypes.Structure:
        return filled("Vector", data=self.tensor(elements))

    def _norm(self) -> ctypes.Structure:
        kind = "none" if self.model.post_norm else self.model.norm
        norm = filled("NormParams", kind=self.cuda.norms[kind], eps=1e-6)
        if kind != "none":
            norm.weight = self._vector(self.model.d)
        if kind == "layer":
            norm.bias = self._vector(self.model.d)
        return norm

    def forward(self) -> list[CudaLaunch]:
        """The launches around the products, which are CUTLASS's."""
        return [self.merge(), self.decompress()]

    def merge_parameters(self) -> ctypes.Structure:
        d, k, r = self.model.d, self.k, self.r
        return filled(
            "MergeParams", dtype=self.cuda.dtypes["bfloat16"], groups=self._groups(), d=d, r=r,
            x=self.tensor(self.tokens * d), x_stride=d, norm=self._norm(),
            merge_weight=self.tensor(k * k * d), merge_bias=self._vector(k),
            projection=self.tensor(r * d), projection_stride=2 * d, projected_columns=r,
            merged=self.tensor(self.groups * d), projected=self.tensor(self.tokens * r, 4),
        )  # fmt: skip

    def merge(self) -> CudaLaunch:
        self.moved = 0
        of = self.merge_parameters()
        resident = self.cuda.resident_blocks(self.model.d)
        return CudaLaunch("merge_kernel", "kernels/merge", f"merge_kernelINS0_4BF16ELi{resident}E",
                          (self.cuda.tiles(self.groups), 1, 1), bytes(of), self.moved)  # fmt: skip

    def decompress_parameters(
        self, x: int | None = None, u: int | None = None, projected: int | None = None
    ) -> ctypes.Structure:
        """Of tensors that have no address yet, or of these."""
        d, r = self.model.d, self.r
        return filled(
            "DecompressParams", dtype=self.cuda.dtypes["bfloat16"], groups=self._groups(), d=d,
            r=r, phi=self.cuda.adapter_activations["tanh"], u=u or self.tensor(self.groups * d),
            projected=projected or self.tensor(self.tokens * r, 4), projected_columns=r,
            w1u=self.tensor(r * d), w1u_stride=2 * d, b1=self._vector(r),
            w2=self.tensor(r * d), b2=self._vector(d), residual=x or self.tensor(self.tokens * d),
            residual_stride=d, y=self.tensor(self.tokens * d),
        )  # fmt: skip

    def decompress(self) -> CudaLaunch:
        self.moved, d, r = 0, self.model.d, self.r
        of = self.decompress_parameters()
        each = self.cuda.blocks_a_part(self.groups, d, self.processors)
        grid = (self.cuda.tiles(self.groups), -(-d // 32 // each), 1)
        return CudaLaunch("decompress_kernel", "kernels/decompress",
                          f"decompress_kernelINS0_4BF16ELb{int(r == 64)}E", grid,
                          bytes(of) + each.to_bytes(4, "little"), self.moved)  # fmt: skip

    def backward(self) -> list[CudaLaunch]:
        """The launches of training's backward pass, but for the FFN's own."""
        r, k = self.r, self.k
        return [
            self.decompress_backward(),
            self._weight_gradient("W_1u", r, self.groups, by_group=True),
            self._weight_gradient("W_2, b_2", r, self.tokens, ones=True),
            self.merge_backward(),
            self._weight_gradient("W_c, W_1h", r, self.tokens, scores=k, normed=True),
        ]

    def decompress_backward(self) -> CudaLaunch:
        self.moved, d, r = 0, self.model.d, self.r
        of = filled(
            "DecompressBackwardParams", dtype=self.cuda.dtypes["bfloat16"], groups=self._groups(),
            d=d, r=r, phi=self.cuda.adapter_activations["tanh"],
            u=self.tensor(self.groups * d), projected=self.tensor(self.tokens * r, 4),
            projected_columns=r, w1u=self.tensor(r * d), w1u_stride=2 * d,
            w1u_transpose=self.tensor(r * d), w2_transpose=self.tensor(r * d),
            b1=self._vector(r), dy=self.tensor(self.tokens * d), dy_stride=d,
            du=self.tensor(self.groups * d), d_projected=self.tensor(self.tokens * r, 4),
            bottleneck=self.tensor(self.tokens * r, 4), d_q=self.tensor(self.groups * r, 4),
        )  # fmt: skip
        return self._backward("decompress_backward_kernel", of)

    def merge_backward(self) -> CudaLaunch:
        self.moved, d, k, r = 0, self.model.d, self.k, self.r
        tiles, norm = self.cuda.tiles(self.groups), self._norm()
        gradients = {
            f"d_norm_{name}": self.tensor(tiles * d, 4)
            for name in ("weight", "bias") if getattr(norm, name).data
        }  # fmt: skip
        of = filled(
            "MergeBackwardParams", dtype=self.cuda.dtypes["bfloat16"], groups=self._groups(), d=d,
            r=r, x=self.tensor(self.tokens * d), x_stride=d, norm=norm,
            weights=self.tensor(self.groups * k, 4), merge_weight=self.tensor(k * k * d),
            projection_transpose=self.tensor(r * d), projected_columns=r,
            d_merged=self.tensor(self.groups * d), d_projected=self.tensor(self.tokens * r, 4),
            dx=self.tensor(self.tokens * d), d_scores=self.tensor(self.groups * k, 4),
            moments=self.tensor(self.groups * k * 2, 4), **gradients,
        )  # fmt: skip
        return self._backward("merge_backward_kernel", of)

    def _backward(self, kernel: str, of: ctypes.Structure) -> CudaLaunch:
        symbol = f"{kernel}INS0_4BF16ELb{int(self.r == 64)}E"
        grid = (self.cuda.tiles(self.groups), 1, 1)
        return CudaLaunch(kernel, "kernels/backward", symbol, grid, bytes(of), self.moved)

    def _weight_gradient(
        self, name: str, r: int, rows: int, *, scores: int = 0, ones: bool = False,
        by_group: bool = False, normed: bool = False,
    ) -> CudaLaunch:  # fmt: skip
        self.moved, d = 0, self.model.d
        columns, slots = r + scores + ones, 1 if by_group else self.k
        shares = self.cuda.gradient_shares(self.groups, columns, d, slots, self.processors)
        norm = self._norm() if normed else filled("NormParams", kind=self.cuda.norms["none"])
        normed = norm.kind != self.cuda.norms["none"]
        of = filled(
            "WeightGradientParams", dtype=self.cuda.dtypes["bfloat16"], groups=self._groups(),
            by_group=by_group, left=self.tensor(rows * r, 4), left_columns=r,
            scores=self.tensor(self.groups * scores, 4) if scores else 0, score_columns=scores,
            ones=ones, right=self.tensor(rows * d), right_stride=d, d=d, norm=norm,
            moments=self.tensor(self.groups * self.k * 2, 4) if normed else 0, shares=shares,
            out=self.tensor(shares * slots * columns * d, 4),
        )  # fmt: skip
        grid = (
            -(-d // self.cuda.gradient_columns),
            self.cuda.gradient_pieces(columns),
            shares * slots,
        )
        each = self.cuda.gradient_tiles_a_piece(columns)
        symbol = f"weight_gradient_kernelINS0_4BF16ELb{int(normed)}E"
        return CudaLaunch(f"weight_gradient_kernel: {name}", "kernels/backward", symbol, grid,
                          bytes(of) + each.to_bytes(4, "little"), self.moved)  # fmt: skip
