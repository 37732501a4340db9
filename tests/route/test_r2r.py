from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tokenary.bench.measure import measure
from tokenary.core.errors import InputError, OptionError, UnsupportedModelError
from tokenary.core.sampling import Sampler
from tokenary.core.seeding import substream
from tokenary.decode.base import Loop
from tokenary.hf.packing import pack_linears
from tokenary.hf.strategy import Task
from tokenary.hf.target import Target, attached
from tokenary.memory.base import ReadLayer
from tokenary.models import find, load
from tokenary.models.smollm2_small import FOLDER as SMALL
from tokenary.models.smollm2_small import keep_layers, probe, small_sibling
from tokenary.models.tiny import tiny_lm
from tokenary.route.r2r import R2R, ends
from tokenary.route.r2r.labels import SENTENCE, divergent, label
from tokenary.route.r2r.loop import Gate
from tokenary.route.r2r.router import FOLDER, TOP, Router, aleatoric, entropy, load_router, read_config, top_logits
from tokenary.run import generate

VOCAB, NEW = 13, 24
PROMPTS = [substream(0, "r2r prompt", n).integers(0, VOCAB, n).tolist() for n in (9, 3, 17)]
SAMPLERS = (Sampler(), Sampler(temperature=1.1, top_p=0.9, seed=5))


def toy(family="llama", **options):
    return tiny_lm(vocab=VOCAB, layers=4, family=family, **options)


def run(lm, prompts=PROMPTS, sampler=SAMPLERS[0], new=NEW, watch=None, readers=None, **options):
    method = R2R(small="layers:2", **options)
    method.prepare(lm.model, None)
    if watch is not None:
        inner = method.score
        method.score = lambda *seen: watch(inner(*seen), *seen)
    loop = method.loop(Task(lm.model, None, prompts, sampler, new, readers=readers))
    with attached(lm.model):
        for _ in loop:
            pass
    return loop


def alone(model, sampler=SAMPLERS[0], prompts=PROMPTS, readers=None):
    with attached(model):
        loop = Loop(Target(model, readers=readers), prompts, sampler, NEW)
        for _ in loop:
            pass
    return [sequence.new_ids for sequence in loop.sequences]


def written(loop):
    return [sequence.new_ids for sequence in loop.sequences]


def by_large(loop):
    return [[not small for small in sequence.trace.from_draft] for sequence in loop.sequences]


@torch.no_grad()
def slow(lm, routed, row, sampler):
    """The mixed text with no cache at all: both models read everything anew for each token."""
    small, ids = keep_layers(lm.model, ends(4, 2)), list(PROMPTS[row])
    for _ in range(NEW):
        model = lm.model if routed(row, len(ids), small) else small
        logits = model(torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids += sampler(logits, [row], [ids])
    return ids[len(PROMPTS[row]) :]


# ------------------------------------------------------------------------------------------------- the mixed loop


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_share_is_the_small_model_and_full_share_the_large_one(family, sampler):
    lm = toy(family)
    small = keep_layers(lm.model, ends(4, 2))
    assert written(run(lm, sampler=sampler, large_share=0)) == alone(small, sampler)
    assert written(run(lm, sampler=sampler, large_share=1)) == alone(lm.model, sampler)
    assert written(run(lm, sampler=sampler, threshold=0)) == alone(lm.model, sampler)
    assert alone(small, sampler) != alone(lm.model, sampler)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.95])
def test_any_routing_writes_what_two_models_without_caches_would(family, threshold):
    lm = toy(family)
    for sampler in SAMPLERS:
        loop = run(lm, sampler=sampler, router="random", threshold=threshold, seed=4)

        def routed(row, position, small):
            return substream(4, "r2r", row, position).random() >= threshold

        for row in range(len(PROMPTS)):
            assert loop.sequences[row].new_ids == slow(lm, routed, row, sampler)
            assert by_large(loop)[row] == [routed(row, len(PROMPTS[row]) + at, None) for at in range(NEW)]


def test_the_router_sees_what_a_full_recomputation_gives():
    lm = toy()
    small, seen = keep_layers(lm.model, ends(4, 2)), []

    def watch(scores, hidden, logits, tokens, names):
        seen.extend(zip(hidden.clone(), logits.clone(), tokens, names, strict=True))
        return scores

    loop = run(lm, router="random", threshold=0.6, watch=watch)
    assert len(seen) == NEW * len(PROMPTS)
    for hidden, logits, token, (row, position) in seen:
        with torch.no_grad():
            output = small(
                torch.tensor([loop.sequences[row].ids[:position]]), use_cache=False, output_hidden_states=True
            )
        assert torch.allclose(hidden, output.hidden_states[-1][0, -1], atol=1e-4)
        assert torch.allclose(logits, output.logits[0, -1], atol=1e-4)
        assert token == int(logits.argmax())


@pytest.mark.parametrize(
    "options", [{"threshold": 1.0}, {"large_share": 0.3}, {"router": "random", "large_share": 0.3}]
)
def test_a_batch_is_its_prompts(options):
    lm = toy()
    together = run(lm, **options)
    shares = [np.mean(row) for row in by_large(together)]
    assert min(shares) > 0 and max(shares) < 1
    for row, prompt in enumerate(PROMPTS):
        single = run(lm, [prompt], Sampler(first_row=row), **options)
        assert written(single) == written(together)[row : row + 1]
        assert by_large(single) == by_large(together)[row : row + 1]


def test_only_uncertain_tokens_are_routed():
    lm, scores = toy(), {}

    def watch(found, hidden, logits, tokens, names):
        scores.update(zip(names, found.tolist(), strict=True))
        return found

    loop = run(lm, watch=watch, threshold=0.8)
    for sequence, flags in zip(loop.sequences, by_large(loop), strict=True):
        assert flags == [scores[sequence.index, sequence.n_prompt + at] >= 0.8 for at in range(NEW)]
    assert 0 < np.mean(by_large(loop)) < 1


def test_the_trace_counts_passes_of_the_large_model():
    lm = toy()
    for sequence, flags in zip((loop := run(lm, threshold=1.0)).sequences, by_large(loop), strict=True):
        assert sequence.trace.passes == sum(flags) - flags[0]
        routed = [at for at, flag in enumerate(flags) if flag]
        read = [at - before for before, at in zip([0, *routed], routed, strict=False) if at]
        assert [drafted + 1 for drafted, _ in sequence.trace.per_pass] == read
    assert loop.peak_bytes > 0


def test_the_large_model_keeps_its_cache_policy():
    lm = toy()
    for recipe in ("keyformer:keep=50%,interval=4", "recent:keep=10,sinks=0,interval=2"):
        pruned = [o.token_ids for o in generate(lm, PROMPTS, recipe, max_new_tokens=NEW)]
        mixed = [
            o.token_ids
            for o in generate(lm, PROMPTS, f"r2r:small=layers:2,large_share=1 + {recipe}", max_new_tokens=NEW)
        ]
        assert mixed == pruned
        generate(lm, PROMPTS, f"r2r:small=layers:2,large_share=0.3 + {recipe}", max_new_tokens=NEW)


class Blind(ReadLayer):
    """Reads nothing."""

    def attend(self, layer, query, key, value, mask, scale):
        return torch.zeros_like(query).transpose(1, 2)


def test_the_large_model_alone_reads_as_a_read_policy_says():
    lm = toy()
    blind = [Blind(), None, None, None]
    seen = alone(lm.model, readers=blind)
    assert written(run(lm, large_share=1, readers=lambda: blind)) == seen != alone(lm.model)
    assert written(run(lm, large_share=0, readers=lambda: blind)) == written(run(lm, large_share=0))


def test_a_comparison_calls_it_lossy():
    lm, options = toy(), {"warmup": [], "max_new_tokens": 8, "rounds": 2}
    found = measure(lm, ["r2r:small=layers:2,large_share=50%"], PROMPTS, **options)
    row = found.rows()[1]
    assert not row.lossless and row.near_ties == 0 and row.identical < len(PROMPTS)
    assert row.tokens == found.rows()[0].tokens == 8 * len(PROMPTS) and row.tokens_per_pass > 1


@given(st.lists(st.floats(0, 1), min_size=40, max_size=80), st.sampled_from([0.1, 0.3, 0.7]))
def test_a_gate_without_threshold_takes_the_upper_share_so_far(scores, share):
    gate = Gate(None, share)
    for at, score in enumerate(scores):
        below = sum(other < score for other in scores[:at])
        assert gate(score) == (below >= (1 - share) * at)
    assert not Gate(math.inf)(1e9) and Gate(-math.inf)(-1e9) and Gate(0.5)(0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": -1},
        {"large_share": 1.5},
        {"large_share": "101%"},
        {"large_share": "some%"},
        {"threshold": 0.5, "large_share": 0.5},
        {"small": "layers:0"},
        {"small": "half"},
        {"router": "oracle"},
        {"small": "layers:2", "router": "trained"},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(OptionError):
        R2R(**options)


def test_options_are_read_from_text():
    for text in ("20%", "0.2", 0.2):
        method = R2R(small="layers:2", large_share=text, router="random")
        method.prepare(toy().model, None)
        gate = method.loop(Task(toy().model, None, PROMPTS, SAMPLERS[0], NEW)).gate()
        assert gate.threshold == pytest.approx(0.8)
    thresholds = {"entropy": 0.45, "aleatoric": 2.275, "random": 0.9}
    for router, threshold in thresholds.items():
        method = R2R(small="layers:2", router=router)
        method.prepare(toy().model, None)
        assert method.loop(Task(toy().model, None, PROMPTS, SAMPLERS[0], NEW)).gate().threshold == threshold


def test_models_that_do_not_fit_are_refused():
    lm = toy()
    for options in ({"small": "trained"}, {"small": "layers:4"}, {"router": "trained"}):
        with pytest.raises((UnsupportedModelError, InputError)):
            R2R(**options).prepare(lm.model, None)
    with pytest.raises(UnsupportedModelError):
        keep_layers(lm.model, [0, 4])


# ------------------------------------------------------------------------------------------------ the small model


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "gpt2"])
def test_kept_layers_compute_what_a_model_of_copied_weights_computes(family):
    lm, kept = toy(family), [0, 1, 3]
    small = keep_layers(lm.model, kept)
    copied = type(lm.model)(small.config).eval()
    weights = dict(lm.model.state_dict())
    for name in copied.state_dict():
        for new, old in reversed(list(enumerate(kept))):
            for root in ("model.layers", "transformer.h"):
                if name.startswith(f"{root}.{new}."):
                    weights[name] = lm.model.state_dict()[name.replace(f"{root}.{new}.", f"{root}.{old}.")]
    copied.load_state_dict({name: weights[name] for name in copied.state_dict()})
    ids = torch.tensor(PROMPTS[2:])
    assert torch.equal(small(ids).logits, copied(ids).logits)
    theirs = {p.data_ptr() for p in lm.model.parameters()}
    assert all(p.data_ptr() in theirs for p in small.parameters())


def sibling_folder(folder, lm, kept=(0, 3), rank=2):
    """Write a made-up sibling of a toy net; return its updates."""
    small, generator, weights = keep_layers(lm.model, kept), torch.Generator().manual_seed(1), {}
    for name, module in small.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            weights[f"{name}.A"] = torch.randn(rank, module.in_features, generator=generator) / 4
            weights[f"{name}.B"] = torch.randn(module.out_features, rank, generator=generator) / 4
        elif name.endswith("norm"):
            weights[f"{name}.weight"] = torch.randn(module.weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors")
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4}
    source = {"name": "toy", "fingerprint": lm.fingerprint, "shape": shape, "probe": probe(lm.model)}
    (folder / "config.json").write_text(json.dumps({"layers": list(kept), "rank": rank, "source": source}))
    return weights


@pytest.mark.parametrize("packed", [False, True])
def test_the_sibling_is_the_kept_layers_with_their_updates(tmp_path, packed):
    lm, ids = toy(), torch.tensor(PROMPTS[2:])
    weights = sibling_folder(tmp_path, lm)
    before = lm.model(ids).logits
    expected = keep_layers(toy().model, (0, 3))
    with torch.no_grad():
        for name, module in expected.named_modules():
            if f"{name}.A" in weights:
                module.weight += weights[f"{name}.B"] @ weights[f"{name}.A"]
            elif f"{name}.weight" in weights:
                module.weight.copy_(weights[f"{name}.weight"])
    if packed:
        pack_linears(lm.model)
    small = small_sibling(lm, folder=tmp_path)
    assert torch.allclose(small(ids).logits, expected(ids).logits, atol=1e-4)
    assert torch.allclose(lm.model(ids).logits, before, atol=1e-4)  # the large model is as it was
    assert small.get_input_embeddings() is lm.model.get_input_embeddings()
    assert small.get_output_embeddings() is lm.model.get_output_embeddings()


def test_the_sibling_of_another_model_is_refused(tmp_path):
    sibling_folder(tmp_path, toy())
    for other in (toy(seed=1), toy(hidden=16, heads=2), tiny_lm(vocab=VOCAB, layers=2)):
        with pytest.raises(UnsupportedModelError, match="belongs to toy"):
            small_sibling(other, folder=tmp_path)
        with pytest.raises(UnsupportedModelError, match="belongs to toy"):
            small_sibling(other.model, folder=tmp_path)
    small_sibling(toy().model.bfloat16(), folder=tmp_path)
    with pytest.raises(InputError):
        small_sibling(toy(), folder=tmp_path / "none")


# ------------------------------------------------------------------------------------------- router and its labels


def test_features_are_those_of_the_slow_formulation():
    logits = torch.randn(5, 150, generator=torch.Generator().manual_seed(0)) * 3
    for row, values in zip(top_logits(logits), logits.tolist(), strict=True):
        assert row.tolist() == sorted(values, reverse=True)[:TOP]
    few = top_logits(logits[:, :30])
    assert few.shape == (5, TOP) and torch.equal(few[:, 29:], few[:, 29:30].expand(-1, TOP - 29))
    for value, row in zip(entropy(logits).tolist(), logits.double().tolist(), strict=True):
        weights = [math.exp(x) for x in row]
        shares = [w / sum(weights) for w in weights]
        assert value == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-4)
    assert entropy(torch.tensor([[0.0, -math.inf]])).tolist() == [0.0]


def test_aleatoric_uncertainty_is_the_expected_entropy_under_the_evidence():
    rng = substream(0, "evidence")
    for evidence in ([6, 2, 1], [9, 9, 9, 9, 9, 9, 9, 9, 9, 9], [30, 1]):
        drawn = rng.dirichlet(evidence, 200_000)
        expected = -(drawn * np.log(np.clip(drawn, 1e-300, None))).sum(1).mean()
        found = float(aleatoric(torch.tensor([evidence], dtype=torch.float)))
        assert found == pytest.approx(expected, abs=5e-3)
    many = torch.cat([torch.full((1, 10), 9.0), torch.full((1, 30), 2.0)], dim=1)  # only the ten largest count
    assert float(aleatoric(many)) == pytest.approx(float(aleatoric(many[:, :10])))


def test_the_router_is_the_residual_network_of_the_formula():
    torch.manual_seed(0)
    router = Router(6, width=8, blocks=2).eval()
    router.mean.normal_()
    router.scale.uniform_(0.5, 2)
    h, e, top = torch.randn(3, 6), torch.randn(3, 6), torch.randn(3, TOP)
    w = {name: p.detach().double().numpy() for name, p in router.state_dict().items()}

    def norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def affine(x, name):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    gelu = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    for at in range(3):
        logs = top[at].double() - top[at].double().exp().sum().log()
        z = (torch.cat([h[at].double(), e[at].double(), logs]).numpy() - w["mean"]) / w["scale"]
        x = affine(np.concatenate([z[:12], affine(z[12:], "logits")]), "input")
        for block in range(2):
            inner = gelu(affine(norm(x, f"blocks.{block}.0"), f"blocks.{block}.1"))
            x = x + affine(inner, f"blocks.{block}.4")
        expected = affine(norm(x, "output.0"), "output.1")[0]
        assert float(router(h, e, top)[at].detach()) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "differ"),
    [
        (" big red dog runs home.", " large red dog runs home.", False),
        (" the dog runs.", " The dog, runs!", False),
        (" is 12 metres high.", " is 14 metres high.", True),
        (" is safe to drink.", " is not safe to drink.", True),
        (" walks to the market.", " sleeps under a tree.", True),
        (".", " and of it.", False),
        (".", " because rain fell.", True),
    ],
)
def test_the_judge_compares_numbers_negations_and_words(a, b, differ):
    assert divergent(a, b) is differ and divergent(b, a) is differ


@torch.no_grad()
def test_labels_are_those_of_the_slow_pipeline():
    lm = load("stories260k", dtype="float32")
    tokenizer = lm.tokenizer
    small = keep_layers(lm.model, [0, 1, 2, 4])
    prompt = lm.encode(["Once upon a time"], raw=True)[0]
    answer = generate(lm, [prompt], max_new_tokens=60)[0].token_ids
    texts = []

    def judge(a, b):
        texts.append((a, b))
        return divergent(a, b)

    def stops(token):
        text = tokenizer.decode([token])
        return token == 2 or "\n" in text or text.rstrip()[-1:] in (".", "!", "?")

    found = label(lm.model, small, tokenizer, prompt, answer, [2], most=99, judge=judge)
    stop_at = [at for at, token in enumerate(answer) if stops(token)]
    assert found.positions.tolist() == list(range(stop_at[-1] + 1))
    assert found.mismatch.any() and not found.label[~found.mismatch].any()
    expected = []
    for at in found.positions:
        prefix = torch.tensor([prompt + answer[:at]])
        output = small(prefix, use_cache=False, output_hidden_states=True)
        token = int(output.logits[0, -1].argmax())
        assert token == found.tokens[at] and (token != answer[at]) == found.mismatch[at]
        assert np.allclose(found.hidden_states[at], output.hidden_states[-1][0, -1], atol=0.02)
        assert np.allclose(found.top_logits[at], top_logits(output.logits[:, -1])[0], atol=0.05)
        if token != answer[at]:
            other = [token]
            while len(other) < SENTENCE and not stops(other[-1]):
                other.append(int(lm.model(torch.tensor([prompt + answer[:at] + other])).logits[0, -1].argmax()))
            end = next(stop for stop in stop_at if stop >= at) + 1
            expected.append((tokenizer.decode(answer[at : min(end, at + SENTENCE)]), tokenizer.decode(other)))
    assert len(texts) == len(expected)
    for (a, b), (own, other) in zip(texts, expected, strict=True):  # ours may begin with the start of the word
        assert a.endswith(own.lstrip()) and b.endswith(other.lstrip())
    some = label(lm.model, small, tokenizer, prompt, answer, [2], most=3)
    assert 0 < len(some.positions) < len(found.positions)


# --------------------------------------------------------------------------------------------- what is shipped


def test_the_shipped_sibling_has_the_shapes_of_its_model():
    config, weights = json.loads((SMALL / "config.json").read_text()), load_file(SMALL / "model.safetensors")
    assert config["source"]["fingerprint"] == find("smollm2").sha256
    layers, rank = len(config["layers"]), config["rank"]
    sizes = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)}
    sizes |= {"gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}
    expected = {"model.norm.weight": (576,)}
    for layer in range(layers):
        for name, (wide, out) in sizes.items():
            part = f"model.layers.{layer}.{'mlp' if wide == 1536 or out == 1536 else 'self_attn'}.{name}"
            expected |= {f"{part}.A": (rank, wide), f"{part}.B": (out, rank)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{layer}.{name}.weight"] = (576,)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    assert (SMALL / "model.safetensors").stat().st_size < 8_000_000


def test_the_shipped_router_belongs_to_the_shipped_sibling():
    config = read_config()  # checks the hash
    router = load_router(config)
    probability = router(torch.zeros(1, 576), torch.zeros(1, 576), torch.zeros(1, TOP)).sigmoid()
    assert 0 <= float(probability.detach()) <= 1 and 0 < config["threshold"] < 1
    for scores in config["quantiles"].values():
        assert scores == sorted(scores) and len(scores) == 101
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000


@pytest.mark.real
def test_the_shipped_pair_writes():
    lm = load("smollm2", dtype="float32")
    prompt = ["Why is the sky blue?"]
    assert (
        generate(lm, prompt, "r2r:large_share=1", max_new_tokens=12)[0].token_ids
        == generate(lm, prompt, max_new_tokens=12)[0].token_ids
    )
    output = generate(lm, prompt, "r2r:large_share=20%", max_new_tokens=24)[0]
    assert 0 < sum(output.trace.from_draft) < 24


@pytest.mark.real
@torch.no_grad()
def test_the_router_scores_in_the_loop_what_it_was_trained_on():
    lm = load("smollm2", dtype="float32")
    method, scores = R2R(large_share=1), []
    method.prepare(lm.model, lm.tokenizer)
    prompts, inner = lm.encode(["Why is the sky blue?"]), method.score

    def watch(*seen):
        found = inner(*seen)
        scores.extend(found.tolist())
        return found

    method.score = watch
    loop = method.loop(Task(lm.model, lm.tokenizer, prompts, Sampler(), 30))
    with attached(lm.model):
        for _ in loop:
            pass
    found = label(lm.model, method.net, lm.tokenizer, prompts[0], loop.sequences[0].new_ids, [], most=99)
    assert len(found.positions) > 8
    hidden, top = (torch.from_numpy(part).float() for part in (found.hidden_states, found.top_logits))
    embedded = method.net.get_input_embeddings()(torch.from_numpy(found.tokens))
    expected = inner.router(hidden, embedded, top).sigmoid().numpy()
    assert np.allclose(np.array(scores)[found.positions], expected, atol=0.01)
