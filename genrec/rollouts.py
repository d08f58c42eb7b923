"""TRL's GRPOTrainer with rollouts over the trie and log-probabilities over the trie.

With `genrec.reasoning_rollouts`, which puts chains before the items, the only module that touches
TRL's experimental hooks; longer than others, so that a new TRL release is met in one place.
Overridden are generation (a group is the beam, or what `genrec.rollout_groups` draws: valid items,
best first), the policy's log-probabilities, renormalised over what the trie allows, and what comes
after TRL's advantages (`Objective`). With full-vocabulary log-probabilities, negative advantages
push mass onto tokens that can never be produced, which the search doesn't see and the loss rewards.

Logged beside TRL's own: ``hits_per_group``, ``groups_without_hit``, ``zero_advantage`` (share of
groups), ``invalid`` (share of completions that are no item: 0), ``resampled`` (share of groups),
``level_entropy/<l>`` and ``valid_mass/<l>``, the full-vocabulary probability of what the trie
allows, measured on a few completions of every batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from genrec.advantages import (
    ChainValue,
    level_advantages,
    with_pass_at_k_bonus,
    without_difference,
)
from genrec.averaging import WeightAverage
from genrec.columns import SEEN
from genrec.decoding.beam import Normalizer, child_log_probs, normalize
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import TrieTensors
from genrec.group_losses import Loss, listwise_loss, sdpo_loss
from genrec.modeling import encode_prompts
from genrec.rewards import CompletedItems
from genrec.rollout_groups import (
    DISTINCT,
    Rollouts,
    batch_seed,
    best_first,
    check_rollouts,
    chosen,
    n_drawn,
    sampler_of,
)

TARGET_SID_IDS = "target_sid_ids"

Credit = Literal["item", "level"]
CREDITS: tuple[Credit, ...] = ("item", "level")

LOOKED_AT = 16  # completions of a batch whose valid mass is measured
_AT_ONCE = 64  # rows that are searched together before training


@dataclass(frozen=True)
class Objective:
    """What a group of rollouts is, and what is learned from it.

    Attributes:
        rollouts: see `genrec.rollout_groups`.
        oversample: of "dynamic": draws per item of a group.
        loss: "grpo" (TRL's, by its `loss_type`), or of `genrec.group_losses`.
        listwise_temperature: of the listwise loss: rewards are divided by it.
        credit: "item", one advantage per rollout, or "level" (see `level_advantages`).
        pass_at_k: size of a draw in the pass@k bonus; 0: no bonus.
        pass_at_k_weight: of the bonus.
        filter_groups: groups without any advantage count nothing: neither in the loss's mean, nor
            through a KL term.
        resample: how often rows whose group has no hit are exchanged for others. The model then
            learns from prompts that it can nearly answer; 0: never.
        add_target: in groups without a hit the target takes the place of the least likely item, as
            in S-DPO. No prompt is then without a signal; the added item is no rollout of the policy
            (its log-probability is taken as if it were), so this is part imitation.
        sft_weight: of the supervised loss on the rows' targets, added to the other: the mean over
            a step's prompts of −log π(target), under the same normaliser. Where hits are rare it is
            most of what there is to learn, and it holds the policy to what users did; 0: none.
        chains: reasoning mode: chains per prompt, with as many items behind each as make up the
            group (see `genrec.reasoning_rollouts`); 0: items alone.
        max_chain_tokens: of a chain.
        chain_value: what a chain is worth (see `genrec.advantages.tree_advantages`).
    """

    rollouts: Rollouts = "beam"
    oversample: float = 1.5
    loss: Loss = "grpo"
    listwise_temperature: float = 0.1
    credit: Credit = "item"
    pass_at_k: int = 0
    pass_at_k_weight: float = 1.0
    filter_groups: bool = False
    resample: int = 0
    add_target: bool = False
    sft_weight: float = 0.0
    chains: int = 0
    max_chain_tokens: int = 256
    chain_value: ChainValue = "mean"

    @property
    def lists_per_prompt(self) -> int:
        """Lists of items that make a group: one, or one behind each chain."""
        return self.chains or 1

    def check(self, args: Any, normalizer: str) -> None:
        """Reject what can't work together.

        Args:
            args: TRL's GRPOConfig.
            normalizer: of the policy's log-probabilities.

        Raises:
            ValueError: it can't.
        """
        check_rollouts(self.rollouts, normalizer, self.oversample)
        if self.chains:
            self._check_chains(args)
        elif args.temperature != 1.0:
            raise ValueError(
                f"temperature={args.temperature}: beam rollouts are those of temperature 1.0"
            )
        if not 0 <= self.pass_at_k <= args.num_generations:
            raise ValueError(
                f"pass_at_k={self.pass_at_k} must lie between 1 and num_generations="
                f"{args.num_generations}; 0 turns the bonus off"
            )
        if self.resample < 0 or self.listwise_temperature <= 0:
            raise ValueError(
                f"resample={self.resample} must be 0 or more, and listwise_temperature="
                f"{self.listwise_temperature} above 0"
            )
        if not 0 <= self.sft_weight < float("inf"):
            raise ValueError(f"sft_weight={self.sft_weight} must be 0 or more")
        if self.loss == "grpo":
            return
        if self.credit != "item" or self.pass_at_k or self.filter_groups:
            raise ValueError(
                f"loss: {self.loss} has no advantages; credit, pass_at_k and filter_groups belong "
                "to loss: grpo"
            )
        if self.rollouts not in DISTINCT:
            raise ValueError(
                f"loss: {self.loss} with rollouts: {self.rollouts}, which may hold an item twice; "
                f"use one of {', '.join(DISTINCT)}"
            )
        if args.per_device_train_batch_size % args.num_generations:
            raise ValueError(
                f"loss: {self.loss} needs whole groups in a batch: per_device_train_batch_size="
                f"{args.per_device_train_batch_size} is no multiple of num_generations="
                f"{args.num_generations}"
            )
        if self.loss == "sdpo" and args.beta <= 0:
            raise ValueError(
                f"loss: sdpo with beta={args.beta}: S-DPO compares with the SFT model by beta; "
                "set it above 0, e.g. 0.1"
            )

    def _check_chains(self, args: Any) -> None:
        """Reject what can't work together in reasoning mode."""
        n_items, rest = divmod(args.num_generations, max(self.chains, 1))
        if self.chains < 0 or rest or n_items < 2:
            raise ValueError(
                f"chains={self.chains} with num_generations={args.num_generations}: a group is "
                "chains x items, with two items or more behind each chain, which are compared; "
                "make num_generations such a multiple of chains"
            )
        if self.max_chain_tokens < 1:
            raise ValueError(f"max_chain_tokens={self.max_chain_tokens} must be at least 1")
        unused = {"loss": (self.loss, "grpo"), "pass_at_k": (self.pass_at_k, 0),
            "resample": (self.resample, 0), "add_target": (self.add_target, False),
            "sft_weight": (self.sft_weight, 0.0)}  # fmt: skip
        for name, (value, only) in unused.items():
            if value != only:
                raise ValueError(
                    f"{name}: {value} with chains={self.chains}: it works on one list of items; "
                    f"set {name}: {only}"
                )
        # What TRL would do to a group as a whole, or to sampled text that we sample ourselves.
        needed = {
            "scale_rewards": ("group", "none", True, False),
            "multi_objective_aggregation": ("sum_then_normalize",),
            "importance_sampling_level": ("token",),
            "loss_type": ("dr_grpo", "grpo", "bnpo", "dapo", "cispo", "sapo"),
            "top_p": (1.0,),
            "top_k": (0,),
            "min_p": (None, 0.0),
            "repetition_penalty": (1.0,),
        }
        for name, allowed in needed.items():
            if (value := getattr(args, name)) not in allowed:
                raise ValueError(
                    f"{name}={value} with chains={self.chains}: chains are drawn from the whole "
                    "distribution at `temperature`, and advantages are those of each level; set "
                    f"{name}: {allowed[0]}"
                )


class BeamGRPOTrainer(GRPOTrainer):
    """GRPO whose rollouts are searched or sampled over the trie.

    Dataset columns beside `prompt`: what the reward functions read, `target_sid_ids` always, and
    optionally `seen_item_index`, the catalogue rows that evaluation would filter for this row.

    Args:
        trie: trie of the SID map.
        sid_token_ids: per level the token id of each code.
        normalizer: of the policy's log-probabilities; "trie" is the one that stays stable.
        beam_width: prefixes kept per level; at least `num_generations`. Of the beam alone.
        objective: rollouts, loss and advantages; default: the beam and TRL's own.
        average: of the weights, if one is kept; it lies in each checkpoint.
        **kwargs: GRPOTrainer's own arguments.

    Raises:
        ValueError: settings under which rollouts would be wrong.
    """

    # TRL and Transformers type these more widely than they are here.
    args: GRPOConfig
    model: torch.nn.Module  # type: ignore[assignment]
    train_dataset: Dataset  # type: ignore[assignment]
    num_generations: int
    num_generations_eval: int
    objective: Objective
    _buffered_inputs: list[dict[str, Tensor | None]] | None  # type: ignore[assignment]

    def __init__(
        self,
        *,
        trie: SidTrie,
        sid_token_ids: list[list[int]],
        beam_width: int,
        normalizer: Normalizer = "trie",
        objective: Objective | None = None,
        average: WeightAverage | None = None,
        **kwargs: Any,
    ) -> None:
        args = kwargs["args"]
        per_process = args.per_device_train_batch_size * args.steps_per_generation
        if per_process % args.num_generations:
            raise ValueError(
                f"per_device_train_batch_size x steps_per_generation = {per_process} splits "
                f"groups of num_generations={args.num_generations} over processes; make it a "
                "multiple"
            )
        self.objective = objective or Objective()
        self.objective.check(args, normalizer)
        if self.objective.rollouts == "beam":
            room = min(beam_width, trie.n_items)
        else:
            room = trie.n_items
        if not args.num_generations // self.objective.lists_per_prompt <= room:
            each = f" / chains={self.objective.chains}" if self.objective.chains else ""
            raise ValueError(
                f"num_generations={args.num_generations}{each} exceeds beam_width={beam_width} or "
                f"the {trie.n_items} items of the catalogue"
            )
        super().__init__(**kwargs)
        self._average = average
        if average:
            self.add_callback(average)
        tokenizer = self.processing_class
        assert isinstance(tokenizer, PreTrainedTokenizerBase), "text models only"
        self._text_tokenizer = tokenizer
        self.trie, self.sid_token_ids = trie, sid_token_ids
        self.beam_width, self.normalizer = beam_width, normalizer
        device = self.accelerator.device
        self._tensors = TrieTensors(trie, None, device)
        self._sid_ids = [torch.tensor(ids, device=device) for ids in sid_token_ids]
        self._code_of_token = torch.full((len(tokenizer),), -1, device=device)
        for ids in self._sid_ids:
            self._code_of_token[ids] = torch.arange(len(ids), device=device)
        codes = trie.codes()
        self._item_tokens = np.stack(
            [np.array(ids)[codes[:, level]] for level, ids in enumerate(sid_token_ids)], axis=1
        )
        self._completed = CompletedItems(trie, sid_token_ids)
        # Beyond the SID itself a completion holds EOS alone: it is what TRL calls "terminated".
        self._n_completion = trie.n_levels + 1
        self._made: list[list[int]] = []  # completions of the batch that is being scored
        self._rewards = torch.zeros(0)  # weighted, of the same completions

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Into a checkpoint; its last file, which says that it is complete, is written later."""
        super()._save(output_dir, state_dict)
        if self._average and output_dir:
            self._average.save(output_dir)

    @property
    def _moment(self) -> int:
        """Number of the micro-batch in the whole training; TRL's own count restarts at a resume."""
        per_step = self.args.gradient_accumulation_steps
        return self.state.global_step * per_step + self._step % per_step

    @property
    def _group(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL shuffles completions over the batches; losses over groups need them whole."""
        if self.objective.loss == "grpo" or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        per_generation = self.args.steps_per_generation
        assert per_generation is not None  # TRL fills it in
        if self._step % (per_generation * self.num_iterations) == 0 or not self._buffered_inputs:
            made = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(made, per_generation)
        return self._buffered_inputs[self._step % per_generation]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Roll out before TRL does: its generation sees prompts, ours the rows and their filters.

        So a row can be exchanged for another while all its columns stay together.
        """
        group, rows = self._group, inputs[:: self._group]
        attempts = self.objective.resample if self.model.training else 0
        rows, items, exchanged = self._roll_out(rows, group, attempts)
        targets = self._targets(rows)
        hits = items == targets[:, None]
        goal = self.objective
        with_target = goal.loss == "sdpo" or (goal.add_target and self.model.training)
        if (with_target or goal.sft_weight) and (targets < 0).any():
            raise ValueError(f"{TARGET_SID_IDS} must be an item's in every row")
        if with_target:  # in place of the least likely miss
            items[~hits.any(1), -1] = targets[~hits.any(1)]
        output = super()._generate_and_score_completions(self._written(rows, items))
        output = self._learned_from(output, items == targets[:, None], group)
        if goal.sft_weight and self.model.training:
            tokens = torch.from_numpy(self._item_tokens[targets]).to(self.accelerator.device)
            output["target_ids"] = tokens.repeat_interleave(group, 0)
        made = self._completed(self._sids_of(output).tolist())
        self._note(
            {
                "hits_per_group": hits.sum(1).mean(),
                "groups_without_hit": 1 - hits.any(1).mean(),
                "invalid": (made < 0).mean(),
                "resampled": exchanged / len(rows),
            }
        )
        return output

    def _written(self, rows: list[dict[str, Any]], items: np.ndarray) -> list[dict[str, Any]]:
        """Make the completions of items (rows, group); gives each completion's row."""
        eos = self._tokenizer.eos_token_id
        self._made = [[*sid, eos] for sid in self._item_tokens[items.ravel()].tolist()]
        return [row for row in rows for _ in range(items.shape[1])]

    def _sids_of(self, output: dict[str, Any]) -> Tensor:
        """SID tokens of the completions in TRL's batch, (N, L), perhaps with EOS behind."""
        return output["completion_ids"]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        """The completions that are made already, one SID and EOS each."""
        return self._made, None

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return encode_prompts(self._text_tokenizer, prompts), None, {}

    def _calculate_rewards(self, inputs: list[Any], *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, *args)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        first = self.accelerator.process_index * len(inputs)
        self._rewards = weighted[first : first + len(inputs)]
        return rewards

    def _targets(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """Catalogue row of each row's target; −2, which no item has, where none is given."""
        if TARGET_SID_IDS not in rows[0]:
            return np.full(len(rows), -2)
        found = self._completed([row[TARGET_SID_IDS] for row in rows])
        return np.where(found < 0, -2, found)

    def _roll_out(
        self, rows: list[dict[str, Any]], group: int, attempts: int
    ) -> tuple[list[dict[str, Any]], np.ndarray, int]:
        """Groups of items, (rows, group); rows without a hit are exchanged where others hit.

        Returns:
            The rows, some of them exchanged; their items, best first; how many were exchanged.
        """
        rows, items, exchanged = list(rows), self._search(rows, group, 0), 0
        for attempt in range(1, attempts + 1):
            without = np.flatnonzero(~(items == self._targets(rows)[:, None]).any(1))
            if not len(without):
                break
            seed = batch_seed(self.args.seed, self._moment, self.accelerator.process_index, attempt)
            drawn = np.random.default_rng(seed).integers(len(self.train_dataset), size=len(without))
            others = [self.train_dataset[int(place)] for place in drawn]
            found = self._search(others, group, attempt)
            good = np.flatnonzero((found == self._targets(others)[:, None]).any(1))
            exchanged += len(good)
            for at, other in zip(without.tolist(), good.tolist(), strict=False):
                rows[at], items[at] = others[other], found[other]
        return rows, items, exchanged

    def _search(self, rows: list[dict[str, Any]], group: int, attempt: int) -> np.ndarray:
        """Items of each row's group, best first, (rows, group); each prompt is prefilled once."""
        prompts = encode_prompts(self._text_tokenizer, [row["prompt"] for row in rows])
        with self._engine() as engine:
            return self._items_behind(engine, prompts, rows, group, self._seed_of(attempt))

    def _seed_of(self, attempt: int) -> int:
        return batch_seed(self.args.seed, self._moment, self.accelerator.process_index, attempt)

    @contextmanager
    def _engine(self) -> Iterator[TorchEngine]:
        """The policy as it stands, for generating."""
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            yield TorchEngine(
                model, self.trie, self.sid_token_ids, self._tokenizer.pad_token_id, self.normalizer
            )

    def _items_behind(
        self,
        engine: TorchEngine,
        prompts: list[list[int]],
        rows: list[dict[str, Any]],
        group: int,
        seed: int,
    ) -> np.ndarray:
        """Items of the lists behind prompts that belong to rows, best first, (prompts, group)."""
        rollouts = self.objective.rollouts
        seen = [np.asarray(row[SEEN], dtype=np.int64) for row in rows] if SEEN in rows[0] else None
        n = n_drawn(rollouts, group, self.objective.oversample)
        width, sampler = max(n, self.beam_width), sampler_of(rollouts, seed)
        found = engine.search(prompts, n, width, seen, sampler=sampler)
        places = None
        if rollouts == "dynamic":
            places = chosen(found.items, self._targets(rows), group)
        items = best_first(found.items, found.scores, places)
        if (items < 0).any():
            raise ValueError(
                f"fewer than num_generations={group} items are left for some row after its "
                "filters; lower num_generations"
            )
        return items

    def hits_before(self, n_rows: int) -> dict[str, Any]:
        """How many items of a group hit, on a seeded sample of the training rows, as it stands.

        Returns:
            ``rows``, ``rollouts``, ``num_generations``, ``hits_per_group`` (number of hits ->
            groups) and ``groups_without_hit``, the share that teaches nothing by the rule reward.
        """
        order = np.random.default_rng(self.args.seed).permutation(len(self.train_dataset))[:n_rows]
        counts: Counter[int] = Counter()
        for start in range(0, len(order), _AT_ONCE):
            rows = [self.train_dataset[int(place)] for place in order[start : start + _AT_ONCE]]
            items = self._search(rows, self.num_generations, start)
            counts.update((items == self._targets(rows)[:, None]).sum(1).tolist())
        return {
            "rows": len(order),
            "rollouts": self.objective.rollouts,
            "num_generations": self.num_generations,
            "hits_per_group": {str(n): counts[n] for n in sorted(counts)},
            "groups_without_hit": counts[0] / max(len(order), 1),
        }

    def _learned_from(self, output: dict[str, Any], hits: np.ndarray, group: int) -> dict[str, Any]:
        """TRL's batch with our advantages, or with what the losses over groups need."""
        goal, rewards = self.objective, self._rewards
        is_hit = torch.from_numpy(hits).to(rewards.device)
        idle = without_difference(rewards, group)
        advantages = output["advantages"]
        if goal.pass_at_k and self.model.training:
            idle = idle & (is_hit == is_hit[:, :1]).all(1)
            advantages = with_pass_at_k_bonus(
                advantages, is_hit, goal.pass_at_k, goal.pass_at_k_weight
            )
        if goal.credit == "level":
            tokens = output["completion_ids"][:, : self.trie.n_levels]
            advantages = F.pad(level_advantages(advantages, tokens, group), (0, 1))  # EOS: nothing
        output["advantages"] = advantages
        self._leave_out(output, idle, group)
        if goal.loss != "grpo":
            output["rewards"], output["is_target"] = rewards, is_hit.view(-1)
        return output

    def _leave_out(self, output: dict[str, Any], idle: Tensor, group: int) -> None:
        """Log the share of groups without advantages (groups,) and, if asked for, filter them."""
        share = self._note({"zero_advantage": idle.float().mean().item()})["zero_advantage"]
        if not self.objective.filter_groups:
            return
        left = (~idle).repeat_interleave(group).long().unsqueeze(1)
        output["tool_mask"] = output.get("tool_mask", output["completion_mask"]) * left
        if share < 1 and self.args.loss_type != "bnpo":  # which counts what is left itself
            # Of the whole loss, its KL term too; a number for each completion, as TRL splits them.
            output["loss_scale"] = torch.full_like(left[:, 0], 1 / (1 - share), dtype=torch.float)

    def _note(self, values: dict[str, float]) -> dict[str, float]:
        """Log values through TRL, averaged over processes, which they are given back as."""
        stacked = torch.tensor([float(v) for v in values.values()], device=self.accelerator.device)
        means = self.accelerator.reduce(stacked, reduction="mean").tolist()
        mode = "train" if self.model.training else "eval"
        for name, mean in zip(values, means, strict=True):
            self._metrics[mode][name].append(mean)
        return dict(zip(values, means, strict=True))

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss = self._rl_loss(model, inputs)
        if "loss_scale" in inputs:
            loss = loss * inputs["loss_scale"][0]
        if "target_ids" in inputs:
            own = self.objective.sft_weight * self._sft_loss(model, inputs)
            loss = loss + own / self.current_gradient_accumulation_steps
        return loss

    def _sft_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean −log π over completions of their prompts' targets, each prompt computed once.

        TRL scatters a prompt's completions over the micro-batches of a step, whose mean is then the
        mean over prompts.
        """
        rows = torch.cat([inputs["prompt_ids"], inputs["target_ids"]], 1)
        _, place, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
        first = _first_places(place)
        targets = inputs["target_ids"][first]
        behind = F.pad(targets, (0, 1), value=self._tokenizer.eos_token_id)
        ids = torch.cat([inputs["prompt_ids"][first], behind], 1)
        mask = torch.cat([inputs["prompt_mask"][first], torch.ones_like(behind)], 1)
        log_probs, _ = self._score_completions(self._sid_logits(model, ids, mask), targets)
        loss = -(log_probs.sum(1) * counts).sum() / len(rows)
        self._note({"sft_loss": loss.item()})
        return loss

    def _rl_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.objective.loss == "grpo":
            return super()._compute_loss(model, inputs)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        made, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, mask, self._n_completion, compute_entropy=True
        )
        assert entropies is not None
        reference = inputs.get("ref_per_token_logps")
        values: dict[str, float] = {"entropy": entropies.mean().item()}
        kl = made.new_zeros(())
        if reference is not None:
            kl = (torch.exp(reference - made) - (reference - made) - 1).mean()
            values["kl"] = kl.item()
        items = made.sum(1).view(-1, self._group)
        if self.objective.loss == "listwise":
            rewards = inputs["rewards"].view(items.shape)
            loss = listwise_loss(items, rewards, self.objective.listwise_temperature)
            loss = loss + self.beta * kl
        else:
            assert reference is not None, "beta is above 0"
            own = inputs["is_target"].view(items.shape)
            loss = sdpo_loss(items, reference.sum(1).view(items.shape), own, self.beta)
        self._note(values)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)

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
        """Log-probabilities of SID tokens under the declared normaliser; EOS counts as certain.

        Returns:
            Log-probabilities (N, L + 1), entropies over the allowed children (N, L + 1), None.
        """
        assert logits_to_keep == self._n_completion, "completions are one SID and EOS"
        step = batch_size or len(input_ids)
        log_probs, entropies, masses = [], [], list[float]()
        for start in range(0, len(input_ids), step):
            ids, mask = input_ids[start : start + step], attention_mask[start : start + step]
            with self.accelerator.autocast():
                logits = self._sid_logits(model, ids, mask)
            made = ids[:, -logits_to_keep:-1]
            if compute_entropy and start == 0:  # it is the loss that asks
                masses = self._valid_mass(logits[:LOOKED_AT], made[:LOOKED_AT])
            lp, entropy = self._score_completions(logits, made)
            log_probs.append(lp)
            entropies.append(entropy)
        if not compute_entropy:
            return torch.cat(log_probs), None, None
        entropy = torch.cat(entropies)
        self._note_levels(entropy[:, :-1], masses)
        return torch.cat(log_probs), entropy, None

    def _sid_logits(self, model: torch.nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of each level behind prompts and the codes before, (N, L, V).

        Completions of a group share their prompt, which is nearly all of a row: it is run once, and
        its keys and values serve all of them, in the backward pass too.

        Args:
            model: the policy or the reference.
            ids: prompts, padded on the left, and completions, (N, P + L + 1).
            mask: of the same shape.
        """
        n_levels, n_prompt = self.trie.n_levels, ids.shape[1] - self._n_completion
        # TRL pads on the left; the search counts positions from the prompt's start.
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        known = ids[:, :n_prompt].masked_fill(mask[:, :n_prompt] == 0, -1)
        prompts, place = known.unique(dim=0, return_inverse=True)
        plain = self.accelerator.unwrap_model(model)
        checkpointed = getattr(plain, "is_gradient_checkpointing", False) and model.training
        if checkpointed or n_levels == 1 or 2 * len(prompts) > len(ids):
            return model(
                # The last code and EOS predict nothing that is scored.
                input_ids=ids[:, :-2],
                attention_mask=mask[:, :-2],
                position_ids=position[:, :-2],
                logits_to_keep=n_levels,
            ).logits
        first = _first_places(place)
        shared = model(
            input_ids=ids[first, :n_prompt],
            attention_mask=mask[first, :n_prompt],
            position_ids=position[first, :n_prompt],
            past_key_values=DynamicCache(),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = shared.past_key_values
        cache.batch_select_indices(place)
        behind = model(
            input_ids=ids[:, n_prompt:-2],
            attention_mask=mask[:, :-2],
            position_ids=position[:, n_prompt:-2],
            past_key_values=cache,
            use_cache=True,
        )
        return torch.cat([shared.logits[place], behind.logits], dim=1)

    def _note_levels(self, entropies: Tensor, masses: list[float]) -> None:
        """Log entropies (N, L) and the valid mass of each level."""
        named = {"level_entropy": entropies.detach().mean(0).tolist(), "valid_mass": masses}
        self._note({f"{n}/{i + 1}": v for n, vs in named.items() for i, v in enumerate(vs)})

    def _score_completions(self, logits: Tensor, sid_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (N, L + 1) of SIDs (N, L) from logits (N, L, V)."""
        log_probs, entropies = [], []
        for level, above, own in self._path(sid_tokens):
            columns = normalize(logits[:, level : level + 1], self._sid_ids[level], self.normalizer)
            order, scored, mixed = [], [], []
            for rows, codes, exists, place in self._tensors.siblings(level, above, own):
                behind = columns if len(rows) == len(own) else columns[rows]
                scores = child_log_probs(behind[:, 0], codes, exists, self.normalizer)
                allowed = scores.log_softmax(-1)
                order.append(rows)
                scored.append(scores.gather(-1, place).flatten())
                mixed.append(-(allowed.exp() * allowed.masked_fill(~exists, 0.0)).sum(-1))
            back = torch.cat(order).argsort()
            log_probs.append(torch.cat(scored)[back])
            entropies.append(torch.cat(mixed)[back])
        zero = torch.zeros_like(log_probs[0])
        return torch.stack([*log_probs, zero], 1), torch.stack([*entropies, zero], 1)

    def _path(self, sid_tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Per level the nodes before and at each SID's code, (N,) each; SIDs are (N, L)."""
        codes = self._code_of_token[sid_tokens]
        above = torch.zeros(len(codes), dtype=torch.int64, device=codes.device)
        for level in range(self.trie.n_levels):
            own, found = self._tensors.follow(level, above, codes[:, level])
            if not found.all():
                raise ValueError(
                    "a rollout left the trie; it was not made by this trainer's search"
                )
            yield level, above, own
            above = own

    @torch.no_grad()
    def _valid_mass(self, logits: Tensor, sid_tokens: Tensor) -> list[float]:
        """Per level the mean probability, over the whole vocabulary, of what the trie allows."""
        masses = []
        for level, above, own in self._path(sid_tokens):
            full, total = logits[:, level].float(), 0.0
            for rows, codes, exists, _ in self._tensors.siblings(level, above, own):
                allowed = full[rows].gather(1, self._sid_ids[level][codes])
                allowed = allowed.masked_fill(~exists, -torch.inf).logsumexp(1)
                total += (allowed - full[rows].logsumexp(1)).exp().sum().item()
            masses.append(total / len(own))
        return masses


def _first_places(numbers: Tensor) -> Tensor:
    """Where each of the numbers 0, 1, … stands first in `numbers`, which holds them all."""
    places = torch.arange(len(numbers), device=numbers.device)
    first = torch.full((int(numbers.max()) + 1,), len(numbers), device=numbers.device)
    return first.scatter_reduce_(0, numbers, places, "amin")
