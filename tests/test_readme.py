"""The README's library example runs as it stands, and its file tree names what is there."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs():
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, names)
    gamma, per_token, response = names["gamma"], names["per_token"], names["response"]
    assert gamma.shape == per_token.shape == (4, 300)
    assert gamma[~response].eq(1).all() and gamma[response].gt(1).any()
    assert torch.equal(per_token[1], torch.full((300,), -0.4))
    assert names["schedule"].groups.local_heads.any() and names["c"].rhythm().spans is None


def test_the_tree_names_what_is_there():
    tree = README.split("## The tree", 1)[1].split("```")[1]
    folder = ROOT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        path = (folder / name) if line.startswith(" ") else (ROOT / name)
        assert path.exists(), f"{path.relative_to(ROOT)} is in the README's tree only"
        if not line.startswith(" "):
            folder = path
