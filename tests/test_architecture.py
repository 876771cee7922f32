"""docs/architecture.md says what is there, and its instructions work as they are printed."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_random
from docs import draw_imports
from sea_jax import losses, sampling, train
from sea_jax.agent import Agent
from sea_jax.oracles.ledger import Ledger
from sea_jax.runtime import cache
from sea_jax.settings import user_function
from sea_jax.types import Array, Duel, PairLogps
from tests.test_imports import HEIGHT, RULE
from tests.test_readme import blocks, fields

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def first_column(text: str) -> list[str]:
    """The names that stand in code in the first column of a table."""
    cells = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def test_the_rule_on_the_page_is_the_one_that_is_held() -> None:
    assert blocks("text", PAGE) == [RULE.lstrip()]


def test_every_room_has_its_line_on_the_page() -> None:
    rooms = first_column(PAGE.split("## The rooms")[1].split("## Who imports whom")[0])
    assert sorted([*rooms, "fit"]) == sorted(HEIGHT)


def test_every_slot_of_an_agent_has_its_line_on_the_page() -> None:
    slots = first_column(PAGE.split("## The way of one step")[1].split("## Where things go")[0])
    assert sorted([*slots, "max_queries", "batch_size", "standardise", "unfinished"]) == sorted(
        slot.name for slot in dataclasses.fields(Agent)
    )


def test_the_picture_of_the_imports_is_that_of_the_sources() -> None:
    found = draw_imports.without_implied(draw_imports.room_imports())
    assert draw_imports.drawn_edges(draw_imports.PICTURE) == draw_imports.edge_list(found), (
        "draw it again: python -m docs.draw_imports"
    )


def test_arrows_that_others_imply_are_left_out() -> None:
    chain = {("a", "b"), ("b", "c"), ("c", "d")}
    assert draw_imports.without_implied(chain | {("a", "c"), ("a", "d"), ("b", "d")}) == chain


def test_every_arrow_has_a_way_and_the_same_sources_give_the_same_picture(tmp_path: Path) -> None:
    lines, edges = draw_imports.rule_lines(), draw_imports.without_implied(draw_imports.room_imports())
    pieces = draw_imports.routes(edges, lines)
    for above, below in edges:
        stop = draw_imports.Stop(above, next(n for n, line in enumerate(lines) if above in line))
        while stop.room != below or stop.room not in lines[stop.line]:
            (stop,) = [lower for upper, lower in pieces if upper == stop and lower.room == below]
    for name in ("first.svg", "second.svg"):
        draw_imports.draw(tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_lines_that_the_page_would_change_are_there() -> None:
    diffs = blocks("diff", PAGE)
    assert len(diffs) == 2
    for diff in diffs:
        for part in diff.split("--- a/")[1:]:
            file, *changes = part.splitlines()
            there = (ROOT / file).read_text().splitlines()
            kept = [change[1:] for change in changes if change[0] in " -"]
            assert kept
            assert [line for line in kept if line not in there] == []


def test_what_contributing_names_is_there() -> None:
    text, makefile = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "Makefile").read_text()
    paths = re.findall(r"(?<![\w/.])((?:tests|docs|configs|sea_jax|\.ci)/[\w./]*)(?:::(\w+))?", text)
    assert len(paths) > 8
    for path, test in paths:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text()
    targets = re.findall(r"`make (\w+)", text)
    assert len(targets) > 4
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


@pytest.fixture
def _mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's files, importable."""
    for block in blocks("python", PAGE):
        name = re.match(r"# (my_[a-z]+\.py)\n", block)
        assert name, block
        (tmp_path / name[1]).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_mine")
def test_the_loss_with_labels_leaves_out_what_is_nearly_one_half() -> None:
    zero, length = jnp.zeros(3), jnp.ones(3, jnp.int32)
    pairs = PairLogps(jnp.array([2.0, 2.0, 2.0]), zero, zero, zero, length, length)
    decided = losses.bind(user_function("my_losses:decided", "loss.name"), {"beta": 0.5})
    found = losses.expected(decided, pairs, jnp.array([1.0, 0.55, 0.0]))
    np.testing.assert_allclose(found, [np.log1p(np.exp(-1)), 0, np.log1p(np.exp(1))], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("_mine")
def test_the_pages_own_loss_rule_method_and_oracle_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own,) = [fields(block) for block in blocks("sh", PAGE) if "my_methods" in block]
    assert len(own) == 4
    shapes, best_pair = [], sampling.best_pair

    def noted(score: Array, distinct: Array) -> Duel:
        shapes.append(score.shape)
        return best_pair(score, distinct)

    monkeypatch.setattr(sampling, "best_pair", noted)
    settings = tiny_random.get_config()
    settings.update_from_flattened_dict(own | {"max_queries": 6, "eval.every_queries": 1000, "eval.best_of_n": 0})
    cache.keep_compiled_programs()
    train.train(settings, tmp_path / "run")

    assert shapes == [(2, 4, 4)]  # the rule, traced once, for half of four prompts
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows[1:] if row["explorer/pairs"])
    assert first["train/loss"] == 1  # (1 - beta 0)^2, where DPO's is log 2
    with Ledger(tmp_path / "run" / "queries.jsonl", writes=False) as ledger:
        paid = list(ledger.lines())
    assert len(paid) == 6
    for line in paid:
        assert len(line["first"]) != len(line["second"])
        assert line["label"] == (len(line["first"]) < len(line["second"]))
    run_id, kept = (
        (tmp_path / "run" / "run_id").read_text(),
        user_function("my_oracles:shorter", "oracle.kind").__globals__,
    )
    assert kept["PAID"].keys() == {f"{run_id}/{line['key']}" for line in paid}


@pytest.mark.usefixtures("_mine")
def test_the_pages_own_method_refuses_what_it_cannot_take(tmp_path: Path) -> None:
    settings = tiny_random.get_config()
    settings.method = "my_methods:half_of_the_prompts"
    settings.data.batch_size, settings.learner.microbatch_size = 3, 1
    with pytest.raises(ValueError, match=r"config\.data\.batch_size=3: must be even"):
        train.train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_mine")
def test_the_pages_own_rule_prefers_responses_that_are_alike_in_length() -> None:
    rule = user_function("my_rules:alike_in_length", "exploration.rule")
    rewards, distinct = jnp.array([[[3.0, 0.0, 1.0]]]), ~jnp.eye(3, dtype=bool)[None]
    key = jax.random.key(0)
    assert jax.tree.leaves(rule(rewards, distinct, key, lengths=jnp.array([[5, 5, 5]]))) == [0, 1]
    assert jax.tree.leaves(rule(rewards, distinct, key, lengths=jnp.array([[5, 25, 6]]))) == [0, 2]
