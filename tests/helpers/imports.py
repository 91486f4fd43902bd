"""Who imports whom in the package, read from its source: by file, and by room.

A room is a folder of the package's first level or a module beside them. The package's ``__init__`` is none: it
imports what users import, and nobody imports from it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from helpers.paths import PACKAGE

Graph = dict[str, set[str]]
COMMON = {"errors", "version", "validation"}  # anybody may import these: their arrows say nothing


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _nodes(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _nodes(node, inside_functions)


def imported(path: Path, inside_functions: bool) -> Iterator[tuple[str, ...]]:
    """What a file takes from the package, as parts of a path in it: ``("ops", "gated", "weighted_lora")``."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), inside_functions):
        if isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = (*folder[: len(folder) - node.level + 1], *module)
            elif module[:1] == [PACKAGE.name]:
                base = tuple(module[1:])
            else:
                continue
            yield from ((*base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            yield from (tuple(parts[1:]) for parts in names if parts[0] == PACKAGE.name and parts[1:])


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms(inside_functions: bool) -> Graph:
    """Room -> rooms it imports from."""
    files = [path for path in files_of(PACKAGE) if room_of(path) != "__init__"]
    graph: Graph = {room_of(path): set() for path in files}
    for path in files:
        own = room_of(path)
        graph[own] |= {parts[0] for parts in imported(path, inside_functions)} & (graph.keys() - {own})
    return graph


def modules(inside_functions: bool) -> Graph:
    """File -> files it imports from, as paths in the package."""
    files = [path for path in files_of(PACKAGE) if room_of(path) != "__init__"]
    return {str(path.relative_to(PACKAGE)): set(_targets(path, inside_functions)) for path in files}


def _targets(path: Path, inside_functions: bool) -> Iterator[str]:
    for parts in imported(path, inside_functions):
        for length in range(len(parts), 0, -1):
            place = PACKAGE.joinpath(*parts[:length])
            found = [p for p in (place.with_suffix(".py"), place / "__init__.py") if p.is_file() and p != path]
            if found:
                yield str(found[0].relative_to(PACKAGE))
                break


def arrows(graph: Graph) -> list[tuple[str, str]]:
    """Ordered pairs (who imports, from whom) without those of ``COMMON``."""
    return sorted((a, b) for a, others in graph.items() for b in others if not {a, b} & COMMON)


def longest_chain(graph: Graph) -> list[str]:
    """The longest way along imports; a circle is raised as a ``ValueError`` that shows it."""
    known: dict[str, list[str]] = {}

    def chain_from(node: str, way: list[str]) -> list[str]:
        if node in way:
            raise ValueError(" -> ".join([*way[way.index(node) :], node]))
        if node not in known:
            known[node] = [node, *max((chain_from(n, [*way, node]) for n in sorted(graph.get(node, ()))), key=len,
                                      default=[])]  # fmt: skip
        return known[node]

    return max((chain_from(node, []) for node in sorted(graph)), key=len)
