"""Tests of gemma270m.py. `HYPOTHESIS_PROFILE=long pytest` searches twenty times as far as `pytest` alone."""
import contextlib
import copy
import csv
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import gemma270m
from gemma270m import (PRESETS, Gemma, GemmaConfig, KVCache, RMSNorm, TrainConfig, apply_rope, evaluate,
                       get_batch, learning_rate, load_checkpoint, load_data, main, pick_dtype, rope_tables,
                       sample_token, save_checkpoint, sliding_window_attention, training_blocks)

common = dict(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("short", derandomize=True, max_examples=20, **common)
settings.register_profile("long", max_examples=400, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
few = settings(max_examples=settings().max_examples // 2)  # for properties that take long
torch.set_num_threads(1)  # the models here are too small to share out

SHAPE = dict(vocab_size=40, context_length=64, emb_dim=16, n_layers=3, n_heads=4, n_kv_groups=2, head_dim=8,
             hidden_dim=24, sliding_window=6, full_attention_every=3, query_pre_attn_scalar=8)
TOY = dict(SHAPE, preset="tiny", device="cpu", dtype="float32", batch_size=2, grad_accum=2, block_size=16,
           lr=1e-2, max_iters=12, warmup_iters=4, eval_interval=4, eval_tokens=80, log_interval=4)
seeds = st.integers(0, 999)
shapes = st.fixed_dictionaries({
    "vocab_size": st.integers(10, 50), "context_length": st.just(64), "emb_dim": st.sampled_from((12, 24)),
    "n_layers": st.integers(1, 4), "n_heads": st.integers(1, 3), "n_kv_groups": st.integers(1, 2),
    "head_dim": st.sampled_from((2, 8, 12)), "hidden_dim": st.integers(1, 30),
    "sliding_window": st.integers(1, 9), "full_attention_every": st.integers(1, 4),
    "rope_local_base": st.floats(5, 1e4), "rope_base": st.floats(5, 1e6), "tie_embeddings": st.booleans(),
    "query_pre_attn_scalar": st.integers(4, 30), "norm_eps": st.floats(1e-6, 1e-2),
}).map(lambda shape: GemmaConfig(**{**shape, "n_heads": shape["n_heads"] * shape["n_kv_groups"]}))
assert_equal = functools.partial(assert_close, rtol=0, atol=0)


def randomize(model, seed=0):
    """Gives every weight a random value, those that start at zero too."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, std=0.3 if "norm" in name else 0.1)
    return model


def some_tokens(config, B, T, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def write_data(folder, train, val, **meta):
    """Does what prepare.py does. -> the folder"""
    folder.mkdir(exist_ok=True)
    for name, tokens in (("train", train), ("val", val)):
        np.asarray(tokens, dtype=np.uint16).tofile(folder / f"{name}.bin")
    (folder / "meta.json").write_text(json.dumps({
        "tokenizer": "bytes", "vocab_size": 40, "dtype": "uint16", "end_of_text": 39, "train_stories": 1,
        "val_stories": 1, "train_tokens": len(train), "val_tokens": len(val), "source": "a test", **meta}))
    return folder


def flags(**values):
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of data in which each token says much about the next."""
    walk = np.cumsum(np.random.default_rng(0).integers(1, 4, size=700)) % 40
    return write_data(tmp_path_factory.mktemp("data"), walk[:600], walk[600:])


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A function that trains a toy through the command line, without pictures, and returns its checkpoint."""
    def run(**given):
        given = {**TOY, "data_dir": data, "out": tmp_path_factory.mktemp("run") / "out.pt", **given}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "matplotlib.figure", None)
            main(flags(**given))
        return torch.load(given["out"], weights_only=True)
    return run


@pytest.fixture(scope="session")
def whole(run):
    """The checkpoint of a toy run that nothing interrupted."""
    return run()


def column(state, name):
    return [row[name] for row in state["rows"] if name in row]


class TensorsMade(TorchDispatchMode):
    """Lists the shape and dtype of each tensor that any operation makes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [(leaf.shape, leaf.dtype) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.list = getattr(self, "list", []) + tensors
        return out


# ---- layers ------------------------------------------------------------------------------------------


def dense_attention(q, k, v, window, scale):
    """All scores at once: query i sees key j if 0 <= i - j < window."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    age = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
    return (q @ k.mT * scale).masked_fill((age < 0) | (age >= window), -math.inf).softmax(-1) @ v


@given(B=st.integers(1, 2), G=st.integers(1, 3), shared=st.integers(1, 3), T=st.integers(1, 40),
       D=st.integers(1, 8), window=st.integers(1, 45), seed=seeds)
def test_sliding_window_attention_and_its_gradient_equal_a_dense_reference(B, G, shared, T, D, window, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, heads, T, D, dtype=torch.float64, requires_grad=True)
               for heads in (G * shared, G, G))
    got, expected = (f(q, k, v, window, 0.7) for f in (sliding_window_attention, dense_attention))
    assert_close(got, expected)
    weight = torch.randn_like(got)
    assert_close(*(torch.autograd.grad(out, (q, k, v), weight) for out in (got, expected)))


@given(T=st.integers(1, 40), window=st.integers(1, 12), seed=seeds, data=st.data())
def test_a_key_influences_its_own_query_and_the_window_minus_one_after_it(T, window, seed, data):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 1, 1, T, 4, dtype=torch.float64)
    j, changed = data.draw(st.integers(0, T - 1)), v.clone()
    changed[:, :, j] += 1
    before, after = (sliding_window_attention(q, k, values, window, 0.5) for values in (v, changed))
    influenced = (after - before).abs().amax(dim=(0, 1, 3)) > 1e-9
    assert influenced.nonzero().flatten().tolist() == list(range(j, min(T, j + window)))


def test_sliding_layers_make_nothing_of_size_t_by_t():
    T, window = 512, 4
    q, k, v = torch.randn(3, 1, 2, T, 8, requires_grad=True)
    with TensorsMade() as made:
        sliding_window_attention(q, k, v, window, 1.0).sum().backward()
    assert q.numel() <= max(shape.numel() for shape, _ in made.list) < T * T / 8


@given(T=st.integers(1, 300), D=st.sampled_from((2, 4, 6, 16, 32)), base=st.floats(2, 1e6), seed=seeds)
def test_rope_equals_complex_numbers_and_keeps_norms(T, D, base, seed):
    x = torch.randn(2, 3, T, D, generator=torch.Generator().manual_seed(seed))
    turned = apply_rope(x, rope_tables(T, D, base))
    angle = np.outer(np.arange(T), base ** (-2 * np.arange(D // 2) / D))
    z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.from_numpy(np.exp(1j * angle))
    assert_close(turned, torch.cat((z.real, z.imag), dim=-1).float(), atol=1e-3, rtol=0)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@given(distance=st.integers(0, 99), shift=st.integers(0, 200), base=st.floats(2, 1e6), seed=seeds)
def test_scores_of_turned_vectors_depend_on_the_distance_only(distance, shift, base, seed):
    torch.manual_seed(seed)
    q, k = (apply_rope(torch.randn(8).expand(1, 1, 300, 8), rope_tables(300, 8, base)) for _ in "qk")
    score = q[0, 0] @ k[0, 0].T
    assert_close(score[distance + shift, shift], score[distance, 0], atol=1e-3, rtol=0)


@few
@given(config=shapes, casts=st.lists(st.sampled_from(("bfloat16", "float16", "float64")), min_size=1))
def test_rope_tables_survive_casts_and_copies(config, casts):
    config = replace(config, context_length=600)
    model = randomize(Gemma(config))
    for dtype in casts:
        model = copy.deepcopy(model.to(getattr(torch, dtype)))
    for kind, base in (("sliding_attention", config.rope_local_base), ("full_attention", config.rope_base)):
        assert_equal(model.rope[kind], rope_tables(600, config.head_dim, base))
    fresh = Gemma(config)
    fresh.load_state_dict(model.state_dict())
    tokens = some_tokens(config, 1, 600)
    assert_equal(model.float()(tokens), fresh(tokens))
    assert torch.isfinite(model.bfloat16()(tokens)).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@given(dim=st.integers(1, 64), scale=st.floats(1e-3, 1e3), eps=st.floats(1e-8, 1e-2), seed=seeds)
def test_rms_norm_equals_that_of_transformers(dtype, dim, scale, eps, seed):
    ours, theirs = RMSNorm(dim, eps), Gemma3RMSNorm(dim, eps)
    torch.manual_seed(seed)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = (torch.randn(5, dim) * scale).to(dtype)
    assert_equal(ours(x), theirs(x))
    assert_equal(ours.to(dtype)(x), theirs.to(dtype)(x))


# ---- configuration and counts ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (GemmaConfig, TrainConfig))
@given(data=st.data())
def test_a_number_out_of_range_raises_value_error_naming_its_field(kind, data):
    field = data.draw(st.sampled_from([field for field in fields(kind) if field.type in (int, float)]))
    with pytest.raises(ValueError, match=field.name):
        kind(**{field.name: data.draw(st.sampled_from((-1, math.nan, math.inf, -math.inf)))})


@pytest.mark.parametrize("kind, wrong", (
    (GemmaConfig, dict(n_kv_groups=3)), (GemmaConfig, dict(head_dim=7)), (GemmaConfig, dict(vocab_size=0)),
    (TrainConfig, dict(dtype="int8")), (TrainConfig, dict(preset="1b")), (TrainConfig, dict(grad_accum=0)),
    (TrainConfig, dict(min_lr=1e-3)), (TrainConfig, dict(beta1=1.0)), (TrainConfig, dict(max_iters=31))))
def test_a_value_that_does_not_fit_raises_value_error_naming_its_field(kind, wrong):
    with pytest.raises(ValueError, match=list(wrong)[0]):
        kind(**wrong)


def matrix_weights(c):
    attention, feed_forward = 2 * c.head_dim * (c.n_heads + c.n_kv_groups), 3 * c.hidden_dim
    return (c.n_layers * (attention + feed_forward) + c.vocab_size) * c.emb_dim


@given(config=shapes, T=st.integers(1, 64))
def test_parameters_and_flops_equal_their_closed_forms(config, T):
    model = Gemma(config)
    norms = config.n_layers * (4 * config.emb_dim + 2 * config.head_dim) + config.emb_dim
    untied = 0 if config.tie_embeddings else config.vocab_size * config.emb_dim
    assert model.num_parameters() == matrix_weights(config) + norms + untied
    visible = sum(min(i + 1, config.sliding_window if kind == "sliding_attention" else T)
                  for kind in config.layer_types for i in range(T)) / T
    expected = 6 * matrix_weights(config) + 12 * visible * config.n_heads * config.head_dim
    assert model.flops_per_token(T) == pytest.approx(expected)


@pytest.mark.parametrize("changes, count", (({}, 132_490_496), (dict(tie_embeddings=False), 164_654_976),
                                            (dict(vocab_size=262_144), 268_098_176)), ids=str)
def test_exact_numbers_of_the_full_model(changes, count):
    with torch.device("meta"):
        model = Gemma(GemmaConfig(**changes))
    assert model.num_parameters() == count
    assert sum(weight.numel() for weight in model.layers[0].parameters()) == 5_573_632
    assert changes or model.flops_per_token(1024) == pytest.approx(884e6, rel=1e-3)
    assert [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"] == [5, 11, 17]


# ---- model -------------------------------------------------------------------------------------------


@given(config=shapes, T=st.integers(1, 40), seed=seeds, data=st.data())
def test_future_tokens_never_change_the_past(config, T, seed, data):
    model, tokens = randomize(Gemma(config), seed), some_tokens(config, 2, T, seed)
    i, other = data.draw(st.integers(0, T - 1)), tokens.clone()
    other[:, i:] = (other[:, i:] + 1) % config.vocab_size
    before, after = model(tokens), model(other)
    assert_close(before[:, :i], after[:, :i])
    assert not torch.allclose(before[:, i], after[:, i])


def transformers_peer(c, seed):
    """A Gemma3ForCausalLM of the same shape with random weights, and a Gemma that has loaded them."""
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in
            (("sliding_attention", c.rope_local_base), ("full_attention", c.rope_base))}
    peer = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=c.vocab_size, hidden_size=c.emb_dim, intermediate_size=c.hidden_dim, rope_parameters=rope,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_groups,
        head_dim=c.head_dim, sliding_window=c.sliding_window, query_pre_attn_scalar=c.query_pre_attn_scalar,
        max_position_embeddings=c.context_length, layer_types=c.layer_types, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, pad_token_id=None, bos_token_id=None, eos_token_id=None)).eval()
    model, weights = Gemma(c), randomize(peer, seed).state_dict()
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()
                           if not (c.tie_embeddings and name == "lm_head.weight")})
    return peer, model


@given(config=shapes, T=st.integers(2, 40), seed=seeds)
def test_logits_and_gradients_equal_those_of_transformers(config, T, seed):
    peer, model = transformers_peer(config, seed)
    tokens = some_tokens(config, 2, T, seed)
    logits = peer(tokens).logits
    assert_close(model(tokens), logits, atol=1e-4, rtol=0)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = {name.removeprefix("model."): weight.grad for name, weight in peer.named_parameters()}
    for name, weight in model.named_parameters():
        assert_close(weight.grad, theirs[name], atol=1e-5, rtol=1e-3)


@few
@given(config=shapes, T=st.integers(1, 20), seed=seeds)
def test_greedy_generation_equals_full_forwards_and_transformers(config, T, seed):
    peer, model = transformers_peer(config, seed)
    tokens = expected = some_tokens(config, 2, T, seed)
    for _ in range(16):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(tokens, 16, temperature=0), expected)
    assert torch.equal(model.generate(tokens, 16, temperature=1, top_k=1), expected)
    if config.sliding_window > 1:  # the peer's cache never drops a key from a window of one
        options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False)
        assert torch.equal(peer.generate(tokens, **options), expected)


@given(config=shapes, pieces=st.lists(st.integers(1, 12), min_size=1, max_size=10), seed=seeds)
def test_the_cache_gives_the_full_logits_for_any_split_and_stays_small(config, pieces, seed):
    pieces = [n for n, end in zip(pieces, itertools.accumulate(pieces)) if end <= config.context_length]
    model, tokens = randomize(Gemma(config), seed), some_tokens(config, 2, sum(pieces), seed)
    cache = KVCache(config, 2, sum(pieces))
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
        assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-4, rtol=0)
    for store, kind in zip(cache.layers, config.layer_types):
        longest = min(sum(pieces), config.sliding_window if kind == "sliding_attention" else math.inf)
        assert store.numel() == 2 * 2 * config.n_kv_groups * longest * config.head_dim


@given(config=shapes, seed=seeds, temperature=st.floats(0.1, 3), stop=st.none() | st.integers(0, 9))
def test_sampling_repeats_with_its_seed_and_ends_at_the_stop_token(config, seed, temperature, stop):
    model, tokens = randomize(Gemma(config), seed), some_tokens(config, 3, 2, seed)

    def sample(method, **more):
        generator = torch.Generator().manual_seed(seed)
        return method(tokens, 30, temperature=temperature, generator=generator, **more)

    free = sample(model.generate)[:, 2:]
    assert torch.equal(free, torch.stack(list(sample(model.stream)), dim=1))
    stopped = free.eq(-1 if stop is None else stop).cumsum(1) > 0
    end = 1 + int((~stopped).sum(1).max())  # the place of the last row's first stop token
    expected = free.masked_fill(stopped, stop or 0)[:, :end]
    assert torch.equal(sample(model.generate, stop_token=stop)[:, 2:], expected)


@given(logits=st.lists(st.floats(-5, 5, width=16), min_size=2, max_size=9, unique=True),
       temperature=st.floats(0.2, 4), top_k=st.none() | st.integers(1, 10),
       top_p=st.none() | st.floats(0.01, 0.99))
def test_sampling_draws_from_the_smallest_nucleus_of_the_best_k(logits, temperature, top_k, top_p):
    p = np.exp(np.array(logits) / temperature)
    best = np.argsort(-p)[:top_k]
    if top_p is not None:
        share = np.cumsum(p[best] / p[best].sum())
        assume(np.abs(share - top_p).min() > 1e-5)
        best = best[:np.searchsorted(share, top_p) + 1]
    expected, drawn = np.zeros(len(p)), []
    expected[best] = p[best] / p[best].sum()
    draw = torch.multinomial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda p, *a, **b: drawn.append(p) or draw(p, *a, **b))
        assert sample_token(torch.tensor([logits]), temperature, top_k, top_p).shape == (1,)
    np.testing.assert_allclose(drawn[0][0], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrong", (
    dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0),
    dict(top_k=-3), dict(top_p=0), dict(top_p=1.1), dict(top_p=math.nan), dict(T=0), dict(T=65),
    dict(T=60, n=5)), ids=str)
def test_bad_sampling_arguments_raise_value_error(wrong):
    wrong = {"T": 3, "n": 2, **wrong}
    tokens = torch.zeros(1, wrong.pop("T"), dtype=torch.long)
    with pytest.raises(ValueError):
        Gemma(GemmaConfig(**SHAPE)).generate(tokens, wrong.pop("n"), **wrong)


def test_generate_takes_its_sampling_arguments_by_position_too():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert Gemma(GemmaConfig(**SHAPE)).generate(tokens, 2, 1.0, 5, 0.9).shape == (1, 5)


def test_a_sequence_longer_than_the_context_raises_value_error():
    with pytest.raises(ValueError, match="context"):
        Gemma(GemmaConfig(**SHAPE))(torch.zeros(1, 65, dtype=torch.long))


def with_loss_in_chunks(model, rows):
    """Makes the model believe in a vocabulary so large that its loss takes so few rows at a time."""
    model.config = replace(model.config, vocab_size=2 ** 27 // rows)
    return model


@given(config=shapes, B=st.integers(1, 3), T=st.integers(1, 12), rows=st.integers(1, 40), seed=seeds,
       data=st.data())
def test_chunked_loss_and_its_gradient_equal_plain_cross_entropy(config, B, T, rows, seed, data):
    model, tokens = randomize(Gemma(config), seed), some_tokens(config, B, T, seed)
    ignored = data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T) | st.just([True] * B * T))
    targets = some_tokens(config, B, T, seed + 1).masked_fill(torch.tensor(ignored).view(B, T), -1)
    logits = model(tokens).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    expected = total / max(1, B * T - sum(ignored))  # 0, not NaN, if all are ignored
    got = with_loss_in_chunks(model, rows)(tokens, targets)
    assert got.shape == ()
    assert_close(got, expected)
    assert_close(gradients(got, model), gradients(expected, model))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_training_never_holds_all_logits_in_float32(dtype):
    model = with_loss_in_chunks(randomize(Gemma(GemmaConfig(**{**SHAPE, "vocab_size": 1_000}))), rows=20)
    tokens = torch.randint(1_000, (2, 50))
    with TensorsMade() as made:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens, tokens)
        loss.backward()
    logits = [shape for shape, kind in made.list if shape[-1:] == (1_000,) and kind == torch.float32]
    assert max(shape.numel() for shape in logits) == 20 * 1_000  # of 100 * 1,000


@given(config=shapes, seed=seeds)
def test_recomputed_activations_give_the_same_gradient(config, seed):
    model, tokens = randomize(Gemma(config), seed), some_tokens(config, 2, 20, seed)
    with TensorsMade() as made:
        plain = gradients(model(tokens, tokens), model)
    model.checkpoint_activations = True
    with TensorsMade() as remade:
        assert_equal(gradients(model(tokens, tokens), model), plain)
    assert len(remade.list) > len(made.list)


# ---- data, schedule, evaluation ----------------------------------------------------------------------


@given(n_blocks=st.integers(1, 30), batch_size=st.integers(1, 70), epochs=st.integers(1, 3), seed=seeds,
       data=st.data())
def test_every_block_is_seen_once_an_epoch_wherever_a_run_starts(n_blocks, batch_size, epochs, seed, data):
    iterations = range(math.ceil(epochs * n_blocks / batch_size))
    asked = data.draw(st.permutations(iterations))
    batches = {i: training_blocks(i, batch_size, n_blocks, seed) for i in asked}
    order = np.concatenate([batches[i] for i in iterations])[:epochs * n_blocks].reshape(epochs, n_blocks)
    assert np.array_equal(np.sort(order, axis=1), [range(n_blocks)] * epochs)
    if n_blocks > 12:
        others = [training_blocks(i, n_blocks, n_blocks, n) for i, n in ((0, seed + 1), (1, seed))]
        assert order[0].tolist() not in others


@given(length=st.integers(2, 60), block_size=st.integers(1, 20), data=st.data())
def test_targets_are_the_inputs_one_place_on_and_minus_one_past_the_end(length, block_size, data):
    tokens = np.arange(100, 100 + length, dtype=np.uint16)
    blocks = data.draw(st.lists(st.integers(0, (length - 2) // block_size), min_size=1, max_size=4))
    x, y = get_batch(tokens, blocks, block_size, torch.device("cpu"))
    places = torch.tensor(blocks)[:, None] * block_size + torch.arange(block_size)
    assert torch.equal(y, torch.where(places + 1 < length, 101 + places, -1))
    assert torch.equal(x[places < length], 100 + places[places < length])
    assert x.min() >= 0


@given(grad_accum=st.integers(1, 8), steps=st.integers(1, 60), rest=st.integers(0, 7),
       warmup=st.integers(0, 300), lr=st.floats(1e-6, 1), share=st.none() | st.floats(0, 1))
def test_learning_rate_rises_to_its_peak_then_falls_to_min_lr(grad_accum, steps, rest, warmup, lr, share):
    config = TrainConfig(grad_accum=grad_accum, max_iters=steps * grad_accum + rest % grad_accum, lr=lr,
                         warmup_iters=warmup, min_lr=None if share is None else lr * share)
    rates = [learning_rate(config, step) for step in range(steps)]
    peak = rates.index(max(rates))
    assert 0 <= min(rates) and max(rates) <= lr * (1 + 1e-9)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(lr * grad_accum / warmup) if warmup >= grad_accum else peak == 0
    if warmup < steps * grad_accum:
        assert rates[-1] == pytest.approx(lr * (0.1 if share is None else share))
        assert peak == 0 or abs((peak + 1) * grad_accum - warmup) < grad_accum
    if warmup % grad_accum == 0 and 0 < warmup <= steps * grad_accum:
        assert rates[warmup // grad_accum - 1] == pytest.approx(lr)


@given(length=st.integers(2, 60), block_size=st.integers(1, 70), batch_size=st.integers(1, 5),
       eval_tokens=st.integers(1, 130), world=st.integers(2, 3), seed=seeds)
def test_validation_is_the_same_for_any_batch_size_and_number_of_processes(length, block_size, batch_size,
                                                                           eval_tokens, world, seed):
    model = randomize(Gemma(GemmaConfig(**{**SHAPE, "context_length": 70})), seed)
    tokens = np.random.default_rng(seed).integers(40, size=length, dtype=np.uint16)
    config = TrainConfig(block_size=block_size, batch_size=batch_size, eval_tokens=eval_tokens)
    validate = functools.partial(evaluate, model, tokens, autocast=contextlib.nullcontext())
    got, totals = validate(config=config), []
    assert validate(config=replace(config, batch_size=1)) == pytest.approx(got, rel=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda total: totals.append(total.clone()))
        for rank in range(world):
            validate(config=config, rank=rank, world=world)
    loss, count = sum(totals).tolist()
    assert loss / count == pytest.approx(got, rel=1e-5)
    assert min(length - 1, eval_tokens - block_size) <= count <= length - 1
    if eval_tokens >= length + block_size:  # every token counts once
        pieces = torch.from_numpy(tokens.astype(np.int64)).unfold(0, 2, 1).split(block_size)
        losses = [F.cross_entropy(model(p[None, :, 0])[0], p[:, 1], reduction="none") for p in pieces]
        assert got == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name, content", (
    ("meta.json", None), ("train.bin", None), ("val.bin", None), ("val.bin", b""), ("val.bin", b"ab" * 51),
    ("train.bin", b"ab" * 99), ("train.bin", b"a" * 199), ("meta.json", b""), ("meta.json", b'{"dt'),
    ("meta.json", b"\xff"), ("meta.json", b"[1]"), ("meta.json", b"{}"), ("meta.json", b'{"dtype": "int3"}'),
    ("meta.json", b'{"dtype": "uint16", "train_tokens": 100, "val_tokens": 50, "vocab_size": 40}'),
    ("meta.json", b'{"dtype": "uint16", "train_tokens": 100, "val_tokens": 50, "tokenizer": "bytes"}')))
def test_missing_or_damaged_data_raises_value_error(name, content, tmp_path):
    folder = write_data(tmp_path, range(100), range(50))
    assert [len(part) for part in load_data(folder)[:2]] == [100, 50]
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="prepare.py"):
        load_data(folder)


# ---- checkpoint --------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    def full_disk(state, file):
        file.write(b"half")
        raise OSError("no space left on device")

    save_checkpoint(tmp_path / "out.pt", {"iteration": 1})
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        save_checkpoint(tmp_path / "out.pt", {"iteration": 2})
    assert torch.load(tmp_path / "out.pt", weights_only=True) == {"iteration": 1}


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", (torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))))
def test_code_in_a_checkpoint_is_refused_and_does_not_run(save, tmp_path):
    save({"model_config": Malice(tmp_path / "ran")}, tmp_path / "out.pt")
    with pytest.raises(ValueError, match="out.pt"):
        load_checkpoint(tmp_path / "out.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", (0, 0.01, 0.5, 0.9, 0.999))
def test_a_cut_checkpoint_raises_value_error(whole, tmp_path, share):
    torch.save(whole, tmp_path / "out.pt")
    assert load_checkpoint(tmp_path / "out.pt")["model_config"] == GemmaConfig(**SHAPE)
    os.truncate(tmp_path / "out.pt", int((tmp_path / "out.pt").stat().st_size * share))
    with pytest.raises(ValueError, match="out.pt"):
        load_checkpoint(tmp_path / "out.pt")


# ---- training ----------------------------------------------------------------------------------------


def test_one_batch_can_be_learned_by_heart(run, tmp_path):
    data = write_data(tmp_path, np.random.default_rng(0).integers(40, size=17), range(17))
    state = run(data_dir=data, batch_size=1, grad_accum=1, max_iters=150, lr=2e-2, eval_interval=999)
    assert column(state, "train_loss")[-1] < 0.1 < 1 < column(state, "train_loss")[0]


@few
@given(stops=st.lists(st.tuples(st.integers(2, 30), st.sampled_from((signal.SIGINT, signal.SIGTERM))),
                      min_size=1, max_size=3))
def test_a_stopped_run_resumes_bit_for_bit(run, tmp_path_factory, stops):
    out, handler = tmp_path_factory.mktemp("stopped") / "out.pt", signal.getsignal(signal.SIGINT)
    for leg, (call, number) in enumerate(stops):
        calls = itertools.count(1)

        def get_batch_and_stop(*args):
            if next(calls) == call:
                signal.raise_signal(number)
            return get_batch(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemma270m, "get_batch", get_batch_and_stop)
            run(out=out, **{"resume": True} if leg else {})
    resumed, whole = run(out=out, resume=True), run()
    assert signal.getsignal(signal.SIGINT) is handler
    for part in ("iteration", "model", "optimizer", "scaler"):
        assert_equal(resumed[part], whole[part])
    for name in ("iteration", "step", "train_loss", "val_loss", "perplexity", "lr", "grad_norm"):
        assert column(resumed, name) == column(whole, name)


def test_resume_takes_settings_from_the_checkpoint_and_flags_override_them(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("out.pt", whole)
    main(["--resume", "--max_iters=16", "--eval_interval=100", "--lr=0.0005"])
    state = torch.load("out.pt", weights_only=True)
    changed = dict(state["train_config"].items() - whole["train_config"].items())
    assert [changed.pop(name) for name in ("max_iters", "eval_interval", "lr")] == [16, 100, 0.0005]
    assert set(changed) <= {"out", "resume", "min_lr"}
    assert state["rows"][:len(whole["rows"])] == whole["rows"]
    assert column(state, "iteration")[len(whole["rows"]):] == [16, 16]


def test_log_lines_come_at_the_steps_after_each_multiple_and_average_over_them(run, tmp_path):
    sizes = dict(grad_accum=3, max_iters=20, eval_interval=7)
    coarse, fine = run(**sizes, log_interval=4, out=tmp_path / "coarse.pt"), run(**sizes, log_interval=1)
    assert [row["iteration"] for row in coarse["rows"] if "val_loss" in row] == [0, 9, 15, 18]
    assert [row["iteration"] for row in coarse["rows"] if "train_loss" in row] == [6, 9, 12, 18]
    assert column(coarse, "iteration") == [3 * step for step in column(coarse, "step")]
    losses = column(fine, "train_loss")
    means = [sum(losses[:2]) / 2, losses[2], losses[3], sum(losses[4:]) / 2]
    assert column(coarse, "train_loss") == pytest.approx(means)
    assert column(coarse, "perplexity") == pytest.approx(np.exp(column(coarse, "val_loss")).tolist())
    with open(tmp_path / "coarse.csv", newline="") as file:
        table = [{name: text for name, text in row.items() if text} for row in csv.DictReader(file)]
    assert table == [{name: str(value) for name, value in row.items()} for row in coarse["rows"]]


def assert_equal_to_rounding(got, expected):
    a, b = (torch.cat([weight.flatten() for weight in state["model"].values()]) for state in (got, expected))
    assert (a - b).norm() < 2e-3 * b.norm()
    for name in ("train_loss", "val_loss", "lr", "grad_norm"):
        assert column(got, name) == pytest.approx(column(expected, name), rel=1e-3)


@pytest.mark.parametrize("batch_size, grad_accum", ((1, 8), (2, 4), (4, 2)))
def test_accumulated_micro_batches_equal_one_batch(run, batch_size, grad_accum):
    states = [run(batch_size=b, grad_accum=k, max_iters=4 * k, lr=1e-3, warmup_iters=2 * k, eval_interval=999,
                  log_interval=k) for b, k in ((batch_size, grad_accum), (8, 1))]
    assert_equal_to_rounding(*states)


def test_two_processes_under_torchrun_equal_one(run, data, tmp_path):
    given, out = dict(grad_accum=4, max_iters=16, lr=1e-3, checkpoint_activations=True), tmp_path / "two.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [gemma270m.__file__, *flags(**{**TOY, **given, "data_dir": data, "out": out})]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_equal_to_rounding(torch.load(out, weights_only=True), run(**given))


def test_processes_share_out_the_micro_batches_of_a_step(run, tmp_path, monkeypatch):
    data, seen, plain_forward = write_data(tmp_path, np.arange(11 * 16 + 1), range(17)), {}, Gemma.forward

    def forward(self, x, y=None):
        if torch.is_grad_enabled():
            seen.setdefault((world, rank), []).append((x[:, 0] // 16).tolist())
        return plain_forward(self, x, y)

    monkeypatch.setattr(Gemma, "forward", forward)
    monkeypatch.setattr(Gemma, "no_sync", contextlib.nullcontext, raising=False)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, **options: model)
    for name in ("init_process_group", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *args: None)
    for world in (1, 2, 4):
        for rank in range(world):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setenv("RANK", str(rank))
            with contextlib.suppress(FileNotFoundError):  # only rank 0 leaves a checkpoint
                out = tmp_path / f"{world}-{rank}.pt"
                run(data_dir=data, vocab_size=200, grad_accum=4, max_iters=16, out=out)
        together = [batch for turn in zip(*(seen[world, rank] for rank in range(world))) for batch in turn]
        assert together == [training_blocks(i, 2, 11, TrainConfig.seed) for i in range(16)]
    assert {path.name for path in tmp_path.glob("*.pt")} == {"1-0.pt", "2-0.pt", "4-0.pt"}


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_weights_stay_in_float32_and_gradients_are_clipped_unscaled(run, monkeypatch, dtype):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=16.0))
    state = run(dtype=dtype, grad_clip=0.01, max_iters=2)
    assert bool(state["scaler"]) == (dtype == "float16")
    moments = [moment["exp_avg"] for moment in state["optimizer"]["state"].values()]
    assert {tensor.dtype for tensor in (*moments, *state["model"].values())} == {torch.float32}
    norm = torch.cat([moment.flatten() for moment in moments]).norm().item()
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)  # (1 - beta1) * grad_clip
    states = [run(dtype=name) for name in (dtype, "float32")]
    for name in ("train_loss", "val_loss"):
        assert column(states[0], name) == pytest.approx(column(states[1], name), rel=0.03)


@pytest.mark.parametrize("before, after", (("float32", "float16"), ("float16", "bfloat16")))
def test_a_run_can_be_resumed_in_another_dtype(run, tmp_path, before, after):
    run(dtype=before, out=tmp_path / "out.pt")
    state = run(dtype=after, out=tmp_path / "out.pt", resume=True, max_iters=20)
    assert state["iteration"] == 20 and bool(state["scaler"]) == (after == "float16")


def test_weight_decay_is_on_matrices_only(whole):
    groups = {group["weight_decay"]: len(group["params"]) for group in whole["optimizer"]["param_groups"]}
    assert groups == {0.1: sum(weight.ndim == 2 for weight in whole["model"].values()),
                      0.0: sum(weight.ndim == 1 for weight in whole["model"].values())}


@pytest.mark.parametrize("capability, dtype", (((6, 1), torch.float32), ((7, 0), torch.float16),
                                               ((7, 5), torch.float16), ((8, 0), torch.bfloat16)), ids=str)
def test_dtype_follows_the_compute_capability(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # what a T4 says
    assert pick_dtype("auto", torch.device("cuda"))[0] == dtype
    assert pick_dtype("bfloat16", torch.device("cuda"))[0] == torch.bfloat16


# ---- command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def workplace(data, whole, tmp_path_factory):
    """A folder with a checkpoint, its data in data, and data that do not fit in cut, large and other."""
    folder = tmp_path_factory.mktemp("workplace")
    settings = {**whole["train_config"], "data_dir": "data", "out": "out.pt"}
    save_checkpoint(folder / "out.pt", {**whole, "train_config": settings})
    changes = {"data": {}, "cut": {}, "large": {"vocab_size": 41}, "other": {"tokenizer": "gpt2"}}
    for name, change in changes.items():
        write_data(folder / name, *load_data(data)[:2], **change)
    os.truncate(folder / "cut" / "train.bin", 500)
    return folder


@pytest.mark.parametrize("wrong", (
    "--data_dir=nowhere", "--data_dir=cut", "--data_dir=large", "--block_size=40000", "--grad_accum=0",
    "--max_iters=1", "--no_such_flag=1", "--batch=2", "word", "--lr=nan", "--lr=fast", "--dtype=foo",
    "--device=foo", "--preset=foo", "--n_kv_groups=3", "--seed=-1", "--context_length=2000 --block_size=700",
    "--out=no/folder/out.pt", "--out=data", "--resume --out=nowhere.pt", "--resume --out=data/train.bin",
    "--resume --emb_dim=24", "--resume --preset=270m", "--resume --data_dir=large",
    "--resume --data_dir=other", "--resume --data_dir=cut", "--resume --block_size=40000",
    "--resume --grad_accum=0"))
def test_a_mistake_gives_one_line_and_changes_no_file(wrong, workplace, monkeypatch, capsys, tmp_path):
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main([*([] if "--resume" in wrong else flags(**TOY)), *wrong.split()])
    assert stopped.value.code not in (0, None)
    assert re.fullmatch(r"gemma270m\.py: error: .*\S.*\n", capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_mistake_prints_one_line_in_a_process_of_its_own(tmp_path):
    done = subprocess.run([sys.executable, gemma270m.__file__], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode > 0 and "prepare.py" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_shows_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text, source = "".join(capsys.readouterr().out.split()), Path(gemma270m.__file__).read_text()
    for field in (*fields(TrainConfig), *fields(GemmaConfig)):
        comment, = re.findall(rf"^    {field.name}: .*  # (.+)$", source, re.MULTILINE)
        assert f"--{field.name}" in text and "".join(f"{comment}(default: {field.default})".split()) in text


def test_a_newcomer_without_a_gpu_gets_the_tiny_preset_and_a_picture(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(flags(data_dir=data, max_iters=1, batch_size=1, block_size=64))
    assert "tiny" in capsys.readouterr().out
    shape = {name: value for name, value in PRESETS["tiny"].items() if hasattr(GemmaConfig, name)}
    assert load_checkpoint("out.pt")["model_config"] == GemmaConfig(vocab_size=40, **shape)
    pytest.importorskip("matplotlib")
    assert {path.name for path in tmp_path.iterdir()} == {"out.pt", "out.csv", "out.png"}
