"""Which folder or module may import which, and that no file imports itself through others.

The table is that of CONTRIBUTING.md. Imports inside functions count too, since circles hide there.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rhythm_kernels

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"


def allowed_imports() -> dict[str, set[str]]:
    """Returns what each folder or module may import, from the table of CONTRIBUTING.md."""
    text = PAGE.read_text(encoding="utf-8")
    core = set(re.findall(r"`(\w+)`", re.search(r"The core is (.*?)\.\s", text, re.DOTALL)[1]))
    table = text.split("| folder or module | may import |")[1].split("\n\n")[0]
    rules = {}
    for folders, imported in re.findall(r"^\| (`.*?) \| (.*?) \|$", table, re.MULTILINE):
        names = set(re.findall(r"`(\w+)`", imported)) | (core if "the core" in imported else set())
        rules |= dict.fromkeys(re.findall(r"`(\w+)`", folders), names)
    return rules


def modules() -> dict[str, Path]:
    """The files of the package and of the trainer, by the names of their modules."""
    files = [path for folder in ("rhythm_kernels", "train") for path in (ROOT / folder).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """Returns the modules among `known` that a module imports, without those under TYPE_CHECKING."""
    imported: set[str] = set()
    nodes = [ast.parse(known[name].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and getattr(node.test, "id", getattr(node.test, "attr", "")) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {part if part in known else node.module for part in parts}
    return imported & set(known) - {name}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, known) for name in known}


def test_folders_import_only_what_they_may(graph):
    allowed = allowed_imports()
    assert len(allowed) > 15
    for name, imported in graph.items():
        parts = name.split(".")
        if parts[0] == "train" or len(parts) == 1:
            continue
        folders = {part.split(".")[1] for part in imported if part.startswith("rhythm_kernels.")}
        assert not any(part.split(".")[0] == "train" for part in imported), f"{name} imports the trainer"
        foreign = folders - {parts[1]} - allowed[parts[1]]
        assert not foreign, f"{name} may not import {', '.join(sorted(foreign))}"


def test_no_file_imports_itself_through_others(graph):
    left = {name: set(imported) for name, imported in graph.items()}
    while ready := [name for name, imported in left.items() if not imported & set(left)]:
        for name in ready:
            del left[name]
    assert not left, f"imports go in a circle among {', '.join(sorted(left))}"


@pytest.mark.parametrize("module", ["rhythm_kernels", "rhythm_kernels.console", "rhythm_kernels.options"])
def test_modules_without_torch(module):
    program = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_package_exports_what_type_checkers_see():
    tree = ast.parse(Path(rhythm_kernels.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen.keys() == set(rhythm_kernels.__all__)
    for name, module in seen.items():
        assert getattr(rhythm_kernels, name).__name__ == name
        assert f"rhythm_kernels.{rhythm_kernels._MODULE_OF[name]}" == module
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(rhythm_kernels, "nothing")  # noqa: B009
