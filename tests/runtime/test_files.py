"""A file is replaced whole or not at all."""

import os

import pytest

from sea_jax.runtime import files


def test_a_file_is_written_and_replaced(tmp_path):
    path = tmp_path / "run.json"
    for content, expected in (("é\n", "é\n".encode()), (b"\0", b"\0")):
        files.write_whole(path, content)
        assert path.read_bytes() == expected
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_outlives_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
