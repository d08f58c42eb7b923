"""LSA item vectors: TF-IDF over the catalogue's text, reduced by truncated SVD.

Deerwester et al., "Indexing by Latent Semantic Analysis", JASIS 1990. Needs no pretrained weights,
so it is the offline default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from genrec.artifacts import read_json, write_json
from genrec.columns import BRAND, CATEGORIES, DESCRIPTION, TITLE
from genrec.data.cleaning import missing_title

TEXT_FIELDS = (TITLE, CATEGORIES, BRAND, DESCRIPTION)
LSA_FILES = ("lsa.safetensors", "lsa.json")

FloatArray = npt.NDArray[np.float32]


def item_texts(
    catalog: pl.DataFrame, fields: Sequence[str] = TEXT_FIELDS, labelled: bool = False
) -> list[str]:
    """One line of text per item: the given fields in order, where present.

    Args:
        catalog: the catalogue.
        fields: of `TEXT_FIELDS`.
        labelled: the form for language models, "title. general > specific. Brand: b" (and
            ". description."), whose end is a full stop unless it is the brand; else, for counts of
            words, "title. general, specific. b. description".

    Returns:
        n_items texts; an item without any of the fields has an empty one.

    Raises:
        ValueError: an unknown field, one named twice, or none.
    """
    if not fields or len(set(fields)) < len(fields) or not set(fields) <= set(TEXT_FIELDS):
        raise ValueError(
            f"text_fields={list(fields)} must name some of {', '.join(TEXT_FIELDS)}, each once"
        )
    # A stand-in for a title says nothing, and would make items alike that are only unknown.
    catalog = catalog.with_columns(catalog[TITLE].set(missing_title(catalog), None))
    forms = {
        TITLE: pl.col(TITLE),
        CATEGORIES: pl.col(CATEGORIES).list.join(" > " if labelled else ", "),
        BRAND: pl.col(BRAND),
        DESCRIPTION: pl.col(DESCRIPTION),
    }
    parts = []
    for field in fields:
        form = forms[field].str.strip_chars()
        form = pl.when(form != "").then(form)  # else null: no separator around nothing
        parts.append(pl.format("Brand: {}", form) if labelled and field == BRAND else form)
    text = pl.concat_str(parts, separator=". ", ignore_nulls=True).fill_null("")
    if labelled:
        last = pl.coalesce(parts[::-1])
        whole = last.str.ends_with(".") | last.is_null()
        if BRAND in fields:
            whole |= last.eq_missing(parts[list(fields).index(BRAND)])
        text = pl.when(whole).then(text).otherwise(text + ".")
    return catalog.select(text.alias("text"))["text"].to_list()


@dataclass(frozen=True)
class LSA:
    """What was fitted on a catalogue, so that later items get vectors in the same space.

    Attributes:
        terms: words and pairs of words that occur in two texts or more, in the order of columns.
        idf: their inverse document frequencies. ``# (n_terms,)``
        components: right singular vectors of the TF-IDF matrix. ``# (dim, n_terms)``
    """

    terms: list[str]
    idf: FloatArray
    components: FloatArray

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Vectors of texts, (n, dim); unit length, zero for texts without any known term."""
        vectorizer = _vectorizer(self.terms)
        vectorizer.idf_ = self.idf
        return _unit(vectorizer.transform(texts) @ self.components.T)

    def save(self, folder: Path) -> None:
        """Write `LSA_FILES`: idf and components as safetensors, the terms as JSON."""
        tensors, terms = (folder / name for name in LSA_FILES)
        save_file({"idf": self.idf, "components": self.components}, tensors)
        write_json(terms, {"terms": self.terms})

    @classmethod
    def load(cls, folder: Path) -> LSA:
        """Read what `save` wrote."""
        tensors, terms = (folder / name for name in LSA_FILES)
        stored = load_file(tensors)
        return cls(read_json(terms)["terms"], stored["idf"], stored["components"])


def fit_lsa(texts: Sequence[str], dim: int, seed: int = 0) -> tuple[LSA, FloatArray]:
    """Fit on a catalogue.

    Args:
        texts: one text per item.
        dim: SVD components; must be below both the items and the distinct terms.
        seed: of the randomised SVD.

    Returns:
        The fitted pieces, and the vectors of `texts` (n_items, dim), unit length (zero for items
        without any term).

    Raises:
        ValueError: `dim` is too large for this catalogue, or no text has a usable term.
    """
    vectorizer = _vectorizer()
    try:
        terms = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise ValueError(
            f"no term occurs in two of the {len(texts)} item texts ({error}); give vectors by "
            "`method: npy`"
        ) from error
    limit = min(terms.shape) - 1
    if limit < 1:
        raise ValueError(
            "the item texts don't tell items apart (no titles given?); name a title column in "
            "prepare, or bring vectors by `method: npy`"
        )
    if dim > limit:
        raise ValueError(
            f"dim={dim} exceeds what {terms.shape[0]} items with {terms.shape[1]} terms allow; "
            f"use at most {limit}"
        )
    svd = TruncatedSVD(dim, random_state=seed)
    vectors = _unit(svd.fit_transform(terms))
    idf, components = (
        np.ascontiguousarray(a, np.float32) for a in (vectorizer.idf_, svd.components_)
    )
    return LSA(vectorizer.get_feature_names_out().tolist(), idf, components), vectors


def _vectorizer(terms: list[str] | None = None) -> TfidfVectorizer:
    """Counts of words and pairs of words; with `terms`, of these alone and in their order."""
    return TfidfVectorizer(
        sublinear_tf=True, ngram_range=(1, 2), min_df=2, vocabulary=terms, dtype=np.float32
    )


def _unit(vectors: npt.NDArray[np.floating]) -> FloatArray:
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norm, 1e-12)).astype(np.float32)
