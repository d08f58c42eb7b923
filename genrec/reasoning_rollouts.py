"""Reasoning mode in reinforcement learning: C chains per prompt, B items behind each chain.

A group of `num_generations` = C · B completions is a tree. C chains are drawn from the policy as
free text up to the decision marker, at TRL's `temperature` and with no top_p; behind each, B items
are searched or sampled over the trie, as the objective's `rollouts` says. A completion is chain,
marker, SID and EOS; its chain's B completions lie side by side.

What is learned, place by place:

- Chain tokens, and a marker that the model wrote itself: the log-probability over all that could be
  drawn there (the vocabulary without special tokens), at the temperature that it was drawn at. A
  chain that the model broke off by EOS learns of that EOS, at the place where the appended marker
  begins.
- A marker that was appended, and the last EOS, were not drawn and carry no gradient.
- SID tokens: as without chains, renormalised over what the trie allows, at temperature 1.
- Advantages are those of `genrec.advantages.tree_advantages`: the chain's tokens get the chain's,
  the SID's tokens the item's (with `credit: level`, what each level decided of it).

A chain is generated once for its items and read once; the training pass runs it again with each of
them, B times, so that TRL may mix completions over micro-batches. That repeats a chain's loss B
times too: divided by all completions, the loss is a mean over chains and a mean over items. Where
it is summed over tokens (`loss_type: dr_grpo`), the many tokens of a chain outweigh the few of the
SID.

Logged beside what `genrec.rollouts` does: ``chains/length`` (tokens drawn), ``chains/ended`` (share
that the model ended by the marker), ``chains/distinct`` (share of a prompt's chains that differ),
``chains/format``, ``chains/citations`` and ``chains/claims`` (the rewards of
`genrec.chain_rewards`, whether or not they are paid). TRL's ``entropy`` is over all that was drawn.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.advantages import level_advantages, tree_advantages, without_difference
from genrec.chain_reader import ChainReader
from genrec.chain_rewards import CHAIN, CHAIN_REWARDS
from genrec.columns import HISTORY
from genrec.decoding.free_text import SampledText, TextSampling, never_drawn
from genrec.modeling import encode_prompts
from genrec.reasoning import SampledChain, marker_ids, read_texts, sample_chains
from genrec.rollouts import LOOKED_AT, BeamGRPOTrainer, Objective


class ReasoningGRPOTrainer(BeamGRPOTrainer):
    """GRPO over trees of chains and items.

    Dataset columns beside those of `BeamGRPOTrainer`: `history_item_index`, the catalogue rows that
    the prompt shows. The prompts are those of `genrec.reasoning.REASONING`.

    Args:
        marker: words between a chain and its item, of `genrec.reasoning.decision_marker`.
        reader: of the run's chains.
        objective: with `chains` of one or more.
        **kwargs: as `BeamGRPOTrainer` takes them.

    Raises:
        ValueError: settings under which rollouts would be wrong.
    """

    def __init__(
        self, *, marker: str, reader: ChainReader, objective: Objective, **kwargs: Any
    ) -> None:
        if objective.chains < 1:
            raise ValueError(f"chains={objective.chains} must be at least 1 in reasoning mode")
        super().__init__(objective=objective, **kwargs)
        self.marker, self.reader = marker, reader
        self._marker_length = len(marker_ids(self._text_tokenizer, marker))
        model: Any = self.model
        self._never_drawn = never_drawn(model, self._text_tokenizer)
        self._texts: list[list[SampledText]] = []  # of the rows that were searched last
        self._chains: list[SampledChain] = []  # of the batch that is being scored
        self._learned: list[list[int]] = []  # which tokens of its completions were drawn
        # Place in each completion where EOS was drawn, −1: nowhere; of the rows to be scored.
        self._ended_at = torch.zeros(0, dtype=torch.int64)

    def _search(self, rows: list[dict[str, Any]], group: int, attempt: int) -> np.ndarray:
        """Items behind C chains per row, chain by chain, (rows, C · B); the chains are kept."""
        goal, seed = self.objective, self._seed_of(attempt)
        prompts = encode_prompts(self._text_tokenizer, [row["prompt"] for row in rows])
        sampling = TextSampling(self.args.temperature, 1.0, goal.max_chain_tokens, seed)
        with self._engine() as engine:
            self._texts = sample_chains(
                engine, self._text_tokenizer, prompts, goal.chains, self.marker, sampling
            )
            whole = [
                [*prompt, *text.token_ids]
                for prompt, texts in zip(prompts, self._texts, strict=True)
                for text in texts
            ]
            owners = [row for row in rows for _ in range(goal.chains)]
            items = self._items_behind(engine, whole, owners, group // goal.chains, seed)
        return items.reshape(len(rows), group)

    def _written(self, rows: list[dict[str, Any]], items: np.ndarray) -> list[dict[str, Any]]:
        """Completions of chain, marker, SID and EOS; each one's row gets its chain."""
        n_items = items.shape[1] // self.objective.chains
        eos, n_levels = self._tokenizer.eos_token_id, self.trie.n_levels
        read = [
            read_texts(texts, row[HISTORY], self.reader)
            for row, texts in zip(rows, self._texts, strict=True)
        ]
        self._chains = [chain for own in read for chain in own]
        sids = self._item_tokens[items].reshape(len(self._chains), n_items, n_levels)
        owners = [row for row in rows for _ in range(self.objective.chains)]
        self._made, self._learned, ended, inputs = [], [], [], []
        for row, chain, own in zip(owners, self._chains, sids.tolist(), strict=True):
            n_drawn, drawn = self._n_drawn(chain), [1] * len(chain.token_ids)
            if chain.finish_reason != "stop":
                drawn[n_drawn:] = [0] * self._marker_length
            at = n_drawn if chain.finish_reason == "eos" else -1
            if at >= 0:
                drawn[at] = 1  # the EOS that the appended marker took the place of
            self._made += [[*chain.token_ids, *sid, eos] for sid in own]
            self._learned += [[*drawn, *[1] * n_levels, 0]] * n_items
            ended += [at] * n_items
            inputs += [{**row, CHAIN: chain}] * n_items
        self._ended_at = torch.tensor(ended, device=self.accelerator.device)
        return inputs

    def _n_drawn(self, chain: SampledChain) -> int:
        """Tokens that the model wrote, the marker's included where it did."""
        appended = 0 if chain.finish_reason == "stop" else self._marker_length
        return len(chain.token_ids) - appended

    def _generate(self, prompts: list[str]) -> Any:
        """TRL's bookkeeping, with the mask of what was drawn where its tools have theirs."""
        prompt_ids, completion_ids, _, *rest = super()._generate(prompts)
        return prompt_ids, completion_ids, self._learned, *rest

    def _calculate_rewards(
        self, inputs: list[Any], prompts: Any, completions: Any, completion_ids: list[list[int]]
    ) -> Tensor:
        """Rewards of items read the SID at the beginning of a completion."""
        behind = self.trie.n_levels + 1
        sids = [ids[-behind:] for ids in completion_ids]
        return super()._calculate_rewards(inputs, prompts, completions, sids)

    def _sid_places(self, completion_mask: Tensor) -> Tensor:
        """Where the SIDs lie in completions that are padded on the right, (N, L)."""
        levels = torch.arange(self.trie.n_levels, device=completion_mask.device)
        return completion_mask.sum(1, keepdim=True) - (self.trie.n_levels + 1) + levels

    def _sids_of(self, output: dict[str, Any]) -> Tensor:
        return output["completion_ids"].gather(1, self._sid_places(output["completion_mask"]))

    def _learned_from(self, output: dict[str, Any], hits: np.ndarray, group: int) -> dict[str, Any]:
        """TRL's batch with advantages per token, (N, T)."""
        goal, rewards = self.objective, self._rewards
        n_items = group // goal.chains
        scaled = self.scale_rewards != "none"
        chains, items = tree_advantages(rewards, goal.chains, n_items, goal.chain_value, scaled)
        ids, places = output["completion_ids"], self._sid_places(output["completion_mask"])
        if goal.credit == "level":
            credits = level_advantages(items, ids.gather(1, places), n_items)
        else:
            credits = items.unsqueeze(1).expand(places.shape)
        output["advantages"] = chains.unsqueeze(1).expand(ids.shape).scatter(1, places, credits)
        output["ended_at"] = self._ended_at
        self._leave_out(output, without_difference(rewards, group), group)
        self._note_chains()
        return output

    def _note_chains(self) -> None:
        """Log what the chains of the batch are like."""
        n, chains = self.objective.chains, self._chains
        texts = [chain.token_ids for chain in chains]
        distinct = [len(set(texts[at : at + n])) / n for at in range(0, len(texts), n)]
        values = {
            "length": np.mean([self._n_drawn(chain) for chain in chains]),
            "ended": np.mean([chain.finish_reason == "stop" for chain in chains]),
            "distinct": np.mean(distinct),
            **{name: np.mean(reward(chain=chains)) for name, reward in CHAIN_REWARDS.items()},
        }
        self._note({f"chains/{name}": float(value) for name, value in values.items()})

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        self._ended_at = inputs["ended_at"]  # TRL hands on token ids alone
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities of what was drawn: chains over the vocabulary, SIDs over the trie.

        Returns:
            Log-probabilities (N, T), 0 for EOS and padding, entropies of the same distributions
            (N, T), None.
        """
        assert len(self._ended_at) == len(input_ids), "set for the rows that are scored"
        step = batch_size or len(input_ids)
        log_probs: list[Tensor] = []
        entropies: list[Tensor] = []
        levels: list[Tensor] = []
        masses: list[float] = []
        for start in range(0, len(input_ids), step):
            part = slice(start, start + step)
            ids, mask, ended = input_ids[part], attention_mask[part], self._ended_at[part]
            with self.accelerator.autocast():
                # Neither the last code nor EOS predicts anything that is scored.
                logits = model(
                    input_ids=ids[:, :-2],
                    attention_mask=mask[:, :-2],
                    # TRL pads on the left; the search counts positions from the prompt's start.
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-2],
                    logits_to_keep=logits_to_keep - 1,
                ).logits  # (n, T - 1, V): place t predicts token t of the completion
            made = ids[:, -logits_to_keep:]
            places = self._sid_places(mask[:, -logits_to_keep:])
            of_sids = logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
            sids = made.gather(1, places)
            if compute_entropy and start == 0:  # it is the loss that asks
                masses = self._valid_mass(of_sids[:LOOKED_AT], sids[:LOOKED_AT])
            scores, spread = (x[:, :-1] for x in self._score_completions(of_sids, sids))
            levels.append(spread)
            for own, behind, found in zip(
                self._score_chains(logits, made, places[:, :1], ended),
                (scores, spread),
                (log_probs, entropies),
                strict=True,
            ):
                found.append(F.pad(own, (0, 1)).scatter(1, places, behind.float()))
        if not compute_entropy:
            return torch.cat(log_probs), None, None
        self._note_levels(torch.cat(levels), masses)
        return torch.cat(log_probs), torch.cat(entropies), None

    def _score_chains(
        self, logits: Tensor, made: Tensor, sid_starts: Tensor, ended: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of chain tokens, (n, T − 1), 0 elsewhere.

        Args:
            logits: (n, T − 1, V).
            made: completions, (n, T).
            sid_starts: where the SID begins, (n, 1).
            ended: where EOS was drawn, −1: nowhere, (n,).
        """
        places = torch.arange(logits.shape[1], device=logits.device)
        drawn = made[:, :-1].masked_fill(places == ended.unsqueeze(1), self._tokenizer.eos_token_id)
        in_chain = places < sid_starts
        scaled = logits[in_chain].float() / self.args.temperature  # (M, V)
        full = scaled.masked_fill(self._never_drawn, -torch.inf).log_softmax(-1)
        own = full.gather(1, drawn[in_chain].unsqueeze(1)).squeeze(1)
        spread = -(full.exp() * full.masked_fill(self._never_drawn, 0.0)).sum(1)
        zero = own.new_zeros(in_chain.shape)
        return zero.masked_scatter(in_chain, own), zero.masked_scatter(in_chain, spread)
