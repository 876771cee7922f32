"""Who may import whom, read from the sources without importing anything."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sea_jax

PACKAGE = Path(sea_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A file imports from lower lines and from its own folder, never from its own line or a higher one.
RULE = """
train sft evaluate memory export_labels fit
heldout initial_state judging alpaca_eval
wiring
methods report labels
preflight workdir history
config
agent evaluation agreement
ensemble group_learner features policy_logprobs oracles actors
data replay open_pairs learner policy
models sampling losses
runtime
types settings statistics repetition
"""
HEIGHT = {room: height for height, line in enumerate(reversed(RULE.strip().splitlines())) for room in line.split()}

# Packages that only some files may import, and those that none may.
KEPT_TO = {
    "orbax": {"runtime.checkpoint"},
    "grain": {"data.prompts", "sft"},
    "transformers": {"models.tokenizer"},
    "datasets": {"data.sources"},
    "pyarrow": {"data.files"},
    "tensorflow_datasets": {"data.sources"},
    "tensorflow": set(),
    "torch": set(),
    "vllm": set(),
    "wandb": {"runtime.metrics"},
    "trl": set(),
    "configs": set(),
    "experiments": set(),
    "gpu_bridge": {"actors.bridge", "oracles.oracle"},
    "label_page": set(),
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
    """The module's name within the package, such as models.rope."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def room_of(module: str) -> str:
    """The file or folder at the top of the package that a module is, or lies in."""
    room = module.split(".")[0]
    assert room in HEIGHT, f"{room} stands nowhere in RULE: give it a place"
    return room


def test_imports_are_found_wherever_they_hide():
    source = "import a.b as c\nfrom d import e\ndef f():\n    import g\nif x:\n    from h.i import j, k\n"
    assert set(imports(source)) == {"a.b", "d.e", "g", "h.i.j", "h.i.k"}
    assert set(imports(source, everywhere=False)) == {"a.b", "d.e"}
    with pytest.raises(AssertionError, match="relative import"):
        list(imports("from . import a"))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_imports_only_from_lower_lines_and_its_own_folder(file):
    name = name_of(file)
    if file.name == "__init__.py":
        assert not list(imports(file.read_text()))
        return
    for imported in imports(file.read_text()):
        top, *inner = imported.split(".")
        if top == "sea_jax":
            above, below = room_of(name), room_of(inner[0])
            assert above == below or HEIGHT[below] < HEIGHT[above], f"{name} must not import {imported}"
        assert name in KEPT_TO.get(top, {name}), f"{name} must not import {imported}"


def test_what_one_source_of_prompts_needs_is_imported_only_where_it_reads():
    tops = {name.split(".")[0] for name in imports((PACKAGE / "data" / "sources.py").read_text(), everywhere=False)}
    assert not tops & {"datasets", "pyarrow", "tensorflow_datasets", "huggingface_hub"}


def test_no_two_modules_import_each_other():
    def module(name: str) -> str:
        """The file that an imported name comes from: sea_jax.models.rope.rotate -> sea_jax.models.rope."""
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


def test_every_room_stands_once_in_the_rule_and_is_there():
    rooms = RULE.split()
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")}
