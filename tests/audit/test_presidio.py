"""Presidio beside the patterns, on a spaCy pipeline of a few rules that is made here."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from genrec.artifacts import require
from genrec.audit.pii import mask
from genrec.audit.presidio import presidio_finder
from genrec.audit.records import read_opened

ROOT = Path(__file__).resolve().parents[2]


def pipeline(folder: Path, **names: str) -> Path:
    """A pipeline that knows these names: label -> text."""
    spacy = pytest.importorskip("spacy", reason="genrec[pii] is not installed")
    model = spacy.blank("en")
    rules = model.add_pipe("entity_ruler")
    rules.add_patterns([{"label": label, "pattern": text} for label, text in names.items()])
    model.to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def find(tmp_path_factory):
    names = {"PERSON": "Jane Roe", "GPE": "Nantes", "NORP": "Quaker", "ORG": "Acme"}
    return presidio_finder(str(pipeline(tmp_path_factory.mktemp("spacy") / "en", **names)))


def test_names_places_and_groups_are_masked(find):
    text = "Jane Roe of Nantes, a Quaker at Acme, wrote from jane@example.org"
    said = "[person] of [place], a [group] at Acme, wrote from [email]"
    assert mask(text, (), find) == (said, {"email": 1, "person": 1, "place": 1, "group": 1})
    assert mask(text)[0].startswith("Jane Roe of Nantes")  # patterns know no names
    assert mask("Nantes and Nantes", (), find) == ("[place] and [place]", {"place": 2})
    assert mask("nothing here", (), find) == ("nothing here", {})
    assert mask("", (), find) == ("", {})


def test_item_ids_and_what_is_masked_already_stay(find):
    assert mask("Nantes, again", ["Nantes"], find) == ("Nantes, again", {})
    everywhere = [(0, 10, "person"), (2, 5, "place"), (8, 12, "place")]  # they overlap
    assert mask("0123456789abcdef", (), lambda _: everywhere) == (
        "01[place]567[place]cdef", {"place": 2},
    )  # fmt: skip
    text = "write to a@b.org now"
    assert mask(text, (), lambda masked: [(0, len(masked), "person")])[0] == "write to [email] now"


def test_pipelines_that_cannot_work(tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="no installed spaCy pipeline.*spacy download en_nowhere"):
        presidio_finder("en_nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="can't be loaded"):
        presidio_finder(str(tmp_path / "empty"))
    spacy = pytest.importorskip("spacy", reason="genrec[pii] is not installed")
    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(ValueError, match="finds no entities"):
        presidio_finder(str(tmp_path / "blank"))
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ImportError, match=r"genrec\[pii\]"):
        presidio_finder("en_nowhere")


def test_records_hold_masked_texts(copied: Path, tmp_path: Path, monkeypatch):
    """The stage with a pipeline that takes a word of the chains for somebody's name."""

    def texts() -> list[str]:
        return [
            step["text"]
            for record in read_opened(copied / "audit")
            for item in record["items"]
            if item["chain"]
            for step in item["chain"]["steps"]
        ]

    before = texts()
    word = max(before[0].split(), key=len)
    model = pipeline(tmp_path / "en", PERSON=word)
    path = ROOT / "recipes" / "audit.py"
    flags = ["--run_dir", str(copied), "--presidio_model", str(model), "--overwrite", "true"]
    monkeypatch.setattr(sys, "argv", [str(path), *flags])
    monkeypatch.setenv("GENREC_DEBUG", "1")
    runpy.run_path(str(path), run_name="__main__")
    after = texts()
    assert any(word in text for text in before) and len(before) == len(after)
    assert not any(f" {word} " in f" {text} " for text in after)
    masked = [record["masked"].get("person", 0) for record in read_opened(copied / "audit")]
    assert sum(masked) == sum(text.count("[person]") for text in after) > 0
    assert require(copied, "audit").config["presidio_model"] == str(model)
