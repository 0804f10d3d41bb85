"""The syntax trees of the package and the imports between its modules, for tests of its structure."""

import ast
from functools import cache
from pathlib import Path

import mmx

ROOT = Path(mmx.__file__).parent
PUBLIC_MODULE = "mmx.__init__"  # its imports are lazy public names, not dependencies


@cache
def trees() -> dict[str, ast.Module]:
    """Syntax tree of every module by its dotted name; a package has the name of its folder."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 2:
            parts = parts[:-1]
        found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def package_of(module: str) -> str:
    """`mmx.training.loop` -> `training`."""
    return module.split(".")[1]


@cache
def imports_of(module: str) -> frozenset[str]:
    """Dotted names that a module imports, also inside functions and TYPE_CHECKING blocks."""
    names: set[str] = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute_base(module, node)
            names.update(_imported_module(base, alias.name) for alias in node.names)
    return frozenset(names)


@cache
def internal_imports() -> tuple[tuple[str, str], ...]:
    """Pairs (importing module, imported module) inside mmx, without the public names of `mmx/__init__.py`."""
    pairs = []
    for module in trees():
        if module != PUBLIC_MODULE:
            pairs += [(module, name) for name in imports_of(module) if name.startswith("mmx.")]
    return tuple(pairs)


@cache
def external_imports() -> tuple[tuple[str, str], ...]:
    """Pairs (importing module, dotted name imported from another distribution or the standard library)."""
    pairs = []
    for module in trees():
        pairs += [(module, name) for name in imports_of(module) if name.split(".")[0] != "mmx"]
    return tuple(pairs)


def _absolute_base(module: str, node: ast.ImportFrom) -> str:
    """The absolute module of `from BASE import ...`."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = any(other.startswith(module + ".") for other in trees())
    if not is_package:
        parts = parts[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, node.module]) if node.module else ".".join(parts)


def _imported_module(base: str, name: str) -> str:
    """The module behind `from base import name`: a submodule, the home of a public name of mmx, or the base."""
    if f"{base}.{name}" in trees():
        return f"{base}.{name}"
    if base == "mmx" and name in mmx.__all__:
        return getattr(getattr(mmx, name), "__module__", "mmx")
    return base
