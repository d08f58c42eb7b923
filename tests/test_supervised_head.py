"""Losses of the supervised head against plain cross entropy on whole logits."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from trl import SFTConfig, SFTTrainer

from genrec import adapters, modeling, supervised_head
from genrec.decoding import trie_tensors
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.supervised_head import (
    SupervisedHead,
    Teachers,
    add_hidden_dropout,
    use_supervised_head,
)

IGNORED = -100
TRIE = SidTrie.build(np.zeros((1, 3), dtype=np.int32))  # where none is asked for


class Head:
    """A linear head."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias


def example(bias: bool = False):
    """States, labels with text and two levels among them, and a head."""
    torch.manual_seed(0)
    levels = [[5, 6, 7], [9, 8, 10, 11]]  # not in the order of their ids
    labels = torch.tensor([[IGNORED, 3, 6, 9], [5, IGNORED, 19, 8]])
    states = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    return states, labels, Head(weight, torch.randn(20).double() if bias else None), levels


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("over", ["vocabulary", "level"])
def test_log_probabilities_entropies_and_hits(over: str, bias: bool):
    states, labels, head, levels = example(bias)
    found = SupervisedHead(levels if over == "level" else (), torch.device("cpu"))(
        states, labels, head
    )
    assert found.log_probs is not None and found.entropy is not None and found.is_top1 is not None
    logits = F.linear(states, head.weight, head.bias)
    for row in range(2):
        for at in range(4):
            wanted = int(labels[row, at])
            if wanted == IGNORED:
                assert found.log_probs[row, at] == 0 == found.entropy[row, at]
                assert not found.is_top1[row, at] and not found.label_mask[row, at]
                continue
            rivals = next((lv for lv in levels if wanted in lv), None) if over == "level" else None
            columns = logits[row, at] if rivals is None else logits[row, at, rivals]
            p = columns.softmax(-1)
            place = wanted if rivals is None else rivals.index(wanted)
            assert math.isclose(
                found.log_probs[row, at].item(), p[place].log().item(), abs_tol=1e-6
            )
            entropy = -(p * p.log()).sum().item()
            assert math.isclose(found.entropy[row, at].item(), entropy, abs_tol=1e-5)
            assert bool(found.is_top1[row, at]) == (int(p.argmax()) == place)


@pytest.mark.parametrize("over", ["vocabulary", "level"])
def test_gradients_and_blocks(over: str, monkeypatch):
    """Computed in blocks of two positions, the gradients are those of one block."""

    def gradients() -> list[torch.Tensor]:
        states, labels, head, levels = example()
        scored = SupervisedHead(levels if over == "level" else (), torch.device("cpu"))
        scored(states, labels, head).log_probs.sum().backward()
        assert states.grad is not None and head.weight.grad is not None
        return [states.grad, head.weight.grad]

    whole = gradients()
    monkeypatch.setattr(supervised_head, "_LOGITS_AT_ONCE", 8)
    for one, other in zip(whole, gradients(), strict=True):
        torch.testing.assert_close(one, other)
    assert whole[0][0, 0].abs().sum() == 0  # nothing is learned there
    moved = whole[1].abs().sum(1) > 0
    assert moved.all()  # text labels are among them, and they compete with everything


@pytest.mark.parametrize("at_once", [1 << 26, 40])
@pytest.mark.parametrize("over", ["vocabulary", "level"])
def test_the_target_is_in_part_the_teachers_mean_distribution(over: str, at_once: int, monkeypatch):
    monkeypatch.setattr(supervised_head, "_LOGITS_AT_ONCE", at_once)  # one block, or several
    states, labels, head, levels = example(bias=True)
    taught = [
        (torch.randn(2, 4, dim).double(), Head(torch.randn(rows, dim).double(), bias))
        for dim, rows, bias in ((3, 20, torch.randn(20).double()), (5, 23, None))
    ]  # of other widths; one has an embedding that is padded to more rows
    chosen = levels if over == "level" else ()
    scored = SupervisedHead(chosen, torch.device("cpu"), of_teachers=0.3)
    found = scored(states, labels, head, None, taught)
    plain = SupervisedHead(chosen, torch.device("cpu"))(states, labels, head)
    assert torch.equal(found.entropy, plain.entropy) and torch.equal(found.is_top1, plain.is_top1)
    for row, at in (labels != IGNORED).nonzero().tolist():
        wanted = int(labels[row, at])
        rivals = next((lv for lv in levels if wanted in lv), None) if over == "level" else None
        rivals = list(range(20)) if rivals is None else rivals
        log_p = F.linear(states, head.weight, head.bias)[row, at, rivals].log_softmax(-1)
        target = torch.zeros(len(rivals)).double()
        target[rivals.index(wanted)] = 0.7
        for of_teacher, theirs in taught:
            logits = F.linear(of_teacher, theirs.weight[:20], theirs.bias)[row, at, rivals]
            target += 0.15 * logits.softmax(-1)
        expected = (target * log_p).sum().item()
        assert math.isclose(found.log_probs[row, at].item(), expected, abs_tol=1e-5)
    found.log_probs.sum().backward()
    assert states.grad is not None and states.grad.abs().sum() > 0


def test_level_losses_leave_other_columns_alone():
    states, labels, head, levels = example()
    labels = labels.masked_fill((labels == 3) | (labels == 19), IGNORED)
    SupervisedHead(levels, torch.device("cpu"))(states, labels, head).log_probs.sum().backward()
    moved = (head.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist()
    assert moved == [5, 6, 7, 8, 9, 10, 11]


def test_a_batch_without_labels_has_a_zero_gradient():
    states, labels, head, levels = example()
    nothing = torch.full_like(labels, IGNORED)
    SupervisedHead(levels, torch.device("cpu"))(states, nothing, head).log_probs.sum().backward()
    assert states.grad is not None and states.grad.abs().sum() == 0


def trainer_of(tiny, folder, accumulate: int = 1, **settings):
    semantic_ids, tokenizer = tiny.sids(20), tiny.tokenizer()
    model, _, token_ids = tiny.sid_lm(semantic_ids)
    modeling.add_sid_tokens(tokenizer, semantic_ids)
    sids = semantic_ids.sids().to_list()
    prompts = [f"Bought: {'red hat ' * (i % 4)}{sids[i]}" for i in range(12)]
    completions = [sids[i + 1] if i % 3 else "wool hat" for i in range(12)]
    flat = {t for level in token_ids for t in level}
    rows = modeling.encode_rows(tokenizer, prompts, completions, flat)
    training = SFTConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, max_length=None,
        gradient_accumulation_steps=accumulate,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=training, train_dataset=Dataset.from_dict(rows), **settings,
        processing_class=tokenizer,
    )  # fmt: skip
    return trainer, model, token_ids


@pytest.mark.parametrize("lora", [False, True])
def test_over_the_vocabulary_it_trains_as_trl_does(tiny, tmp_path, lora: bool):
    losses = []
    for ours in (False, True):
        trainer, model, token_ids = trainer_of(tiny, tmp_path, accumulate=2)
        if lora:
            config = adapters.lora_config(model, token_ids, 4, 8)
            trainer, model, token_ids = trainer_of(tiny, tmp_path, accumulate=2, peft_config=config)
            adapters.expose_head_bias(trainer.model)
        if ours:
            assert use_supervised_head(model, token_ids, "vocabulary", TRIE)
        trainer.train()
        log = [e for e in trainer.state.log_history if "loss" in e]
        losses.append([[e["loss"], e["entropy"], e["mean_token_accuracy"]] for e in log])
        assert len(log) == 3
    torch.testing.assert_close(
        torch.tensor(losses[0]), torch.tensor(losses[1]), atol=2e-4, rtol=1e-3
    )
    assert losses[1][0][0] != losses[1][-1][0]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("few", [8, 0, 10_000])
def test_over_the_trie_a_label_scores_as_the_search_scores_it(
    tiny, tmp_path, monkeypatch, few: int, cut: bool
):
    """Summed over an item's tokens, it is the engine's exact score under the same normaliser."""
    monkeypatch.setattr(supervised_head, "_FEW", few)  # columns gathered always, or never
    if cut:  # labels with one child apart from the others
        monkeypatch.setattr(trie_tensors, "_row_lengths", lambda n, _: [1, max(2, int(n.max()))])
    semantic_ids = tiny.sids(20)
    trie = SidTrie.build(semantic_ids.codes)
    trainer, model, token_ids = trainer_of(tiny, tmp_path)
    use_supervised_head(model, token_ids, "trie", trie)
    model.eval()
    rows = [row for row in trainer.train_dataset if row["labels"][-1] in token_ids[2]]
    assert len(rows) == 8
    batch = trainer.data_collator(rows)
    output = model(**batch, fused_lm_head=True)
    prompts = [r["input_ids"][: -semantic_ids.n_levels] for r in rows]
    engine = TorchEngine(model, trie, token_ids, trainer.processing_class.pad_token_id, "trie")
    every = engine.score(prompts, np.tile(np.arange(20), (len(rows), 1)))
    sids = {tuple(token_ids[at][c] for at, c in enumerate(row)): i
            for i, row in enumerate(semantic_ids.codes.tolist())}  # fmt: skip
    for at, row in enumerate(rows):
        item = sids[tuple(row["labels"][-semantic_ids.n_levels :])]
        assert math.isclose(output.log_probs[at].sum().item(), every[at, item].sum(), abs_tol=1e-4)
    # Where one code alone can follow nothing is to be learned, and nothing is uncertain.
    single = output.log_probs[output.label_mask & (output.entropy < 1e-6)]
    assert len(single) and (single.abs() < 1e-6).all()


@pytest.mark.parametrize("few", [8, 0, 10_000])
@pytest.mark.parametrize("over", ["vocabulary", "level", "trie"])
def test_a_teacher_like_the_student_leaves_the_entropy(tiny, tmp_path, monkeypatch, over, few):
    """Taught by itself, a student's expected log-probability is minus its entropy."""
    monkeypatch.setattr(supervised_head, "_FEW", few)
    trie = SidTrie.build(tiny.sids(20).codes)
    outputs = []
    for weight in (0.0, 1.0, 0.25):
        trainer, model, token_ids = trainer_of(tiny, tmp_path)
        teachers = Teachers([deepcopy(model).eval()], weight) if weight else None
        assert use_supervised_head(model, token_ids, over, trie, teachers)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(12)])
        outputs.append(model.train()(**batch, fused_lm_head=True))
        again = model.eval()(**batch, fused_lm_head=True)
        assert torch.allclose(again.log_probs, outputs[0].log_probs, atol=1e-5)  # no teacher then
    plain, wholly, partly = outputs
    assert torch.allclose(wholly.log_probs, -plain.entropy, atol=1e-4)
    mixed = 0.75 * plain.log_probs - 0.25 * plain.entropy
    assert torch.allclose(partly.log_probs, mixed, atol=1e-4)


def test_a_student_comes_near_its_teacher(tiny, tmp_path):
    trainer, model, token_ids = trainer_of(tiny, tmp_path)
    teacher = tiny.sid_lm(tiny.sids(20), seed=5)[0]
    trie = SidTrie.build(tiny.sids(20).codes)
    use_supervised_head(model, token_ids, "trie", trie, Teachers([teacher], 1.0))
    weights = [parameter.clone() for parameter in teacher.parameters()]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(12)])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        output = model.train()(**batch, fused_lm_head=True)
        loss = -output.log_probs.sum() / output.label_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    twin = deepcopy(teacher)
    use_supervised_head(twin, token_ids, "trie", trie)
    least = twin(**batch, fused_lm_head=True)  # the teacher's entropy: no loss is below it
    floor = (least.entropy.sum() / least.label_mask.sum()).item()
    assert floor < losses[-1] and losses[-1] - floor < 0.1 * (losses[0] - floor)
    assert all(torch.equal(a, b) for a, b in zip(weights, teacher.parameters(), strict=True))


def test_rows_of_another_sid_map_are_refused_by_the_trie(tiny, tmp_path):
    trainer, model, token_ids = trainer_of(tiny, tmp_path)
    codes = tiny.sids(20).codes[:3]
    use_supervised_head(model, token_ids, "trie", SidTrie.build(codes))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with pytest.raises(ValueError, match="is no item's: the rows belong to another SID map"):
        model(**batch, fused_lm_head=True)


def test_padding_behind_a_row_needs_no_mask(tiny, tmp_path):
    """Rows of a padded batch score as each does alone; a mask in front is kept."""
    trainer, model, token_ids = trainer_of(tiny, tmp_path)
    use_supervised_head(model, token_ids, "level", TRIE)
    model.eval()
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(rows)
    assert not bool(batch["attention_mask"].all())
    together = model(**batch, fused_lm_head=True).log_probs
    for i, row in enumerate(rows):
        one = trainer.data_collator([row])
        alone = model(**one, fused_lm_head=True).log_probs
        torch.testing.assert_close(together[i, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)
    front = {"attention_mask": torch.tensor([[0, 1, 1]])}
    assert supervised_head._causal(front) == front


def test_models_with_capped_logits_are_refused(tiny, monkeypatch):
    model, _, token_ids = tiny.sid_lm(tiny.sids(20))
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(ValueError, match="loss_over=level: .* more to its logits"):
        use_supervised_head(model, token_ids, "level", TRIE)
    assert not use_supervised_head(model, token_ids, "vocabulary", TRIE)


def test_teachers_that_have_no_linear_head_are_refused(tiny, monkeypatch):
    model, _, token_ids = tiny.sid_lm(tiny.sids(20))
    teacher = deepcopy(model)
    whole = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda **inputs: _doubled(whole(**inputs)))
    with pytest.raises(ValueError, match="whose logits are a linear head's"):
        use_supervised_head(model, token_ids, "vocabulary", TRIE, Teachers([teacher], 0.5))


def _doubled(output):
    output.logits = 2 * output.logits
    return output


def test_models_whose_routers_have_a_loss_are_left_to_trl(tiny):
    model, _, token_ids = tiny.sid_lm(tiny.sids(20))
    model.config.output_router_logits = True
    assert not use_supervised_head(model, token_ids, "vocabulary", TRIE)
    with pytest.raises(ValueError, match="or a router's loss"):
        use_supervised_head(model, token_ids, "trie", TRIE)


def test_hidden_dropout_acts_in_training_alone_and_is_not_saved(tiny, tmp_path):
    model = modeling.from_scratch("tiny", 100, 64, 0)
    names = set(model.state_dict())
    ids = torch.arange(10).unsqueeze(0)
    model.eval()
    before = model(ids).logits
    add_hidden_dropout(model, 0.5)
    assert torch.equal(model(ids).logits, before) and set(model.state_dict()) == names
    model.train()
    torch.manual_seed(1)
    one, two = model(ids).logits, model(ids).logits
    assert not torch.allclose(one, two)
    dropped = (model.get_input_embeddings()(ids) == 0).float().mean()
    assert 0.4 < dropped < 0.6
    with pytest.raises(ValueError, match="has no self_attn and mlp blocks"):
        add_hidden_dropout(torch.nn.Linear(2, 2), 0.1)  # type: ignore[arg-type]
