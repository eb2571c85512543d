"""A file is there whole or not at all."""

from __future__ import annotations

import os

import pytest

from lockstep.process import durable


def test_a_block_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = durable.write_whole(tmp_path / "a", "before")

    def fill():
        with durable.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    path, flushed = tmp_path / "a", []
    monkeypatch.setattr(durable, "fsync", lambda file: flushed.append((file.read_text(), path.exists())))
    durable.write_whole(path, "after")
    assert flushed == [("after", False)]
    assert path.read_text() == "after"
