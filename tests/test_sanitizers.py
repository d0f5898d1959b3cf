"""Runs sanitizers on the C++ code: memory and undefined behaviour of the CPU ops, data races of a thread block's code.

Other tests plant a defect, which must be found.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_build import CSRC, ROOT, build, run
from torch.utils import cpp_extension

NATIVE = Path(__file__).resolve().parent / "native"
CXX = shlex.split(build.find_cxx() or "")
READABLE = ["-O1", "-g", "-fno-omit-frame-pointer"]
MEMORY = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-D_GLIBCXX_ASSERTIONS",
    "-D_GLIBCXX_SANITIZE_VECTOR",  # finds accesses behind the end of a vector that has room for more
]
RACES = ["-fsanitize=thread", "-pthread"]


def shipped(library: str) -> str | None:
    """Returns the path of a library that comes with gcc, or None if another compiler is used."""
    if not CXX or "Free Software Foundation" not in run([*CXX, "--version"]):
        return None
    path = run([*CXX, f"-print-file-name={library}"]).strip()
    return path if os.path.isabs(path) else None


def at_fixed_addresses() -> list[str]:
    """Returns a prefix that turns address randomization off, which the runtimes of older compilers need."""
    prefix = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else []


def found_in(command: list, **options) -> str:
    """Returns the report of a command that has to fail."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode != 0, f"{command}\n{done.stdout}"
    return done.stdout


def changed_csrc(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """Copies csrc/ and replaces, for each (file, old, new), the first `old` in the file."""
    shutil.copytree(CSRC, folder)
    for file, old, new in changes:
        text = (folder / file).read_text()
        assert old in text, f"{file} no longer has {old!r}: plant this defect elsewhere"
        (folder / file).write_text(text.replace(old, new, 1))
    return folder


# ---- memory and undefined behaviour ----------------------------------------------------------------------------------

asan = pytest.mark.skipif(not shipped("libasan.so"), reason="no AddressSanitizer of gcc")


def compile_sources(sources: list[Path], folder: Path) -> list[Path]:
    flags = [*build.cxx_flags(), *READABLE, *MEMORY, "-fPIC", "-isystem", sysconfig.get_path("include")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source, out: run([*CXX, *flags, "-c", source, "-o", out]), sources, objects))
    return objects


def link_package(objects: list[Path], folder: Path) -> Path:
    """Links these objects into a copy of the package, and returns the folder to import it from."""
    package = folder / "rhythm_kernels"
    shutil.copytree(ROOT / "rhythm_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    torch_libraries = [flag for path in cpp_extension.library_paths() for flag in ("-L", path)]
    # -Bsymbolic takes templates that libtorch has too, such as std::vector's, from the objects with the checks
    flags = ["-shared", "-Wl,-Bsymbolic", *MEMORY, *torch_libraries, "-lc10", "-ltorch_cpu"]
    run([*CXX, *objects, *flags, "-o", package / "_C.abi3.so"])
    return folder


def ops_command(package: Path, *op: str) -> dict:
    return {
        "command": [*at_fixed_addresses(), sys.executable, NATIVE / "sanitized_ops.py", package, *op],
        "env": {
            **os.environ,
            "PYTHONPATH": str(package),
            # Python is not linked with these, and libasan must find libstdc++'s exceptions when it starts
            "LD_PRELOAD": f"{shipped('libasan.so')} {shipped('libstdc++.so.6')}",
            # Python and torch keep many allocations until their end
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        "timeout": 300,
    }


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    return compile_sources([CSRC / "ops.cpp", *sorted(CSRC.glob("cpu/*.cpp"))], tmp_path_factory.mktemp("objects"))


@asan
@pytest.mark.xdist_group("asan")  # one worker compiles the library
def test_the_cpu_ops(objects, tmp_path):
    assert "all as defined" in run(**ops_command(link_package(objects, tmp_path)))


@asan
@pytest.mark.xdist_group("asan")
@pytest.mark.parametrize(
    ("op", "file", "old", "new", "report"),
    [
        ("topq", "cpu/solo.h", "i < n", "i <= n", "AddressSanitizer: heap-buffer-overflow"),
        ("peaks", "cpu/run.h", "scratch.resize(", "scratch.reserve(", "AddressSanitizer: container-overflow"),
        ("topq", "rows/select.h", ">> shift >> kDigitBits", ">> (shift + kDigitBits)", "error: shift exponent 32"),
    ],
    ids=["one item too many", "unused room of a vector", "shift by 32"],
)
def test_a_defect_in_the_cpu_ops_is_found(objects, tmp_path, op, file, old, new, report):
    csrc = changed_csrc(tmp_path / "csrc", (file, old, new))
    (changed,) = compile_sources([csrc / "cpu" / f"{op}.cpp"], tmp_path)
    others = [path for path in objects if path.name != changed.name]
    assert report in found_in(**ops_command(link_package([*others, changed], tmp_path / "package"), op))


# ---- data races ------------------------------------------------------------------------------------------------------

tsan = pytest.mark.skipif(not shipped("libtsan.so"), reason="no ThreadSanitizer of gcc")
# The barriers in the order of their numbers in teams.cpp, from 1
BARRIERS = (
    "for_each ends",
    "total is 0",
    "total is the sum",
    "total is read",
    "bins are 0",
    "bins are full",
    "bin is found",
    "mark ends",
)
RACE = "WARNING: ThreadSanitizer: data race"


def build_teams(csrc: Path, program: Path) -> Path:
    run([*CXX, *build.cxx_flags(), *READABLE, *RACES, "-I", csrc, NATIVE / "teams.cpp", "-o", program])
    return program


def teams_command(program: Path, *barrier: str) -> dict:
    return {
        "command": [*at_fixed_addresses(), program, *barrier],
        "env": {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        "timeout": 300,
    }


@pytest.fixture(scope="module")
def teams(tmp_path_factory) -> Path:
    return build_teams(CSRC, tmp_path_factory.mktemp("teams") / "teams")


@tsan
@pytest.mark.xdist_group("tsan")
def test_teams_of_threads_have_one_threads_results_without_a_race(teams):
    assert "every team has the same results" in run(**teams_command(teams))


@tsan
@pytest.mark.xdist_group("tsan")
@pytest.mark.parametrize("barrier", BARRIERS)
def test_every_barrier_is_needed(teams, barrier):
    assert RACE in found_in(**teams_command(teams, str(1 + BARRIERS.index(barrier))))


@tsan
@pytest.mark.xdist_group("tsan")
@pytest.mark.parametrize(
    ("file", "old", "new", "report"),
    [
        ("rows/credit.h", "team.add_bits(&fai_keys[waad_keys[t]], kIntro)", "fai_keys[waad_keys[t]] |= kIntro", RACE),
        ("rows/topq.h", "take_largest = largest", "take_largest = sizeof(team) > 1", "other results than one thread's"),
    ],
    ids=["a race", "a result that depends on the team"],
)
def test_a_defect_in_the_rows_is_found(tmp_path, file, old, new, report):
    program = build_teams(changed_csrc(tmp_path / "csrc", (file, old, new)), tmp_path / "teams")
    assert report in found_in(**teams_command(program))


def barriers(code: str, barrier: str) -> dict[str, int]:
    """Counts a barrier in each member function of a team."""
    members = re.split(r"\b(for_each|sum|find_bin|mark)\(int32_t n, ", code)
    return {name: len(re.findall(barrier, body)) for name, body in zip(members[1::2], members[2::2])}


def test_a_team_of_threads_waits_where_a_thread_block_does():
    of_threads = barriers((NATIVE / "teams.cpp").read_text(), r"\bwait\(k\w+\);")
    assert of_threads == barriers((CSRC / "cuda" / "block.cuh").read_text(), r"__syncthreads\(\);")
    assert sum(of_threads.values()) == len(BARRIERS)
