from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from tokenary.core.errors import InputError, OptionError
from tokenary.models.text_diffusion import (
    any_subset_logits,
    any_subset_nll,
    any_subset_ranks,
    build,
    diffusion_nll,
    load_text_diffusion,
    sample_masks,
    save_text_diffusion,
    two_stream_mask,
)
from tokenary.models.text_diffusion.corpus import (
    Corpus,
    clean_wikipedia,
    encode_corpus,
    token_bytes,
    train_tokenizer,
)
from tokenary.models.text_diffusion.training import (
    Training,
    batch_of,
    evaluate,
    rows_of,
    train,
    training_loss,
    unigram_bits_per_byte,
)

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32}
ARTICLES = [
    f"The {a} {b} sat on the {c}. It was {n} years old, and nobody in the {c} knew why the {a} {b} sat there."
    for n, (a, b, c) in enumerate(
        itertools.product(("red", "old", "shy"), ("cat", "dog", "owl"), ("mat", "oak", "café"))
    )
]


def net(objective="diffusion", vocab=11, context=16, seed=0, scale=6.0):
    """A small random network whose logits differ clearly from position to position."""
    model = build(seed=seed, objective=objective, vocab=vocab, context=context, **SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def draws(rows, length, vocab=11, seed=0):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(ARTICLES, 300)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return encode_corpus(ARTICLES, tokenizer, held_out=0.3)


# The network


def test_default_size_fits_fifteen_megabytes():
    model = build()
    count = sum(p.numel() for p in model.parameters())
    assert count == 7_475_456 and 2 * count < 15e6
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_looks_both_ways(implementation):
    model = net()
    model.set_attn_implementation(implementation)
    ids = draws(1, 8)
    changed = ids.clone()
    changed[0, 7] = 3 if ids[0, 7] != 3 else 4
    first = model(input_ids=ids).logits[0, 0], model(input_ids=changed).logits[0, 0]
    assert (first[0] - first[1]).abs().max() > 1e-3
    changed = ids.clone()
    changed[0, 0] = 3 if ids[0, 0] != 3 else 4
    assert (model(input_ids=ids).logits[0, 7] - model(input_ids=changed).logits[0, 7]).abs().max() > 1e-3


@torch.no_grad()
def test_padding_and_gathered_positions():
    model, ids = net(), draws(2, 9)
    full = model(input_ids=ids).logits
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    positions = torch.arange(-3, 9).clamp(min=0)[None].expand(2, -1)
    logits = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[:, 3:], full, atol=1e-4, rtol=1e-4)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 7, 5])  # tokens in any order, at their true positions
    logits = model(input_ids=ids[:, order], position_ids=order[None]).logits
    torch.testing.assert_close(logits, full[:, order], atol=1e-4, rtol=1e-4)


def test_build_is_deterministic_and_leaves_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, other = build(seed=1, **SMALL), build(seed=1, **SMALL), build(seed=2, **SMALL)
    assert torch.equal(torch.rand(3), expected)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)


def test_save_and_load(tmp_path, tokenizer):
    model = net("any-subset", vocab=tokenizer.get_vocab_size(), context=32)
    save_text_diffusion(model, tokenizer, tmp_path / "m")
    lm = load_text_diffusion(tmp_path / "m")
    half = {name: value.half().float() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, half[name]) for name, value in lm.model.state_dict().items())
    assert lm.model.config.objective == "any-subset" and not lm.model.config.is_causal
    assert not any(layer.self_attn.is_causal for layer in lm.model.model.layers)
    assert lm.tokenizer.mask_token_id == lm.model.config.mask_token_id == 1
    assert (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id) == (0, 2) and lm.eos_token_ids == (2,)
    text = "The old owl sat in the café, 27 years."
    assert lm.decode(lm.encode([text], raw=True)[0]) == text
    assert lm.tokenizer("a [MASK] b")["input_ids"].count(1) == 1
    assert {f.name for f in (tmp_path / "m").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [f for f in (tmp_path / "m").iterdir() if f.name.startswith(".writing")]
    with pytest.raises((ValueError, KeyError)):  # a causal model must not come out of this folder
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_text_diffusion(tmp_path / "m")


# Masked diffusion


def test_mask_sizes_are_uniform_and_positions_fair():
    generator, rows, length = torch.Generator().manual_seed(0), 40, 8
    masked = torch.stack([sample_masks(rows, length, generator) for _ in range(300)])  # (300, 40, 8)
    sizes = masked.sum(-1)
    assert sizes.min() == 1 and sizes.max() == length
    per_batch = torch.stack([(sizes == k).sum(1) for k in range(1, length + 1)], 1)
    assert (per_batch - rows / length).abs().max() <= 1  # stratified: every batch holds every size alike
    first = torch.bincount(sizes[:, 0], minlength=length + 1)[1:] / 300  # and one row alone is uniform
    assert (first - 1 / length).abs().max() < 5 * math.sqrt(1 / length / 300)
    rate = masked.float().mean((0, 1))
    assert (rate - (length + 1) / 2 / length).abs().max() < 0.02
    only = sample_masks(50, 20, generator, share=(0.85, 1.0)).sum(1)
    assert only.min() >= 18 and only.max() == 20


@torch.no_grad()
def test_loss_is_the_explicit_one():
    model, ids = net(), draws(5, 12)
    masked = sample_masks(5, 12, torch.Generator().manual_seed(1))
    expected = []
    for row, mask in zip(ids, masked, strict=True):
        noisy = torch.tensor([1 if m else int(t) for t, m in zip(row, mask, strict=True)])
        logp = log_softmax(model(input_ids=noisy[None]).logits[0], -1)
        terms = [-float(logp[i, row[i]]) for i in range(12) if mask[i]]
        expected.append(sum(terms) / len(terms))
    torch.testing.assert_close(diffusion_nll(model, ids, masked), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert abs(float(training_loss(model, ids, masked)) - np.mean(expected)) < 1e-5


@torch.no_grad()
def test_bound_equals_the_one_weighted_by_one_over_t():
    """All masks of a row of four, t integrated by Gauss-Legendre, against the mean over uniform sizes."""
    model, ids, length = net(seed=3), draws(1, 4, seed=3), 4
    masks = torch.tensor(list(itertools.product([False, True], repeat=length)))[1:]
    mean = diffusion_nll(model, ids.expand(len(masks), -1), masks).double()
    count = masks.sum(1)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    one_over_t = 0.0
    for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        probability = t ** count.double() * (1 - t) ** (length - count.double())
        one_over_t += w * float((probability * mean * count / t).sum()) / length
    by_size = np.mean([float(mean[count == k].mean()) for k in range(1, length + 1)])
    assert abs(one_over_t - by_size) < 1e-6
    # it is also the mean over all orders of revealing one token after the other
    value = {tuple(m.tolist()): m for m in masks}
    orders = []
    for order in itertools.permutations(range(length)):
        total = 0.0
        for step, position in enumerate(order):
            hidden = tuple(i not in order[:step] for i in range(length))
            noisy = ids.masked_fill(value[hidden], 1)
            total -= float(log_softmax(model(input_ids=noisy).logits[0, position], -1)[ids[0, position]])
        orders.append(total / length)
    assert abs(np.mean(orders) - by_size) < 1e-5
    # and the estimate from draws comes to it
    generator = torch.Generator().manual_seed(0)
    estimate = diffusion_nll(model, ids.expand(4000, -1), sample_masks(4000, length, generator))
    assert abs(float(estimate.mean()) - by_size) < 5 * float(estimate.std()) / 4000**0.5


# Any-subset autoregression


def test_ranks_sort_both_groups():
    masked = torch.tensor([[True, False, True, False, True], [True] * 5])
    assert any_subset_ranks(masked).tolist() == [[2, 0, 3, 1, 4], [0, 1, 2, 3, 4]]


def test_two_stream_mask_by_hand():
    masked = torch.tensor([[True, False, True, False]])  # ranks 2 0 3 1
    mask = two_stream_mask(any_subset_ranks(masked), masked)[0, 0]
    content = [[1, 1, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1]]
    query = [[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 0]]
    assert mask[:4, :4].int().tolist() == content and not mask[:4, 4:].any()
    assert mask[4:, :4].int().tolist() == query and torch.equal(mask[4:, 4:], torch.eye(4, dtype=torch.bool))


@torch.no_grad()
def test_a_token_is_seen_only_by_higher_ranks():
    model, ids = net("any-subset"), draws(1, 7)
    masked = torch.tensor([[True, False, True, True, False, True, True]])
    rank = any_subset_ranks(masked)
    before = any_subset_logits(model, ids, rank, masked)[0]
    for position in range(7):
        changed = ids.clone()
        changed[0, position] = 3 if ids[0, position] != 3 else 4
        moved = (any_subset_logits(model, changed, rank, masked)[0] - before).abs().amax(-1) > 1e-5
        higher = rank[0] > rank[0, position]
        assert not moved[~higher & masked[0]].any() and moved[higher & masked[0]].all()


@torch.no_grad()
def test_one_pass_is_the_chain_rule_and_sums_to_one():
    """Sequential conditionals, each from a pass in which later tokens are undecoded, multiply to the one-pass joint."""
    model, vocab = net("any-subset", vocab=5, seed=2), 5
    masked = torch.tensor([[True, False, True, False, True]])
    base = torch.tensor([[0, 3, 0, 4, 0]])
    joint = []
    for values in itertools.product(range(vocab), repeat=3):
        ids = base.clone()
        ids[masked] = torch.tensor(values)
        joint.append(float(torch.exp(-3 * any_subset_nll(model, ids, masked))))
    assert abs(sum(joint) - 1) < 1e-5
    ids = torch.tensor([[2, 3, 1, 4, 4]])
    rank, logp = any_subset_ranks(masked), 0.0
    for step, position in enumerate([0, 2, 4]):
        undecoded = rank >= 2 + step
        draft = any_subset_logits(model, ids.masked_fill(undecoded, 0), rank.masked_fill(undecoded, 2 + step), masked)
        logp += float(log_softmax(draft[0, position], -1)[ids[0, position]])
    assert abs(logp + 3 * float(any_subset_nll(model, ids, masked))) < 1e-4


@torch.no_grad()
def test_any_subset_loss_counts_every_masked_token_alike():
    model, ids = net("any-subset"), draws(6, 8)
    masked = sample_masks(6, 8, torch.Generator().manual_seed(2))
    logp = log_softmax(any_subset_logits(model, ids, any_subset_ranks(masked), masked), -1)
    terms = [-float(logp[b, i, ids[b, i]]) for b in range(6) for i in range(8) if masked[b, i]]
    assert abs(float(training_loss(model, ids, masked)) - np.mean(terms)) < 1e-5


# Text


def test_wikipedia_becomes_prose():
    body = (
        "{{Infobox|a={{b}}}}\n'''Anarchism''' is a [[political theory|theory]]&lt;ref&gt;x&lt;/ref&gt; that began "
        "&quot;long ago&quot;, see [http://a.b/c this page], &amp;mdash; they say &amp;mdash; with a [[state]].\n"
        "== Heading ==\n* A list item that is long enough to count as prose, if it were not a list item at all.\n"
        "[[Image:a.jpg|thumb|A picture with a [[link]] in its caption, which is long enough to look like prose.]]\n"
        "{| class=x\n| A table cell that is long enough to count as prose, if it were not a table cell at all.\n|}\n"
        "The second paragraph follows here; it has a [[Star Trek: Voyager]] link and many more than sixty letters, "
        "which is what a paragraph needs.\n"
        "[[fr:Anarchisme]]\n"
    )
    page = '<page><title>{}</title><revision><text xml:space="preserve">{}</text></revision></page>'
    dump = page.format("A", body) + page.format("Wikipedia:B", body) + page.format("C", "#REDIRECT [[A]]")
    assert list(clean_wikipedia(dump.encode())) == [
        'Anarchism is a theory that began "long ago", see this page, — they say — with a state.\n'
        "The second paragraph follows here; it has a Star Trek: Voyager link and many more than sixty letters, "
        "which is what a paragraph needs."
    ]


def test_tokens_give_back_text_and_bytes(tokenizer, corpus):
    size = token_bytes(tokenizer)
    for part, articles in zip(corpus, (ARTICLES[:19], ARTICLES[19:]), strict=True):
        assert part.dtype == np.uint16 and (part == 2).sum() == len(articles)
        assert tokenizer.decode(part.tolist()) == "".join(articles)
        assert size[part].sum() == sum(len(a.encode()) for a in articles)
    with pytest.raises(InputError):
        encode_corpus(ARTICLES[:1], tokenizer)


# Training


def quick(**options):
    values = {"steps": 12, "batch": 8, "length": 32, "warmup": 2, "lr": 3e-3, "evaluate_every": 1e9, "save_every": 1e9}
    return Training(**(values | options))


def test_half_of_the_any_subset_rows_are_nearly_empty():
    """Rows that hide at least 85% of their tokens: half of the batch, and the share that a uniform draw adds."""
    tokens = torch.arange(400) % 7
    for objective, least, most in (("any-subset", 0.5, 0.7), ("diffusion", 0.05, 0.25)):
        settings = Training(objective=objective, steps=1, batch=64, length=40, short_every=0)
        masked = torch.cat([batch_of(tokens, settings, step)[1] for step in range(8)])
        share = float((masked.float().mean(1) >= 0.85).float().mean())
        assert least <= share <= most and int(masked.sum(1).min()) >= 1


def test_batches_depend_on_seed_and_step_alone(corpus):
    tokens = torch.from_numpy(corpus.train.astype(np.int32))
    ids, masked = batch_of(tokens, quick(), 3)
    torch.rand(7)
    again = batch_of(tokens, quick(), 3)
    assert torch.equal(ids, again[0]) and torch.equal(masked, again[1])
    assert not torch.equal(ids, batch_of(tokens, quick(), 4)[0])
    assert not torch.equal(ids, batch_of(tokens, quick(seed=1), 3)[0])
    short, mask = batch_of(tokens, quick(short_every=4), 3)
    assert ids.shape == (8, 32) and short.shape == mask.shape == (32, 8)
    windows = {bytes(row) for row in np.lib.stride_tricks.sliding_window_view(corpus.train, 32).copy()}
    assert all(bytes(row.numpy().astype(np.uint16)) in windows for row in ids)


@pytest.mark.parametrize("objective", ["diffusion", "any-subset"])
def test_training_learns_and_is_reproducible(tmp_path, tokenizer, corpus, objective):
    reports = []
    for name in ("a", "b"):
        settings = quick(objective=objective, steps=60)
        reports.append(train(corpus, tokenizer, tmp_path / name, settings, sizes=SMALL, progress=False))
    assert reports[0]["weights_sha256"] == reports[1]["weights_sha256"]
    untrained = build(objective=objective, vocab=tokenizer.get_vocab_size(), context=32, **SMALL)
    before = evaluate(untrained, rows_of(corpus.held_out, 32), tokenizer)
    assert abs(before["nats_per_token"] - math.log(tokenizer.get_vocab_size())) < 0.1  # knows nothing yet
    assert reports[0]["held_out"]["bits_per_byte"] < 0.9 * before["bits_per_byte"]
    assert ("infill_nats_per_token" in before) == (objective == "any-subset")
    curve = json.loads((tmp_path / "a" / "curve.json").read_text())
    assert curve[-1]["step"] == 60 and curve[-1]["tokens"] == 60 * 8 * 32


def test_a_run_broken_off_and_resumed_is_the_same(tmp_path, tokenizer, corpus, monkeypatch):
    whole = train(corpus, tokenizer, tmp_path / "whole", quick(), sizes=SMALL, progress=False)
    from tokenary.models.text_diffusion import training

    def broken(tokens, settings, step, original=batch_of):
        if step == 9:
            raise KeyboardInterrupt
        return original(tokens, settings, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "batch_of", broken)
        train(corpus, tokenizer, tmp_path / "part", quick(save_every=0), sizes=SMALL, progress=False)
    assert not list((tmp_path / "part").glob(".*"))
    resumed = train(corpus, tokenizer, tmp_path / "part", quick(save_every=0), sizes=SMALL, progress=False)
    assert resumed["weights_sha256"] == whole["weights_sha256"] and resumed["steps"] == 12
    with pytest.raises(InputError, match="other settings"):
        train(corpus, tokenizer, tmp_path / "part", quick(seed=9), sizes=SMALL, progress=False)


def test_a_run_may_start_from_the_other_objective(tmp_path, tokenizer, corpus):
    first = net("any-subset", vocab=tokenizer.get_vocab_size(), context=32)
    save_text_diffusion(first, tokenizer, tmp_path / "first")
    start = load_text_diffusion(tmp_path / "first")
    still = quick(steps=1, lr=0.0)
    report = train(corpus, tokenizer, tmp_path / "a", still, sizes=SMALL, init=tmp_path / "first", progress=False)
    assert report["init_sha256"] == start.fingerprint
    ended = load_text_diffusion(tmp_path / "a").model
    assert ended.config.objective == "diffusion"
    weights = start.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in ended.state_dict().items())
    with pytest.raises(InputError, match="other settings"):
        train(corpus, tokenizer, tmp_path / "a", quick(steps=2, lr=0.0), sizes=SMALL, progress=False)
    with pytest.raises(InputError, match="other sizes"):
        sizes = SMALL | {"layers": 1}
        train(corpus, tokenizer, tmp_path / "b", still, sizes=sizes, init=tmp_path / "first", progress=False)
    other = train_tokenizer(["aaa bbb " * 50], tokenizer.get_vocab_size())
    save_text_diffusion(first, other, tmp_path / "first")
    with pytest.raises(InputError, match="another tokenizer"):
        train(corpus, tokenizer, tmp_path / "c", still, sizes=SMALL, init=tmp_path / "first", progress=False)


def test_minutes_end_a_run(tmp_path, tokenizer, corpus):
    report = train(corpus, tokenizer, tmp_path, quick(steps=None, minutes=0.01), sizes=SMALL, progress=False)
    assert report["seconds"] >= 0.6 and report["steps"] >= 1


def test_one_step_lowers_the_loss_on_its_batch():
    model, ids = build(vocab=11, **SMALL), draws(16, 12)
    masked = sample_masks(16, 12, torch.Generator().manual_seed(0))
    before = training_loss(model, ids, masked)
    before.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    assert training_loss(model, ids, masked).item() < before.item()


@torch.no_grad()
def test_evaluation_counts_bytes_and_does_not_depend_on_the_batch(tokenizer, corpus):
    model, rows = net(vocab=tokenizer.get_vocab_size(), context=32), rows_of(corpus.held_out, 32)
    result = evaluate(model, rows, tokenizer, samples=4)
    assert result == pytest.approx(evaluate(model, rows, tokenizer, samples=4, batch=4), rel=1e-5)
    bits = result["nats_per_token"] * rows.numel() / math.log(2)
    letters = len(tokenizer.decode(rows.flatten().tolist()).encode())
    assert result["bits_per_byte"] == pytest.approx(bits / letters, rel=0.01)  # a row may cut a letter in two


def test_unigram_baseline(tokenizer):
    tokens = np.array([10, 10, 10, 11], dtype=np.uint16)
    size, vocab = token_bytes(tokenizer), tokenizer.get_vocab_size()
    bits = 3 * -math.log2(4 / (4 + vocab)) - math.log2(2 / (4 + vocab))
    expected = bits / (3 * size[10] + size[11])
    assert unigram_bits_per_byte(Corpus(tokens, tokens), tokenizer) == pytest.approx(expected)


def test_wrong_settings(tmp_path, tokenizer, corpus):
    for options in ({"steps": None}, {"minutes": 1.0}, {"length": 30}, {"steps": 0}, {"steps": None, "minutes": -1.0}):
        with pytest.raises(OptionError):
            quick(**options)
    with pytest.raises(InputError, match="at least"):
        train(Corpus(corpus.train, corpus.held_out[:5]), tokenizer, tmp_path, quick(), progress=False)
