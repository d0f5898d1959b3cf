"""Tests the archive for a GPU machine: the files of a commit, its name, and an extension built from the same files."""

import subprocess
import sys
import tarfile

import pytest

from benchmarks import gpu_bundle, gpu_suite
from benchmarks.measure import commit_of

SETUP = """
import os, pathlib, sys
assert sys.argv[1:] == ["build_ext", "--inplace"]
pathlib.Path("build").mkdir()
print("compiling for", os.environ["RHYTHM_KERNELS_CUDA_ARCHS"])
pathlib.Path("rhythm_kernels/_C.abi3.so").write_text(pathlib.Path("csrc/ops.cpp").read_text())
"""
LOADER = """
import pathlib
def require(device_type):
    serves = (pathlib.Path(__file__).parent.parent / "_C.abi3.so").read_text().split()
    if device_type not in serves: raise RuntimeError(f"built for {serves}")
"""
FILES = {
    "setup.py": SETUP,
    "rhythm_kernels/__init__.py": "",
    "rhythm_kernels/credit/extension.py": LOADER,
    "csrc/ops.cpp": "cpu cuda",
    ".gitignore": "ignored\nbuild/\n*.so\n",
}


def git(root, *arguments: str) -> str:
    own = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", root, *own, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "All")
    (root / "ignored").write_text("not packed")
    monkeypatch.setattr(gpu_bundle, "ROOT", root)
    return root


def unpacked(archive, folder):
    with tarfile.open(archive) as tar:
        names = {member.name for member in tar.getmembers() if member.isfile()}
    subprocess.run(["tar", "-xzf", archive, "-C", folder], check=True)
    return folder / "rhythm_kernels", {name.removeprefix("rhythm_kernels/") for name in names}


def test_the_archive_holds_the_commit_and_its_name(checkout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_bundle.torch.version, "cuda", None)  # builds no extension by itself
    gpu_bundle.main(["--out", str(tmp_path / "bundle.tar.gz")])
    folder, names = unpacked(tmp_path / "bundle.tar.gz", tmp_path)
    assert names == {*FILES, "COMMIT"}
    commit = git(checkout, "rev-parse", "--short", "HEAD").strip()
    assert commit_of(folder) == commit_of(checkout) == commit
    (folder / "COMMIT").unlink()
    assert commit_of(folder) == "unknown"

    said = capsys.readouterr().out
    assert f"commit {commit}, no extension: the suite builds it there" in said
    commands = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    begin = "tar -xzf bundle.tar.gz -C /tmp && cd /tmp/rhythm_kernels && python3 -m benchmarks.gpu_suite "
    assert commands == [f"{begin}--half {half} --out DIR" for half in (1, 2)]
    for command in (*commands, said.splitlines()[-2]):
        gpu_suite.parse(command.split("benchmarks.gpu_suite ")[1].split(), gpu_suite.steps())


def test_the_extension_is_built_from_the_files_of_the_commit(checkout, tmp_path, monkeypatch, capsys):
    (checkout / "rhythm_kernels" / "_C.abi3.so").write_text("stale")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python").symlink_to(sys.executable)
    gpu_bundle.main(["--build-with", "./python", "--out", str(tmp_path / "bundle.tar.gz")])
    folder, names = unpacked(tmp_path / "bundle.tar.gz", tmp_path)
    assert names == {*FILES, "COMMIT", "rhythm_kernels/_C.abi3.so"}
    assert (folder / "rhythm_kernels" / "_C.abi3.so").read_text() == "cpu cuda"
    assert "the extension for sm_90a" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_bundle.main(["--build-with", "no/python"])
    assert "--build-with must be a Python that runs, got 'no/python'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("csrc/ops.cpp", "cpu", r"RuntimeError: built for \['cpu'\]"),
        ("setup.py", "raise SystemExit('no compiler')", r"setup.py build_ext --inplace failed:\nno compiler"),
    ],
    ids=["without CUDA", "not built"],
)
def test_an_extension_that_cannot_be_used_is_refused(file, text, reason, checkout, tmp_path):
    (checkout / file).write_text(text)
    git(checkout, "commit", "--quiet", "--all", "--message", "Broken")
    with pytest.raises(SystemExit, match=reason):
        gpu_bundle.main(["--build-with", sys.executable, "--out", str(tmp_path / "out" / "bundle.tar.gz")])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("file", ["csrc/ops.cpp", "untracked.py"])
def test_a_tree_that_differs_from_its_commit_is_refused(file, checkout, tmp_path):
    (checkout / file).write_text("changed")
    with pytest.raises(SystemExit, match=rf"differs from commit \w+, commit or stash:\n.. {file}"):
        gpu_bundle.main(["--out", str(tmp_path / "bundle.tar.gz")])
    assert not (tmp_path / "bundle.tar.gz").exists()


def test_files_that_are_no_checkout_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bundle, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="the files to pack are those of a commit, and .* is no git checkout"):
        gpu_bundle.main(["--out", str(tmp_path / "bundle.tar.gz")])
