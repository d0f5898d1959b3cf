"""Links between the public names in docstrings: `token_credit` leads to its place in the reference."""

import re

import griffe


class LinkPublicNames(griffe.Extension):
    def on_package(self, *, pkg, **_):
        objects = list(walk(pkg))
        modules = {obj.path: obj for obj in objects if obj.is_module}
        places = {str(name): home(pkg.imports[str(name)], modules) for name in pkg.exports}

        def link(found: re.Match) -> str:
            name = found[1]
            return f"[`{name}`][{places[name]}]" if name in places else found[0]

        for obj in objects:
            if obj.docstring is not None:
                obj.docstring.value = re.sub(r"(?<!`)`(\w+)`(?!`)", link, obj.docstring.value)


def walk(obj):
    """All objects that are defined in a package, not those that are imported."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from walk(member)


def home(path: str, modules: dict[str, griffe.Object]) -> str:
    """Where the object of an import is defined."""
    module, name = path.rsplit(".", 1)
    imports = modules[module].imports
    return home(imports[name], modules) if name in imports else path
