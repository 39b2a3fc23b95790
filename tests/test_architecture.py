"""The house's rules: imports run one way, methods know nothing of each other, losses need torch only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_extensions


ROOT = Path(trl_extensions.__file__).parent
METHODS = ("sami", "tnt", "weak_to_strong", "codeclm")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, typing: bool = False) -> set[str]:
    """Modules that a file imports, anywhere in it; those for type checkers only if `typing`."""
    package = list(path.relative_to(ROOT.parent).parent.parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not typing:
        guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        skipped = {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}
    else:
        skipped = set()
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
GRAPH = {name: (imports_of(path) & FILES.keys()) - {name} for name, path in FILES.items()}


def test_no_circle_lazy_imports_included():
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                # A package's own file is no circle for what lies in it, as long as it does not import that back
                if not (name.startswith(other + ".") and not any(n.startswith(other + ".") for n in GRAPH[other])):
                    visit(other, (*way, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_core_knows_no_method_and_methods_not_each_other():
    for name, imported in GRAPH.items():
        place = name.split(".")[1:2]
        rooms = {other.split(".")[1] for other in imported if "." in other}
        if place == ["core"]:
            assert rooms <= {"core", "_compat", "embedded"}, name
        elif place and place[0] in METHODS:
            assert not rooms & ({*METHODS, "cli"} - set(place)), name


@pytest.mark.parametrize("method", ["sami", "tnt", "weak_to_strong"])
def test_losses_import_torch_only(method):
    imported = {name.split(".")[0] for name in imports_of(FILES[f"trl_extensions.{method}.loss"])}
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_importing_the_package_loads_no_torch():
    code = "import trl_extensions, sys; print(sorted({'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
