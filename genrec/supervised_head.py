"""The LM head in training: only the positions that are learned, and the columns they compete in.

Prompts are most of a row and teach nothing at the head; a SID token competes, if so chosen, with
the codes of its own level, or with those alone that continue some item's SID, instead of the whole
vocabulary. For small models on small machines the head is most of the work, so this decides the
speed of supervised fine-tuning; and what the trie rules out anyway needs no capacity to be learned.

Teachers (Hinton, Vinyals and Dean 2015; Furlanello et al. 2018, "Born-Again Neural Networks", for
those of the student's own kind) are run over the same rows: a label's log-probability becomes the
expected one under a target that is in part their distribution.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from genrec.decoding.lm_head import rows_of
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import TrieTensors
from genrec.normalizers import NORMALIZERS, Normalizer

LossOver = Literal["vocabulary", "level", "trie"]
LOSSES: tuple[LossOver, ...] = ("vocabulary", "level", "trie")
# How a model may be scored that was trained so; the first is the default.
NORMALIZERS_OF: dict[str, tuple[Normalizer, ...]] = {
    "vocabulary": NORMALIZERS,
    "level": ("level", "trie"),
    "trie": ("trie",),
}

_LOGITS_AT_ONCE = 1 << 26  # of one matrix, in fp32: 256 MiB
_IGNORED = -100
_CLOSED = -1e9  # finite, so that 0 * log 0 of the entropy is 0
_FEW = 8  # a level's columns are gathered where a label competes with so much fewer of them

Scores = tuple[Tensor, Tensor, Tensor]  # log-probability, entropy, top-1 (0 or 1), (N,) each


@dataclass(frozen=True)
class Teachers:
    """Trained models whose distributions a student learns beside the labels.

    Attributes:
        models: of the student's vocabulary, in eval mode, on its device.
        weight: of their mean distribution in the target, in (0, 1]; the label has the rest.
    """

    models: Sequence[PreTrainedModel]
    weight: float

    @torch.no_grad()
    def states(self, *args: Any, **inputs: Any) -> list[tuple[Tensor, Any]]:
        """Last hidden states and output embedding of each."""
        return [
            (
                model.base_model(*args, use_cache=False, **inputs).last_hidden_state,
                model.get_output_embeddings(),
            )
            for model in self.models
        ]


@dataclass(frozen=True)
class Side:
    """Hidden states with the head behind them: the student's, or a teacher's.

    Attributes:
        states: (N, d).
        weight: (columns, d).
        bias: (columns,) or None.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None

    def rows(self, at: Tensor | slice) -> Side:
        """Some of the states."""
        return replace(self, states=self.states[at])

    def columns(self, at: Tensor | slice) -> Side:
        """Some of the head's columns."""
        return replace(
            self, weight=self.weight[at], bias=None if self.bias is None else self.bias[at]
        )

    def logits(self) -> Tensor:
        """Of all columns, (N, columns) float32."""
        return F.linear(self.states, self.weight, self.bias).float()

    def logits_of(self, ids: Tensor) -> Tensor:
        """Of the columns (N, M), (N, M) float32."""
        # An embedding lookup, since its gradient is summed far faster than that of an index.
        columns = F.embedding(ids, self.weight)  # (N, M, d)
        logits = torch.bmm(columns, self.states.unsqueeze(-1)).squeeze(-1).float()
        return logits if self.bias is None else logits + self.bias[ids]


def use_supervised_head(
    model: PreTrainedModel,
    sid_token_ids: Sequence[Sequence[int]],
    loss_over: LossOver,
    trie: SidTrie,
    teachers: Teachers | None = None,
) -> bool:
    """Let TRL's trainer score a row by this module.

    TRL calls the model with ``fused_lm_head=True`` for per-token log-probabilities; that call is
    answered here, any other goes where it went. On a GPU TRL's own kernel computes the loss over
    the vocabulary well, and keeps doing so.

    Args:
        model: the causal LM itself, below any adapter, after the trainer was made.
        sid_token_ids: per level, (codebook_size,).
        loss_over: what a SID token's probability is normalised over: "vocabulary"; "level", the
            codes of its level; "trie", the codes that continue an item's SID there. Text tokens
            always compete with the whole vocabulary.
        trie: of the SID map.
        teachers: what the student learns beside the labels, or None.

    Returns:
        Whether this module scores from now on.

    Raises:
        ValueError: "level", "trie" or teachers with a model whose logits aren't those of a linear
            head, or whose routers have a loss of their own; or such a teacher.
    """
    plain = _is_linear(model)
    if teachers is not None and not (plain and all(map(_is_linear, teachers.models))):
        raise ValueError(
            "teachers need models, themselves and the student, whose logits are a linear head's "
            "and whose routers have no loss of their own"
        )
    if loss_over != "vocabulary" and not plain:
        raise ValueError(
            f"loss_over={loss_over}: {type(model).__name__} does more to its logits than a linear "
            "head (scaled, capped, sharded, or a router's loss); use loss_over=vocabulary"
        )
    device = cast(Tensor, model.get_input_embeddings().weight).device
    if loss_over == "vocabulary" and teachers is None and (not plain or device.type != "cpu"):
        return False
    levels = () if loss_over == "vocabulary" else sid_token_ids
    of_teachers = 0.0 if teachers is None else teachers.weight
    head = SupervisedHead(levels, device, trie if loss_over == "trie" else None, of_teachers)
    before = model.forward

    # Generation validates its arguments against the signature.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return before(*args, **kwargs)
        labels = kwargs.pop("labels")
        for unused in ("use_cache", "num_items_in_batch", "output_router_logits"):
            kwargs.pop(unused, None)
        tokens, kwargs = kwargs["input_ids"], _causal(kwargs)
        states = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state
        taught = teachers.states(*args, **kwargs) if teachers and self.training else []
        return head(
            states[:, :-1], labels[:, 1:], self.get_output_embeddings(), tokens[:, 1:],
            [(of_teacher[:, :-1], theirs) for of_teacher, theirs in taught],
        )  # fmt: skip

    cast(Any, model).forward = types.MethodType(forward, model)
    return True


class SupervisedHead:
    """Hidden states and labels in, log-probabilities of the labels out.

    Args:
        sid_token_ids: per level the tokens that compete with each other; none: each label competes
            with the whole vocabulary.
        device: of the model.
        trie: with it, a level's tokens compete only where some item's SID continues with them.
        of_teachers: weight of teachers in the target, where a call has some.
    """

    def __init__(
        self,
        sid_token_ids: Sequence[Sequence[int]],
        device: torch.device,
        trie: SidTrie | None = None,
        of_teachers: float = 0.0,
    ) -> None:
        self._of_teachers = of_teachers
        self._levels = [torch.tensor(ids, device=device) for ids in sid_token_ids]
        self._spans = [rows_of(ids) for ids in sid_token_ids]
        self._trie = None if trie is None else TrieTensors(trie, None, device)
        largest = max((int(ids.max()) for ids in self._levels), default=-1)
        # Of each token: its level (0 for text, so that text comes first) and its code there.
        self._level_of = torch.zeros(largest + 2, dtype=torch.long, device=device)
        self._code_of = torch.zeros(largest + 2, dtype=torch.long, device=device)
        for level, ids in enumerate(self._levels):
            self._level_of[ids] = level + 1
            self._code_of[ids] = torch.arange(len(ids), device=device)

    def __call__(
        self,
        states: Tensor,
        labels: Tensor,
        head: Any,
        tokens: Tensor | None = None,
        taught: Sequence[tuple[Tensor, Any]] = (),
    ) -> FusedCausalLMOutput:
        """Score labels.

        Args:
            states: hidden state before each label, (B, T, d).
            labels: token ids, −100 where nothing is learned, (B, T).
            head: the output embedding, with ``weight`` (V, d) and ``bias`` (V,) or None.
            tokens: the rows' tokens at the labels' places, learned or not, (B, T); the trie follows
                them down to a label. None: the labels.
            taught: hidden states (B, T, d) and output embedding of each teacher.

        Returns:
            TRL's output, with log-probability (with teachers the expected one under the target),
            entropy and whether the label is the most probable one, (B, T) each and zero where
            nothing is learned.

        Raises:
            ValueError: with a trie, a label continues no item's SID behind the tokens before it.
        """
        mask = labels != _IGNORED
        wanted = labels[mask]
        sides = [_side(of_one[mask], own) for of_one, own in [(states, head), *taught]]
        # Models of one tokenizer pad their embeddings to different lengths.
        fewest = min(len(side.weight) for side in sides)
        sides = [s if len(s.weight) == fewest else s.columns(slice(fewest)) for s in sides]
        if not self._levels:
            found = _scores(sides, wanted, self._of_teachers)
        else:
            level, code = self._level_and_code(wanted)
            order = torch.argsort(level, stable=True)
            sizes = torch.bincount(level, minlength=len(self._levels) + 1).tolist()
            places = mask.nonzero()  # (N, 2)
            parts = []
            for at, rows in enumerate(order.split(sizes)):
                some = [side.rows(rows) for side in sides]
                if at == 0:
                    parts.append(_scores(some, wanted[rows], self._of_teachers))
                    continue
                seen = labels if tokens is None else tokens
                parts.append(self._scores_of_level(at - 1, some, code[rows], seen, places[rows]))
            back = torch.argsort(order)
            one, two, three = (torch.cat(each)[back] for each in zip(*parts, strict=True))
            found = (one, two, three)
        # `masked_scatter` keeps the graph where no label is learned: the gradient is zero then.
        full = [values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found]
        return FusedCausalLMOutput(
            log_probs=full[0], entropy=full[1], is_top1=full[2] > 0, label_mask=mask
        )

    def _level_and_code(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Level + 1 and code of SID tokens, zeros for text."""
        known = tokens.clamp(0, len(self._level_of) - 1)  # text may lie above the SID tokens
        return self._level_of[known], self._code_of[known]

    def _scores_of_level(
        self, level: int, sides: list[Side], codes: Tensor, tokens: Tensor, places: Tensor
    ) -> Scores:
        """`_scores` of labels of one level.

        Args:
            level: the level.
            sides: the student and its teachers, N states each.
            codes: of the labels, (N,).
            tokens: (B, T).
            places: row and column of each label in `tokens`, (N, 2).
        """
        ids, span = self._levels[level], self._spans[level]
        # A slice is a view: nothing is copied.
        of_level = [side.columns(ids if span is None else span) for side in sides]
        if self._trie is None or not len(codes):
            return _scores(of_level, codes, self._of_teachers)
        parts, order = [], []
        above, own_nodes = self._nodes(tokens, places, codes, level)
        for at, child, exists, place in self._trie.siblings(level, above, own_nodes):
            order.append(at)
            if child.shape[1] * _FEW > len(ids):
                # What is no child goes to a spare column.
                open_codes = torch.zeros(
                    len(at), len(ids) + 1, dtype=torch.bool, device=ids.device
                ).scatter_(1, child.masked_fill(~exists, len(ids)), True)
                some = [side.rows(at) for side in of_level]
                parts.append(_scores(some, codes[at], self._of_teachers, open_codes[:, :-1]))
                continue
            # Few children of a wide level: only their columns.
            logits = [
                side.rows(at).logits_of(ids[child]).masked_fill(~exists, _CLOSED) for side in sides
            ]
            parts.append(_scores_of_logits(logits, place.squeeze(1), self._of_teachers))
        back = torch.cat(order).argsort()
        one, two, three = (torch.cat(each)[back] for each in zip(*parts, strict=True))
        return one, two, three

    def _nodes(
        self, tokens: Tensor, places: Tensor, codes: Tensor, level: int
    ) -> tuple[Tensor, Tensor]:
        """Trie nodes before and at each label.

        Args:
            tokens: (B, T).
            places: row and column of each label, (N, 2).
            codes: of the labels, (N,).
            level: of the labels.
        """
        trie = self._trie
        assert trie is not None
        above = torch.zeros(len(places), dtype=torch.long, device=tokens.device)
        for before in range(level + 1):
            if before == level:
                code = codes
            else:
                token = tokens[places[:, 0], (places[:, 1] - level + before).clamp(min=0)]
                known, code = self._level_and_code(token)
                code = torch.where(known == before + 1, code, -1)
            node, found = trie.follow(before, above, code)
            if not bool(found.all()):
                raise ValueError(
                    "a SID that is learned is no item's: the rows belong to another SID map; "
                    "run build_dataset again"
                )
            if before < level:
                above = node
        return above, node


def _side(states: Tensor, head: Any) -> Side:
    weight, bias = head.weight, getattr(head, "bias", None)
    if hasattr(weight, "full_tensor"):  # FSDP2 shards it
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    return Side(states, weight, bias)


def _scores(
    sides: Sequence[Side], labels: Tensor, of_teachers: float, open_codes: Tensor | None = None
) -> Scores:
    """Log-probability, entropy and top-1 (0 or 1) of each label, (N,) each, float32.

    Args:
        sides: the student and its teachers, N states each.
        labels: column of each label, (N,).
        of_teachers: their weight in the target.
        open_codes: the columns that compete for each label, (N, columns); None: all do.
    """
    at_once = max(1, _LOGITS_AT_ONCE // max(1, len(sides[0].weight)))
    if len(labels) <= at_once:
        return _scores_at_once(sides, labels, of_teachers, open_codes)
    blocks = [slice(at, at + at_once) for at in range(0, len(labels), at_once)]
    parts = [
        # What the backward pass needs is computed again: only one block of logits is ever held.
        checkpoint(
            _scores_at_once,
            [side.rows(block) for side in sides],
            labels[block],
            of_teachers,
            None if open_codes is None else open_codes[block],
            use_reentrant=False,
        )
        for block in blocks
    ]
    one, two, three = (torch.cat(each) for each in zip(*parts, strict=True))
    return one, two, three


def _scores_at_once(
    sides: Sequence[Side], labels: Tensor, of_teachers: float, open_codes: Tensor | None
) -> Scores:
    logits = [side.logits() for side in sides]
    if open_codes is not None:
        logits = [each.masked_fill(~open_codes, _CLOSED) for each in logits]
    return _scores_of_logits(logits, labels, of_teachers)


def _scores_of_logits(logits: Sequence[Tensor], labels: Tensor, of_teachers: float) -> Scores:
    """As `_scores`, of the logits (N, M) of the student and its teachers."""
    own, *taught = logits
    log_probs = -F.cross_entropy(own, labels, reduction="none")
    if taught:
        with torch.no_grad():
            target = torch.stack([each.softmax(-1) for each in taught]).mean(0)
        expected = -F.cross_entropy(own, target, reduction="none")
        log_probs = (1 - of_teachers) * log_probs + of_teachers * expected
    with torch.no_grad():
        best = own.argmax(-1)
        chances = own.log_softmax(-1)
        entropy = -torch.linalg.vecdot(chances.exp(), chances)
    return log_probs, entropy, (best == labels).float()


def _causal(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without a mask that a causal model doesn't need: padding is behind the row."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return {name: value for name, value in inputs.items() if name != "attention_mask"}
    return inputs


@torch.no_grad()
def _is_linear(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its last hidden states times its output embedding."""
    head, decoder = model.get_output_embeddings(), model.base_model
    weight = getattr(head, "weight", None)
    if head is None or decoder is model or not isinstance(weight, Tensor) or weight.dim() != 2:
        return False
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        return False  # a mixture of experts has a loss of its own beside, which TRL's head gives
    ids = torch.arange(2, device=weight.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    whole = model(input_ids=ids, use_cache=False).logits.float()
    states = decoder(input_ids=ids, use_cache=False).last_hidden_state
    parts = F.linear(states, weight, getattr(head, "bias", None)).float()
    model.train(was_training)
    near = (1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2) * whole.abs().max()
    return whole.shape == parts.shape and bool(((whole - parts).abs() <= near).all())


def add_hidden_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout on the embeddings and on what each attention and feed-forward block adds.

    Decoders of today have none but on attention weights; for a small one trained from scratch on
    few interactions it is what keeps it from learning them by heart. The saved model is plain.

    Args:
        model: with ``layers`` that have ``self_attn`` and ``mlp``, as Qwen3 and Llama.
        rate: share of values that are dropped while training, in [0, 1).
    """

    def drop(module: nn.Module, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate), *output[1:])
        return F.dropout(output, rate)

    blocks = [
        block
        for name, block in model.named_modules()
        if name.endswith((".self_attn", ".mlp")) and ".layers." in name
    ]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no self_attn and mlp blocks to put dropout on"
        )
    for module in (model.get_input_embeddings(), *blocks):
        module.register_forward_hook(drop)
