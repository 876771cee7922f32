"""Who may import whom, read from the sources without importing anything."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sea_jax

PACKAGE = Path(sea_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A file may import from its own layer and from those above it in this list, never from those below.
LAYERS = [
    {"types"},
    {"batching", "models", "losses", "ensemble", "sampling", "logprobs", "experience", "metrics"}
    | {"tokenizer", "builtin", "tiny_random", "cache", "docstrings", "files", "sources"},
    {"generation", "learner", "oracles", "actors", "data", "features", "labelling"}
    | {"checkpoint", "config", "console", "interrupts", "policies", "processes", "report", "responses", "sharding"},
    {"agent", "evaluation"},
    {"wiring", "train", "evaluate", "sft", "fit"},
]

# Packages that only some files may import, and those that none may.
KEPT_TO = {
    "orbax": {"checkpoint"},
    "grain": {"data", "sft"},
    "transformers": {"tokenizer"},
    "datasets": {"sources"},
    "pyarrow": {"sources"},
    "tensorflow_datasets": {"sources"},
    "tensorflow": set(),
    "torch": set(),
    "vllm": set(),
    "trl": set(),
    "configs": set(),
    "gpu_bridge": {"wiring"},
    "tests": set(),
}


def imports(source: str, everywhere: bool = True) -> Iterator[str]:
    """The full names of what a source imports; `everywhere`: also inside functions and for type checkers only."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(file: Path) -> str:
    """The module's name within the package, without that of a subpackage's files."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def layer_of(module: str) -> int:
    """The layer of a module or subpackage."""
    found = [number for number, names in enumerate(LAYERS) if module in names]
    assert found, f"{module} has no layer: give it a place in LAYERS"
    return found[0]


def test_imports_are_found_wherever_they_hide():
    source = "import a.b as c\nfrom d import e\ndef f():\n    import g\nif x:\n    from h.i import j, k\n"
    assert set(imports(source)) == {"a.b", "d.e", "g", "h.i.j", "h.i.k"}
    assert set(imports(source, everywhere=False)) == {"a.b", "d.e"}
    with pytest.raises(AssertionError, match="relative import"):
        list(imports("from . import a"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_layer_may(file):
    name = name_of(file)
    if name == "__init__":
        assert not list(imports(file.read_text()))
        return
    for imported in imports(file.read_text()):
        top, *inner = imported.split(".")
        if top == "sea_jax":
            assert layer_of(inner[0]) <= layer_of(name), f"{name} must not import {imported}"
        assert name in KEPT_TO.get(top, {name}), f"{name} must not import {imported}"


def test_what_one_source_of_prompts_needs_is_imported_only_where_it_reads():
    tops = {name.split(".")[0] for name in imports((PACKAGE / "sources.py").read_text(), everywhere=False)}
    assert not tops & {"datasets", "pyarrow", "tensorflow_datasets", "huggingface_hub"}


def test_no_two_modules_import_each_other():
    def module(name: str) -> str:
        """The file that an imported name comes from: sea_jax.models.hf.load -> sea_jax.models.hf."""
        parts = name.split(".")
        while not (PACKAGE.parent.joinpath(*parts).with_suffix(".py")).exists():
            parts = parts[:-1]
            if not parts:
                return ""
        return ".".join(parts)

    graph = {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): {
            module(name) for name in imports(file.read_text(), everywhere=False)
        }
        - {""}
        for file in FILES
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle of imports: {' -> '.join((*path, name))}"
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_every_name_in_the_layers_stands_once():
    names = [name for layer in LAYERS for name in layer]
    assert len(names) == len(set(names))
