"""Chains and items inside TRL's GRPOTrainer: what is drawn, scored, credited and learned."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig

from genrec.advantages import level_advantages, tree_advantages
from genrec.chain_reader import ChainReader
from genrec.chain_rewards import format_reward
from genrec.decoding.free_text import TextSampling, never_drawn
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.reasoning_validation import ReasoningValidation
from genrec.modeling import add_sid_tokens, encode_prompts, encode_rows, train_tokenizer
from genrec.prompts import PromptRenderer
from genrec.reasoning import REASONING, decision_marker, sample_chains, search_with_chains
from genrec.reasoning_rollouts import ReasoningGRPOTrainer
from genrec.rewards import prefix_reward, rule_reward
from genrec.rollouts import Objective
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.reasoning import STEPS, reasoning_slots, step_texts
from genrec.tasks.rendering import ItemTexts, served_prompts
from genrec.tasks.texts import written_renderer

N_ITEMS, N_LEVELS = 20, 3
# A wording of few tokens, so that a tiny model learns it in seconds.
WORDING = {
    "evidence": "Saw {{ items }}.",
    "preference": "Like {{ attribute }}: {{ count }} of {{ total }}, {{ lift }}.",
    "intent": "Now {{ items }} for {{ attribute }}.",
    "formulation": "Ask {{ query }}.",
    "rewriting": "Keep {{ kept }} but {{ set_aside }}.",
    "rewriting_nothing": "Keep {{ kept }}.",
}


class World:
    """A shop, histories, and a model that was taught chains of `said` for `steps` steps."""

    def __init__(
        self, tiny, folder: Path, steps: int = 0, marker: str | None = None, said=STEPS
    ) -> None:
        self.folder, self.shop = folder, tiny.shop(n_items=N_ITEMS)
        self.semantic_ids = self.shop.semantic_ids
        for name, template in WORDING.items():
            path = folder / "wording" / f"step_{name}" / "seen" / "01.jinja"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(template)
        for kind in ("brand", "category", "keyword", "price_band"):
            path = folder / "wording" / f"attribute_{kind}" / "seen" / "01.jinja"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{kind} {{{{ value }}}}")
        wording = written_renderer(str(folder / "wording"))
        attributes = item_attributes(self.shop.catalog)
        self.reader = ChainReader(self.semantic_ids, attributes, wording)
        rng = np.random.default_rng(0)
        self.histories = [rng.permutation(N_ITEMS)[: 2 + i % 3].tolist() for i in range(24)]
        self.targets = np.array([(7 * h[-1] + 3) % N_ITEMS for h in self.histories])
        sids = np.array(self.semantic_ids.sids().to_list(), dtype=object)
        renderer = PromptRenderer()
        self.marker = marker or decision_marker(renderer)
        shown = pl.DataFrame({"history": pl.Series(self.histories, dtype=pl.List(pl.Int32))})
        texts = ItemTexts.of(self.shop.catalog, self.semantic_ids)
        self.prompts = served_prompts(shown, REASONING, texts, renderer).to_list()
        self.chain_texts = self._taught(attributes, wording, said)
        self.tokenizer = train_tokenizer([*self.prompts, *self.chain_texts, self.marker], 400)
        self.token_ids = add_sid_tokens(self.tokenizer, self.semantic_ids)
        self.trie = SidTrie.build(self.semantic_ids.codes)
        self.model = tiny.lm(len(self.tokenizer), context=512)
        completions = [
            f"{text}{self.marker}{sids[target]}"
            for text, target in zip(self.chain_texts, self.targets, strict=True)
        ]
        if steps:
            self._teach(completions, steps)
        self.columns = {
            "prompt": self.prompts,
            "history_item_index": self.histories,
            "target_sid_ids": [
                [self.token_ids[level][c] for level, c in enumerate(codes)]
                for codes in self.semantic_ids.codes[self.targets].tolist()
            ],
        }

    def _taught(self, attributes: pl.DataFrame, wording: PromptRenderer, said) -> list[str]:
        index = AttributeIndex.build(attributes, N_ITEMS)
        histories = pl.Series(self.histories, dtype=pl.List(pl.Int32))
        ids = pl.Series([f"r{i}" for i in range(len(histories))])
        slots = reasoning_slots(histories, index)
        texts = step_texts(slots, wording, ids, sids=self.semantic_ids.sids())
        return [
            " ".join(row[step] for step in said if row[step] is not None)
            for row in texts.iter_rows(named=True)
        ]

    def _teach(self, completions: list[str], steps: int) -> None:
        sid_ids = {i for level in self.token_ids for i in level}
        rows = encode_rows(self.tokenizer, self.prompts, completions, sid_ids)["input_ids"]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = ids.masked_fill(ids == 0, -100)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-3)
        for _ in range(steps):
            loss = self.model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def trainer(self, objective: Objective, group: int, rewards=None, **changes):
        settings = dict(
            output_dir=str(self.folder / "out"),
            num_generations=group,
            per_device_train_batch_size=2 * group,
            max_completion_length=objective.max_chain_tokens + 20,
            learning_rate=1e-3,
            beta=0.0,
            loss_type="dr_grpo",
            scale_rewards="none",
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
        return ReasoningGRPOTrainer(
            marker=self.marker,
            reader=self.reader,
            objective=objective,
            trie=self.trie,
            sid_token_ids=self.token_ids,
            beam_width=10,
            model=self.model,
            args=GRPOConfig(**{**settings, **changes}),
            reward_funcs=rewards or [rule_reward, format_reward],
            train_dataset=Dataset.from_dict(self.columns),
            processing_class=self.tokenizer,
        )

    def inputs(self, rows: list[int], group: int) -> list[dict]:
        return [
            {name: column[row] for name, column in self.columns.items()}
            for row in rows
            for _ in range(group)
        ]

    def engine(self, model=None) -> TorchEngine:
        model = self.model if model is None else model
        pad = self.tokenizer.pad_token_id
        return TorchEngine(model, self.trie, self.token_ids, pad, "trie")


@pytest.fixture
def world(tiny, tmp_path: Path) -> World:
    """A random model whose chains end in every way: by a common letter, by EOS, by the limit."""
    made = World(tiny, tmp_path, marker="a")
    with torch.no_grad():
        made.model.get_input_embeddings().weight[made.tokenizer.eos_token_id] *= 4
    return made


def rollouts(trainer: ReasoningGRPOTrainer, inputs: list[dict]) -> dict:
    trainer.model.train()
    return trainer._generate_and_score_completions(inputs)


MIXED = Objective(chains=3, max_chain_tokens=8)
ROWS = [0, 1, 2, 3, 4, 5]


def parts(world: World, out: dict) -> list[dict]:
    """Each completion taken apart: prompt, chain and SID tokens, and what is learned of it."""
    made = []
    for row in range(len(out["completion_ids"])):
        prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()].tolist()
        length = int(out["completion_mask"][row].sum())
        ids = out["completion_ids"][row][:length].tolist()
        assert ids[-1] == world.tokenizer.eos_token_id
        learned = out["tool_mask"][row][:length].tolist()
        made.append(
            {"prompt": prompt, "chain": ids[: -N_LEVELS - 1], "sid": ids[-N_LEVELS - 1 : -1],
             "learned": learned, "ended_at": int(out["ended_at"][row])}
        )  # fmt: skip
    return made


def test_a_group_is_chains_with_their_items(world: World):
    trainer = world.trainer(MIXED, 6)
    out = rollouts(trainer, world.inputs(ROWS, 6))
    made = parts(world, out)
    # What is generated outside the trainer with the same random numbers.
    ids = encode_prompts(world.tokenizer, [world.prompts[r] for r in ROWS])
    sampling = TextSampling(max_tokens=8, seed=trainer._seed_of(0))
    world.model.eval()
    chains = sample_chains(world.engine(), world.tokenizer, ids, 3, world.marker, sampling)
    whole = [[*p, *t.token_ids] for p, own in zip(ids, chains, strict=True) for t in own]
    items = world.engine().search(whole, 2, 10).items  # (18, 2), best first
    reasons = set()
    for number, part in enumerate(made):
        text = chains[number // 6][number % 6 // 2]
        reasons.add(text.finish_reason)
        assert part["prompt"] == ids[number // 6] and part["chain"] == list(text.token_ids)
        codes = world.semantic_ids.codes[items[number // 2, number % 2]].tolist()
        assert part["sid"] == [world.token_ids[level][c] for level, c in enumerate(codes)]
        # The marker "a" is one token: drawn, or appended and not learned, or EOS in its place.
        end = {"stop": 1, "eos": 1, "length": 0}[text.finish_reason]
        n = len(text.token_ids)
        assert part["learned"] == [*[1] * (n - 1), end, *[1] * N_LEVELS, 0]
        assert part["ended_at"] == (n - 1 if text.finish_reason == "eos" else -1)
    assert reasons == {"stop", "eos", "length"}
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    texts = [t for own in chains for t in own]
    assert logged["invalid"] == 0
    assert logged["chains/ended"] == pytest.approx(
        np.mean([t.finish_reason == "stop" for t in texts])
    )
    assert logged["chains/length"] == pytest.approx(
        np.mean([len(t.token_ids) - (t.finish_reason != "stop") for t in texts])
    )
    distinct = [len({t.token_ids for t in own}) / 3 for own in chains]
    assert logged["chains/distinct"] == pytest.approx(np.mean(distinct))
    assert out["num_items_in_batch"] == sum(sum(part["learned"]) for part in made)


def by_hand(world: World, model, part: dict, temperature: float) -> list[float]:
    """Log-probabilities of one completion by plain passes, one token at a time."""
    forbidden = never_drawn(model, world.tokenizer)
    assert forbidden.any()
    ids, found = list(part["prompt"]), []

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double()

    for place, token in enumerate(part["chain"]):
        drawn = world.tokenizer.eos_token_id if place == part["ended_at"] else token
        scaled = (logits() / temperature).masked_fill(forbidden, -torch.inf)
        found.append(float(scaled.log_softmax(-1)[drawn]))
        ids.append(token)
    prefix: list[int] = []
    for level, token in enumerate(part["sid"]):
        codes = world.semantic_ids.codes
        below = codes[(codes[:, :level] == prefix).all(1), level]
        allowed = [world.token_ids[level][c] for c in sorted(set(below.tolist()))]
        found.append(float(logits()[allowed].log_softmax(-1)[allowed.index(token)]))
        ids.append(token)
        prefix.append(world.token_ids[level].index(token))
    return [*found, 0.0]


def test_log_probs_are_those_of_a_slow_computation(world: World):
    trainer = world.trainer(MIXED, 6, temperature=0.7)
    out = rollouts(trainer, world.inputs(ROWS, 6))
    ids = torch.cat([out["prompt_ids"], out["completion_ids"]], 1)
    mask = torch.cat([out["prompt_mask"], out["completion_mask"]], 1)
    width = out["completion_ids"].shape[1]
    with torch.no_grad():
        got, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model.eval(), ids, mask, width, batch_size=5, compute_entropy=True
        )
    made = parts(world, out)
    assert {part["ended_at"] >= 0 for part in made} == {True, False}
    assert len({len(part["chain"]) for part in made}) > 1  # padding
    for row, part in enumerate(made):
        expected = by_hand(world, trainer.model, part, 0.7)
        own = got[row].tolist()
        assert own[: len(expected)] == pytest.approx(expected, abs=2e-4)
        assert own[len(expected) :] == [0.0] * (width - len(expected))
        assert all(-1e-6 <= e <= np.log(len(world.tokenizer)) for e in entropy[row].tolist())


def test_advantages_lie_on_their_tokens(world: World):
    seen: list[list[float]] = []

    def by_chain_and_item(completion_ids, chain, **kwargs) -> list[float]:
        """Depends on the chain's length and on the item's first token."""
        assert all(len(ids) == N_LEVELS + 1 for ids in completion_ids)
        pairs = zip(completion_ids, chain, strict=True)
        seen.append([len(own.token_ids) + ids[0] % 5 for ids, own in pairs])
        return seen[-1]

    for credit in ("item", "level"):
        for value, scale in (("mean", "none"), ("best", "group")):
            goal = Objective(chains=3, max_chain_tokens=8, credit=credit, chain_value=value)
            trainer = world.trainer(goal, 6, [by_chain_and_item], scale_rewards=scale)
            out = rollouts(trainer, world.inputs(ROWS, 6))
            rewards = torch.tensor(seen[-1], dtype=torch.float32)
            chains, items = tree_advantages(rewards, 3, 2, value, scale == "group")
            assert chains.abs().max() > 0 and items.abs().max() > 0
            sids = torch.tensor([part["sid"] for part in parts(world, out)])
            credits = level_advantages(items, sids, 2)
            for row, part in enumerate(parts(world, out)):
                own, n = out["advantages"][row], len(part["chain"])
                assert own[:n].tolist() == [float(chains[row])] * n
                expected = [float(items[row])] * N_LEVELS
                if credit == "level":
                    expected = credits[row].tolist()
                assert own[n : n + N_LEVELS].tolist() == pytest.approx(expected)


def test_what_was_not_drawn_has_no_gradient(world: World):
    """Advantages of appended markers and of EOS move nothing; those of drawn tokens do."""
    trainer = world.trainer(MIXED, 6)
    trainer.current_gradient_accumulation_steps = 1
    out = rollouts(trainer, world.inputs(ROWS, 6))
    drawn = (out["tool_mask"] * out["completion_mask"]).bool()
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(drawn.shape, generator=generator)
    gradients = []
    for advantages in (base, base.masked_fill(~drawn, 100.0), base.masked_fill(drawn, 0.0)):
        trainer.model.zero_grad()
        trainer._compute_loss(trainer.model, {**out, "advantages": advantages}).backward()
        gradients.append(trainer.model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0 and gradients[2].abs().max() == 0


def test_equal_rewards_teach_nothing_and_are_counted(world: World):
    def constant(completion_ids, **kwargs) -> list[float]:
        return [0.3] * len(completion_ids)

    goal = Objective(chains=3, max_chain_tokens=8, filter_groups=True)
    trainer = world.trainer(goal, 6, [constant], scale_rewards="group")
    out = rollouts(trainer, world.inputs(ROWS, 6))
    assert (out["advantages"] == 0).all() and (out["tool_mask"] == 0).all()
    assert trainer._metrics["train"]["zero_advantage"][-1] == 1
    # One chain has none to be compared with: only its items learn.
    trainer = world.trainer(Objective(chains=1, max_chain_tokens=8), 6, [prefix_reward])
    out = rollouts(trainer, world.inputs(ROWS, 6))
    for row, part in enumerate(parts(world, out)):
        assert (out["advantages"][row][: len(part["chain"])] == 0).all()
    assert out["advantages"].abs().max() > 0


@pytest.mark.parametrize("choice", ["sample", "gumbel", "dynamic"])
def test_items_behind_chains_may_be_sampled(world: World, choice: str):
    goal = Objective(rollouts=choice, chains=2, max_chain_tokens=8)
    trainer = world.trainer(goal, 8)
    out = rollouts(trainer, world.inputs([0, 1], 8))
    again = rollouts(trainer, world.inputs([0, 1], 8))
    assert (out["completion_ids"] == again["completion_ids"]).all()
    lists = [
        tuple(tuple(p["sid"]) for p in parts(world, out)[at : at + 4]) for at in range(0, 16, 4)
    ]
    if choice == "gumbel":
        assert all(len(set(own)) == 4 for own in lists)
    trainer.state.global_step = 1
    other = rollouts(trainer, world.inputs([0, 1], 8))["completion_ids"]
    assert other.shape != out["completion_ids"].shape or (other != out["completion_ids"]).any()


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        (dict(chains=4), {}, "chains=4 with num_generations=6"),
        (dict(chains=6), {}, "two items or more behind each chain"),
        (dict(chains=-1), {}, "chains=-1"),
        (dict(chains=0), {}, "chains=0 must be at least 1"),
        (dict(max_chain_tokens=0), {}, "max_chain_tokens=0 must be at least 1"),
        (dict(loss="listwise"), {}, "loss: listwise with chains=3"),
        (dict(pass_at_k=2), {}, "pass_at_k: 2 with chains=3"),
        (dict(resample=1), {}, "resample: 1 with chains=3"),
        ({}, {"scale_rewards": "batch"}, "scale_rewards=batch with chains=3.*: group"),
        ({}, {"top_p": 0.9}, "top_p=0.9 with chains=3"),
        ({}, {"loss_type": "luspo"}, "loss_type=luspo with chains=3"),
        ({}, {"importance_sampling_level": "sequence"}, "importance_sampling_level=sequence"),
        (dict(chains=1), {"num_generations": 24, "per_device_train_batch_size": 24},
         "num_generations=24 / chains=1 exceeds beam_width=10"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(world: World, objective: dict, changes: dict, message: str):
    goal = Objective(**{"chains": 3, "max_chain_tokens": 8, **objective})
    with pytest.raises(ValueError, match=message):
        world.trainer(goal, 6, **changes)


def test_the_first_step_has_no_kl(world: World):
    """The reference is scored as the policy is: chains over the vocabulary, SIDs over the trie."""
    world.model.save_pretrained(world.folder / "model")
    world.model = AutoModelForCausalLM.from_pretrained(world.folder / "model", dtype="float32")
    rewards = [lambda chain, **kwargs: [float(len(c.text)) for c in chain]]
    trainer = world.trainer(MIXED, 6, rewards, beta=0.1, max_steps=3, learning_rate=1e-2)
    trainer.train()
    kl = [e["kl"] for e in trainer.state.log_history if "kl" in e]
    assert abs(kl[0]) < 1e-6 and max(kl[1:]) > 1e-5


def test_a_resumed_training_is_the_uninterrupted_one(world: World):
    start = {name: value.clone() for name, value in world.model.state_dict().items()}
    rewards = [prefix_reward, lambda chain, **kwargs: [float(len(c.text)) for c in chain]]
    trained = []
    for resumed in (False, True):
        world.model.load_state_dict(start)
        trainer = world.trainer(
            MIXED, 6, rewards, max_steps=4, save_strategy="steps", save_steps=2,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        at = str(world.folder / "out" / "checkpoint-2") if resumed else None
        trainer.train(resume_from_checkpoint=at)
        trained.append({n: v.clone() for n, v in trainer.model.state_dict().items()})
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert len(losses) == 4
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name
    assert any((value != start[name]).any() for name, value in trained[0].items())


def test_a_reward_that_only_chains_can_earn_rises(world: World):
    """Ending by the marker; the items of a chain all earn the same."""

    def ended(chain, **kwargs) -> list[float]:
        return [float(own.finish_reason == "stop") for own in chain]

    goal = Objective(chains=6, max_chain_tokens=8)
    trainer = world.trainer(
        goal, 12, [ended], per_device_train_batch_size=96, max_steps=10, learning_rate=1e-2
    )
    trainer.train()
    log = [e for e in trainer.state.log_history if "chains/ended" in e]
    share = [e["chains/ended"] for e in log]
    assert share[0] < 0.4 and np.mean(share[-3:]) > share[0] + 0.3, share
    assert all(e["invalid"] == 0 for e in log)
    assert log[0]["chains/ended"] == pytest.approx(log[0]["rewards/ended/mean"], abs=1e-5)
    assert json.dumps(log)  # finite


@pytest.mark.slow
def test_the_form_of_chains_improves(tiny, tmp_path: Path):
    """From a model that half knows how to begin: the first step and the marker earn .1."""
    world = World(tiny, tmp_path, steps=40, said=("evidence",))
    trainer = world.trainer(
        Objective(chains=4, max_chain_tokens=24), 8, [format_reward],
        per_device_train_batch_size=24 * 8, max_steps=14, learning_rate=4e-3, scale_rewards="group",
    )  # fmt: skip
    trainer.train()
    earned = [e["chains/format"] for e in trainer.state.log_history if "chains/format" in e]
    assert 0.02 < earned[0] < 0.04 and np.mean(earned[-3:]) > 0.06, earned


def test_validation_is_of_merged_lists(tiny, tmp_path: Path):
    world = World(tiny, tmp_path, steps=5)
    ids = encode_prompts(world.tokenizer, world.prompts)
    sampling = TextSampling(max_tokens=12, seed=3)
    seen = [np.array(h) for h in world.histories]
    validation = ReasoningValidation(
        tokenizer=world.tokenizer, marker=world.marker, n_chains=2, sampling=sampling,
        folder=tmp_path, make_engine=world.engine, prompts=ids, targets=world.targets, seen=seen,
    )  # fmt: skip
    engine = world.engine()
    hit, gain = validation.per_row(engine)
    chains = sample_chains(engine, world.tokenizer, ids, 2, world.marker, sampling)
    lists = search_with_chains(engine, ids, chains, 10, 50, seen)
    ranks = [
        np.flatnonzero(found.items == t) for found, t in zip(lists, world.targets, strict=True)
    ]
    expected = [1 / np.log2(r[0] + 2) if len(r) else 0.0 for r in ranks]
    assert gain.tolist() == pytest.approx(expected) and 0 < np.mean(hit) < 1
    entry = validation.measure(world.model, 0, 0.0)
    assert entry["ndcg@10"] == pytest.approx(np.mean(expected))
