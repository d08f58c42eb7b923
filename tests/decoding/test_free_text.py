"""Free text against plain forward passes, and its ends, limits and seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from genrec.decoding.free_text import SampledText, TextSampling, pick, sample_texts

NEVER = "\x00 never written"


@pytest.fixture(scope="module")
def world(tiny):
    """(model, tokenizer), with sharper logits than a fresh model has."""
    model, tokenizer, _ = tiny.sid_lm(tiny.sids(20))
    for parameter in model.parameters():
        parameter.data *= 2.0 if parameter.ndim > 1 else 1.0
    return model, tokenizer


def prompts_of(tokenizer, *texts: str) -> list[list[int]]:
    return tokenizer(list(texts))["input_ids"]


PROMPTS = ("red wool hat", "Bought so far, oldest first: <a_1><b_2><c_3>", "oak")


def replay(model, tokenizer, prompt, sample, sampling, n) -> list[int]:
    """The first n tokens by plain forward passes without a cache, one text alone."""
    from genrec.decoding.free_text import _draws

    draws = _draws([prompt], sample + 1, sampling, n)[sample]
    forbidden = torch.ones(model.config.vocab_size, dtype=torch.bool)
    forbidden[: len(tokenizer)] = False
    forbidden[tokenizer.pad_token_id] = True
    ids = list(prompt)
    for step in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1]
        ids.append(int(pick(logits, forbidden, torch.tensor(draws[step : step + 1]), sampling)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [TextSampling(max_tokens=24, seed=3),
    TextSampling(0.7, 0.8, 24, 1)], ids=["plain", "nucleus"])  # fmt: skip
def test_tokens_are_those_of_plain_forward_passes(world, sampling):
    model, tokenizer = world
    prompts = prompts_of(tokenizer, *PROMPTS)
    found = sample_texts(model, tokenizer, prompts, 3, NEVER, sampling)
    for prompt, texts in zip(prompts, found, strict=True):
        for sample, text in enumerate(texts):
            expected = replay(model, tokenizer, prompt, sample, sampling, 24)
            if text.finish_reason == "eos":
                expected = expected[: expected.index(tokenizer.eos_token_id)]
            assert list(text.token_ids) == expected
            assert text.text == tokenizer.decode(expected)


def test_a_text_does_not_depend_on_its_batch_or_on_later_settings(world):
    model, tokenizer = world
    prompts = prompts_of(tokenizer, *PROMPTS)
    sampling = TextSampling(max_tokens=40, seed=5)
    whole = sample_texts(model, tokenizer, prompts, 4, NEVER, sampling)
    assert len({t for texts in whole for t in texts}) == 12  # they differ
    ticks: list[int] = []
    small = sample_texts(
        model, tokenizer, prompts, 4, NEVER, sampling, batch_size=4, progress=ticks.append
    )
    assert small == whole and ticks == [1, 1, 1]
    assert sample_texts(model, tokenizer, prompts[::-1], 4, NEVER, sampling) == whole[::-1]
    assert sample_texts(model, tokenizer, prompts, 2, NEVER, sampling) == [t[:2] for t in whole]
    twice = sample_texts(model, tokenizer, [prompts[0]] * 2, 4, NEVER, sampling)
    assert twice == [whole[0]] * 2
    short = sample_texts(model, tokenizer, prompts, 4, NEVER, replace(sampling, max_tokens=7))
    for few, many in zip(sum(short, []), sum(whole, []), strict=True):
        assert few.token_ids == many.token_ids[:7]
    other = sample_texts(model, tokenizer, prompts, 4, NEVER, replace(sampling, seed=6))
    assert other != whole


def test_the_distribution_is_the_models(world):
    """Shares of first tokens over many samples, against the softmax of a forward pass."""
    model, tokenizer = world
    (prompt,) = prompts_of(tokenizer, "red wool hat")
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    logits[tokenizer.pad_token_id] = -torch.inf
    logits[len(tokenizer) :] = -torch.inf
    n = 3000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        probs = (logits / temperature).softmax(-1)
        if top_p < 1:
            order = probs.argsort(descending=True)
            kept = order[: int((probs[order].cumsum(0) < top_p).sum()) + 1]
            probs = torch.zeros_like(probs).index_put_((kept,), probs[kept])
            probs /= probs.sum()
        sampling = TextSampling(temperature, top_p, 1, 9)
        (texts,) = sample_texts(model, tokenizer, [prompt], n, NEVER, sampling, batch_size=n)
        first = [t.token_ids[0] if t.token_ids else tokenizer.eos_token_id for t in texts]
        shares = np.bincount(first, minlength=len(probs)) / n
        p = probs.numpy()
        assert (shares[p == 0] == 0).all()
        # Five standard deviations, for the few hundred tokens at once.
        assert (np.abs(shares - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1 / n).all()


def test_pick_by_hand():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().repeat(4, 1)
    nothing = torch.zeros(4, dtype=torch.bool)
    draws = torch.tensor([0.0, 0.49, 0.51, 0.95], dtype=torch.float64)
    assert pick(logits, nothing, draws, TextSampling()).tolist() == [0, 0, 1, 3]
    # The nucleus of .6 is tokens 0 and 1 (of equals the first), with shares 5/7 and 2/7.
    draws = torch.tensor([0.7, 0.72, 0.99, np.nextafter(1, 0)], dtype=torch.float64)
    assert pick(logits, nothing, draws, TextSampling(top_p=0.6)).tolist() == [0, 1, 1, 1]
    # Without token 0 the shares are .4, .4, .2.
    no_first = torch.tensor([True, False, False, False])
    draws = torch.tensor([0.0, 0.39, 0.41, 0.81], dtype=torch.float64)
    assert pick(logits, no_first, draws, TextSampling()).tolist() == [1, 1, 2, 3]
    cold = TextSampling(temperature=1e-300)
    assert pick(logits, nothing, draws, cold).tolist() == [0, 0, 0, 0]
    last = torch.tensor([False, False, False, True])  # rounding can't reach what is forbidden
    draws = torch.full((4,), float(np.nextafter(1, 0)), dtype=torch.float64)
    assert pick(logits, last, draws, TextSampling()).tolist() == [2, 2, 2, 2]


class Script(GPT2LMHeadModel):
    """Writes given tokens: which one follows depends on the position alone."""

    def __init__(self, vocab_size: int, first: int, script: list[int], context: int = 256) -> None:
        size = dict(n_embd=8, n_layer=1, n_head=1, n_positions=context, vocab_size=vocab_size)
        super().__init__(GPT2Config(**size))
        self.first, self.script = first, script
        self.longest = 0

    def forward(self, input_ids, position_ids=None, past_key_values=None, logits_to_keep=0, **_):
        position = position_ids
        if position is None:
            position = torch.arange(input_ids.shape[1])
        self.longest = max(self.longest, int(position.max()) + 1)
        at = (position - self.first + 1).clamp(0, len(self.script) - 1)
        logits = torch.full((*at.shape, self.config.vocab_size), -50.0)
        logits.scatter_(-1, torch.tensor(self.script)[at].unsqueeze(-1), 50.0)
        logits = logits.expand(len(input_ids), -1, -1)
        logits = logits[:, logits_to_keep] if isinstance(logits_to_keep, torch.Tensor) else logits
        return type("Out", (), {"logits": logits})()


@pytest.fixture
def written(world):
    """What comes out when a model writes this text: ``written(text, **settings)``."""
    _, tokenizer = world

    def run(text: str, context: int = 256, stop: str = " Done: ", **settings) -> SampledText:
        (prompt,) = prompts_of(tokenizer, "red wool hat")
        script = tokenizer(text)["input_ids"] + [tokenizer.convert_tokens_to_ids("!")] * 2
        model = Script(len(tokenizer), len(prompt), script, context)
        reserve = settings.pop("reserve", 0)
        sampling = TextSampling(**settings)
        ((found,),) = sample_texts(model, tokenizer, [prompt], 1, stop, sampling, reserve)
        run.model, run.prompt = model, prompt
        return found

    return run


@pytest.mark.parametrize("n_words", [0, 1, 7, 14, 15, 16, 17, 30])
def test_a_text_ends_with_the_stop_text_wherever_it_falls(written, world, n_words):
    _, tokenizer = world
    text = "<a_1>" * n_words + "é why Done: "
    found = written(text + "<b_1> Done: and on")
    assert found.finish_reason == "stop" and found.text == text.removesuffix(" Done: ")
    assert list(found.token_ids) == tokenizer(text)["input_ids"]


def test_a_text_that_stops_early_or_never(written, world):
    _, tokenizer = world
    found = written("short<|endoftext|> Done: ")
    assert found == SampledText(tuple(tokenizer("short")["input_ids"]), "short", "eos")
    assert written("<|endoftext|>") == SampledText((), "", "eos")
    endless = written("on" * 200, max_tokens=37)
    assert endless.finish_reason == "length" and len(endless.token_ids) == 37
    # The last token of the limit completes the stop text, or would have.
    length = len(tokenizer("a word Done: ")["input_ids"])
    assert written("a word Done: ", max_tokens=length).finish_reason == "stop"
    cut = written("a word Done: ", max_tokens=length - 1)
    assert cut.finish_reason == "length" and cut.text == "a word Done:"


def test_the_context_limits_a_text(written):
    found = written("on" * 200, context=40, reserve=5)
    assert found.finish_reason == "length"
    assert len(written.prompt) + len(found.token_ids) + 5 == 40
    assert written.model.longest < 40  # no token was asked for beyond it
    with pytest.raises(ValueError, match="its item needs .* context holds 20; lower max_history"):
        written("on", context=20, reserve=19)


def test_pick_over_a_large_vocabulary_is_the_textbook_draw():
    generator = torch.Generator().manual_seed(0)
    size = 3001  # no multiple of a block, and more than are sorted first
    forbidden = torch.rand(size, generator=generator) < 0.1
    draws = torch.rand(40, generator=generator, dtype=torch.float64)
    draws[:2] = torch.tensor([0.0, np.nextafter(1, 0)])
    for spread, top_p in ((3.0, 1.0), (3.0, 0.8), (0.2, 0.97), (0.0, 0.5)):
        logits = spread * torch.randn(40, size, generator=generator)
        probs = logits.double().masked_fill(forbidden, -torch.inf).softmax(-1)
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1) - ordered >= top_p - 1e-12
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0.0))
        sums = probs.cumsum(-1)
        own = pick(logits, forbidden, draws, TextSampling(top_p=top_p)).unsqueeze(1)
        target = draws.unsqueeze(1) * sums[:, -1:]
        assert not forbidden[own].any() and (probs.gather(1, own) > 0).all()
        assert (sums.gather(1, own) >= target - 1e-6).all()  # weights are float32
        assert (sums.gather(1, own) - probs.gather(1, own) <= target + 1e-6).all()


def test_padding_of_short_prompts_pushes_nothing_out_of_a_window(tiny):
    torch.manual_seed(0)
    tokenizer = tiny.tokenizer()
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
            sliding_window=24, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    sampling = TextSampling(max_tokens=16)
    prompts = [[5, 6], [7] * 20]
    found = sample_texts(model, tokenizer, prompts, 2, NEVER, sampling, reserve=2)
    assert all(len(text.token_ids) <= 2 for text in found[1])  # 20 + 2 + 2 fill the window
    for sample, text in enumerate(found[0]):
        expected = replay(model, tokenizer, prompts[0], sample, sampling, 16)
        assert list(text.token_ids) == expected[: len(text.token_ids)]
        assert len(text.token_ids) == 16 or text.finish_reason == "eos"
    with pytest.raises(ValueError, match="sliding window or context holds 24"):
        sample_texts(model, tokenizer, [[5] * 24], 1, NEVER, sampling)


def test_special_tokens_and_padding_rows_are_never_drawn(tiny):
    tokenizer = tiny.tokenizer()
    model = tiny.lm(len(tokenizer) + 64, tied=False)
    with torch.no_grad():  # what must not be drawn is what the model likes best
        model.lm_head.weight.zero_()
    bias = torch.zeros(model.config.vocab_size)
    bias[len(tokenizer) :] = 99
    bias[tokenizer.pad_token_id] = 99
    model.lm_head.bias = torch.nn.Parameter(bias)
    sampling = TextSampling(max_tokens=50)
    (texts,) = sample_texts(model, tokenizer, [[5, 6]], 8, NEVER, sampling)
    drawn = {i for t in texts for i in t.token_ids}
    assert len(drawn) > 50 and max(drawn) < len(tokenizer)
    assert tokenizer.pad_token_id not in drawn and tokenizer.eos_token_id not in drawn


def test_the_models_own_generation_settings_do_not_leak_in(world):
    model, tokenizer = world
    prompts = prompts_of(tokenizer, *PROMPTS)
    before = sample_texts(model, tokenizer, prompts, 2, NEVER, TextSampling(max_tokens=20))
    kept = model.generation_config
    try:
        model.generation_config = type(kept)(
            do_sample=False, temperature=0.1, top_k=1, max_new_tokens=3, repetition_penalty=9.0,
            eos_token_id=[5, 6, 7], suppress_tokens=[8, 9],
        )  # fmt: skip
        model.train()
        after = sample_texts(model, tokenizer, prompts, 2, NEVER, TextSampling(max_tokens=20))
        assert model.training  # left as it was
    finally:
        model.generation_config = kept
        model.eval()
    assert after == before


def test_adapters_are_sampled_from(world, tiny):
    from peft import LoraConfig, get_peft_model

    model, tokenizer, _ = tiny.sid_lm(tiny.sids(20))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    prompts = prompts_of(tokenizer, *PROMPTS)
    sampling = TextSampling(max_tokens=12)
    found = sample_texts(adapted, tokenizer, prompts, 2, NEVER, sampling)
    with adapted.disable_adapter():
        plain = sample_texts(adapted, tokenizer, prompts, 2, NEVER, sampling)
    merged = adapted.merge_and_unload()
    assert found == sample_texts(merged, tokenizer, prompts, 2, NEVER, sampling)
    assert found != plain


def test_bad_settings(world):
    model, tokenizer = world
    for wrong, message in (
        ({"temperature": 0.0}, "temperature=0.0 must be a positive number"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p=1.1 must lie in"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            TextSampling(**wrong)
    with pytest.raises(ValueError, match="n_samples=0 must be at least 1"):
        sample_texts(model, tokenizer, [[5]], 0, NEVER, TextSampling())
    with pytest.raises(ValueError, match="the stop text is empty"):
        sample_texts(model, tokenizer, [[5]], 1, "", TextSampling())
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample_texts(model, tokenizer, [[5], []], 1, NEVER, TextSampling())
    assert sample_texts(model, tokenizer, [], 1, NEVER, TextSampling()) == []


def test_nan_scores(tiny):
    model, tokenizer, _ = tiny.sid_lm(tiny.sids(20), tied=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model gave NaN scores"):
        sample_texts(model, tokenizer, [[5, 6]], 2, NEVER, TextSampling())
