"""Ratings and reasons as the model gives them: the serving half of two of P5's families.

A model that was trained on the family `rating` says what a user would give an item, from the
ratings in their history: the ratings that training held are completions, and a trie over their
tokens makes the model's probabilities of them a distribution (Geng et al. 2022 let the model write
a number, which need not be one). `explanation` has it write the review that such a rating would
come with. That text is the model's, and nothing in it is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import stage_folder
from genrec.columns import (
    HISTORY,
    HISTORY_ITEMS,
    HISTORY_RATINGS,
    RATING,
    TARGET,
    TARGETS,
    TASK,
)
from genrec.decoding.free_text import TextSampling, sample_texts
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.modeling import encode_prompts, encode_text
from genrec.recommend import Recommender
from genrec.tasks.rendering import ItemTexts, served_completions, served_prompts
from genrec.tasks.rows import InteractionLog
from genrec.title_index import END_CODE, token_codes

RATING_FAMILY = "rating"
EXPLANATION = "explanation"
MOST_RATINGS = 201  # distinct ones: 0 to 100 in halves


def trained_ratings(run_dir: Path | str) -> list[float]:
    """The ratings that the training rows of a run hold, ascending.

    Raises:
        ValueError: there are none, or so many that they are no scale.
    """
    rows = stage_folder(run_dir, "build_dataset") / "train.parquet"
    table = pl.scan_parquet(rows, glob=False)
    if RATING not in table.collect_schema().names():
        raise ValueError(f"{rows} holds no ratings; run build_dataset with --tasks … rating")
    mine = table.filter(pl.col(TASK) == RATING_FAMILY)
    found = mine.select(pl.col(RATING).drop_nulls().unique().sort()).collect()[RATING].to_list()
    if not found:
        raise ValueError(f"{rows} has no row of the family {RATING_FAMILY}")
    if len(found) > MOST_RATINGS:
        raise ValueError(
            f"{rows} holds {len(found):,} different ratings, which are no scale of at most "
            f"{MOST_RATINGS}; round them before prepare"
        )
    return found


class Rater:
    """Rates items for users, in process.

    Args:
        recommender: of the run, on the torch engine.
        log: of the run: the ratings of the histories.
        values: ratings that can be given, ascending; see `trained_ratings`.

    Raises:
        ValueError: the model was not trained on the family, or runs on another engine.
    """

    def __init__(
        self, recommender: Recommender, log: InteractionLog, values: Sequence[float]
    ) -> None:
        recommender.require_family(RATING_FAMILY)
        self.recommender, self.log = recommender, log
        self.values = np.array(values, dtype=np.float64)
        self._texts = ItemTexts.of(recommender.catalog, recommender.semantic_ids)
        self._own = recommender.writing_engine()
        self._engine = self._engine_of_labels()

    def _engine_of_labels(self) -> TorchEngine:
        """The model over a trie of the ratings' tokens, each ended by EOS as in training."""
        tokenizer = self.recommender.tokenizer
        labels = pl.DataFrame({RATING: pl.Series(self.values, dtype=pl.Float64)})
        texts = served_completions(labels, RATING_FAMILY, self._texts, self.recommender.renderer)
        encoded = encode_text(tokenizer, texts.to_list())
        tokens = np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded])
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int32)
        codes, token_ids = token_codes(tokens, lengths, tokenizer.eos_token_id)
        trie = SidTrie.build(codes, end_code=END_CODE)
        return TorchEngine(
            self._own.model, trie, token_ids, self._own.pad_token_id, "trie", self._own.batch_size
        )

    def rows(self, split: pl.DataFrame) -> pl.DataFrame:
        """What prompts show of split rows: the history's newest items with their ratings.

        Args:
            split: rows of a split; the target is the item that is rated.
        """
        shown = split.with_columns(
            pl.col(HISTORY).list.tail(self.recommender.max_history).alias(HISTORY_ITEMS),
            pl.concat_list(TARGET).alias(TARGETS),
        )
        return shown.with_columns(self.log.of_histories(shown, RATING).alias(HISTORY_RATINGS))

    def probabilities(self, rows: pl.DataFrame) -> npt.NDArray[np.float64]:
        """Probability of each rating, (n, n_values); each row sums to 1.

        Args:
            rows: from `rows`, each with a rated item in its history.

        Raises:
            ValueError: a history holds no rating, or a prompt is longer than the model's context.
        """
        if (rows[HISTORY_RATINGS].list.drop_nulls().list.len() == 0).any():
            raise ValueError("a history holds no rating, and ratings were learned behind some")
        prompts = self._prompts(rows, RATING_FAMILY)
        every = np.tile(np.arange(len(self.values)), (len(prompts), 1))
        scores = self._engine.score(prompts, every).sum(axis=-1, dtype=np.float64)
        return np.exp(scores)

    def expected(self, probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Mean rating under each distribution, (n,)."""
        return probabilities @ self.values

    def reviews(
        self, rows: pl.DataFrame, ratings: npt.NDArray[np.floating], sampling: TextSampling
    ) -> list[str]:
        """The review that the model writes for each row, given a rating.

        Args:
            rows: from `rows`.
            ratings: (n,).
            sampling: of the text.

        Raises:
            ValueError: the model was not trained on the family `explanation`.
        """
        self.recommender.require_family(EXPLANATION)
        rated = rows.with_columns(pl.Series(RATING, ratings, dtype=pl.Float64))
        written = sample_texts(
            self._own.model, self.recommender.tokenizer, self._prompts(rated, EXPLANATION), 1,
            "\n", sampling, batch_size=self._own.batch_size,
        )  # fmt: skip
        return [text.text.strip() for (text,) in written]

    def _prompts(self, rows: pl.DataFrame, family: str) -> list[list[int]]:
        texts = served_prompts(rows, family, self._texts, self.recommender.renderer)
        ids = encode_prompts(self.recommender.tokenizer, texts.to_list())
        context = self._own.model.config.get_text_config().max_position_embeddings
        longest = max(map(len, ids), default=0)
        if longest + self._engine.trie.n_levels > context:
            raise ValueError(
                f"a prompt of the family {family} has {longest} tokens, the model's context holds "
                f"{context}"
            )
        return ids
