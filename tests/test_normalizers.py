"""What a model declares, and what asking for something else does."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from genrec.normalizers import NORMALIZERS, declared_normalizer, mismatch, resolve_normalizer


def folder(path: Path, **about: object) -> Path:
    (path / "genrec.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_declaration_is_followed(tmp_path: Path, caplog, name: str):
    model = folder(tmp_path, normalizer=name)
    with caplog.at_level(logging.WARNING):
        assert declared_normalizer(model) == resolve_normalizer(None, model) == name
        assert resolve_normalizer(name, model) == name
    assert not caplog.records and mismatch(name, name) is None


def test_models_without_a_declaration_were_served_under_full(tmp_path: Path):
    assert declared_normalizer(folder(tmp_path, base="tiny")) == "full"


def test_another_one_is_taken_and_warned_about(tmp_path: Path, caplog):
    model = folder(tmp_path, normalizer="trie")
    with caplog.at_level(logging.WARNING):
        assert resolve_normalizer("level", model) == "level"
    assert "normalised over level, the model declares trie" in caplog.text


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="has no genrec.json"):
        declared_normalizer(tmp_path)
    for wrong in ("sum", None, 3):
        with pytest.raises(ValueError, match=r"declares normalizer .* none of full, level, trie"):
            declared_normalizer(folder(tmp_path, normalizer=wrong))
    (tmp_path / "genrec.json").write_text("[1]")
    with pytest.raises(ValueError, match="is damaged"):
        declared_normalizer(tmp_path)
