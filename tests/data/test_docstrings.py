import logging
from pathlib import Path

import pytest

from sea_jax.data import docstrings
from sea_jax.data.docstrings import Pair

POST = (
    "The walk starts at the node that is given and follows every edge once, in the order in which they were added. "
    "Nodes that cannot be reached from there are never visited, so their count can be smaller than that of the graph."
)


pair_of = docstrings.pair_of_docstring


def post_of(docstring: str) -> str:
    pair = pair_of(docstring)
    assert pair is not None
    return pair.post


def test_the_first_sentence_is_the_summary_and_the_prose_the_post() -> None:
    assert pair_of(f"Visit the nodes of a graph.\n\n{POST}") == Pair("Visit the nodes of a graph.", POST)
    assert pair_of(f"Visit the nodes\nof a graph.\n\n{POST}") == Pair("Visit the nodes of a graph.", POST)


@pytest.mark.parametrize(
    "dropped",
    [
        "Parameters\n----------\ngraph : Graph\n    The graph.",
        "Args:\n  graph: the graph.",
        ":param graph: The graph.",
        "Parameters\n----------\ngraph : Graph\n    The graph.\n\nNotes\n-----\nThe order is that of the edges.",
        ">>> visit(graph)\n[1, 2]",
        "    visit(graph)",
        "```\nThis is printed.\n```",
        "```text\nThis is printed.\n\nAnd this.\n\nAnd that, too.\n```",
        "- one thing\n- another thing",
        ".. note::\n    This is slow.",
        "=====  =====\nName   Value\n=====  =====",
        "| Name | Value |\n|---|---|",
        "which was the end of a sentence.",
        "A heading without an end",
        "x_1 + x_2 = x_3 <= 4.",
        "%(common_part)s",
    ],
)
def test_what_is_not_prose_is_dropped(dropped: str) -> None:
    assert pair_of(f"Visit the nodes of a graph.\n\n{POST}\n\n{dropped}") == Pair("Visit the nodes of a graph.", POST)


def test_prose_goes_on_behind_code_but_not_behind_a_section() -> None:
    more = "The order is that of the edges."
    assert post_of(f"Visit the nodes of a graph.\n\n{POST}\n\n>>> visit(graph)\n[1]\n\n{more}") == f"{POST}\n\n{more}"
    assert post_of(f"Visit the nodes of a graph.\n\n{POST}\n\nReturns:\n  A list.\n\n{more}") == POST


def test_a_sentence_that_leads_to_code_goes_with_it() -> None:
    assert post_of(f"Visit the nodes of a graph.\n\n{POST} For example, see v1.2::\n\n    visit(graph)") == POST


@pytest.mark.parametrize(
    "summary",
    [
        "Visit nodes now.",
        "Visit " + "many " * 25 + "nodes.",
        "Visit the nodes of a graph. Then visit them again.",
        "visit(graph, start) visits the nodes of it.",
        "visit the nodes of a graph.",
        "Nodes of a graph are visited:",
        POST.split(" and")[0],
    ],
)
def test_a_docstring_without_a_one_sentence_summary_of_its_own_is_no_pair(summary: str) -> None:
    assert pair_of(f"{summary}\n\n{POST}") is None


def test_the_post_has_30_to_200_words_in_whole_paragraphs() -> None:
    assert pair_of("Visit the nodes of a graph.\n\nThe walk follows every edge once.") is None
    assert len(POST.split()) == 43
    assert post_of("Visit the nodes of a graph.\n\n" + "\n\n".join([POST] * 6)) == "\n\n".join([POST] * 4)


def test_a_post_that_contains_the_summary_is_no_pair() -> None:
    assert pair_of(f"Visit the nodes of a graph.\n\nThis can visit the  nodes of a graph! {POST}") is None


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("the ``code`` and `name` here", "the code and name here"),
        ("see :class:`~a.b.Name` or :func:`a.b`", "see Name or a.b"),
        ("see `the page <https://a.org>`_ or `it`_", "see the page or it"),
        ("see [the page](https://a.org) or [`Name`] or [`~a.Name`]", "see the page or Name or Name"),
        ("**bold** and *slanted* but not *args and **kwargs", "bold and slanted but not *args and **kwargs"),
        ("two\n  lines, as known [1]_, and snake_case_", "two lines, as known, and snake_case_"),
    ],
)
def test_markup_is_removed(marked: str, plain: str) -> None:
    assert docstrings.plain(marked) == plain


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A folder that is the only one to be mined; importing a module of it would fail."""
    folder = tmp_path / "package"
    (folder / "tests").mkdir(parents=True)
    function = f'def visit():\n    """Visit the nodes of a graph.\n\n    {POST}\n    """\n'
    (folder / "a.py").write_text(f"raise SystemExit\nif True:\n    class A:\n        pass\n{function}")
    (folder / "b.py").write_text(function.replace("Visit the nodes", "Walk over the nodes"))
    (folder / "c.py").write_text('def broken(:\n    """No."""\n')
    (folder / "d.py").write_bytes('# é\n"""Not UTF-8."""'.encode("latin-1"))
    (folder / "tests" / "e.py").write_text(function.replace("The walk", "Every walk"))
    monkeypatch.setenv("SEA_JAX_CACHE", str(tmp_path / "cache"))
    version = ["1.0"]
    monkeypatch.setattr(docstrings, "installed", lambda: {"package": (version[0], folder)})
    return folder, version


def test_files_are_read_without_importing_them_and_no_post_comes_twice(package: tuple[Path, list[str]]) -> None:
    assert docstrings.mine() == [Pair("Visit the nodes of a graph.", POST)]


def test_pairs_are_cached_until_a_version_changes(
    package: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, version = package
    with caplog.at_level(logging.INFO, logger="absl"):
        before = docstrings.mine()
        (folder / "f.py").write_text((folder / "a.py").read_text().replace("The walk", "A walk"))
        assert docstrings.mine() == before
        version[0] = "1.1"
        assert len(docstrings.mine()) == 2
    assert caplog.text.count("this is done once") == 2
    assert "1 docstring pairs, content hash" in caplog.text


def test_the_standard_library_and_installed_packages_are_found() -> None:
    found = docstrings.installed()
    assert {"python", "numpy", "jax"} <= found.keys()
    assert (found["python"][1] / "ast.py").is_file()
    assert (found["numpy"][1] / "__init__.py").is_file()
