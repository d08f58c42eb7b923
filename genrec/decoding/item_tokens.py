"""How a model writes the items of a map: the trie of their codes, and the token of each code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from genrec.decoding.trie import SidTrie
from genrec.modeling import add_sid_tokens, sid_token_ids
from genrec.prompt_format import declare_titles
from genrec.title_ids import ItemMap, TitleIds
from genrec.title_index import END_CODE, check_title_tokens, title_index


@dataclass(frozen=True)
class ItemTokens:
    """Items as a model writes them.

    Attributes:
        trie: of the items' codes.
        token_ids: per level the token of each code, (codebook_size,).
        own: SID tokens, which stand for nothing else and are learned from nothing; per level, and
            none for a title index.
        last: tokens that an item may end in: a completion that does needs no EOS.
    """

    trie: SidTrie
    token_ids: list[list[int]]
    own: list[list[int]]
    last: set[int]


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, ids: ItemMap) -> None:
    """Let a tokenizer read and write the items: add SID tokens, or declare how titles end.

    Raises:
        ValueError: as `genrec.prompt_format.declare_titles`.
    """
    if isinstance(ids, TitleIds):
        declare_titles(tokenizer)
    else:
        add_sid_tokens(tokenizer, ids)


def item_tokens(
    tokenizer: PreTrainedTokenizerBase,
    ids: ItemMap,
    quantize: Path | str | None = None,
    model: Path | str | None = None,
) -> ItemTokens:
    """What a model writes for each item.

    Args:
        tokenizer: the model's, after `prepare_tokenizer`.
        ids: the map.
        quantize: folder of the quantize stage, whose trie of a map of codes is taken; None: it is
            built.
        model: folder of a trained model, whose tokens of titles must be those of now; None: it is
            being trained.

    Raises:
        ValueError: the tokenizer doesn't fit the map, or encodes titles in another way than when
            the model was trained.
    """
    if isinstance(ids, TitleIds):
        names = ids.names.to_list()
        if model is not None:
            check_title_tokens(model, names, tokenizer)
        index = title_index(names, tokenizer)
        trie = SidTrie.build(index.codes, END_CODE)
        return ItemTokens(trie, index.token_ids, [], {index.end_id})
    levels = sid_token_ids(tokenizer, ids)
    trie = SidTrie.of_map(ids, quantize)
    return ItemTokens(trie, levels, levels, {token for level in levels for token in level})
