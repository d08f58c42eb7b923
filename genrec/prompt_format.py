"""How a rendered prompt becomes token ids: as it is, or as the user's turn of a chat.

The format is the tokenizer's own: a chat frame is rendered once, when training starts, and saved in
``tokenizer_config.json``. Training, rollouts, validation, every engine and the server encode
through that tokenizer, so a model can't be served in another format than it was trained in. Nor
does a template get to run again: some write today's date.

In a chat, the run of SIDs that ends a prompt opens the assistant's turn. A history that is trained
in one pass then continues exactly like the prompt that is served, as it does without a chat.

A model of a title index (`genrec.title_ids`) reads and writes ``[Red wool hat]`` as the tokens of
the title and an end mark. Its tokenizer declares that, too: titles and the text around them are
encoded apart, so an item has the same tokens in a prompt, in a completion and in the trie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

FORMATS = ("auto", "plain", "chat")
FRAME = "genrec_chat_frame"  # in tokenizer_config.json: the text before and behind a prompt
_SLOT = "genrec prompt slot"
_SID = r"<[a-z]+_\d+>"
_LAST_SIDS = re.compile(rf"(?:{_SID})*$")

TITLE_END = "genrec_title_end"  # in tokenizer_config.json: token id of the end mark behind titles
_TITLE = r"\[([^\[\]]*)\]"
_TITLES = re.compile(_TITLE)
_LAST_TITLES = re.compile(rf"(?:{_TITLE})*$")


def declare_format(tokenizer: PreTrainedTokenizerBase, asked: str) -> str:
    """Have a tokenizer encode prompts in a format from now on, saved with it.

    auto keeps what a model declares that genrec trained before, and is plain for any other. Having
    a chat template decides nothing: base models ship one, too, and rows that are trained by the
    thousand need no frame, which costs some ten tokens each. chat is worth asking for where an
    instruction-tuned model sees few rows, or keeps its other abilities by it.

    Args:
        tokenizer: the model's.
        asked: one of `FORMATS`.

    Returns:
        "plain" or "chat".

    Raises:
        ValueError: chat, and the tokenizer has no chat template, or one that can't hold a prompt.
    """
    if asked == "auto":
        return "plain" if chat_frame(tokenizer) is None else "chat"
    if asked == "plain":
        tokenizer.init_kwargs.pop(FRAME, None)
        return "plain"
    if not tokenizer.chat_template:
        raise ValueError(
            "prompt_format=chat: the tokenizer has no chat template; use plain, or an "
            "instruction-tuned model"
        )
    try:
        # Templates of models that can think open or skip it in the assistant's turn: skip it.
        # Others ignore the switch.
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _SLOT}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except (TemplateError, ValueError) as error:
        raise ValueError(
            f"prompt_format=chat: the chat template refuses a user's turn alone ({error}); use "
            "plain"
        ) from error
    parts = str(text).split(_SLOT)
    if len(parts) != 2 or not parts[1].strip():
        raise ValueError(
            "prompt_format=chat: the chat template must show a user's turn once, and open the "
            f"assistant's behind it; it gives {str(text)[:200]!r}; use plain"
        )
    tokenizer.init_kwargs[FRAME] = parts
    return "chat"


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The text before and behind a prompt that a tokenizer declares; None for plain prompts."""
    frame = tokenizer.init_kwargs.get(FRAME)
    return None if frame is None else (frame[0], frame[1])


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], frame: tuple[str, str]
) -> list[list[int]]:
    """Token ids of prompts inside a chat frame.

    Frame, prompt and the SIDs at its end are encoded apart, so none of them can change another's
    tokens. Text of users and catalogues is escaped when a prompt is rendered; should a control
    token of the chat still come out of one (a tokenizer whose control tokens have no brackets), it
    is refused.

    Raises:
        ValueError: a prompt holds a control token.
    """
    before, behind = (_encoded(tokenizer, [text])[0] for text in frame)
    last = _LAST_SIDS if title_end(tokenizer) is None else _LAST_TITLES
    ends = [match.start() if (match := last.search(p)) else len(p) for p in prompts]
    heads = encode_text(tokenizer, [p[:end] for p, end in zip(prompts, ends, strict=True)])
    tails = encode_text(tokenizer, [p[end:] for p, end in zip(prompts, ends, strict=True)])
    control = _control_ids(tokenizer, {*before, *behind})
    for prompt, ids in zip(prompts, heads, strict=True):
        if forged := control.intersection(ids):
            token = tokenizer.convert_ids_to_tokens(min(forged))
            raise ValueError(
                f"the prompt {prompt[:80]!r} holds the chat's control token {token!r}; take it out "
                "of the catalogue or the template, or train with prompt_format=plain"
            )
    return [[*before, *head, *behind, *tail] for head, tail in zip(heads, tails, strict=True)]


def declare_titles(tokenizer: PreTrainedTokenizerBase) -> int:
    """Have a tokenizer encode ``[title]`` as an item of a title index from now on, saved with it.

    The end mark is the line break where the tokenizer has one token for it, since a list of lines
    is what a pretrained model knows, and else EOS. A title holds neither.

    Returns:
        Token id of the end mark.

    Raises:
        ValueError: the tokenizer has neither, or EOS alone and prompts are a chat's, where it ends
            a turn.
    """
    line_break = _encoded(tokenizer, ["\n"])[0]
    control = {*tokenizer.all_special_ids}
    end = tokenizer.eos_token_id
    if len(line_break) == 1 and line_break[0] not in control:
        end = line_break[0]
    elif end is None or chat_frame(tokenizer) is not None:
        raise ValueError(
            "items named by titles need a token that ends them: the tokenizer has none for a line "
            "break, and its EOS is missing or ends the turns of a chat; use prompt_format=plain "
            "with a tokenizer that has EOS"
        )
    tokenizer.init_kwargs[TITLE_END] = int(end)
    return int(end)


def title_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token id of the end mark behind titles that a tokenizer declares; None without titles."""
    end: int | None = tokenizer.init_kwargs.get(TITLE_END)
    return end


def encode_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts without special tokens, items of a title index piece by piece."""
    end = title_end(tokenizer)
    if end is None:
        return _encoded(tokenizer, list(texts))
    # By turns text and title; the same few pieces come again and again.
    pieces = [_TITLES.split(text) for text in texts]
    distinct = list(dict.fromkeys(piece for parts in pieces for piece in parts if piece))
    ids = dict(zip(distinct, _encoded(tokenizer, distinct) if distinct else [], strict=True))
    made = []
    for parts in pieces:
        row: list[int] = []
        for place, piece in enumerate(parts):
            row += ids.get(piece, [])
            if place % 2:
                row.append(end)
        made.append(row)
    return made


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [list(row) for row in ids]


def _control_ids(tokenizer: PreTrainedTokenizerBase, used: set[int]) -> set[int]:
    """Special tokens, and other added ones that the frame is made of."""
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special or i in used}
