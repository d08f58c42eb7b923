"""Title index: the tokens of an item's title and an end mark as its codes.

The codes depend on the tokenizer, so they are made where a model meets the map
(`genrec.title_ids`), and a trained model keeps a table of them: serving compares what its tokenizer
says now. Codes are padded with the end mark: what follows the first one is forced, and says
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from transformers import PreTrainedTokenizerBase

from genrec.artifacts import write_parquet
from genrec.columns import TITLE
from genrec.prompt_format import title_end

END_CODE = 0  # of the end mark, on every level
TABLE = "title_tokens.parquet"  # in a model folder: title, token_ids
_TOKEN_IDS = "token_ids"


@dataclass(frozen=True)
class TitleIndex:
    """Titles as codes.

    Attributes:
        codes: (n_items, longest title + 1) int32, distinct rows. A level's codes count the tokens
            that titles have there, in order of their ids; the end mark is `END_CODE`.
        token_ids: per level the token of each code.
        lengths: tokens of each title without end marks, (n_items,) int32.
    """

    codes: npt.NDArray[np.int32]
    token_ids: list[list[int]]
    lengths: npt.NDArray[np.int32]

    @property
    def end_id(self) -> int:
        """Token id of the end mark."""
        return self.token_ids[0][END_CODE]


def title_index(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> TitleIndex:
    """Encode each item's name as a completion of that text is encoded.

    Args:
        names: distinct and escaped, one per item.
        tokenizer: the model's, with an end mark declared (`genrec.prompt_format.declare_titles`).

    Raises:
        ValueError: two names have the same tokens, or one has none, the end mark, or a special or
            added token among its own.
    """
    end_id = title_end(tokenizer)
    assert end_id is not None, "declare_titles comes first"
    encoded = _encode(names, tokenizer)
    _check_tokens(names, encoded, tokenizer, end_id)
    lengths = np.fromiter(map(len, encoded), dtype=np.int32, count=len(encoded))
    tokens = np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
    del encoded
    codes, token_ids = token_codes(tokens, lengths, end_id)
    return TitleIndex(codes, token_ids, lengths)


def token_codes(
    tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], end_id: int
) -> tuple[npt.NDArray[np.int32], list[list[int]]]:
    """Texts of any lengths as codes of one length; see `TitleIndex`.

    Args:
        tokens: of all texts, one after the other, (lengths.sum(),).
        lengths: tokens of each text, (n,).
        end_id: token of the end mark.

    Returns:
        Codes (n, longest + 1), padded with `END_CODE`, and per level the token of each code.
    """
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    # One long text makes all rows long: nothing but the codes themselves is held in that shape.
    codes, token_ids = np.zeros((len(lengths), int(lengths.max()) + 1), np.int32, order="F"), []
    for level in range(codes.shape[1]):
        inside = np.flatnonzero(lengths > level)
        used, place = np.unique(tokens[starts[inside] + level], return_inverse=True)
        codes[inside, level] = place + 1
        token_ids.append([end_id, *used.tolist()])
    return codes, token_ids


def _encode(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    ids = tokenizer(list(names), add_special_tokens=False)["input_ids"]
    return [list(row) for row in ids]


def _check_tokens(
    names: Sequence[str],
    encoded: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    end_id: int,
) -> None:
    """Raise ValueError where tokens can't stand for a name."""
    forbidden = {end_id, *tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    row_of: dict[tuple[int, ...], int] = {}
    for row, (name, ids) in enumerate(zip(names, encoded, strict=True)):
        if not ids or not forbidden.isdisjoint(ids):
            raise ValueError(
                f"the title {name!r} becomes {len(ids)} tokens, with special or added ones "
                f"{sorted(forbidden.intersection(ids))[:3]}; use a tokenizer that knows every byte"
            )
        if (other := row_of.setdefault(tuple(ids), row)) != row:
            raise ValueError(
                f"the titles {names[other]!r} and {name!r} have the same tokens; use a tokenizer "
                "that tells them apart, such as a byte-level one"
            )


def write_title_tokens(
    folder: Path | str, names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Keep the tokens of all names beside a model that was trained on them."""
    encoded = pl.Series(_TOKEN_IDS, _encode(names, tokenizer), dtype=pl.List(pl.Int32))
    write_parquet(Path(folder) / TABLE, pl.DataFrame({TITLE: list(names), _TOKEN_IDS: encoded}))


def check_title_tokens(
    folder: Path | str, names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compare the tokens of names with those that a model was trained on.

    Args:
        folder: of the model.
        names: those that it wasn't trained on (new items) are left out.
        tokenizer: the model's, as it is loaded now.

    Raises:
        ValueError: the table is missing, or the tokenizer encodes a title in another way now: the
            model would read and write other items than it was trained on.
    """
    path = Path(folder) / TABLE
    if not path.is_file():
        raise ValueError(f"{path} is missing: the titles' tokens as trained; restore it or run sft")
    stored = pl.read_parquet(path, glob=False)
    known = stored.filter(pl.col(TITLE).is_in(pl.Series(list(names)).implode()))
    now = pl.Series(_encode(known[TITLE].to_list(), tokenizer), dtype=pl.List(pl.Int32))
    changed = known.filter(now != known[_TOKEN_IDS])
    if len(changed):
        raise ValueError(
            f"the tokenizer in {folder} encodes {len(changed)} titles in another way than when the "
            f"model was trained, the first is {changed[TITLE][0]!r}: use the versions of "
            "transformers and tokenizers that sft's manifest names"
        )
