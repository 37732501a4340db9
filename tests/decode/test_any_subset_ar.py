from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenary.core.errors import OptionError, UnsupportedModelError
from tokenary.core.sampling import Sampler
from tokenary.decode.any_subset_ar import ASSD, NGram, Streams, accept_drafts, log_density
from tokenary.hf.strategy import Task
from tokenary.models.text_diffusion import any_subset_logits, any_subset_ranks, build

MASK = 1
SMALL = {"hidden": 16, "layers": 2, "heads": 2, "intermediate": 32}
TOY = [MASK, 3, MASK, MASK, 4, MASK]  # T = 6, two visible


def net(vocab=5, context=16, seed=0, scale=1.0, objective="any-subset"):
    """A random network whose tokens depend strongly on one another: attention counts for much."""
    model = build(seed=seed, objective=objective, vocab=vocab, context=context, **SMALL).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale * (20 if "self_attn" in name else 2 if "mlp" in name else 10))
    return model


def run(model, prompts, sampler=None, new=0, end=(), stops=None, **options):
    method = ASSD(**options)
    method.prepare(model, None)
    loop = method.loop(Task(model, None, prompts, sampler or Sampler(), new, end, stops))
    emissions = [emission for step in loop for emission in step]
    return loop, emissions


def enumerate_joint(model, prompt, temperature=1.0):
    """Probability of every filling, as the product of sequential conditionals."""
    targets = [i for i, token in enumerate(prompt) if token == MASK]
    visible = [i for i in range(len(prompt)) if i not in targets]
    vocab = [v for v in range(model.config.vocab_size) if v != MASK]
    joint = {(): 1.0}
    for i in targets:
        grown = {}
        for tokens, share in joint.items():
            text = list(prompt)
            for at, token in zip(targets, tokens, strict=False):
                text[at] = token
            p = conditional(model, text, visible, i, temperature)
            for v in vocab:
                grown[(*tokens, v)] = share * p[v].item()
        joint = grown
    return joint


def conditional(model, tokens, visible, position, temperature=1.0):
    """The reference: p(position | tokens of lower rank) from the training pass over all 2N rows, without [MASK]."""
    masked = torch.tensor([[i not in visible for i in range(len(tokens))]])
    with torch.no_grad():
        logits = any_subset_logits(model, torch.tensor([tokens]), any_subset_ranks(masked), masked)[0, position]
    logits = logits.double()
    logits[MASK] = -math.inf
    return (logits / temperature).softmax(-1)


def sampled(model, count, temperature=1.0, seed=0, **options):
    targets = [i for i, token in enumerate(TOY) if token == MASK]
    loop, _ = run(model, [TOY] * count, Sampler(temperature, seed=seed), **options)
    found = {}
    for sequence in loop.sequences:
        key = tuple(sequence.ids[i] for i in targets)
        found[key] = found.get(key, 0) + 1
    return found


def distance(found, joint, count):
    """Total variation, mean and spread of what noise alone gives, chi-square per degree of freedom and its spread."""
    p = np.array(list(joint.values()))
    n = np.array([found.get(key, 0) for key in joint])
    assert n.sum() == count  # nothing outside the support
    tv = 0.5 * np.abs(n / count - p).sum()
    noise = 0.5 * np.abs(np.random.default_rng(0).multinomial(count, p / p.sum(), size=400) / count - p).sum(1)
    often = p * count >= 5
    rest = (n[~often].sum(), p[~often].sum() * count)
    chi = (((n - p * count) ** 2 / (p * count))[often]).sum() + (rest[0] - rest[1]) ** 2 / max(rest[1], 1e-9)
    return tv, noise.mean(), noise.std(), chi / often.sum(), math.sqrt(2 / often.sum())


@pytest.fixture(scope="module")
def model():
    return net()


@pytest.fixture(scope="module")
def joint(model):
    return enumerate_joint(model, TOY)


# Exactness


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},
        {"k": 2},
        {"k": 5},
        {"k": 4, "draft_temperature": 0.5},
        {"k": 3, "drafter": "ngram"},
    ],
    ids=str,
)
def test_the_samples_are_those_of_the_joint(model, joint, options):
    count = 20_000 if options == {"k": 5} else 8000
    tv, mean, spread, chi, error = distance(sampled(model, count, **options), joint, count)
    assert tv < mean + 3 * spread
    assert chi < 1 + 3 * error


def test_at_another_temperature_each_conditional_is_cooled(model):
    count = 8000
    cooled = enumerate_joint(model, TOY, temperature=0.6)
    tv, mean, spread, chi, error = distance(sampled(model, count, temperature=0.6, k=4), cooled, count)
    assert tv < mean + 3 * spread and chi < 1 + 3 * error


def test_one_shot_parallel_sampling_is_far_off(model, joint):
    count = 4000
    tv, mean, spread, chi, _ = distance(sampled(model, count, k=4, verify=False), joint, count)
    assert tv > 0.3 and tv > mean + 20 * spread and chi > 5


def test_accepting_makes_p_into_q_for_any_two_distributions():
    generator = torch.Generator().manual_seed(3)
    p, q = torch.rand(2, 6, generator=generator).pow(3).add(1e-3).split(1)
    p, q = p / p.sum(), q / q.sum()
    count = 40_000
    drafts = torch.multinomial(p[0], count, replacement=True, generator=generator)[:, None]
    numbers = torch.rand(count, 1, 2, generator=generator, dtype=torch.float64)
    rows = p.expand(count, 1, 6), q.expand(count, 1, 6)
    accepted, tokens = accept_drafts(*rows, drafts, torch.ones(count, dtype=torch.long), numbers)
    written = torch.where(accepted == 1, drafts[:, 0], tokens)
    found = torch.bincount(written, minlength=6) / count
    torch.testing.assert_close(found, q[0], atol=0.01, rtol=0)
    share = torch.minimum(p, q).sum()  # what can be accepted at all
    assert abs(accepted.float().mean() - share) < 0.01


def test_padding_and_impossible_drafts_are_not_accepted():
    p = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    q = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    drafts, numbers = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 2, dtype=torch.float64)
    accepted, tokens = accept_drafts(p, q, drafts, torch.tensor([3, 1]), numbers)
    assert accepted.tolist() == [1, 1] and tokens[0] == 1


# Sequential decoding, calls


LONG = [MASK, 7, MASK, MASK, MASK, 5, 9, MASK, MASK, MASK, MASK, 4, MASK, MASK]


@pytest.fixture(scope="module")
def wide():
    return net(vocab=40, context=32, seed=2)


def greedy(model, prompt):
    """Slow and obvious: one position at a time, everything computed anew."""
    tokens, visible = list(prompt), [i for i, token in enumerate(prompt) if token != MASK]
    for i in [i for i, token in enumerate(prompt) if token == MASK]:
        tokens[i] = int(conditional(model, tokens, visible, i).argmax())
    return tokens


@pytest.mark.parametrize("options", [{"k": k} for k in (1, 2, 3, 5, 64)] + [{"drafter": "ngram"}], ids=str)
def test_greedy_is_sequential_greedy(wide, options):
    loop, _ = run(wide, [LONG], **options)
    assert loop.sequences[0].ids == greedy(wide, LONG)
    assert loop.sequences[0].finish == "length"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("options", [{"k": k} for k in (1, 2, 3, 5)] + [{"drafter": "ngram"}], ids=str)
def test_there_are_never_more_calls_than_tokens(wide, options, temperature):
    for seed in range(5):
        prompts = [LONG, [7, MASK], [MASK], [MASK, MASK, 4], [MASK] * 9]
        loop, _ = run(wide, prompts, Sampler(temperature, seed=seed), **options)
        for sequence, prompt in zip(loop.sequences, prompts, strict=True):
            calls, tokens = sequence.trace.passes, prompt.count(MASK)
            assert calls <= tokens and len(sequence.trace.from_draft) == tokens
            assert sequence.trace.accepted == sum(sequence.trace.from_draft)
            if options.get("k") == 1:
                assert calls == tokens and not any(sequence.trace.from_draft)


def test_parallel_sampling_takes_k_tokens_a_call(wide):
    for k in (1, 3, 5, 20):
        loop, _ = run(wide, [LONG], Sampler(1.0), k=k, verify=False)
        assert loop.sequences[0].trace.passes == math.ceil(LONG.count(MASK) / k)


def test_drafts_that_always_pass_give_k_tokens_in_two_calls():
    flat = net(vocab=40, scale=0.0)  # says the same of every position
    loop, _ = run(flat, [[MASK] * 12], Sampler(1.0), k=4)
    assert loop.sequences[0].trace.passes == 6 and loop.sequences[0].trace.accepted == 12


def test_a_model_that_is_not_two_stream_is_noticed(wide, monkeypatch):
    real, calls = Streams.run, []

    def leaky(self, *arguments):
        calls.append(1)
        return real(self, *arguments) * (1 + len(calls) % 2)

    monkeypatch.setattr(Streams, "run", leaky)
    with pytest.raises(AssertionError, match="the passes differ"):
        run(wide, [LONG], Sampler(1.0))


# Batches, order, random numbers


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"k": 1}, {"k": 3, "verify": False}, {"drafter": "ngram"}], ids=str)
def test_a_batch_gives_what_each_gives_alone(wide, options):
    prompts = [LONG, [5, MASK, MASK], [MASK] * 6, [8, 9, 4], [MASK, 6, 7, MASK, 3, MASK, MASK, 5]]
    together, _ = run(wide, prompts, Sampler(1.0, seed=4), **options)
    for row, prompt in enumerate(prompts):
        alone, _ = run(wide, [prompt], Sampler(1.0, seed=4, first_row=row), **options)
        first, other = together.sequences[row], alone.sequences[0]
        assert first.ids == other.ids and first.trace == other.trace


def test_the_same_seed_gives_the_same_text_and_another_seed_another(wide):
    a, b, c = (run(wide, [LONG], Sampler(1.0, seed=seed))[0].sequences[0].ids for seed in (1, 1, 2))
    assert a == b != c


def test_the_global_generators_are_left_alone(wide):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(wide, [LONG], Sampler(1.0))
    assert torch.equal(torch.rand(3), expected)


def test_emissions_say_where_their_tokens_go(wide):
    loop, emissions = run(wide, [LONG, [4, 5]], Sampler(1.0), new=3)
    template, plain = loop.sequences
    assert (template.n_prompt, plain.n_prompt) == (0, 2)
    rebuilt, order = [*LONG, MASK, MASK, MASK], []
    for emission in (e for e in emissions if e.row == 0):
        for place, token in zip(emission.at, emission.token_ids, strict=True):
            order.append(place)
            rebuilt[place] = token
    assert rebuilt == template.ids and order == [i for i, token in enumerate(LONG + [MASK] * 3) if token == MASK]
    own = [e for e in emissions if e.row == 1]
    assert [token for e in own for token in e.token_ids] == plain.new_ids and len(plain.new_ids) == 3
    assert all(e.at is None for e in own)
    for row, sequence in enumerate(loop.sequences):
        mine = [e for e in emissions if e.row == row]
        assert [e.finish for e in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish == sequence.finish == "length" and MASK not in sequence.ids


def test_prompts_and_masks_mean_generation_and_room_behind_changes_nothing(wide):
    short, _ = run(wide, [[4, 5, 6]], new=4)
    longer, _ = run(wide, [[4, 5, 6]], new=9)
    assert longer.sequences[0].ids[:7] == short.sequences[0].ids == greedy(wide, [4, 5, 6] + [MASK] * 4)


def test_end_tokens_and_stops_end_what_is_behind_the_prompt_only(wide):
    full = run(wide, [LONG], new=8)[0].sequences[0]
    behind = full.ids[len(LONG) :]
    first = behind.index(behind[2])
    cut, emissions = run(wide, [LONG], new=8, end=(behind[2],))
    assert cut.sequences[0].ids == [*full.ids[: len(LONG)], *behind[: first + 1]]
    assert cut.sequences[0].finish == "stop"
    assert emissions[-1].finish == "stop"
    stopped, _ = run(wide, [LONG], new=8, stops=lambda row, ids: len(ids) == len(LONG) + 4)
    assert stopped.sequences[0].ids == full.ids[: len(LONG) + 4] and stopped.sequences[0].finish == "stop"
    inside = full.ids[0]
    whole, _ = run(wide, [LONG], end=(inside,))
    assert whole.sequences[0].finish == "length" and MASK not in whole.sequences[0].ids


def test_a_prompt_without_masks_is_left_alone(wide):
    loop, emissions = run(wide, [[4, 5, 6]])
    assert loop.sequences[0].ids == [4, 5, 6] and loop.sequences[0].finish == "length" and emissions == []


# Density


def test_density_is_the_product_of_sequential_conditionals(wide):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (4, 12), generator=generator)
    masked = torch.rand(4, 12, generator=generator) < torch.tensor([[0.2], [0.5], [0.9], [1.1]])
    masked[0, 11] = True
    found = log_density(wide, ids, masked)
    for row in range(4):
        visible = [i for i in range(12) if not masked[row, i]]
        tokens, expected = torch.where(masked[row], MASK, ids[row]).tolist(), 0.0
        for i in range(12):
            if masked[row, i]:
                expected += conditional(wide, tokens, visible, i)[ids[row, i]].log().item()
                tokens[i] = int(ids[row, i])
        assert found[row].item() == pytest.approx(expected, abs=1e-3)


def test_the_densities_of_all_fillings_sum_to_one(model, joint):
    ids = torch.tensor([TOY]).repeat(len(joint), 1)
    masked = ids == MASK
    ids[masked] = torch.tensor(list(joint)).flatten()
    density = log_density(model, ids, masked).double().exp()
    assert density.sum().item() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(density, list(joint.values()), atol=1e-6)


# The passes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_pass_over_the_needed_rows_equals_the_pass_over_all_of_them(implementation):
    model = net(vocab=40, context=32, seed=6)
    ids = torch.randint(2, 40, (2, 10), generator=torch.Generator().manual_seed(1))
    masked = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1, 1, 1, 0]]).bool()
    rank = any_subset_ranks(masked)
    targets = [row.nonzero()[:, 0].tolist() for row in masked]
    streams = Streams(model, masked)
    with torch.no_grad():
        expected = any_subset_logits(model, ids, rank, masked)
        last = rank.where(rank < (~masked).sum(1, keepdim=True), torch.tensor(99))  # all undecoded ones equal and last
        blind = any_subset_logits(model, ids, last, masked)
        model.set_attn_implementation(implementation)
        visible = [(~row).nonzero()[:, 0].tolist() for row in masked]
        drafted = streams.run(ids.tolist(), visible, [t[:2] for t in targets], [[3, 3], [2, 2]])
        # a wrong draft is read, and then its slot is written anew
        wrong = (40 + 1 - ids).clamp(2, 39).tolist()
        streams.run(wrong, [t[:2] for t in targets], [t[2:3] for t in targets], [[5], [4]])
        seen = [[rank[b, i].item() for i in t] for b, t in enumerate(targets)]
        logits = streams.run(ids.tolist(), [t[:-1] for t in targets], targets, seen)
    for b, at in enumerate(targets):
        reference = expected[b, at].clone()
        reference[:, MASK] = -math.inf
        torch.testing.assert_close(logits[b, : len(at)], reference, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(drafted[b, 0], reference[0], atol=1e-3, rtol=1e-4)
        reference = blind[b, at[1]].clone()
        reference[MASK] = -math.inf
        torch.testing.assert_close(drafted[b, 1], reference, atol=1e-3, rtol=1e-4)


def test_only_needed_rows_are_computed(wide):
    loop, _ = run(wide, [[5] * 4 + [MASK] * 12], k=1)
    assert loop.streams.rows == 4 + 12 + 11  # the prompt, a query a token, each token but the last read once
    assert loop.peak_bytes == 17 * 2 * 2 * 16 * 4  # T + 1 slots of keys and values, 2 layers, float32


def test_counts_of_known_pairs():
    tokens = [5, 6, 0, 5, 6, 5, 0]
    table = NGram(tokens, [0, 1, 3, 4, 5])
    p = torch.zeros(3, 8)
    table.probabilities(2, p[0])  # after 6 came 5, once
    tokens[2] = 6
    table.add(2)  # now 6 6 and 6 5 as well
    table.probabilities(2, p[1])
    table.probabilities(0, p[2])
    assert p[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    torch.testing.assert_close(p[1, 5:7], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(p[2, 5:7], torch.tensor([3 / 6, 3 / 6]))
    empty = torch.zeros(8)
    NGram([1, 1], []).probabilities(0, empty)
    torch.testing.assert_close(empty, torch.full((8,), 1 / 8))


# What is refused


def test_wrong_options_and_models(wide):
    for options in ({"k": 0}, {"k": 65}, {"drafter": "other"}, {"draft_temperature": 0}):
        with pytest.raises(OptionError):
            ASSD(**options)
    with pytest.raises(OptionError, match="verify"):
        ASSD(drafter="ngram", verify=False)
    for options in ({"verify": False}, {"drafter": "ngram"}):
        with pytest.raises(OptionError, match="draft_temperature"):
            ASSD(**options, draft_temperature=0.5)
    with pytest.raises(UnsupportedModelError, match="any-subset"):
        ASSD().prepare(net(objective="diffusion"), None)
