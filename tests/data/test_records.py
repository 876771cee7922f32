"""Rows that are no prompts, and names of prompts, as every source's rows are taken."""

from collections.abc import Iterator
from typing import Any

import pytest

from sea_jax.data.records import Columns, Row, digest, records


def rows(*fields: dict[str, Any]) -> Iterator[Row]:
    return ((f"f, line {number}", row) for number, row in enumerate(fields, start=1))


def test_bad_rows_are_counted_in_the_error_and_left_out_where_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    mixed: list[dict[str, Any]] = [{"p": "a"}, {"p": ""}, {"p": None}, {"p": "half \ud83d"}, {"q": "b"}, {"p": "c"}]
    with pytest.raises(ValueError, match=r"^f, line 2: .*is ''; .*; so it is with 3 more.*data\.skip_bad_rows=True"):
        records("f", rows(*mixed), Columns("p"))
    found = records("f", rows(*mixed), Columns("p", skip_bad_rows=True))
    assert [one["prompt"] for one in found] == ["a", "c"]
    assert "f: left out 4 rows that hold no usable prompt, the first being f, line 2: " in caplog.text
    with pytest.raises(ValueError, match=r"^f holds no prompts but 4 bad rows, the first being f, line 1: "):
        records("f", rows(*mixed[1:-1]), Columns("p", skip_bad_rows=True))


def test_an_id_of_several_prompts_can_be_another_field_or_none() -> None:
    comments = [{"p": "a", "id": "post", "comment": 1}, {"p": "b", "id": "post", "comment": 2}]
    with pytest.raises(ValueError, match=r"^f, line 2: the id 'post' is that of f, line 1, .*data\.id_field"):
        records("f", rows(*comments), Columns("p", id="id", id_optional=True))
    named = records("f", rows(*comments), Columns("p", id="comment"))
    assert [one["id"] for one in named] == ["1", "2"]
    unnamed = records("f", rows(*comments), Columns("p"))
    assert [one["id"] for one in unnamed] == [digest(text)[:16] for text in "ab"]
    with pytest.raises(ValueError, match=r"no field 'coment' \(data\.id_field\); there are: 'p', 'id', 'comment'"):
        records("f", rows(*comments), Columns("p", id="coment"))
    assert Columns("p").among(["", "p"]) == ["p"]
