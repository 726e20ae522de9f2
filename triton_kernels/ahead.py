"""Compile kernels ahead, for any architecture and without a GPU, and read what the compiler made of them.

For the tests and the tuner, and for whoever changes a kernel::

    with ahead.compiling(90) as made:
        linear.linear_moments(torch.empty(8, 1024, 768, dtype=torch.bfloat16), ...)
    print(made[0].facts)

The launchers run as they are, on CPU tensors; in place of a launch the kernel is specialised and compiled. Needs a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import _launch, configs, conv, linear

# Of an architecture: multiprocessors of its best known GPU, bytes of shared memory for a program and for a
# multiprocessor (a program costs 1 KB more), registers of a multiprocessor. 8.0 has 166,912 bytes for a program, but
# its rows also serve 8.6, 8.9 and 12.x.
PROCESSORS = {80: 108, 90: 132, 100: 148}
SHARED_PROGRAM = {80: 101376, 90: 232448, 100: 232448}
SHARED_PROCESSOR = {80: 167936, 90: 233472, 100: 233472}
REGISTERS_PROCESSOR = 65536
# What the kernels of an architecture are compiled for, to be looked at. Those of 8.0 also serve 8.6 and 8.9, for which
# ptxas makes the same of them, and 12.x, where it ran out of registers in other places.
TARGETS: dict[int, tuple[int, ...]] = {80: (80, 120), 90: (90,), 100: (100,)}


class _Driver:
    """What Triton asks of a driver while it compiles."""

    utils = None

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return -self.arch  # compiled kernels are cached by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "int"


@dataclass(frozen=True)
class Compiled:
    """A kernel as compiled for one architecture."""

    name: str
    arch: int
    warps: int
    registers: int  # of a thread
    spills: int  # bytes stored and loaded, and stack
    shared: int  # bytes
    scratch: int  # bytes of device memory
    warnings: tuple[str, ...]  # of ptxas: C75xx says that it serialised wgmma
    loops: int
    pending: int  # products in flight where the next begins (wgmma)
    buffers: int  # accumulators that products take in turn (tcgen05)
    wgmma: int
    tcgen05: int
    mma: int
    tma: int  # bulk tensor copies
    copies: int  # other asynchronous copies
    vectors: int  # loads and stores of 16 bytes
    atomics: int

    @property
    def resident(self) -> int:
        """How many programs a multiprocessor holds at once, by registers and shared memory."""
        registers = -(-self.registers // 8) * 8 * self.warps * 32
        return min(REGISTERS_PROCESSOR // registers, SHARED_PROCESSOR[self.arch] // (self.shared + 1024))

    def problems(
        self,
        *,
        resident: int = 1,
        tensor_cores: bool = False,
        one_loop: bool = False,
        pipelined: bool = False,
        overlapped: bool = False,
    ) -> list[str]:
        """What is wrong with it, for every kernel of this library and for what is expected of this one.

        Args:
            resident: so many programs have to fit into a multiprocessor.
            tensor_cores: its products have to use those of the architecture.
            one_loop: its only loop runs on across examples.
            pipelined: its loads do not wait.
            overlapped: the next product is issued before the last is done (wgmma, tcgen05).
        """
        product = {80: self.mma, 90: self.wgmma, 100: self.tcgen05}[self.arch]
        found = {
            f"spills {self.spills} bytes": self.spills > 0,
            f"uses {self.scratch} bytes of device memory": self.scratch > 0,
            f"ptxas warns: {', '.join(self.warnings)}": bool(self.warnings),
            f"{self.shared} bytes of shared memory": self.shared > SHARED_PROGRAM[self.arch],
            f"{self.resident} programs fit a multiprocessor, {resident} are planned": self.resident < resident,
            f"{self.atomics} atomic operations": self.atomics > 0,
            "no product on tensor cores": tensor_cores and product == 0,
            f"{self.loops} loops": one_loop and self.loops != 1,
            "every product waits for the one before": overlapped
            and ((self.wgmma > 0 and self.pending == 0) or (self.tcgen05 > 0 and self.buffers < 2)),
            "loads are not asynchronous": pipelined and self.tma + self.copies == 0,
        }
        return [what for what, wrong in found.items() if wrong]


def read(kernel: Any, name: str, arch: int, log: str) -> Compiled:
    """The facts of a compiled Triton kernel; `log` is what ptxas said with -v."""
    ptx, ir = kernel.asm["ptx"], kernel.asm["ttgir"]
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    if spilled is None or registers is None:
        raise RuntimeError(f"{name}: ptxas said nothing of registers:\n{log}")
    pending = [int(n) for n in re.findall(r"warp_group_dot_wait[^{]*\{[^}]*pendings = (\d+)", ir)]
    buffers = [int(n) for n in re.findall(r"tmem_alloc.*memdesc<(\d+)x\d+x\d+xf32", ir)]
    return Compiled(
        name=name,
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=int(registers[1]),
        spills=sum(map(int, spilled.groups())),
        shared=kernel.metadata.shared,
        scratch=kernel.metadata.global_scratch_size,
        warnings=tuple(re.findall(r"\((C7\d+)\)", log)),
        loops=ir.count("scf.for") + ir.count("scf.while"),
        pending=max(pending, default=0),
        buffers=max(buffers, default=1),
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma=ptx.count("mma.sync"),
        tma=ptx.count("cp.async.bulk.tensor"),
        copies=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        vectors=len(re.findall(r"\b(?:ld|st)\.global\S*\.(?:v4\.b32|v2\.b64)", ptx)),
        atomics=len(re.findall(r"\b(?:atom|red)\.", ptx)),
    )


_read: dict[str, Compiled] = {}


@contextlib.contextmanager
def compiling(arch: int, target: int | None = None) -> Iterator[list[Compiled]]:
    """Within it every launch compiles for `arch` (80, 90 or 100) and appends to the list, in place of running.

    `target`: what to compile the kernels of `arch` for, if that is another.
    """
    if _launch.INTERPRET:
        raise RuntimeError("ahead.compiling: TRITON_INTERPRET is set, so that there is nothing to compile")
    made: list[Compiled] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            compiled = kernel.warmup(*args, grid=grid, **meta, enable_fp_fusion=True)
        if compiled.hash not in _read:  # else it was compiled before, in this process
            _read[compiled.hash] = read(compiled, kernel.fn.__name__, arch, said.getvalue())
        made.append(_read[compiled.hash])

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_launch, "launch", launch))
        stack.enter_context(mock.patch.object(_launch, "pretended", _launch.Device(arch, PROCESSORS[arch])))
        stack.enter_context(triton.knobs.nvidia.scope())
        stack.enter_context(triton.knobs.compilation.scope())
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        driver.set_active(_Driver(target or arch))
        try:
            yield made
        finally:
            driver.set_active(None)  # the next use looks for a GPU again


# ---- Rows of the tables ----------------------------------------------------------------------------

LinearRow = tuple[str, str, int]  # a key of configs.LINEAR
# Kernel sizes, and whether all other sizes are odd, for which a row of configs.CONV has to suit.
CONVOLUTIONS = ((1, False), (3, False), (3, True))


@contextlib.contextmanager
def row_is(table: dict[int, Any], arch: int, row: Any, tile: configs.Tile | None) -> Iterator[None]:
    """Within it the table has this tile in that row; None leaves it as it is."""
    with mock.patch.dict(table, {arch: table[arch] if tile is None else {**table[arch], row: tile}}):
        yield


@contextlib.contextmanager
def multiplying(kind: str) -> Iterator[None]:
    """Within it PyTorch multiplies float32 as this kind of the tables says."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


def operands(
    row: LinearRow, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy (B, T, O) and x (B, T, I), uninitialised, for which the launcher chooses this row; sizes: O, I, B, T."""
    outputs, inputs, batch, positions = sizes
    if row[0].endswith("unaligned"):
        outputs, inputs = outputs + 1, inputs - 1
    dy, x = (torch.empty(batch, positions, size, dtype=dtype, device=device) for size in (outputs, inputs))
    if row[0] == "pointer":  # aligned, but no descriptor: positions of several examples between each other
        dy = dy.view(positions, batch, outputs).transpose(0, 1)
    return dy, x


def compile_linear(
    arch: int, row: LinearRow, dtype: torch.dtype, tile: configs.Tile | None = None, target: int | None = None
) -> Compiled:
    """The kernel that serves a row of configs.LINEAR, with another tile in its place if one is given."""
    kernel, kind, positions = row
    sizes = (768, 3072, 2048 if positions == 1 else 16, positions or 1024)
    with row_is(configs.LINEAR, arch, row, tile), multiplying(kind), compiling(arch, target) as made:
        linear.linear_moments(*operands(row, sizes, dtype), False)
    compiled = next(c for c in made if c.name != "_add_parts")
    if compiled.name != f"_{kernel.split(',')[0].replace(' ', '_')}":
        raise RuntimeError(f"row {row} of {arch} is served by {compiled.name}")
    return compiled


def linear_problems(compiled: Compiled, row: LinearRow, tile: configs.Tile) -> list[str]:
    """What is wrong with the kernel of a row of configs.LINEAR."""
    kernel, kind, positions = row
    # Where rows have odd lengths, 2-byte elements cannot be copied asynchronously.
    pipelined = not (kernel.endswith("unaligned") and kind == "half")
    found = compiled.problems(
        resident=tile.resident,
        tensor_cores=kind != "float32",
        one_loop=True,
        pipelined=pipelined,
        overlapped=pipelined and positions == 0,  # else every product is an example's, and read at once
    )
    if kernel == "descriptor" and compiled.tma == 0:
        found.append("no TMA")
    return found


def compile_conv(
    arch: int,
    kind: str,
    kernel_size: int,
    tile: configs.Tile | None = None,
    *,
    odd: bool = False,
    target: int | None = None,
) -> Compiled:
    """The kernel that serves a row of configs.CONV, of a 2-d convolution, with another tile if one is given.

    Args:
        arch: 80, 90 or 100.
        kind: of the row.
        kernel_size: in both dimensions.
        tile: in place of the row's.
        odd: all sizes are odd, so that nothing can be loaded in vectors.
        target: see `compiling`.
    """
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    dy, x = (torch.empty(64, channels - odd, 32 - odd, 32 - odd, dtype=dtype) for channels in (128, 64))
    with row_is(configs.CONV, arch, kind, tile), multiplying(kind), compiling(arch, target) as made:
        conv.conv_moments(dy, x, [kernel_size] * 2, [1, 1], [kernel_size // 2] * 2, [1, 1], 1, False)
    return made[0]


def conv_problems(
    compiled: Compiled, kind: str, kernel_size: int, tile: configs.Tile, *, odd: bool = False
) -> list[str]:
    """What is wrong with the kernel of a row of configs.CONV."""
    pipelined = not (kind == "half" and odd)  # 2-byte elements cannot be copied asynchronously one by one
    return compiled.problems(
        resident=tile.resident,
        tensor_cores=kind != "float32",
        one_loop=True,
        pipelined=pipelined,
        # A border makes those of x go through registers, and with them every product.
        overlapped=pipelined and not (kind == "half" and kernel_size > 1),
    )
