"""Recommendations that the model writes in words, grounded to the nearest items (BIGRec).

The other half of `genrec.grounding`: a model that was trained on the family `sids_to_title` writes
the title of what comes next, unconstrained, and the catalogue items nearest to that text are the
list (Bao et al. 2023). It needs no constrained search, and names no semantic id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genrec.decoding.free_text import TextSampling, sample_texts
from genrec.grounding import TextGrounder
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender
from genrec.tasks.families import FAMILIES

TO_TITLE = "sids_to_title"
LIKELIEST = TextSampling(temperature=1e-3, max_tokens=64)
"""The likeliest token each time; a title is short."""


@dataclass(frozen=True)
class WrittenList:
    """What the model wrote, and the items nearest to it.

    Attributes:
        text: the model's.
        items: catalogue rows, nearest first; fewer than k where fewer are allowed, and none where
            the encoder knows no word of the text.
        distances: of the items (see `genrec.grounding.Grounded`).
    """

    text: str
    items: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]


def recommend_in_words(
    recommender: Recommender,
    grounder: TextGrounder,
    histories: Sequence[Sequence[Any]],
    k: int = 10,
    sampling: TextSampling = LIKELIEST,
    popularity: float = 0.0,
    filter_seen: bool | None = None,
    allowed: npt.NDArray[np.integer] | None = None,
) -> list[WrittenList]:
    """Let the model write what each user should get, and find the nearest allowed, unseen items.

    Args:
        recommender: of the run, on the torch engine.
        grounder: of the same catalogue.
        histories: item ids per user, oldest first.
        k: items per list.
        sampling: of the text.
        popularity: exponent by which popular items come nearer (see `TextGrounder.ground`).
        filter_seen: leave out items of the history; default: the rule of the run.
        allowed: catalogue rows that may be found at all; None: every item.

    Raises:
        ValueError: the model was not trained on the family, runs on another engine, a history is
            shorter than any it was trained on or holds an unknown item; and as `ground`.
    """
    recommender.require_family(TO_TITLE)
    engine = recommender.writing_engine()
    rows = [recommender.rows_of(history) for history in histories]
    least = FAMILIES[TO_TITLE].least_history
    if short := [len(own) for own in rows if len(own) < least]:
        raise ValueError(
            f"a history has {short[0]} items, and titles were learned from {least} or more"
        )
    ids = encode_prompts(recommender.tokenizer, recommender.family_prompts(TO_TITLE, rows))
    written = sample_texts(
        engine.model, recommender.tokenizer, ids, 1, "\n", sampling, batch_size=engine.batch_size
    )
    texts = [text.text.strip() for (text,) in written]
    rule = recommender.filter_seen if filter_seen is None else filter_seen
    seen = [np.array(own, dtype=np.int64) for own in rows] if rule else None
    found = grounder.ground(texts, k, popularity, seen, allowed)
    real = found.items >= 0
    return [
        WrittenList(text, items[kept], distances[kept])
        for text, items, distances, kept in zip(
            texts, found.items, found.distances, real, strict=True
        )
    ]
