"""Beam rollouts and trie-normalised log-probabilities inside TRL's GRPOTrainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from genrec.adapters import expose_head_bias, lora_config
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.modeling import add_sid_tokens, encode_prompts
from genrec.rewards import make_rank_reward, rule_reward
from genrec.rollouts import BeamGRPOTrainer

N_ITEMS = 20


class World:
    """A catalogue of 20 items; the next item is a fixed function of the last one."""

    def __init__(
        self, tiny, folder: Path, tied: bool = True, bos: bool = False, prompts: int = N_ITEMS
    ):
        self.semantic_ids, self.tokenizer = tiny.sids(N_ITEMS), tiny.tokenizer(bos)
        self.trie = SidTrie.build(self.semantic_ids.codes)
        self.token_ids = add_sid_tokens(self.tokenizer, self.semantic_ids)
        self.folder = folder
        # A reference model is loaded from a folder, as the recipe's is.
        if not (folder / "model").exists():
            tiny.lm(len(self.tokenizer), tied).save_pretrained(folder / "model")
        self.model = type(tiny.lm(64, tied)).from_pretrained(folder / "model", dtype="float32")
        sids = self.semantic_ids.sids().to_list()
        self.prompts = [f"Bought so far, oldest first: {sids[i]}" for i in range(prompts)]
        self.targets = np.array([(7 * i + 3) % N_ITEMS for i in range(prompts)])
        codes = self.semantic_ids.codes
        self.columns: dict = {
            "prompt": self.prompts,
            "target_sid_ids": [
                [self.token_ids[level][c] for level, c in enumerate(codes[t].tolist())]
                for t in self.targets
            ],
        }

    def engine(self, model=None, normalizer: str = "trie") -> TorchEngine:
        model = self.model if model is None else model
        return TorchEngine(
            model, self.trie, self.token_ids, self.tokenizer.pad_token_id, normalizer
        )

    def trainer(
        self,
        group: int = 4,
        beam_width: int = 10,
        normalizer: str = "trie",
        peft=None,
        rewards=None,
        **changes,
    ) -> BeamGRPOTrainer:
        settings = dict(
            output_dir=str(self.folder / "out"),
            num_generations=group,
            per_device_train_batch_size=2 * group,
            max_completion_length=4,
            learning_rate=1e-3,
            beta=0.0,
            loss_type="dr_grpo",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            max_steps=1,
            disable_tqdm=True,
            seed=0,
            lr_scheduler_type="constant",
        )
        trainer = BeamGRPOTrainer(
            trie=self.trie,
            sid_token_ids=self.token_ids,
            beam_width=beam_width,
            normalizer=normalizer,
            model=self.model,
            args=GRPOConfig(**{**settings, **changes}),
            reward_funcs=rewards or [rule_reward, make_rank_reward(group)],
            train_dataset=Dataset.from_dict(self.columns),
            processing_class=self.tokenizer,
            peft_config=peft,
        )
        expose_head_bias(trainer.model)
        return trainer

    def items_of(self, completions: list[list[int]]) -> np.ndarray:
        """Catalogue rows of completions; fails unless each is one SID and EOS."""
        rows = []
        for ids in completions:
            *sid, eos = ids
            assert eos == self.tokenizer.eos_token_id and len(sid) == 3
            codes = [self.token_ids[level].index(token) for level, token in enumerate(sid)]
            row = self.semantic_ids.index_of(codes)
            assert row is not None
            rows.append(row)
        return np.array(rows)


@pytest.fixture
def world(tiny, tmp_path: Path) -> World:
    return World(tiny, tmp_path)


def inputs_of(world: World, rows: list[int], group: int) -> list[dict]:
    return [
        {name: column[row] for name, column in world.columns.items()}
        for row in rows
        for _ in range(group)
    ]


def rollouts(trainer: BeamGRPOTrainer, inputs: list[dict]) -> dict:
    trainer.model.train()
    return trainer._generate_and_score_completions(inputs)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("filtered", [False, True])
def test_rollouts_are_the_served_beam(tiny, tmp_path: Path, bos: bool, filtered: bool):
    world = World(tiny, tmp_path, bos=bos)
    seen = [[int(t) for t in range(row % 5)] for row in range(N_ITEMS)]
    if filtered:
        world.columns["seen_item_index"] = seen
    trainer = world.trainer()
    rows = [3, 0, 4, 4]
    out = rollouts(trainer, inputs_of(world, rows, 4))
    made = world.items_of(out["completion_ids"].tolist()).reshape(4, 4)
    ids = encode_prompts(world.tokenizer, [world.prompts[r] for r in rows])
    excluded = [np.array(seen[r], dtype=np.int64) for r in rows] if filtered else None
    served = world.engine().search(ids, 4, 10, excluded)
    assert (made == served.items).all()  # the same items, best first
    for row, items in zip(rows, made, strict=True):
        assert len(set(items)) == 4
        if filtered:
            assert not set(items) & set(seen[row])
    # The prompt that is scored is the prompt that was searched.
    mask = out["prompt_mask"].bool()
    assert [p[m].tolist() for p, m in zip(out["prompt_ids"], mask, strict=True)] == [
        i for i in ids for _ in range(4)
    ]
    assert out["completion_mask"].bool().all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("normalizer", ["trie", "full", "level"])
def test_log_probs_are_those_of_the_engine(tiny, tmp_path: Path, normalizer: str, tied: bool):
    world = World(tiny, tmp_path, tied)
    world.columns["prompt"][1] += "".join(world.semantic_ids.sids()[2:7])  # another length: padding
    trainer = world.trainer(normalizer=normalizer, num_iterations=2)
    rows = [0, 1, 2]
    out = rollouts(trainer, inputs_of(world, rows, 4))
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    with torch.no_grad():
        got, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model.eval(), ids, mask, 4, batch_size=5, compute_entropy=True
        )
    items = world.items_of(out["completion_ids"].tolist()).reshape(3, 4)
    prompts = encode_prompts(world.tokenizer, [world.columns["prompt"][r] for r in rows])
    expected = world.engine(normalizer=normalizer).score(prompts, items)
    assert got.shape == (12, 4) and (got[:, 3] == 0).all()
    np.testing.assert_allclose(got[:, :3].numpy().reshape(3, 4, 3), expected, atol=2e-5)
    assert entropy is not None and (entropy >= -1e-6).all() and (entropy[:, :3].max() > 0)
    assert entropy.max() <= np.log(4) + 1e-5 and (entropy[:, 3] == 0).all()


def test_trie_normalised_log_probs_leave_other_tokens_alone(world: World):
    trainer = world.trainer()
    vocab = len(world.tokenizer)
    rows = [0, 5, 11]
    codes = torch.from_numpy(world.semantic_ids.codes[rows]).long()
    tokens = torch.stack(
        [torch.tensor(world.token_ids[level])[codes[:, level]] for level in range(3)], 1
    )
    for normalizer in ("trie", "full"):
        trainer.normalizer = normalizer
        logits = torch.randn(
            3, 3, vocab, generator=torch.Generator().manual_seed(0), requires_grad=True
        )
        log_probs, _ = trainer._score_completions(logits, tokens)
        (-log_probs.sum()).backward()  # what a negative advantage does
        gradient = logits.grad
        assert gradient is not None and torch.isfinite(gradient).all()
        allowed = torch.zeros_like(gradient, dtype=torch.bool)
        every = world.semantic_ids.codes
        for row, code in enumerate(codes.numpy()):
            for level in range(3):
                same = (every[:, :level] == code[:level]).all(1)
                children = np.unique(every[same, level])
                allowed[row, level, [world.token_ids[level][c] for c in children]] = True
        outside = gradient[~allowed].abs().max()
        assert (outside == 0) == (normalizer == "trie")
        assert gradient[allowed].abs().max() > 0


def test_a_completion_outside_the_trie_is_refused(world: World):
    trainer = world.trainer()
    free = next(c for c in np.ndindex(4, 4, 4) if world.semantic_ids.index_of(c) is None)
    tokens = torch.tensor([[world.token_ids[level][c] for level, c in enumerate(free)]])
    with pytest.raises(ValueError, match="left the trie"):
        trainer._score_completions(torch.randn(1, 3, len(world.tokenizer)), tokens)


def test_rewards_belong_to_rows_that_share_a_prompt(world: World):
    world.columns["prompt"] = [world.prompts[0]] * N_ITEMS
    trainer = world.trainer(rewards=[rule_reward])
    (ids,) = encode_prompts(world.tokenizer, [world.prompts[0]])
    best = world.engine().search([ids], 4, 10).items[0]
    owner = {int(t): r for r, t in enumerate(world.targets)}
    rows = [owner[int(best[0])], owner[int(best[2])]]
    seen: list[list[float]] = []
    calculate = trainer._calculate_rewards

    def spy(*args):
        rewards = calculate(*args)
        seen.append(rewards.flatten().tolist())
        return rewards

    trainer._calculate_rewards = spy  # type: ignore[method-assign]
    rollouts(trainer, inputs_of(world, rows, 4))
    assert seen == [[1, 0, 0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("lora", [False, True])
def test_first_step_kl_is_zero_from_a_merged_start(world: World, lora: bool):
    peft = lora_config(world.model, world.token_ids, 4, 8) if lora else None
    trainer = world.trainer(peft=peft, beta=0.1, max_steps=3, learning_rate=1e-2)
    trainer.train()
    kl = [e["kl"] for e in trainer.state.log_history if "kl" in e]
    assert abs(kl[0]) < 1e-6
    assert max(kl[1:]) > 1e-5  # and it is measured: after a step the policy has moved


def test_training_mode_and_eval_mode(world: World):
    trainer = world.trainer()
    rollouts(trainer, inputs_of(world, [0, 1], 4))
    assert trainer.model.training  # the search restores what it found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.7}, r"temperature=0.7: beam rollouts are those of temperature 1.0"),
        ({"group": 4, "beam_width": 3}, "num_generations=4 exceeds beam_width=3 or the 20 items"),
        (
            {"group": 24, "beam_width": 50},
            "num_generations=24 exceeds beam_width=50 or the 20 items",
        ),
        ({"per_device_train_batch_size": 6}, r"num_generations"),
        (
            {"per_device_train_batch_size": 2, "steps_per_generation": 3, "group": 4},
            "num_generations|generation_batch_size",
        ),
    ],
)
def test_settings_under_which_rollouts_would_be_wrong(world: World, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        world.trainer(**changes)


def test_groups_may_not_be_split_over_processes(world: World):
    # As a second process would see it: the global batch holds whole groups, the own part doesn't.
    args = GRPOConfig(
        output_dir=str(world.folder),
        num_generations=4,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
    )
    args.per_device_train_batch_size = 2
    with pytest.raises(ValueError, match="= 2 splits groups of num_generations=4 over processes"):
        BeamGRPOTrainer(
            trie=world.trie,
            sid_token_ids=world.token_ids,
            beam_width=10,
            model=world.model,
            args=args,
            reward_funcs=[rule_reward],
            train_dataset=Dataset.from_dict(world.columns),
            processing_class=world.tokenizer,
        )


def test_fewer_items_than_a_group_after_the_filter(world: World):
    world.columns["seen_item_index"] = [list(range(17))] * N_ITEMS
    with pytest.raises(ValueError, match="fewer than num_generations=4 items are left"):
        rollouts(world.trainer(), inputs_of(world, [0, 1], 4))


def hit_rate(world: World, model) -> float:
    ids = encode_prompts(world.tokenizer, world.prompts)
    best = world.engine(model).search(ids, 1, 20).items[:, 0]
    return float((best == world.targets).mean())


def test_rl_learns_a_toy_world(world: World):
    before = hit_rate(world, world.model)
    trainer = world.trainer(
        group=8, beam_width=20, per_device_train_batch_size=80, max_steps=80, learning_rate=3e-3
    )
    trainer.train()
    after = hit_rate(world, trainer.model)
    assert before <= 0.2
    assert after >= 0.6, (before, after)
