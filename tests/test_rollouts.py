"""Beam rollouts and trie-normalised log-probabilities inside TRL's GRPOTrainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from genrec.adapters import expose_head_bias, lora_config
from genrec.advantages import level_advantages, pass_at_k_advantages
from genrec.artifacts import read_json
from genrec.averaging import WeightAverage
from genrec.decoding import trie_tensors
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.collapse import CollapseStop
from genrec.evaluation.validation import BeamValidation
from genrec.modeling import add_sid_tokens, encode_prompts
from genrec.normalizers import NORMALIZERS
from genrec.rewards import make_rank_reward, prefix_reward, rule_reward
from genrec.rollouts import BeamGRPOTrainer, Objective
from genrec.semantic_ids import SemanticIds

N_ITEMS = 20


class World:
    """A catalogue of 20 items; the next item is a fixed function of the last one."""

    def __init__(
        self,
        tiny,
        folder: Path,
        tied: bool = True,
        bos: bool = False,
        prompts: int = N_ITEMS,
        sids: SemanticIds | None = None,
    ):
        self.semantic_ids, self.tokenizer = sids or tiny.sids(N_ITEMS), tiny.tokenizer(bos)
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
        objective: Objective | None = None,
        average: WeightAverage | None = None,
        **changes,
    ) -> BeamGRPOTrainer:
        settings = dict(
            output_dir=str(self.folder / "out"),
            num_generations=group,
            per_device_train_batch_size=2 * group,
            max_completion_length=len(self.token_ids) + 1,
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
            objective=objective,
            average=average,
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
            assert eos == self.tokenizer.eos_token_id and len(sid) == len(self.token_ids)
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


@pytest.mark.parametrize(
    ("normalizer", "tied", "cut"),
    [
        *((normalizer, tied, False) for normalizer in NORMALIZERS for tied in (True, False)),
        ("trie", True, True),
        ("full", True, True),
    ],
)
def test_log_probs_are_those_of_the_engine(
    tiny, tmp_path: Path, monkeypatch, normalizer: str, tied: bool, cut: bool
):
    if cut:  # prefixes with one child apart from the others
        monkeypatch.setattr(trie_tensors, "_row_lengths", lambda n, _: [1, max(2, int(n.max()))])
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


def logged(trainer: BeamGRPOTrainer, name: str) -> list[float]:
    return trainer._metrics["train"][name]


@pytest.mark.parametrize("choice", ["sample", "gumbel", "dynamic"])
def test_sampled_rollouts(world: World, choice: str):
    trainer = world.trainer(group=6, objective=Objective(rollouts=choice, oversample=3))
    out = rollouts(trainer, inputs_of(world, [0, 1, 2, 3], 6))
    made = world.items_of(out["completion_ids"].tolist()).reshape(4, 6)
    prompts = encode_prompts(world.tokenizer, world.prompts[:4])
    scores = world.engine().score(prompts, made).sum(-1)
    assert (np.diff(scores) <= 1e-5).all()  # best first, as the rank reward reads them
    if choice == "gumbel":
        assert all(len(set(group)) == 6 for group in made.tolist())
    else:
        everything = world.engine().score(prompts, np.tile(np.arange(N_ITEMS), (4, 1))).sum(-1)
        assert np.allclose(np.exp(everything).sum(1), 1, atol=1e-4)  # what is drawn from
    again = rollouts(trainer, inputs_of(world, [0, 1, 2, 3], 6))["completion_ids"]
    assert (again == out["completion_ids"]).all()  # the same step draws the same
    trainer.state.global_step = 1
    other = rollouts(trainer, inputs_of(world, [0, 1, 2, 3], 6))["completion_ids"]
    assert (other != out["completion_ids"]).any()


def test_samples_are_those_of_the_policy(world: World):
    world.columns = {name: column[:1] * 2 for name, column in world.columns.items()}
    trainer = world.trainer(group=8, objective=Objective(rollouts="sample"))
    counts = np.zeros(N_ITEMS)
    for step in range(60):
        trainer.state.global_step = step
        counts += np.bincount(
            trainer._search([inputs_of(world, [0], 1)[0]], 8, 0)[0], minlength=N_ITEMS
        )
    (ids,) = encode_prompts(world.tokenizer, [world.prompts[0]])
    chance = np.exp(world.engine().score([ids], np.arange(N_ITEMS)[None]).sum(-1)[0])
    deviation = np.sqrt(480 * chance * (1 - chance))
    assert (np.abs(counts - 480 * chance) <= 4 * deviation + 1).all()


def test_dynamic_sampling_finds_more_hits_and_repeats_less(world: World):
    inputs = inputs_of(world, list(range(N_ITEMS)), 6)
    hits, distinct = {}, {}
    for choice in ("sample", "dynamic"):
        trainer = world.trainer(group=6, objective=Objective(rollouts=choice, oversample=3))
        out = rollouts(trainer, inputs)
        made = world.items_of(out["completion_ids"].tolist()).reshape(N_ITEMS, 6)
        hits[choice] = (made == world.targets[:, None]).any(1).mean()
        distinct[choice] = np.mean([len(set(group)) for group in made.tolist()])
        assert logged(trainer, "groups_without_hit")[-1] == pytest.approx(1 - hits[choice])
        assert logged(trainer, "invalid")[-1] == 0.0
    assert hits["dynamic"] > hits["sample"] and distinct["dynamic"] > distinct["sample"]


def raw_and(world: World, objective: Objective, rows: list[int], **changes) -> tuple[dict, dict]:
    """The same rollouts under TRL's own advantages and under an objective's."""
    made = []
    for goal in (Objective(), objective):
        trainer = world.trainer(objective=goal, **changes)
        made.append(rollouts(trainer, inputs_of(world, rows, trainer.num_generations)))
    assert (made[0]["completion_ids"] == made[1]["completion_ids"]).all()
    return made[0], made[1]


def hits_in(world: World, out: dict, rows: list[int], group: int) -> torch.Tensor:
    made = world.items_of(out["completion_ids"].tolist()).reshape(-1, group)
    return torch.from_numpy(made == world.targets[rows][:, None])


def test_advantages_are_trls_with_what_is_asked_for(world: World):
    rows = list(range(N_ITEMS))
    plain, bonus = raw_and(world, Objective(pass_at_k=2, pass_at_k_weight=0.5), rows)
    hits = hits_in(world, plain, rows, 4)
    assert 0 < hits.any(1).sum() < len(rows)
    expected = plain["advantages"] + 0.5 * pass_at_k_advantages(hits, 2).view(-1)
    torch.testing.assert_close(bonus["advantages"], expected)
    plain, level = raw_and(world, Objective(credit="level"), rows, rewards=[prefix_reward])
    assert level["advantages"].shape == level["completion_ids"].shape
    torch.testing.assert_close(level["advantages"].sum(1), plain["advantages"])
    parts = level_advantages(plain["advantages"], plain["completion_ids"][:, :3], 4)
    torch.testing.assert_close(level["advantages"][:, :3], parts)


def test_groups_without_a_difference_count_nothing(world: World):
    rows = list(range(N_ITEMS))
    plain, out = raw_and(world, Objective(filter_groups=True), rows)
    keep = hits_in(world, plain, rows, 4).any(1)
    share = 1 - keep.float().mean()
    kept = keep.repeat_interleave(4)
    assert (out["tool_mask"].any(1) == kept).all() and (out["tool_mask"][kept] == 1).all()
    torch.testing.assert_close(out["advantages"], plain["advantages"])
    # The loss is the mean over what is left, its KL term included.
    for beta in (0.0, 0.5):
        trainer = world.trainer(objective=Objective(filter_groups=True), beta=beta)
        trainer.current_gradient_accumulation_steps = 1
        plain_trainer = world.trainer(beta=beta)
        plain_trainer.current_gradient_accumulation_steps = 1
        far = {} if not beta else {"ref_per_token_logps": torch.full((len(kept), 4), -3.0)}
        loss = trainer._compute_loss(trainer.model, {**out, **far})
        only = {
            name: value[kept] if value.dim() and len(value) == len(kept) else value
            for name, value in {**plain, **far}.items()
        }
        expected = plain_trainer._compute_loss(plain_trainer.model, only)
        torch.testing.assert_close(loss, expected)
        assert not beta or loss.abs() > 0.1
    rollouts(trainer, inputs_of(world, rows, 4))
    assert logged(trainer, "zero_advantage")[-1] == pytest.approx(float(share))


def test_rows_without_a_hit_are_exchanged_with_all_their_columns(world: World):
    rows = list(range(10))
    without = world.trainer()
    rollouts(without, inputs_of(world, rows, 4))
    trainer = world.trainer(objective=Objective(resample=6))
    seen: list[tuple[list, list]] = []
    calculate = trainer._calculate_rewards

    def spy(inputs, prompts, *args):
        seen.append(([row["target_sid_ids"] for row in inputs], prompts))
        return calculate(inputs, prompts, *args)

    trainer._calculate_rewards = spy  # type: ignore[method-assign]
    rollouts(trainer, inputs_of(world, rows, 4))
    before, after = (logged(t, "groups_without_hit")[-1] for t in (without, trainer))
    assert after < before and logged(trainer, "resampled")[-1] == pytest.approx(before - after)
    own = dict(zip(world.prompts, world.columns["target_sid_ids"], strict=True))
    ((targets, prompts),) = seen
    assert targets == [own[prompt] for prompt in prompts]


def test_a_group_shares_its_prompt_forwards_and_backwards(world: World):
    """Prompts of unlike lengths, groups scattered over the batch as TRL shuffles them."""
    rows = [0, 1, 2, 3, 4]
    world.columns["prompt"] = [
        ("Bought a lot. " * (i % 3)) + prompt for i, prompt in enumerate(world.prompts)
    ]
    trainer = world.trainer(group=4)
    out = rollouts(trainer, inputs_of(world, rows, 4))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)[order]
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)[order]
    assert (mask[:, 0] == 0).any() and (mask[:, 0] == 1).any()
    seen, forward = [], trainer.model.forward

    def counted(*args, **kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    trainer.model.forward = counted
    found = []
    for shared in (True, False):
        trainer.model.zero_grad()
        if shared:
            logits = trainer._sid_logits(trainer.model, ids, mask)
        else:  # row by row no prompt is shared
            parts = [
                trainer._sid_logits(trainer.model, i[None], m[None])
                for i, m in zip(ids, mask, strict=True)
            ]
            logits = torch.cat(parts)
        weight = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
        (logits.log_softmax(-1) * weight).mean().backward()
        grads = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        found.append((logits.detach(), grads))
    n_prompt = out["prompt_ids"].shape[1]
    assert seen[:2] == [(5, n_prompt), (20, 2)] and len(seen) == 22
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)


def test_checkpointed_models_run_whole_rows(world: World):
    trainer = world.trainer(group=4)
    out = rollouts(trainer, inputs_of(world, [0, 1], 4))
    trainer.model.gradient_checkpointing_enable()
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    trainer.model.train()
    assert trainer.model.is_gradient_checkpointing
    whole = trainer._sid_logits(trainer.model, ids, mask)
    trainer.model.eval()
    torch.testing.assert_close(trainer._sid_logits(trainer.model, ids, mask), whole)


def test_the_target_joins_groups_without_a_hit(world: World):
    rows = list(range(N_ITEMS))
    plain = world.trainer()
    before = rollouts(plain, inputs_of(world, rows, 4))
    old = world.items_of(before["completion_ids"].tolist()).reshape(-1, 4)
    trainer = world.trainer(objective=Objective(add_target=True))
    after = rollouts(trainer, inputs_of(world, rows, 4))
    new = world.items_of(after["completion_ids"].tolist()).reshape(-1, 4)
    missed = ~(old == world.targets[:, None]).any(1)
    assert missed.any() and not missed.all()
    assert (new[~missed] == old[~missed]).all() and (new[missed, :3] == old[missed, :3]).all()
    assert (new[missed, 3] == world.targets[missed]).all()
    # What is logged is what the policy found by itself.
    for name in ("hits_per_group", "groups_without_hit"):
        assert logged(trainer, name) == logged(plain, name)
    assert logged(trainer, "zero_advantage")[-1] == 0.0
    hit = torch.from_numpy((new == world.targets[:, None]).ravel())
    assert (after["advantages"][hit] > 0).all() and (after["advantages"][~hit] < 0).all()
    trainer.model.eval()  # validation groups are the policy's own
    shown = trainer._generate_and_score_completions(inputs_of(world, rows, 4))
    assert (world.items_of(shown["completion_ids"].tolist()).reshape(-1, 4) == old).all()


def test_the_supervised_loss_is_that_of_the_targets_once_per_prompt(world: World):
    rows = [0, 1, 2, 3]
    plain = rollouts(world.trainer(), inputs_of(world, rows, 4))
    trainer = world.trainer(objective=Objective(sft_weight=0.5))
    out = rollouts(trainer, inputs_of(world, rows, 4))
    prompts = encode_prompts(world.tokenizer, [world.prompts[row] for row in rows])
    expected = -world.engine().score(prompts, world.targets[rows][:, None]).sum(-1).mean()
    losses = []
    for one, batch in ((world.trainer(), plain), (trainer, out)):
        one.current_gradient_accumulation_steps = 2
        losses.append(one._compute_loss(one.model, dict(batch)).item())
    assert losses[1] - losses[0] == pytest.approx(0.5 * expected / 2, rel=1e-4)
    assert logged(trainer, "sft_loss")[-1] == pytest.approx(expected, rel=1e-4)
    # TRL scatters completions: a prompt weighs as much however they fall.
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    halves = [
        {name: value[part] for name, value in out.items() if value.dim() and len(value) == 16}
        for part in order.split(8)
    ]
    scattered = [trainer._sft_loss(trainer.model, half).item() for half in halves]
    assert sum(scattered) / 2 == pytest.approx(expected, rel=1e-4)


def test_the_supervised_loss_alone_learns_the_world(world: World):
    before, after, _ = train_hits(
        world, objective=Objective(sft_weight=1.0), rewards=[rule_reward], reward_weights=[0.0],
        max_steps=60,
    )  # fmt: skip
    assert before < 0.3 and after > 0.9


def train_hits(world: World, **changes) -> tuple[float, float, BeamGRPOTrainer]:
    before = hit_rate(world, world.model)
    settings = dict(group=8, beam_width=20, per_device_train_batch_size=80, max_steps=15)
    trainer = world.trainer(**{**settings, "learning_rate": 3e-3, **changes})
    trainer.train()
    return before, hit_rate(world, trainer.model), trainer


@pytest.mark.parametrize("loss", ["listwise", "sdpo"])
def test_losses_over_groups_learn(world: World, loss: str):
    before, after, trainer = train_hits(
        world, objective=Objective(loss=loss), beta=0.1 if loss == "sdpo" else 0.0
    )
    assert after > before + 0.2
    first = next(e for e in trainer.state.log_history if "loss" in e)
    if loss == "sdpo":  # the policy is the reference at first
        assert first["loss"] == pytest.approx(np.log(8), abs=1e-3)
        assert abs(first["kl"]) < 1e-6


@pytest.mark.parametrize("loss", ["listwise", "sdpo"])
def test_losses_over_groups_see_whole_groups_under_accumulation(world: World, loss: str):
    histories = []
    for batch, steps in ((16, 1), (8, 2)):
        world.model = type(world.model).from_pretrained(world.folder / "model", dtype="float32")
        trainer = world.trainer(
            objective=Objective(loss=loss),
            beta=0.1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=2,
            rewards=[prefix_reward],
        )
        trainer.train()
        histories.append([e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e])
    # Every group has a difference in prefix rewards or none is counted twice: S-DPO's mean is over
    # all groups, so that accumulation changes nothing.
    if loss == "sdpo":
        assert histories[0] == pytest.approx(histories[1], rel=1e-3)
    assert all(np.isfinite(histories[1])) and max(histories[1]) > 0


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (dict(loss="sdpo"), {}, "loss: sdpo with beta=0.0"),
        (dict(loss="listwise", rollouts="dynamic"), {}, "may hold an item twice"),
        (dict(loss="listwise", pass_at_k=2), {}, "belong to loss: grpo"),
        (
            dict(loss="listwise"),
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
            "whole groups in a batch",
        ),
        (dict(pass_at_k=5), {}, "pass_at_k=5 must lie between 1 and num_generations=4"),
        (dict(resample=-1), {}, "resample=-1 must be 0 or more"),
        (dict(sft_weight=-1.0), {}, "sft_weight=-1.0 must be 0 or more"),
        (dict(rollouts="gumbel"), {"normalizer": "full"}, "gumbel with normalizer full"),
    ],
)
def test_objectives_that_cannot_work(world: World, objective: dict, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        world.trainer(objective=Objective(**objective), **changes)


def test_an_average_of_the_weights_survives_a_resume(tiny, tmp_path: Path):
    """Stopped after two steps and resumed, it is what four steps in one go leave."""
    found = []
    for number, parts in enumerate(((4,), (2, 4))):
        for steps in parts:
            world, average = World(tiny, tmp_path / str(number)), WeightAverage(0.9)
            trainer = world.trainer(
                average=average, objective=Objective(sft_weight=1.0), max_steps=steps,
                save_strategy="steps", save_steps=2,
            )  # fmt: skip
            resume = steps == 4 and len(parts) == 2
            trainer.train(
                resume_from_checkpoint=str(world.folder / "out/checkpoint-2") if resume else None
            )
        last = [p.detach().clone() for p in trainer.model.parameters()]
        average.put_into(trainer.model)
        found.append([p.detach().clone() for p in trainer.model.parameters()])
        assert any((one != other).any() for one, other in zip(last, found[-1], strict=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_hits_before_training_are_counted(world: World):
    trainer = world.trainer(beam_width=20)
    found = trainer.hits_before(12)
    every = trainer.hits_before(100)
    prompts = encode_prompts(world.tokenizer, world.prompts)
    best = world.engine().search(prompts, 4, 20).items
    n_hits = int((best == world.targets[:, None]).sum())
    assert every["hits_per_group"] == {"0": N_ITEMS - n_hits, "1": n_hits}
    assert every["groups_without_hit"] == pytest.approx(1 - n_hits / N_ITEMS)
    assert found["rows"] == 12 == sum(found["hits_per_group"].values())
    assert (found["rollouts"], found["num_generations"]) == ("beam", 4)


def test_entropies_and_valid_mass_are_logged_per_level(world: World):
    trainer = world.trainer(max_steps=1)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "valid_mass/1" in e)
    entropies = [entry[f"level_entropy/{level}"] for level in (1, 2, 3)]
    assert all(0 <= value <= np.log(4) + 1e-5 for value in entropies)
    assert sum(entropies) / 4 == pytest.approx(entry["entropy"], abs=1e-5)  # EOS has none
    assert all(0 < entry[f"valid_mass/{level}"] < 1 for level in (1, 2, 3))
    # By hand: of uniform logits each token has 1 / V.
    sids = torch.tensor(world.columns["target_sid_ids"][:1])
    masses = trainer._valid_mass(torch.zeros(1, 3, 100 + int(sids.max())), sids)
    codes, own = world.semantic_ids.codes, world.semantic_ids.codes[world.targets[0]]
    for level, mass in enumerate(masses):
        below = codes[(codes[:, :level] == own[:level]).all(1), level]
        expected = len(set(below.tolist())) / (100 + int(sids.max()))
        assert mass == pytest.approx(expected, rel=1e-4)


def test_a_hybrid_index_of_unequal_levels(tiny, tmp_path: Path):
    """Two levels, the last one an item token of its own, as hybrid indexes have them."""
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, 3, N_ITEMS), rng.permutation(50)[:N_ITEMS]], 1)
    sids = SemanticIds(tiny.sids(N_ITEMS).item_ids, codes.astype(np.int32), (3, 50))
    for number, goal in enumerate(
        (
            Objective(credit="level", pass_at_k=2, filter_groups=True, resample=1),
            Objective(rollouts="dynamic"),
            Objective(loss="listwise"),
        )
    ):
        world = World(tiny, tmp_path / str(number), sids=sids)
        trainer = world.trainer(objective=goal, rewards=[rule_reward, prefix_reward], max_steps=2)
        trainer.train()
        entry = next(e for e in trainer.state.log_history if "level_entropy/2" in e)
        assert "level_entropy/3" not in entry and entry["invalid"] == 0


def test_rl_learns_a_toy_world(world: World):
    # Groups of the whole catalogue: what no group holds can't be found, however long one trains.
    before, after, _ = train_hits(
        world, group=N_ITEMS, per_device_train_batch_size=10 * N_ITEMS, max_steps=60
    )
    assert before <= 0.2
    assert after >= 0.95, (before, after)


def test_a_collapse_is_stopped_and_the_best_model_kept(world: World):
    def punish_hits(completion_ids, target_sid_ids, **kwargs) -> list[float]:
        return [-reward for reward in rule_reward(completion_ids, target_sid_ids)]

    trainer = world.trainer(
        group=8,
        beam_width=20,
        per_device_train_batch_size=80,
        max_steps=40,
        learning_rate=3e-3,
        rewards=[punish_hits],
    )
    validation = BeamValidation(
        world.folder,
        world.engine,
        encode_prompts(world.tokenizer, world.prompts),
        world.targets,
        None,
        every_steps=3,
        at_start=True,
    )
    stop = CollapseStop(world.folder, validation, tolerance=0.1, patience=2)
    trainer.add_callback(validation)
    trainer.add_callback(stop)
    trainer.train()
    step = trainer.state.global_step
    assert step < 40 and stop.reason is not None and "validation ndcg@10" in stop.reason
    assert read_json(world.folder / "stopped.json") == {"step": step, "reason": stop.reason}
    kept = validation.restore_best(trainer.model)
    assert kept is not None
    gain = validation.per_row(world.engine(trainer.model))[1].mean()
    assert gain == pytest.approx(kept["ndcg@10"]) and gain >= validation.history[0]["ndcg@10"]
