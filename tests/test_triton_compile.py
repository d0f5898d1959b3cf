"""Ahead-of-time compilation of the Triton kernels in the tiles that ship, without a GPU.

    python tests/test_triton_compile.py     # prints what each kernel takes of an SM

The compiler needs a process in which Triton does not interpret, so the tests run this file as a script.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program; sm_86 and sm_89 run sm_80's tiles
PLAIN = {"USE_SOFTCAP": False, "USE_SINKS": False, "USE_LSE": False, "USE_SPAN": True}
FEATURES = {
    "plain": {},
    "no span": {"USE_SPAN": False},
    "softcap, sinks": {"USE_SOFTCAP": True, "USE_SINKS": True},
    "softcap, lse": {"USE_SOFTCAP": True, "USE_LSE": True},
}
# (target, dtype, head size, kernel, feature)
LAUNCHES = [
    *[(90, "bf16", size, "rows", f) for size in (64, 128, 256) for f in ("plain", "softcap, sinks", "softcap, lse")],
    (90, "bf16", 128, "rows", "no span"),
    (90, "bf16", 80, "rows", "plain"),
    (90, "fp16", 128, "rows", "plain"),
    *[(90, "bf16", size, kernel, "softcap, sinks") for size in (64, 128, 256) for kernel in ("waad", "fai")],
    *[(90, "fp32", 128, kernel, "softcap, sinks") for kernel in ("rows", "waad", "fai")],
    *[
        (target, "bf16", size, kernel, "softcap, sinks")
        for target in (80, 100)
        for size in (128, 256)
        for kernel in ("rows", "waad", "fai")
    ],
]
POINTERS = {"first": "*i32", "last": "*i32", "rows": "*i1", "next_row": "*i32", "counts": "*i32"}
POINTERS |= dict.fromkeys(("sinks", "lse", "distance", "waad", "fai"), "*fp32")
COLUMNS = (
    "target dtype head_size kernel feature tile registers stack shared tensor_core wide_copies narrow_copies atomics"
)


def compile_launch(target: int, dtype: str, head_size: int, name: str, feature: str) -> dict:
    """What the launchers of the package would compile on a GPU of this target, and what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rhythm_kernels.attention import triton_band, triton_rows
    from rhythm_kernels.attention.triton_tiles import choose_tiles

    kernel = {"rows": triton_rows.row_kernel, "waad": triton_band.waad_kernel, "fai": triton_band.fai_kernel}[name]
    tile = getattr(choose_tiles(target, head_size, 32 if dtype == "fp32" else 16), name)
    constants = PLAIN | FEATURES[feature]
    if not constants["USE_SINKS"]:
        constants["sinks"] = None
    if not constants["USE_SPAN"]:
        constants["distance"] = None
    constants |= {"HEAD_DIM": head_size, "BLOCK_D": triton.next_power_of_2(head_size)}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants = {argument: x for argument, x in constants.items() if argument in kernel.arg_names}

    pointers = POINTERS | {"q": f"*{dtype}", "k": f"*{dtype}"}
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("factor", "cap"):
            signature[argument] = "fp32"
        else:
            signature[argument] = pointers.get(argument, "i32")
            if argument in pointers or argument.startswith("stride"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    ptx = compiled.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+|\d+)[,;]", ptx)
    return {
        "target": target,
        "dtype": dtype,
        "head_size": head_size,
        "kernel": name,
        "feature": feature,
        "tile": "x".join(map(str, tile)),
        **resource_usage(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "tensor_core": next((op for op in ("wgmma", "tcgen05", "mma.sync") if f"{op}." in ptx), "none"),
        "wide_copies": sum(int(size, 0) == 16 for size in copies),
        "narrow_copies": sum(int(size, 0) < 16 for size in copies),
        "atomics": len(re.findall(r"^\s*(?:@!?%p\d+\s+)?(?:atom|red)\.", ptx, re.MULTILINE)),
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack (spills) a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(path)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"registers": int(re.search(r"REG:(\d+)", out)[1]), "stack": int(re.search(r"STACK:(\d+)", out)[1])}


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, __file__, "--json"]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return {tuple(key): row for key, row in zip(LAUNCHES, json.loads(out), strict=True)}


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: "-".join(map(str, launch)).replace(", ", "+"))
def test_kernel_fits_its_target(compiled, launch):
    target, dtype, *_ = launch
    row = compiled[launch]
    print("  ".join(f"{name} {row[name]}" for name in COLUMNS.split()))
    assert row["stack"] == 0, "spills"
    assert row["shared"] <= SHARED_LIMIT[target]
    assert row["atomics"] == 0
    assert row["wide_copies"] > 0
    assert row["narrow_copies"] == 0, "copies of less than 16 bytes"
    if dtype != "fp32":
        assert row["tensor_core"] == {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[target]


def main() -> None:
    rows = []
    if "--json" not in sys.argv:
        widths = [6, 5, 9, 6, 14, 10, 9, 5, 7, 11, 11, 13, 7]
        print("  ".join(name.rjust(width) for name, width in zip(COLUMNS.split(), widths, strict=True)))
    for launch in LAUNCHES:
        rows.append(compile_launch(*launch))
        if "--json" not in sys.argv:
            values = [str(rows[-1][name]) for name in COLUMNS.split()]
            print("  ".join(x.rjust(width) for x, width in zip(values, widths, strict=True)), flush=True)
    if "--json" in sys.argv:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
