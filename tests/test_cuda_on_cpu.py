"""Runs the kernels of csrc/cuda on a CPU, with a fiber for each thread of a block (tests/native/cuda_on_cpu).

Barriers, shuffles and votes are those of the source. Other tests plant a defect, which must be found.
"""

from pathlib import Path

import pytest
from test_build import CSRC, build, run
from test_sanitizers import CXX, NATIVE, changed_csrc, found_in

FLAGS = ["-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_ASSERTIONS"]
SAME = "every kernel has the same results"
OTHER = "other results than one thread's"

pytestmark = [pytest.mark.skipif(not CXX, reason="no C++ compiler"), pytest.mark.xdist_group("cuda on a cpu")]


def build_kernels(csrc: Path, program: Path) -> Path:
    headers = ["-I", NATIVE / "cuda_on_cpu", "-I", csrc]
    run([*CXX, *build.cxx_flags(), *FLAGS, *headers, NATIVE / "kernels.cpp", "-o", program])
    return program


def test_every_kernel_has_one_threads_results(tmp_path):
    assert SAME in run([build_kernels(CSRC, tmp_path / "kernels")], timeout=300)


@pytest.mark.parametrize(
    ("file", "old", "new", "report"),
    [
        ("block.cuh", "above < place && place <= up_to_mine", "above <= place && place < up_to_mine", OTHER),
        ("block.cuh", "lane >= offset ? other : 0", "other", OTHER),
        ("block.cuh", "kWarpSize / 2; offset > 0", "kWarpSize / 4; offset > 0", OTHER),
        ("block.cuh", "words[i / kWarpSize] = word", "words[i / blockDim.x] = word", OTHER),
        ("block.cuh", "atomicOr(word, bits)", "*word = bits", OTHER),
        (
            "row_kernel.cuh",
            "sequence.tokens <= capacity",
            "sequence.tokens <= capacity + 1",
            "behind its shared memory",
        ),
        ("plan.h", "static_cast<int32_t>(capacity)", "static_cast<int32_t>(capacity + 50)", "behind its shared memory"),
        ("plan.h", "scratch * all}", "all}", "behind the workspace"),
        (
            "block.cuh",
            "    if (threadIdx.x < kWarpSize) {\n      walk_by_warp(place);",
            "    if (threadIdx.x < kWarpSize - 1) {\n      walk_by_warp(place);",
            "some threads wait for others that never come",
        ),
        (
            "block.cuh",
            "f(static_cast<int32_t>(i));\n    }\n    __syncthreads();",
            "f(static_cast<int32_t>(i));\n      __syncthreads();\n    }",
            "wait",
        ),
    ],
    ids=[
        "place in the wrong lane",
        "sum of bins",
        "half a warp's sum",
        "word of a plateau",
        "bits not added",
        "one token too many",
        "more than the room",
        "too small a workspace",
        "a lane that is not there",
        "a barrier in a branch",
    ],
)
def test_a_defect_in_the_kernels_is_found(tmp_path, file, old, new, report):
    csrc = changed_csrc(tmp_path / "csrc", (f"cuda/{file}", old, new))
    assert report in found_in([build_kernels(csrc, tmp_path / "kernels")], timeout=300)
