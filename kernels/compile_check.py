"""Compiles every kernel ahead of time for GPUs that are not here, and reads in the machine code what became of it.

`python -m garserve.kernels.compile_check` prints the table; needs neither a GPU nor its toolkit, only Triton.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from garserve.kernels import patch_embed, roi_replay

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bf16", "fp16", "fp32")
# Registers and warps of one multiprocessor (NVIDIA) or SIMD unit (AMD, registers per lane).
_REGISTERS, _WARPS = 65536, 64
_AMD_REGISTERS, _AMD_WAVES = 512, 8


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one target; `wide` accesses move 16 bytes a thread, `narrow` ones less."""

    kernel: str
    target: str
    dtype: str
    tuning: str
    registers: int
    spills: int  # bytes of stack, or loads and stores of local memory
    shared: int  # bytes
    occupancy: float  # share of the warps that a multiprocessor can hold
    wide_loads: int
    wide_stores: int
    narrow_stores: int

    @property
    def good(self) -> bool:
        """Say whether nothing spills and loads are wide; on NVIDIA GPUs also whether every store is."""
        wide = self.target.startswith("gfx") or (self.wide_stores > 0 and not self.narrow_stores)
        return not self.spills and self.wide_loads > 0 and wide


def compile_all() -> Iterator[Compiled]:
    """Compile each kernel for each target and dtype with the tuning that is shipped for it.

    Raises RuntimeError inside Triton's interpreter (TRITON_INTERPRET), which replaces the compiler.
    """
    if interpreted():
        raise RuntimeError("compile_check: expected a process without TRITON_INTERPRET")
    for target, dtype in product(TARGETS, DTYPES):
        capability = int(target[3:]) if target.startswith("sm_") else 0
        yield compile_replay(target, dtype, roi_replay.TUNED.get(capability, roi_replay.DEFAULT))
        yield compile_patch_embed(target, dtype)


def interpreted() -> bool:
    """Say whether Triton made interpreted functions of the kernels: for it, "true" and "on" mean what 1 does."""
    import triton

    return not isinstance(roi_replay.roi_replay_kernel, triton.JITFunction)


def compile_replay(target: str, dtype: str, tuning: roi_replay.Tuning) -> Compiled:
    """Compile the replay of 16² tokens a region, channels and strides multiples of 16."""
    integers = dict.fromkeys(("row_count", "channel_count"), "i32")
    strides = dict.fromkeys(("tile_stride", "token_stride", "out_stride"), "i64")
    pointers = {"features": f"*{dtype}", "table": "*i32", "regions": "*i32", "boxes": "*fp32", "out": f"*{dtype}"}
    constants = {"N": 16, "SAMPLES": 2, "ROWS": tuning.rows, "CHANNELS": tuning.channels, "ROUND": False}
    compiled = _compile(roi_replay.roi_replay_kernel, pointers | integers | strides, constants, target, tuning.warps)
    name = f"{tuning.rows}x{tuning.channels}, {tuning.warps} warps"
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return read(compiled, tuning.warps, ("roi_replay", target, dtype, name))


def compile_patch_embed(target: str, dtype: str) -> Compiled:
    """Compile the patch embedding of tiles of 448 pixels and patches of 14, as the released models have."""
    columns = patch_embed.COLUMNS[4 if dtype == "fp32" else 2]
    pointers = {"tiles": "*u8", "masks": "*u8", "matrix": f"*{dtype}", "bias": "*fp32", "out": f"*{dtype}"}
    numbers = {"row_count": "i32", "width": "i32", "scale": "fp32", "mask_value": "fp32"}
    shape = {"SIDE": 448, "PATCH": 14, "BYTES": 56, "ROWS": patch_embed.ROWS, "COLUMNS": columns}
    constants = shape | {"DEPTH": patch_embed.DEPTH, "INTERPRET": False}
    compiled = _compile(patch_embed.patch_embed_kernel, pointers | numbers, constants, target, patch_embed.WARPS)
    name = f"{patch_embed.ROWS}x{columns}, {patch_embed.WARPS} warps"
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return read(compiled, patch_embed.WARPS, ("patch_embed", target, dtype, name))


def _compile(kernel: Any, signature: dict[str, str], constants: dict[str, Any], target: str, warps: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    whole = [index for index, kind in enumerate(signature.values()) if kind != "fp32"]
    aligned = {(index,): [["tt.divisibility", 16]] for index in whole}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=gpu, options={"num_warps": warps, "enable_fp_fusion": False})


def _read_nvidia(compiled: Any, warps: int, labels: tuple[str, str, str, str]) -> Compiled:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(path))
        code = Counter(re.findall(r"\b((?:LDG(?:STS)?|STG|LDL|STL)(?:\.\w+)*)", _tool("nvdisasm", "-c", str(path))))
    registers = int(_first(r"REG:(\d+)", usage))
    spills = int(_first(r"STACK:(\d+)", usage)) + sum(n for name, n in code.items() if name[:3] in ("LDL", "STL"))
    wide = {kind: sum(n for name, n in code.items() if name[:3] == kind and "128" in name) for kind in ("LDG", "STG")}
    stores = sum(n for name, n in code.items() if name[:3] == "STG")
    blocks = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    occupancy = min(1.0, blocks * warps / _WARPS)
    shared = compiled.metadata.shared
    return Compiled(*labels, registers, spills, shared, occupancy, wide["LDG"], wide["STG"], stores - wide["STG"])


def _read_amd(compiled: Any, warps: int, labels: tuple[str, str, str, str]) -> Compiled:
    text = compiled.asm["amdgcn"]
    registers = int(_first(r"\.vgpr_count:\s+(\d+)", text))
    spills = sum(int(_first(rf"\.{kind}_spill_count:\s+(\d+)", text)) for kind in ("vgpr", "sgpr"))
    code = Counter(re.findall(r"\b((?:global|buffer)_(?:load|store)_\w+)", text))
    wide = {kind: sum(n for name, n in code.items() if kind in name and "x4" in name) for kind in ("load", "store")}
    stores = sum(n for name, n in code.items() if "store" in name)
    occupancy = min(1.0, _AMD_REGISTERS // (-(-registers // 8) * 8) / _AMD_WAVES)
    shared = compiled.metadata.shared
    return Compiled(*labels, registers, spills, shared, occupancy, wide["load"], wide["store"], stores - wide["store"])


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)  # noqa: S603
    return done.stdout


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"compile_check: {pattern!r} is not in the compiler's output")
    return found[1]


def rows(compiled: Iterable[Compiled]) -> Iterator[tuple[str, ...]]:
    """Yield a header and one line of text cells for each kernel."""
    yield ("kernel", "target", "dtype", "tuning", "registers", "spills", "shared", "occupancy", "16-byte loads, stores")
    for one in compiled:
        wide = f"{one.wide_loads}, {one.wide_stores}" + (f" ({one.narrow_stores} narrow)" if one.narrow_stores else "")
        cells = (one.registers, one.spills, one.shared, f"{one.occupancy:.0%}", wide)
        yield (one.kernel, one.target, one.dtype, one.tuning, *map(str, cells))


def main() -> int:
    """Print the table; return 1 where a kernel spills or reads and writes narrowly."""
    if os.environ.pop("TRITON_INTERPRET", None):
        return subprocess.run([sys.executable, "-m", "garserve.kernels.compile_check"], check=False).returncode
    compiled = list(compile_all())
    for line in rows(compiled):
        print("\t".join(line))
    return int(not all(one.good for one in compiled))


if __name__ == "__main__":
    sys.exit(main())
