"""How the package is built, in figures: size, functions used once, imports inside functions, cycles, docstrings.

python tools/house_figures.py [FOLDER]      # the package of a checkout; --json prints one object
"""

import argparse
import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "cn_clip"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(path: Path, root: Path) -> str:
    """`cn_clip.clip.model` of a file below `root`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, modules: set[str], *, inside: bool) -> Iterator[str]:
    """The package's modules that are imported inside functions, or outside of them and at run time."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, FUNCTIONS):
            if inside:
                yield from (one for below in ast.walk(node) for one in imported(below, modules))
        elif not inside:
            yield from imported(node, modules)
        if not isinstance(node, FUNCTIONS):
            yield from imports(node, modules, inside=inside)


def imported(node: ast.AST, modules: set[str]) -> list[str]:
    """The modules that one statement imports."""
    if isinstance(node, ast.Import):
        return [one.name for one in node.names if one.name in modules]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        below = [f"{node.module}.{one.name}" for one in node.names]
        return [one if one in modules else node.module for one in below if one in modules or node.module in modules]
    return []


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other at their top, each in order (Tarjan's components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def help_texts(tree: ast.AST) -> Iterator[str]:
    """The string below each field of an Options class, or of a class of shared options."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            for declared, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(declared, ast.AnnAssign) and isinstance(below, ast.Expr):
                    yield ast.unparse(below.value)


def public_without_docstring(tree: ast.Module) -> Iterator[str]:
    """Public functions, classes and methods of public classes that say nothing, but for dunder methods."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.name
            for below in node.body if isinstance(node, ast.ClassDef) else ():
                if not isinstance(below, FUNCTIONS) or below.name.startswith("_") or ast.get_docstring(below):
                    continue
                is_setter = any(ast.unparse(one).endswith(".setter") for one in below.decorator_list)
                if not is_setter and not ast.unparse(below).endswith("..."):
                    yield f"{node.name}.{below.name}"


def figures(root: Path) -> dict[str, object]:
    """What is counted, by name."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    modules = {module_name(path, root) for path in paths}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    private = [one.name for one in functions if one.name.startswith("_") and not one.name.endswith("__")]
    uses: Counter[str] = Counter()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                uses[node.id] += 1
            elif isinstance(node, ast.Attribute):
                uses[node.attr] += 1
    once = [name for name in private if uses[name] <= 1]
    in_functions = sum(isinstance(below, (ast.Import, ast.ImportFrom)) for one in functions for below in ast.walk(one))
    graph = {module_name(path, root): set(imports(tree, modules, inside=False)) for path, tree in trees.items()}
    every = {
        name: graph[name] | set(imports(trees[path], modules, inside=True))
        for path in paths
        for name in [module_name(path, root)]
    }
    helps = Counter(text for tree in trees.values() for text in help_texts(tree))
    silent = [
        f"{module_name(path, root)}.{name}" for path, tree in trees.items() for name in public_without_docstring(tree)
    ]
    return {
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths),
        "files": len(paths),
        "functions": len(functions),
        "private functions": len(private),
        "private functions used once": len(once),
        "imports in functions": in_functions,
        "help texts that stand twice or more": sum(count > 1 for count in helps.values()),
        "public names without a docstring": silent,
        "cycles of imports at the top": cycles(graph),
        "cycles with imports in functions": cycles(every),
    }


def main() -> None:
    """Prints the figures, one a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = figures(options.folder.resolve())
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {len(value) if isinstance(value, list) else value}")
        for one in value if isinstance(value, list) else ():
            print(f"    {one if isinstance(one, str) else ' <-> '.join(one)}")


if __name__ == "__main__":
    main()
