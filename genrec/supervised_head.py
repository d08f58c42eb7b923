"""The LM head in training: only the positions that are learned, and the columns they compete in.

Prompts are most of a row and teach nothing at the head; a SID token competes, if so chosen, with
the codes of its own level, or with those alone that continue some item's SID, instead of the whole
vocabulary. For small models on small machines the head is most of the work, so this decides the
speed of supervised fine-tuning; and what the trie rules out anyway needs no capacity to be learned.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
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


def use_supervised_head(
    model: PreTrainedModel,
    sid_token_ids: Sequence[Sequence[int]],
    loss_over: LossOver,
    trie: SidTrie,
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

    Returns:
        Whether this module scores from now on.

    Raises:
        ValueError: "level" or "trie" with a model whose logits aren't those of a linear head, or
            whose routers have a loss of their own.
    """
    plain = _is_linear(model)
    if loss_over != "vocabulary" and not plain:
        raise ValueError(
            f"loss_over={loss_over}: {type(model).__name__} does more to its logits than a linear "
            "head (scaled, capped, sharded, or a router's loss); use loss_over=vocabulary"
        )
    device = cast(Tensor, model.get_input_embeddings().weight).device
    if loss_over == "vocabulary" and (not plain or device.type != "cpu"):
        return False
    levels = () if loss_over == "vocabulary" else sid_token_ids
    head = SupervisedHead(levels, device, trie if loss_over == "trie" else None)
    before = model.forward

    # Generation validates its arguments against the signature.
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return before(*args, **kwargs)
        labels = kwargs.pop("labels")
        for unused in ("use_cache", "num_items_in_batch", "output_router_logits"):
            kwargs.pop(unused, None)
        tokens = kwargs["input_ids"]
        states = self.base_model(*args, use_cache=False, **_causal(kwargs)).last_hidden_state
        return head(states[:, :-1], labels[:, 1:], self.get_output_embeddings(), tokens[:, 1:])

    cast(Any, model).forward = types.MethodType(forward, model)
    return True


class SupervisedHead:
    """Hidden states and labels in, log-probabilities of the labels out.

    Args:
        sid_token_ids: per level the tokens that compete with each other; none: each label competes
            with the whole vocabulary.
        device: of the model.
        trie: with it, a level's tokens compete only where some item's SID continues with them.
    """

    def __init__(
        self,
        sid_token_ids: Sequence[Sequence[int]],
        device: torch.device,
        trie: SidTrie | None = None,
    ) -> None:
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
        self, states: Tensor, labels: Tensor, head: Any, tokens: Tensor | None = None
    ) -> FusedCausalLMOutput:
        """Score labels.

        Args:
            states: hidden state before each label, (B, T, d).
            labels: token ids, −100 where nothing is learned, (B, T).
            head: the output embedding, with ``weight`` (V, d) and ``bias`` (V,) or None.
            tokens: the rows' tokens at the labels' places, learned or not, (B, T); the trie follows
                them down to a label. None: the labels.

        Returns:
            TRL's output, with log-probability, entropy and whether the label is the most probable
            one, (B, T) each and zero where nothing is learned.

        Raises:
            ValueError: with a trie, a label continues no item's SID behind the tokens before it.
        """
        mask = labels != _IGNORED
        kept, wanted = states[mask], labels[mask]
        weight, bias = head.weight, getattr(head, "bias", None)
        if hasattr(weight, "full_tensor"):  # FSDP2 shards it
            weight = weight.full_tensor()
            bias = None if bias is None else bias.full_tensor()
        if not self._levels:
            found = _scores(kept, weight, bias, wanted)
        else:
            level, code = self._level_and_code(wanted)
            order = torch.argsort(level, stable=True)
            sizes = torch.bincount(level, minlength=len(self._levels) + 1).tolist()
            places = mask.nonzero()  # (N, 2)
            parts = []
            for at, rows in enumerate(order.split(sizes)):
                if at == 0:
                    parts.append(_scores(kept[rows], weight, bias, wanted[rows]))
                    continue
                parts.append(
                    self._scores_of_level(
                        at - 1,
                        kept[rows],
                        weight,
                        bias,
                        code[rows],
                        labels if tokens is None else tokens,
                        places[rows],
                    )  # fmt: skip
                )
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
        self,
        level: int,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        tokens: Tensor,
        places: Tensor,
    ) -> Scores:
        """`_scores` of labels of one level.

        Args:
            level: the level.
            states: (N, d).
            weight: of the head, (V, d).
            bias: (V,) or None.
            codes: of the labels, (N,).
            tokens: (B, T).
            places: row and column of each label in `tokens`, (N, 2).
        """
        ids, span = self._levels[level], self._spans[level]
        rows = ids if span is None else span  # a slice is a view: nothing is copied
        own = None if bias is None else bias[rows]
        if self._trie is None or not len(codes):
            return _scores(states, weight[rows], own, codes)
        parts, order = [], []
        above, own_nodes = self._nodes(tokens, places, codes, level)
        for at, child, exists, place in self._trie.siblings(level, above, own_nodes):
            order.append(at)
            if child.shape[1] * _FEW > len(ids):
                # What is no child goes to a spare column.
                open_codes = torch.zeros(
                    len(at), len(ids) + 1, dtype=torch.bool, device=ids.device
                ).scatter_(1, child.masked_fill(~exists, len(ids)), True)
                parts.append(_scores(states[at], weight[rows], own, codes[at], open_codes[:, :-1]))
                continue
            # Few children of a wide level: only their columns. An embedding lookup, since its
            # gradient is summed far faster than that of an index.
            columns = F.embedding(ids[child], weight)  # (n, M, d)
            logits = torch.bmm(columns, states[at].unsqueeze(-1)).squeeze(-1).float()
            if bias is not None:
                logits = logits + bias[ids[child]]
            logits = logits.masked_fill(~exists, _CLOSED)
            parts.append(_scores_of_logits(logits, place.squeeze(1)))
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


def _scores(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    open_codes: Tensor | None = None,
) -> Scores:
    """Log-probability, entropy and top-1 (0 or 1) of each label, (N,) each, float32.

    Args:
        states: (N, d).
        weight: (columns, d).
        bias: (columns,) or None.
        labels: column of each label, (N,).
        open_codes: the columns that compete for each label, (N, columns); None: all do.
    """
    at_once = max(1, _LOGITS_AT_ONCE // max(1, len(weight)))
    if len(states) <= at_once:
        return _scores_at_once(states, weight, bias, labels, open_codes)
    parts = [
        # What the backward pass needs is computed again: only one block of logits is ever held.
        checkpoint(
            _scores_at_once,
            states[at : at + at_once],
            weight,
            bias,
            labels[at : at + at_once],
            None if open_codes is None else open_codes[at : at + at_once],
            use_reentrant=False,
        )
        for at in range(0, len(states), at_once)
    ]
    one, two, three = (torch.cat(each) for each in zip(*parts, strict=True))
    return one, two, three


def _scores_at_once(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    open_codes: Tensor | None,
) -> Scores:
    logits = F.linear(states, weight, bias).float()
    if open_codes is not None:
        logits = logits.masked_fill(~open_codes, _CLOSED)
    return _scores_of_logits(logits, labels)


def _scores_of_logits(logits: Tensor, labels: Tensor) -> Scores:
    log_probs = -F.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        best = logits.argmax(-1)
        chances = logits.log_softmax(-1)
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
