"""TRL's GRPOTrainer with constrained-beam rollouts and log-probabilities over the trie.

The only module that touches TRL's experimental hooks. Two of them are overridden: generation (a
group is the beam: distinct, valid items, best first), and the policy's log-probabilities,
renormalised over what the trie allows. With full-vocabulary log-probabilities, negative advantages
push mass onto tokens that can never be produced, which the search doesn't see and the loss rewards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from genrec.columns import SEEN
from genrec.decoding.beam import Normalizer, child_log_probs, normalize
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import TrieTensors
from genrec.modeling import encode_prompts


class BeamGRPOTrainer(GRPOTrainer):
    """GRPO whose rollouts are the served beam search.

    Dataset columns beside `prompt`: what the reward functions read (`target_sid_ids`), and
    optionally `seen_item_index`, the catalogue rows that evaluation would filter for this row.

    Args:
        trie: trie of the SID map.
        sid_token_ids: per level the token id of each code.
        normalizer: of the policy's log-probabilities; "trie" is the one that stays stable.
        beam_width: prefixes kept per level; at least `num_generations`.
        **kwargs: GRPOTrainer's own arguments.

    Raises:
        ValueError: settings under which beam rollouts would be wrong.
    """

    def __init__(
        self,
        *,
        trie: SidTrie,
        sid_token_ids: list[list[int]],
        beam_width: int,
        normalizer: Normalizer = "trie",
        **kwargs: Any,
    ) -> None:
        args = kwargs["args"]
        per_process = args.per_device_train_batch_size * args.steps_per_generation
        if per_process % args.num_generations:
            raise ValueError(
                f"per_device_train_batch_size x steps_per_generation = {per_process} splits "
                "groups of "
                f"num_generations={args.num_generations} over processes; make it a multiple"
            )
        if args.temperature != 1.0:
            raise ValueError(
                f"temperature={args.temperature}: beam rollouts are those of temperature 1.0"
            )
        if not args.num_generations <= min(beam_width, trie.n_items):
            raise ValueError(
                f"num_generations={args.num_generations} exceeds beam_width={beam_width} or the "
                f"{trie.n_items} items of the catalogue"
            )
        super().__init__(**kwargs)
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
        levels = list(enumerate(sid_token_ids))
        codes = trie.codes()
        self._item_tokens = np.stack(
            [np.array(ids)[codes[:, level]] for level, ids in levels], axis=1
        )
        # Beyond the SID itself a completion holds EOS alone: it is what TRL calls "terminated".
        self._n_completion = trie.n_levels + 1
        self._rows: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs  # generation sees only prompts; the filters are columns of the rows
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return encode_prompts(self._text_tokenizer, prompts), None, {}

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], None]:
        """Beam rollouts: each distinct prompt is searched once and gives its whole group."""
        first = prompt_ids[::num_generations]
        rows = self._rows[::num_generations]
        seen = [np.asarray(row[SEEN], dtype=np.int64) for row in rows] if SEEN in rows[0] else None
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            engine = TorchEngine(
                model, self.trie, self.sid_token_ids, self._tokenizer.pad_token_id, self.normalizer
            )
            items = engine.search(first, num_generations, self.beam_width, seen).items
        if (items < 0).any():
            raise ValueError(
                f"fewer than num_generations={num_generations} items are left for some row after "
                "its "
                "filters; lower num_generations"
            )
        eos = self._tokenizer.eos_token_id
        return [[*row, eos] for row in self._item_tokens[items.ravel()].tolist()], None

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
        log_probs, entropies = [], []
        for start in range(0, len(input_ids), step):
            ids, mask = input_ids[start : start + step], attention_mask[start : start + step]
            with self.accelerator.autocast():
                # The last code and EOS predict nothing that is scored.
                logits = model(
                    input_ids=ids[:, :-2],
                    attention_mask=mask[:, :-2],
                    # TRL pads on the left; the search counts positions from the prompt's start.
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-2],
                    logits_to_keep=self.trie.n_levels,
                ).logits
            lp, entropy = self._score_completions(logits, ids[:, -logits_to_keep:-1])
            log_probs.append(lp)
            entropies.append(entropy)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _score_completions(self, logits: Tensor, sid_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (N, L + 1) of SIDs (N, L) from logits (N, L, V)."""
        codes = self._code_of_token[sid_tokens]
        node = torch.zeros(len(codes), 1, dtype=torch.int64, device=codes.device)
        log_probs, entropies = [], []
        for level in range(self.trie.n_levels):
            child, exists = self._tensors.expand(level, node)  # (N, 1, M)
            child_codes = self._tensors.codes(level, child)
            columns = normalize(logits[:, level : level + 1], self._sid_ids[level], self.normalizer)
            scores = child_log_probs(columns, child_codes, exists, self.normalizer)
            match = (child_codes == codes[:, level].view(-1, 1, 1)) & exists
            if not match.any(-1).all():
                raise ValueError(
                    "a rollout left the trie; it was not made by this trainer's search"
                )
            at = match.int().argmax(-1, keepdim=True)
            log_probs.append(scores.gather(-1, at).flatten())
            allowed = scores.log_softmax(-1)
            entropies.append(-(allowed.exp() * allowed.masked_fill(~exists, 0.0)).sum(-1).flatten())
            node = child.gather(-1, at).squeeze(-1)
        zero = torch.zeros_like(log_probs[0])
        return torch.stack([*log_probs, zero], 1), torch.stack([*entropies, zero], 1)
