"""LSA item vectors: TF-IDF over the catalogue's text, reduced by truncated SVD.

Deerwester et al., "Indexing by Latent Semantic Analysis", JASIS 1990. Needs no pretrained weights,
so it is the offline default.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from genrec.columns import BRAND, CATEGORIES, DESCRIPTION, TITLE


def item_texts(catalog: pl.DataFrame) -> list[str]:
    """One line of text per item: title, category path, brand and description, where present."""
    text = pl.concat_str(
        pl.col(TITLE),
        pl.col(CATEGORIES).list.join(", "),
        pl.col(BRAND),
        pl.col(DESCRIPTION),
        separator=". ",
        ignore_nulls=True,
    )
    return catalog.select(text.alias("text"))["text"].to_list()


def lsa_vectors(texts: list[str], dim: int, seed: int = 0) -> np.ndarray:
    """Vectors of shape (n_items, dim), float32, unit length (zero for items without any term).

    Args:
        texts: one text per item.
        dim: SVD components; must be below both the items and the distinct terms.
        seed: of the randomised SVD.

    Raises:
        ValueError: `dim` is too large for this catalogue, or no text has a usable term.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2, dtype=np.float32)
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
    vectors = TruncatedSVD(dim, random_state=seed).fit_transform(terms)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norm, 1e-12)).astype(np.float32)
