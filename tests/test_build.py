"""Tests the build: what setup.py decides, the CUDA kernels on every architecture, the binary's symbols, and wheels."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

from rhythm_kernels.credit import extension

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def load_setup():
    spec = importlib.util.spec_from_file_location("rhythm_kernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_setup()


def run(command: list, **options) -> str:
    """Returns standard output and error of a command that has to succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


# ---- what setup.py decides -------------------------------------------------------------------------------------------


def test_architectures():
    assert build.parse_archs("8.0, 90a;100+PTX") == ["80", "90a", "100+PTX"]
    assert build.parse_archs(" ") == []
    assert build.gencode_flags(["90a", "100+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(SystemExit, match="RHYTHM_KERNELS_CUDA_ARCHS must look like .*got 'hopper'"):
        build.parse_archs("hopper")


def sources(extension) -> set[str]:
    return {Path(source).name for source in extension.sources}


def test_a_torch_without_cuda_gets_the_cpu_ops(monkeypatch, capsys):
    monkeypatch.setattr(build.torch.version, "cuda", None)
    monkeypatch.delenv("RHYTHM_KERNELS_CUDA_ARCHS", raising=False)
    (extension,) = build.extensions()
    assert sources(extension) == {"ops.cpp", "topq.cpp", "peaks.cpp", "credit.cpp"}
    assert "building the CPU ops only" in capsys.readouterr().err
    monkeypatch.setenv("RHYTHM_KERNELS_CUDA_ARCHS", "90a")
    with pytest.raises(SystemExit, match="RHYTHM_KERNELS_CUDA_ARCHS='90a', but torch .* is a build without CUDA"):
        build.extensions()


def test_a_torch_with_cuda_gets_both_whatever_the_gpu(monkeypatch):
    monkeypatch.setattr(build.torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "13.2")
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: pytest.fail("asked for the visible GPU"))
    monkeypatch.setenv("RHYTHM_KERNELS_CUDA_ARCHS", "80 90a")
    archs = build.cuda_archs_to_build()
    assert archs == ["80", "90a"]
    monkeypatch.setenv("RHYTHM_KERNELS_CUDA_ARCHS", "")
    assert build.cuda_archs_to_build() == []


def test_a_toolkit_of_another_major_version_is_not_used(monkeypatch, capsys):
    monkeypatch.setattr(build.torch.version, "cuda", "13.0")
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("nvcc"))
    monkeypatch.setattr(build, "nvcc_version", lambda nvcc: "12.8")
    monkeypatch.delenv("RHYTHM_KERNELS_CUDA_ARCHS", raising=False)
    assert build.cuda_archs_to_build() == []
    assert (
        "the CUDA toolkit is 12.8 and torch was built with 13.0: building the CPU ops only" in capsys.readouterr().err
    )
    monkeypatch.setenv("RHYTHM_KERNELS_CUDA_ARCHS", "90a")
    with pytest.raises(SystemExit, match="but the CUDA toolkit is 12.8"):
        build.cuda_archs_to_build()


def make_nvcc(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def wrapped_nvcc(tmp_path, monkeypatch):
    """Makes a wrapper and the nvcc in a toolkit that it calls. torch takes the wrapper's folder for the toolkit."""
    top = tmp_path / "toolkit"
    inside = make_nvcc(top / "bin" / "nvcc", f"echo '#$ _HERE_={top}/bin' >&2; echo '#$ TOP={top}/bin/..' >&2")
    wrapper = make_nvcc(tmp_path / "local" / "bin" / "nvcc", f'exec {inside} "$@"')
    monkeypatch.setattr(build.cpp_extension, "CUDA_HOME", str(tmp_path / "local"))
    return wrapper, inside


def test_an_nvcc_that_calls_another_is_followed_to_its_toolkit(wrapped_nvcc, monkeypatch):
    wrapper, inside = wrapped_nvcc
    local = str(wrapper.parent.parent)
    assert build.find_nvcc() == inside
    (inside.parent.parent / "lib64").mkdir()
    monkeypatch.setattr(build, "cuda_archs_to_build", lambda: ["90a"])
    (extension,) = build.extensions()
    assert str(inside.parent.parent / "lib64") in extension.library_dirs
    assert str(inside.parent.parent / "include") in extension.include_dirs
    assert not [folder for folder in extension.library_dirs + extension.include_dirs if folder.startswith(local)]
    assert build.find_nvcc() == inside, "the toolkit's own nvcc leads elsewhere"


def test_an_nvcc_that_names_no_toolkit_is_taken_as_it_is(wrapped_nvcc):
    wrapper, inside = wrapped_nvcc
    inside.write_text("#!/bin/sh\necho 'no such option' >&2; exit 1\n")
    assert build.find_nvcc() == wrapper
    inside.write_text("#!/bin/sh\necho '#$ TOP=/no/such/folder' >&2\n")
    assert build.find_nvcc() == wrapper
    wrapper.unlink()
    assert build.find_nvcc() is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_the_toolkits_version_is_read():
    assert re.fullmatch(r"\d+\.\d+", build.nvcc_version(Path(shutil.which("nvcc"))))


def test_no_compiler_means_no_extension(monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.extensions() == []
    assert capsys.readouterr().err.count("\n") == 1


# ---- compilers -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(build.find_cxx() is None, reason="no C++ compiler")
@pytest.mark.slow
def test_the_cpu_sources_have_no_warnings():
    command = [
        build.find_cxx(),
        "-fsyntax-only",
        "-Werror",
        *build.cxx_flags(),
        "-isystem",
        sysconfig.get_path("include"),
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: run([*command, path]), sorted(CSRC.rglob("*.cpp"))))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
@pytest.mark.slow
def test_the_cuda_kernels_neither_warn_nor_spill(tmp_path, record_property):
    """Compiles for every architecture of the default list. The end of the log shows registers and shared memory."""
    flags = [*build.nvcc_flags(build.parse_archs(build.DEFAULT_CUDA_ARCHS)), "-Werror=all-warnings", "-Xptxas=-v"]
    files = sorted(CSRC.rglob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda path: run(["nvcc", "-c", path, "-o", tmp_path / path.stem, *flags]), files))
    usage = {
        (row, arch): [int(n) for n in numbers]
        for row, arch, *numbers in re.findall(
            r"entry function '\w+row_kernelINS_\d+(\w+?)EEEv\w+' for '(\w+)'.*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            "".join(outputs),
            re.DOTALL,
        )
    }
    words = dict(re.findall(r"struct (\w+) {\n  static constexpr int kScratch = (\d+);", text_of("rows/*.h")))
    for (row, arch), (stack, stores, loads, registers) in usage.items():
        shared = f"{4 * int(words[row])} bytes of shared memory a token"
        record_property("resources", f"{row}, {arch}: {registers} registers, {stack} bytes of stack, {shared}")
        assert (stack, stores, loads) == (0, 0, 0), (row, arch)
        assert registers <= 64, "a block of 1024 threads has 64 registers a thread"
    assert len(words) == 4
    assert set(usage) == {(row, arch) for row in words for arch in ("sm_80", "sm_90a", "sm_100")}
    check_sass(tmp_path)


def text_of(pattern: str) -> str:
    return "".join(file.read_text() for file in sorted(CSRC.glob(pattern)))


def check_sass(objects: Path) -> None:
    """The kernels count bins by the instruction that adds up a warp's equal bins, so few exponents are no slower."""
    cuobjdump = shutil.which("cuobjdump") or next(Path(triton.__file__).parent.rglob("bin/cuobjdump"))
    for file in sorted(objects.iterdir()):
        sass = run([cuobjdump, "-sass", file])
        functions = [text for text in sass.split("Function : ")[1:] if "row_kernel" in text.splitlines()[0]]
        assert functions
        for function in functions:
            assert "ATOMS.POPC.INC" in function
            assert not re.search(r"\b(LDL|STL)\b", function)


# ---- the binary ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm on the PATH")
def test_the_binary_uses_only_stable_interfaces():
    assert extension.available("cpu"), extension.HOW_TO_BUILD
    from rhythm_kernels import _C

    assert Path(_C.__file__).name == "_C.abi3.so"
    undefined = run(["nm", "-D", "--undefined-only", "-C", _C.__file__])
    for symbol in (line.split(" U ")[-1] for line in undefined.splitlines()):
        assert not re.search(r"\b(at|c10|torch|pybind11)::", symbol), f"C++ interface of libtorch: {symbol}"
    assert "torch_library_impl" in undefined
    if shutil.which("readelf"):
        assert "libtorch_python" not in run(["readelf", "-d", _C.__file__])


OWN_LIBRARY = """
import sys, torch
torch.ops.load_library(sys.argv[1])
values = torch.tensor([[3.0, 1.0, 2.0]])
mask = torch.ones_like(values, dtype=torch.bool)
op = torch.ops.rhythm_kernels.segment_topq
print(op(values, mask, None, 0.4, True)[0].tolist())
for wrong in (lambda: op(values, mask, None, 1.25, True), lambda: op(values[0], mask, None, 0.4, True)):
    try:
        wrong()
    except ValueError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(build.find_cxx() is None, reason="no C++ compiler")
@pytest.mark.slow
def test_a_compiler_that_links_its_own_cxx_library_gives_ops_and_messages_that_work(tmp_path):
    """Two C++ libraries in a process share no locale, so that a stream of one crashes on what the other has made."""
    sources = [CSRC / "ops.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    torch_libraries = [flag for path in build.cpp_extension.library_paths() for flag in ("-L", path)]
    flags = [*build.cxx_flags(), "-shared", "-fPIC", "-static-libstdc++", "-isystem", sysconfig.get_path("include")]
    library = tmp_path / "own.so"
    run([*shlex.split(build.find_cxx()), *flags, *sources, *torch_libraries, "-lc10", "-ltorch_cpu", "-o", library])
    lines = run([sys.executable, "-c", OWN_LIBRARY, library]).splitlines()
    assert lines == [
        "[[True, False, True]]",
        "segment_topq: top_fraction must be in [0, 1], got 1.25",
        "segment_topq: values must have the shape of response_mask, [1, 3], got [3]",
    ]


def build_wheel(tmp_path: Path, **environment: str) -> Path:
    """Builds a wheel from a copy of the sources, as a user does, without the network."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("csrc", "rhythm_kernels", "train"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        tmp_path,
        copy,
    ]
    run(command, env={**os.environ, **environment})
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


def run_from(wheel: Path, code: str) -> str:
    installed = wheel.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    # -S ignores .pth files, so that an editable install of the checkout cannot lend its modules
    path = os.pathsep.join([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return run([sys.executable, "-S", "-c", code], cwd=wheel.parent, env={**os.environ, "PYTHONPATH": path})


SELECT = """
import torch, rhythm_kernels
assert "installed" in rhythm_kernels.__file__
values, mask = torch.tensor([[3., 1., 2.]]), torch.ones(1, 3, dtype=torch.bool)
print(rhythm_kernels.segment_topq(values, mask, 0.4).tolist())
try:
    print(rhythm_kernels.segment_topq(values, mask, 0.4, backend="extension").tolist())
except RuntimeError as error:
    print("RuntimeError:", error)
"""


@pytest.mark.skipif(build.find_cxx() is None, reason="no C++ compiler")
@pytest.mark.slow
def test_a_wheel_with_the_extension(tmp_path):
    wheel = build_wheel(tmp_path)
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "rhythm_kernels/_C.abi3.so" in names
    assert "rhythm_kernels/statistics/__init__.py" in names
    assert not [name for name in names if name.startswith(("train", "tests", "csrc", "benchmarks"))]
    assert run_from(wheel, SELECT).splitlines() == ["[[True, False, True]]"] * 2


@pytest.mark.slow
def test_a_wheel_without_a_compiler(tmp_path):
    wheel = build_wheel(tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    output = run_from(wheel, SELECT)
    assert "[[True, False, True]]" in output
    assert output.count("the slower torch implementation is used") == 1
    assert 'RuntimeError: backend="extension" has no ops for cpu: rhythm_kernels._C cannot be loaded' in output
