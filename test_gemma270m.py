"""Tests of gemma270m.py, prepare.py and sample.py. HYPOTHESIS_PROFILE=long searches twenty times as far.

    python test_gemma270m.py train --batch_size 32 --block_size 512    # times gemma270m beside transformers
    python test_gemma270m.py decode --num_samples 64
"""
import argparse
import contextlib
import copy
import csv
import functools
import gzip
import io
import itertools
import json
import logging
import lzma
import math
import multiprocessing
import operator
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig,
                          PreTrainedTokenizerFast, pipeline)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import gemma270m
import prepare
import sample
from gemma270m import (PRESETS, ChunkedLoss, Gemma, GemmaConfig, KVCache, RMSNorm, TrainConfig, apply_rope,
                       evaluate, get_batch, learning_rate, load_checkpoint, load_data, main, pick_dtype,
                       rope_tables, sample_token, save_checkpoint, sliding_window_attention, softmax_loss,
                       training_blocks)

common = dict(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("short", derandomize=True, max_examples=16, **common)
settings.register_profile("long", max_examples=400, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
ROOT = Path(gemma270m.__file__).parent
few = settings(max_examples=settings().max_examples // 3)  # for properties that take long
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
    meta = {"tokenizer": "bytes", "vocab_size": 40, "dtype": "uint16", "end_of_text": 39, "train_stories": 1,
            "val_stories": 1, "train_tokens": len(train), "val_tokens": len(val), "source": "a test", **meta}
    meta["crc32"] = prepare.checksum((folder / "train.bin", folder / "val.bin"), meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def flags(**values):
    return [f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
            for name, value in values.items()]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of data in which each token says much about the next."""
    walk = np.cumsum(np.random.default_rng(0).integers(1, 4, size=700)) % 40
    return write_data(tmp_path_factory.mktemp("data"), walk[:600], walk[600:])


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A function that trains a toy through the command line and returns its checkpoint."""
    def run(**given):
        given = {**TOY, "data_dir": data, "out": tmp_path_factory.mktemp("run") / "out.pt", **given}
        main(flags(**{"overwrite": True, **given}))
        return torch.load(given["out"], weights_only=True)
    return run


@pytest.fixture(scope="session")
def whole(run):
    """The checkpoint of a toy run that nothing interrupted."""
    return run()


@pytest.fixture(scope="session")
def start(data):
    """A function that starts a toy run, like run(), in a process of its own: the fork of one that has torch.
    It runs some code before it begins, and what it says goes to a .txt beside its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["gemma270m"])

        def start(code="", **given):
            given = {**TOY, "data_dir": data, **given}
            code = ("import gemma270m, os, sys, time\n"
                    f"sys.stdout = open(out + '.txt', 'w')\n{code}\ngemma270m.main(flags)")
            names = {"flags": flags(**given), "out": str(given["out"])}
            process = context.Process(target=exec, args=(code, names))
            process.start()
            return process
        yield start


def column(state, name):
    return [row[name] for row in state["rows"] if name in row]


def assert_same_run(got, expected):
    for part in ("iteration", "model", "optimizer", "scaler"):
        assert_equal(got[part], expected[part])
    for name in ("iteration", "step", "train_loss", "val_loss", "perplexity", "lr", "grad_norm"):
        assert column(got, name) == column(expected, name)


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
       D=st.integers(1, 8), window=st.integers(1, 45), last=st.integers(1, 40), seed=seeds)
def test_sliding_window_attention_and_its_gradient_equal_a_dense_reference(B, G, shared, T, D, window, last,
                                                                           seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, heads, T, D, dtype=torch.float64, requires_grad=True)
               for heads in (G * shared, G, G))
    got, expected = (f(q, k, v, window, 0.7) for f in (sliding_window_attention, dense_attention))
    assert_close(got, expected)
    assert_close(sliding_window_attention(q[:, :, -last:], k, v, window, 0.7), expected[:, :, -last:])
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
    turned = apply_rope(x, rope_tables(torch.arange(T), D, base))
    angle = np.outer(np.arange(T), base ** (-2 * np.arange(D // 2) / D))
    z = torch.complex(*x.double().chunk(2, dim=-1)) * torch.from_numpy(np.exp(1j * angle))
    assert_close(turned, torch.cat((z.real, z.imag), dim=-1).float(), atol=1e-3, rtol=0)
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@given(distance=st.integers(0, 99), shift=st.integers(0, 200), base=st.floats(2, 1e6), seed=seeds)
def test_scores_of_turned_vectors_depend_on_the_distance_only(distance, shift, base, seed):
    torch.manual_seed(seed)
    rope = rope_tables(torch.arange(300), 8, base)
    q, k = (apply_rope(torch.randn(8).expand(1, 1, 300, 8), rope) for _ in "qk")
    score = q[0, 0] @ k[0, 0].T
    assert_close(score[distance + shift, shift], score[distance, 0], atol=1e-3, rtol=0)


@few
@given(config=shapes, casts=st.lists(st.sampled_from(("bfloat16", "float16", "float64")), min_size=1))
def test_rope_survives_casts_and_copies(config, casts):
    config = replace(config, context_length=600)
    model = randomize(Gemma(config))
    for dtype in casts:
        model = copy.deepcopy(model.to(getattr(torch, dtype)))
    assert rope_tables(torch.arange(600), config.head_dim, config.rope_base).dtype == torch.float32
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
    (TrainConfig, dict(min_lr=1e-3)), (TrainConfig, dict(beta1=1.0)), (TrainConfig, dict(max_iters=31)),
    (TrainConfig, dict(out=5)), (TrainConfig, dict(compile=3)), (GemmaConfig, dict(tie_embeddings=5))))
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
        assert_close(weight.grad, theirs[name], atol=1e-4, rtol=1e-3)


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
    cache = KVCache(model, 2, sum(pieces))
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
        assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-4, rtol=0)
    for (_, store), kind in zip(cache.layers, config.layer_types):
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
    arrivals = torch.ones(len(p), dtype=torch.float64)  # the race of -log(uniform) / p, whose first one is drawn
    arrivals[best.copy()] = torch.from_numpy(p[best] / p[best].sum())
    order = np.arange(len(p)) if top_k is top_p is None else np.argsort(-p)[:top_k]  # in which they are raced
    for first in best:  # as soon as its share is off by a thousandth, another one wins
        times = arrivals.clone()
        times[first] *= 0.999
        with mock.patch.object(torch.Tensor, "exponential_", lambda x, generator: x.copy_(times[order.copy()])):
            token, = sample_token(torch.tensor([logits]), temperature, top_k, top_p)
        assert token == first


@pytest.mark.parametrize("wrong", (
    dict(temperature=-1), dict(temperature=math.nan), dict(temperature=math.inf), dict(top_k=0),
    dict(top_k=-3), dict(top_p=0), dict(top_p=1.1), dict(top_p=math.nan), dict(T=0), dict(T=65),
    dict(T=60, n=5), dict(n=-1)), ids=str)
def test_bad_sampling_arguments_raise_value_error(wrong):
    wrong = {"T": 3, "n": 2, **wrong}
    tokens = torch.zeros(1, wrong.pop("T"), dtype=torch.long)
    with pytest.raises(ValueError):
        Gemma(GemmaConfig(**SHAPE)).generate(tokens, wrong.pop("n"), **wrong)


def test_generate_takes_its_sampling_arguments_by_position_too():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    assert Gemma(GemmaConfig(**SHAPE)).generate(tokens, 2, 1.0, 5, 0.9).shape == (1, 5)


@given(temperature=st.floats(0, 1e-3), top_k=st.none() | st.integers(1, 9),
       top_p=st.none() | st.floats(0.1, 1))
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature, top_k, top_p):
    logits = torch.tensor([[-90.0, 80.0, 79.0], [500.0, -300.0, 0.0]])
    assert sample_token(logits, temperature, top_k, top_p).tolist() == [1, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("T, last, heads", ((40, 40, (4, 1)), (300, 300, (4, 1)), (300, 7, (6, 2))), ids=str)
def test_each_attention_path_of_a_gpu_equals_the_dense_reference(dtype, T, last, heads):
    torch.manual_seed(0)
    H, G = heads
    q, k, v = (torch.randn(2, n, T, 16, requires_grad=True) for n in (H, G, G))
    expected = dense_attention(q, k, v, 50, 0.25)[:, :, -last:]
    inputs = [t.detach().cuda().to(dtype).requires_grad_() for t in (q[:, :, -last:], k, v)]
    got = sliding_window_attention(*inputs, 50, 0.25)
    weight = torch.randn_like(expected)
    for a, b in ((got, expected), *zip(torch.autograd.grad(got, inputs, weight.to(got)),
                                       torch.autograd.grad(expected, (q, k, v), weight))):
        a = a.float().cpu()
        assert (a - b[:, :, -a.size(2):]).norm() < {torch.float32: 1e-4}.get(dtype, 1e-2) * b.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", (False, True))
def test_greedy_text_from_recorded_steps_equals_that_of_full_forwards(compiled):
    model = randomize(Gemma(GemmaConfig(**SHAPE))).cuda()
    tokens = expected = some_tokens(model.config, 3, 9).cuda()
    for _ in range(40):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    model.compile() if compiled else None
    assert torch.equal(model.generate(tokens, 40, temperature=0), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, apart", (("float32", 1e-3), ("bfloat16", 0.1)))
@pytest.mark.parametrize("given", ({}, {"checkpoint_activations": True}), ids=str)
def test_training_on_a_gpu_follows_that_on_a_cpu(run, whole, dtype, apart, given):
    for compile in (False, True):
        state = run(device="cuda", dtype=dtype, compile=compile, **given)
        assert_close(column(state, "val_loss"), column(whole, "val_loss"), rtol=0, atol=apart)


def test_a_sequence_longer_than_the_context_raises_value_error():
    with pytest.raises(ValueError, match="context"):
        Gemma(GemmaConfig(**SHAPE))(torch.zeros(1, 65, dtype=torch.long))


def loss_in_chunks(model, rows):
    """Lets the loss take so few rows at a time."""
    return mock.patch.object(ChunkedLoss, "logits", rows * model.config.vocab_size)


@given(config=shapes, B=st.integers(1, 3), T=st.integers(1, 12), rows=st.integers(1, 40), seed=seeds,
       data=st.data())
def test_chunked_loss_and_its_gradient_equal_plain_cross_entropy(config, B, T, rows, seed, data):
    model, tokens = randomize(Gemma(config), seed), some_tokens(config, B, T, seed)
    ignored = data.draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T) | st.just([True] * B * T))
    targets = some_tokens(config, B, T, seed + 1).masked_fill(torch.tensor(ignored).view(B, T), -1)
    logits = model(tokens).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    expected = total / max(1, B * T - sum(ignored))  # 0, not NaN, if all are ignored
    with loss_in_chunks(model, rows):
        got = model(tokens, targets)
    assert got.shape == ()
    assert_close(got, expected)
    assert_close(gradients(got, model), gradients(expected, model))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_training_never_holds_all_logits_in_float32(dtype):
    model = randomize(Gemma(GemmaConfig(**{**SHAPE, "vocab_size": 1_000})))
    tokens = torch.randint(1_000, (2, 50))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with TensorsMade() as made, loss_in_chunks(model, rows=20):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), hooks:
            loss = model(tokens, tokens)
        loss.backward()
    made = [shape.numel() for shape, kind in made.list if shape[-1:] == (1_000,) and kind == torch.float32]
    assert max(made) == 20 * 1_000  # of 100 * 1,000
    assert not any(tensor.shape[-1:] == (1_000,) for tensor in saved)  # for the backward pass


def test_a_loss_without_gradient_multiplies_no_more_than_the_logits():
    model = randomize(Gemma(GemmaConfig(**SHAPE, tie_embeddings=False)))
    tokens = some_tokens(model.config, 2, 30)
    with torch.no_grad():
        with FlopCounterMode(display=False) as logits:
            model(tokens)
        with FlopCounterMode(display=False) as loss:
            value = model(tokens, tokens)
    assert loss.get_total_flops() == logits.get_total_flops() > 0
    for weight in model.parameters():  # all but the head keep still
        weight.requires_grad_(weight is model.head)
    learned, plain = model(tokens, tokens), F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert torch.equal(learned, value)
    assert_close(torch.autograd.grad(learned, model.head), torch.autograd.grad(plain, model.head))


def test_a_residual_stream_beyond_float16_stays_finite_under_float16_autocast():
    model = randomize(Gemma(GemmaConfig(**SHAPE, tie_embeddings=False)))
    model.embed_tokens.weight.data *= 1e6
    with torch.autocast("cpu", torch.float16):
        got = model(some_tokens(model.config, 2, 30))
    assert_close(got.float(), model(some_tokens(model.config, 2, 30)), atol=0.01, rtol=0.01)


@given(lead=st.floats(0, 9), seed=seeds)
def test_the_gradient_of_a_confident_bfloat16_row_is_rounded_once(lead, seed):
    torch.manual_seed(seed)
    logits, targets = torch.randn(30, 11), torch.randint(9, (30, 1))
    logits = logits.scatter_add(1, targets, torch.full((30, 1), lead)).bfloat16()
    p = logits[:, :9].double().softmax(1)
    loss, gradient = softmax_loss(logits, targets, 9)
    assert_close(loss.double(), -p.gather(1, targets).log().sum(), rtol=1e-5, atol=1e-5)
    expected = p.scatter_add(1, targets, -torch.ones_like(p))
    assert_close(gradient[:, :9].double(), expected, rtol=0.005, atol=1e-6)
    assert not gradient[:, 9:].any()


def test_a_second_backward_pass_through_the_loss_is_an_error_and_not_a_wrong_gradient():
    model, tokens = Gemma(GemmaConfig(**SHAPE)), torch.zeros(1, 9, dtype=torch.long)
    loss = model(tokens, tokens)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@given(config=shapes, seed=seeds)
def test_recomputed_activations_give_the_same_gradient(config, seed):
    model, tokens = randomize(Gemma(config), seed), some_tokens(config, 2, 20, seed)
    with TensorsMade() as made:
        plain = gradients(model(tokens, tokens), model)
    model.checkpoint_activations = True
    with TensorsMade() as remade:
        recomputed = gradients(model(tokens, tokens), model)
    assert_equal(recomputed, plain)
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


def test_tokens_beyond_two_to_the_31_are_read_where_they_lie(tmp_path):
    with open(tmp_path / "train.bin", "wb") as file:  # sparse
        file.seek(2 ** 32)
        np.arange(1, 514, dtype=np.uint16).tofile(file)
    tokens = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    n_blocks = (len(tokens) - 1) // 512
    assert np.array_equal(np.sort(gemma270m.block_order(n_blocks, 0, 3)), np.arange(2 ** 22 + 1))
    x, y = get_batch(tokens, [0, n_blocks - 1], 512, torch.device("cpu"))
    assert not x[0].any() and x[1].tolist() == list(range(1, 513)) and y[1].tolist() == list(range(2, 514))


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


@st.composite
def damages(draw):
    """A function that cuts bytes short or changes some of them."""
    place, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    kind, mask = draw(st.sampled_from(("cut", "erase", "flip"))), draw(st.integers(1, 255))

    def damage(content):
        i = int(place * len(content))
        middle = {"cut": b"", "erase": bytes(length), "flip": bytes([content[i] ^ mask])}[kind]
        return content[:i] + middle + (b"" if kind == "cut" else content[i + len(middle):])
    return damage


@pytest.mark.parametrize("name", ("meta.json", "train.bin", "val.bin"))
@given(damage=damages())
def test_damaged_data_are_as_written_or_refused_in_one_line(data, tmp_path_factory, name, damage):
    folder = shutil.copytree(data, tmp_path_factory.mktemp("damaged"), dirs_exist_ok=True)
    (folder / name).write_bytes(damage((data / name).read_bytes()))
    try:
        got, expected = load_data(folder), load_data(data)
    except ValueError as error:
        assert re.fullmatch(rf"no usable data in {folder} \(.+\): run python prepare.py", str(error))
    else:
        assert got[2] == expected[2]
        assert all(map(np.array_equal, got[:2], expected[:2]))


@given(damage=damages())
def test_a_damaged_checkpoint_is_as_written_or_refused_in_one_line(whole, tmp_path_factory, damage):
    out = tmp_path_factory.mktemp("damaged") / "out.pt"
    torch.save(whole, out)
    expected = load_checkpoint(out)
    out.write_bytes(damage(out.read_bytes()))
    try:
        got = load_checkpoint(out)
    except ValueError as error:
        assert re.fullmatch(rf"{out} cannot be loaded as a checkpoint: .+", str(error))
    else:
        assert_equal(*([state.pop(part) for part in ("model", "optimizer")] for state in (got, expected)))
        assert got == expected


def without(name):
    return lambda state: state.pop(name)


def with_weight(change):
    def damage(state):
        state["model"]["norm.weight"] = change(state["model"]["norm.weight"])
    return damage


UNUSABLE = {  # what can be wrong with a whole file
    **{f"no {name}": without(name) for name in ("model", "model_config", "train_config", "data", "optimizer",
                                                "scaler", "iteration", "rows", "losses", "skips")},
    "a longer weight": with_weight(lambda weight: torch.cat((weight, weight))),
    "no tensor": with_weight(lambda weight: weight.tolist()),
    "nan": with_weight(lambda weight: weight * math.nan),
    "inf": with_weight(lambda weight: weight + math.inf),
    "a weight less": lambda state: state["model"].popitem(),
    "a weight more": lambda state: state["model"].update(more=torch.zeros(1)),
    "another shape": lambda state: state["model_config"].update(emb_dim=32),
    "no such field": lambda state: state["model_config"].update(emb_dims=32),
    "no such value": lambda state: state["train_config"].update(lr=-1),
    "no tokenizer": lambda state: state["data"].pop("tokenizer"),
}


@pytest.mark.parametrize("damage", UNUSABLE.values(), ids=UNUSABLE)
def test_a_checkpoint_with_a_part_that_does_not_fit_is_refused_in_one_line(whole, data, tmp_path, capsys,
                                                                           damage):
    state, out = copy.deepcopy(whole), tmp_path / "out.pt"
    damage(state)
    save_checkpoint(out, state)
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(flags(resume=True, out=out, data_dir=data))
    assert stopped.value.code == 2 and out.read_bytes() == before
    assert re.fullmatch(rf"gemma270m\.py: error: .*{out} .+\n", capsys.readouterr().err)
    with contextlib.suppress(SystemExit):  # which may do without what only training needs
        sample.main(flags(ckpt=out, max_new_tokens=9))
    assert re.fullmatch(rf"sample\.py: error: {out} .+\n|\d tokens, .+\n", capsys.readouterr().err)


# ---- training ----------------------------------------------------------------------------------------


def test_one_batch_can_be_learned_by_heart(run, tmp_path):
    data = write_data(tmp_path, np.random.default_rng(0).integers(40, size=17), range(17))
    state = run(data_dir=data, batch_size=1, grad_accum=1, max_iters=150, lr=2e-2, eval_interval=999)
    assert column(state, "train_loss")[-1] < 0.1 < 1 < column(state, "train_loss")[0]


@few
@given(stops=st.lists(st.tuples(st.integers(2, 30), st.sampled_from((signal.SIGINT, signal.SIGTERM))),
                      min_size=1, max_size=3))
@example(stops=[(9, signal.SIGINT), (6, signal.SIGTERM), (3, signal.SIGINT)])
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
            run(out=out, log_interval=8, **{"resume": True} if leg else {})
    resumed, whole = run(out=out, log_interval=8, resume=True), run(log_interval=8)
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_run(resumed, whole)


def test_kill_9_at_any_moment_loses_nothing(run, start, tmp_path):
    kills, out, chance = settings().max_examples // 4, tmp_path / "out.pt", random.Random(0)
    temporary, given = tmp_path / "out.pt.tmp", dict(max_iters=12 * kills, eval_interval=2)

    def seen(path):
        return path.stat().st_mtime_ns if path.exists() else None

    for _ in range(kills):
        process, event = start(out=out, resume=out.exists(), **given), chance.choice((out, temporary))
        before = seen(event)
        while process.is_alive() and seen(event) == before:
            pass
        process.join(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        if out.exists():
            load_checkpoint(out)
    assert_same_run(run(out=out, resume=out.exists(), **given), run(**given))


def full_disk(out, room=0.5):
    """Lets no file grow beyond a part of a checkpoint. -> what ends that"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * out.stat().st_size), limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fuller_disk(out):
    """The same with so little room that torch.save fails with a RuntimeError."""
    return full_disk(out, room=0.01)


def no_place(out):
    """Takes the place where the new checkpoint would be written. -> what frees it"""
    path = Path(f"{out}.tmp")
    path.mkdir()
    return path.rmdir


@pytest.mark.parametrize("sabotage", (full_disk, fuller_disk, no_place))
@pytest.mark.parametrize("ends", (True, False))
def test_a_run_whose_saves_fail_says_so_and_goes_on_but_the_last_must_succeed(run, whole, tmp_path, capsys,
                                                                              monkeypatch, sabotage, ends):
    out, undo, seen = tmp_path / "out.pt", [], []

    def get_batch_and_sabotage(*args):
        if out.exists() and not undo:
            undo.append(sabotage(out))
        if ends and "warning" in (text := capsys.readouterr().out):
            seen.append((text, torch.load(out)["iteration"]))
            undo[0]()
        return get_batch(*args)

    monkeypatch.setattr(gemma270m, "get_batch", get_batch_and_sabotage)
    if ends:
        assert_same_run(run(out=out), whole)
        (text, iteration), = seen
        assert iteration == 0 and text.count("warning") == 1 and str(out) in text
    else:
        with pytest.raises(SystemExit):
            run(out=out)
        undo[0]()
        output = capsys.readouterr()
        assert output.out.count("warning") == 2  # at iterations 4 and 8
        assert re.fullmatch(rf"gemma270m.py: error: {out} .*cannot be written: .+\n", output.err)
        assert load_checkpoint(out)["iteration"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out.pt", "out.csv"}


def wait_for(path, process):
    while process.is_alive() and not path.exists():
        time.sleep(0.001)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_ends_a_run_in_the_middle_of_a_step_with_one_line_and_status_0(start, tmp_path, number):
    process = start(out=tmp_path / "out.pt", grad_accum=10 ** 6, max_iters=10 ** 6)
    wait_for(tmp_path / "out.pt", process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0 and load_checkpoint(tmp_path / "out.pt")["iteration"] == 0
    last_line = (tmp_path / "out.pt.txt").read_text().splitlines()[-1]
    assert re.fullmatch(r"stopped at iteration 0; \S+/out\.pt is up to date, --resume goes on .*", last_line)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_second_signal_ends_a_run_at_once(start, tmp_path, number):
    process = start("gemma270m.learning_rate = lambda *given: open(out + '.slow', 'w') and time.sleep(3600)",
                    out=tmp_path / "out.pt")
    wait_for(tmp_path / "out.pt.slow", process)
    os.kill(process.pid, number)
    process.join(1.1)  # a second one within a second may be torchrun's echo of the first
    assert process.is_alive()
    for _ in range(30):  # a slow machine may only now have noticed the first
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        process.join(2)
        if not process.is_alive():
            break
    assert process.exitcode == -number and load_checkpoint(tmp_path / "out.pt")["iteration"] == 0


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@few
@given(bad=st.sets(st.integers(0, 11), max_size=5), factor=st.sampled_from((math.inf, -math.inf, math.nan)))
@example(bad={2, 5, 6}, factor=math.nan)
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_three_in_a_row_end_the_run(run, tmp_path_factory,
                                                                                      dtype, bad, factor):
    out, calls, plain_forward = tmp_path_factory.mktemp("bad") / "out.pt", itertools.count(), Gemma.forward

    def forward(self, *args):
        loss = plain_forward(self, *args)
        return loss * factor if torch.is_grad_enabled() and next(calls) in bad else loss

    steps = {iteration // TOY["grad_accum"] for iteration in bad}
    third = next((i for i in sorted(steps) if {i - 2, i - 1, i} <= steps), None)  # of three in a row
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(output):
        patch.setattr(Gemma, "forward", forward)
        patch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=16.0))
        if dtype == "float16" or third is None:
            state = run(out=out, dtype=dtype)
            updates = state["optimizer"]["state"][0]["step"]
            assert column(state, "skipped")[-1] == len(steps) == 6 - updates
        else:
            with pytest.raises(SystemExit) as stopped:
                run(out=out, dtype=dtype)
            rate = learning_rate(load_checkpoint(out)["train_config"], third)
            line = output.getvalue().splitlines()[-1]
            assert stopped.value.code == 2
            assert all(part in line for part in (f"iteration {2 * (third + 1)},", f"lr {rate:.1e}", str(out)))
    assert all(math.isfinite(loss) for loss in column(load_checkpoint(out), "val_loss"))


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gemma270m, "learning_rate", lambda config, step: 1e300)
    with pytest.raises(SystemExit) as stopped:
        run(out=tmp_path / "out.pt")
    assert stopped.value.code == 2 and load_checkpoint(tmp_path / "out.pt")["iteration"] == 0
    assert re.search(rf"iteration 4, lr 1.0e\+300; {tmp_path / 'out.pt'} .+\n$", capsys.readouterr().err)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads memory and open files from /proc")
def test_memory_and_open_files_stay_the_same_over_a_thousand_iterations(run, monkeypatch):
    calls, used = itertools.count(), []

    def measured_get_batch(*args):
        if next(calls) % 250 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used.append((pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))
        return get_batch(*args)

    monkeypatch.setattr(gemma270m, "get_batch", measured_get_batch)
    run(max_iters=1_000, n_layers=1, batch_size=1, eval_interval=50, log_interval=50)
    (memory, files), (later_memory, later_files) = used[1], used[-1]
    assert len(used) >= 4 and later_files == files and later_memory - memory < 2 ** 21


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
    coarse, fine = run(**sizes, log_interval=4, out=tmp_path / "coarse.0"), run(**sizes, log_interval=1)
    assert [row["iteration"] for row in coarse["rows"] if "val_loss" in row] == [0, 9, 15, 18]
    assert [row["iteration"] for row in coarse["rows"] if "train_loss" in row] == [6, 9, 12, 18]
    assert column(coarse, "iteration") == [3 * step for step in column(coarse, "step")]
    losses = column(fine, "train_loss")
    means = [sum(losses[:2]) / 2, losses[2], losses[3], sum(losses[4:]) / 2]
    assert column(coarse, "train_loss") == pytest.approx(means)
    assert column(coarse, "perplexity") == pytest.approx(np.exp(column(coarse, "val_loss")).tolist())
    with open(tmp_path / "coarse.0.csv", newline="") as file:
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


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(**given):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*command, gemma270m.__file__, *flags(**{**TOY, **given})]


def workers(process):
    """The ids of the processes that torchrun has started."""
    command = ["pgrep", "-P", str(process.pid), "-f", "gemma270m"]
    return list(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


def test_a_run_of_any_number_of_processes_gives_the_same_and_resumes_with_another(run, start, tmp_path):
    given = dict(grad_accum=4, max_iters=16, lr=1e-3, checkpoint_activations=True)

    def together(world, **given):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        environments = [{**address, "WORLD_SIZE": str(world), "RANK": str(rank)} for rank in range(world)]
        processes = [start(f"os.environ.update({environment})", **given) for environment in environments]
        for process in processes:
            process.join(100)
            assert process.exitcode == 0
        return torch.load(given["out"], weights_only=True)

    whole = run(**given)
    for world in (2, 4):
        assert_equal_to_rounding(together(world, out=tmp_path / f"{world}.pt", **given), whole)
    given |= dict(resume=True, max_iters=32)
    assert_equal_to_rounding(together(4, out=tmp_path / "2.pt", **given), run(out=tmp_path / "4.pt", **given))


def test_a_killed_worker_ends_the_whole_run_with_a_usable_checkpoint(run, data, tmp_path):
    out, given = tmp_path / "out.pt", dict(grad_accum=4, max_iters=10 ** 6, log_interval=4)
    with subprocess.Popen(torchrun(data_dir=data, out=out, **given), stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL, env=ONE_THREAD) as process:
        next(line for line in process.stdout if "iteration 40 " in line)
        os.kill(workers(process)[-1], signal.SIGKILL)
        process.communicate(timeout=60)
    assert process.returncode == 1
    before = load_checkpoint(out)["iteration"]
    assert before >= 36
    assert run(out=out, resume=True, max_iters=before + 8)["iteration"] == before + 8


@pytest.mark.parametrize("to, number", (("torchrun", signal.SIGINT), ("torchrun", signal.SIGTERM),
                                        ("a worker", signal.SIGTERM)))
def test_two_processes_stop_together_and_save(data, tmp_path, to, number):
    out = tmp_path / "two.pt"
    command = torchrun(data_dir=data, out=out, max_iters=10 ** 6, eval_interval=10 ** 6, log_interval=20)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ONE_THREAD) as process:
        next(line for line in process.stdout if "train loss" in line)
        os.kill(process.pid if to == "torchrun" else workers(process)[-1], number)
        rest, _ = process.communicate(timeout=60)
    state = load_checkpoint(out)
    assert f"stopped at iteration {state['iteration']:,}" in rest and state["iteration"] >= 20
    assert process.returncode == (1 if to == "torchrun" else 0)  # torchrun itself fails at any signal


def test_processes_share_out_the_micro_batches_of_a_step(run, tmp_path, monkeypatch):
    data, seen, plain_forward = write_data(tmp_path, np.arange(11 * 16 + 1), range(129)), {}, Gemma.forward

    def forward(self, x, y=None):
        if torch.is_grad_enabled():
            seen.setdefault((world, rank), []).append((x[:, 0] // 16).tolist())
        return plain_forward(self, x, y)

    monkeypatch.setattr(Gemma, "forward", forward)
    for name in ("init_process_group", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *args: None)
    for world in (1, 2, 4):
        for rank in range(world):
            monkeypatch.setenv("WORLD_SIZE", str(world))
            monkeypatch.setenv("RANK", str(rank))
            with contextlib.suppress(FileNotFoundError):  # only rank 0 leaves a checkpoint
                out = tmp_path / f"{world}-{rank}.pt"
                run(data_dir=data, vocab_size=200, grad_accum=4, max_iters=16, eval_tokens=128, out=out)
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


def test_the_optimizer_has_the_rate_of_the_step_and_decays_matrices_only(run):
    state = run(lr=5e-3)
    groups, dimensions = state["optimizer"]["param_groups"], [w.ndim for w in state["model"].values()]
    assert [group["lr"] for group in groups] == [column(state, "lr")[-1]] * 2 == [pytest.approx(5e-4)] * 2
    assert {group["weight_decay"]: len(group["params"]) for group in groups} == {0.1: dimensions.count(2),
                                                                                 0.0: dimensions.count(1)}


@pytest.mark.parametrize("capability, dtype", (((6, 1), torch.float32), ((7, 0), torch.float16),
                                               ((7, 5), torch.float16), ((8, 0), torch.bfloat16)), ids=str)
def test_dtype_follows_the_compute_capability(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # what a T4 says
    assert pick_dtype("auto", torch.device("cuda"))[0] == dtype
    assert pick_dtype("bfloat16", torch.device("cuda"))[0] == torch.bfloat16


@pytest.mark.parametrize("full, half, dtype", ((2, 1, torch.bfloat16), (1, 2, torch.float32)), ids=str)
def test_dtype_on_a_cpu_is_the_faster_one(full, half, dtype, monkeypatch):
    seconds = {torch.float32: full, torch.bfloat16: half}

    def timer(stmt, globals):
        return mock.Mock(**{"blocked_autorange.return_value.median": seconds[globals["a"].dtype]})

    monkeypatch.setattr(gemma270m.benchmark, "Timer", timer)
    assert pick_dtype("auto", torch.device("cpu"))[0] == dtype


# ---- command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def workplace(data, whole, tmp_path_factory):
    """A folder with a checkpoint, its data in data, data that do not fit in cut, large and other, and in
    model one that transformers reads, without a tokenizer."""
    folder = tmp_path_factory.mktemp("workplace")
    settings = {**whole["train_config"], "data_dir": "data", "out": "out.pt"}
    save_checkpoint(folder / "out.pt", {**whole, "train_config": settings})
    changes = {"data": {}, "cut": {}, "large": {"vocab_size": 41}, "other": {"tokenizer": "gpt2"}}
    for name, change in changes.items():
        write_data(folder / name, *load_data(data)[:2], **change)
    os.truncate(folder / "cut" / "train.bin", 500)
    Gemma(GemmaConfig(**SHAPE)).save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize("wrong, word", (
    ("--init_from=nowhere", "config.json"), ("--init_from=data", "config.json"),
    ("--init_from=model", "--tokenizer model"), ("--init_from=model --bench --emb_dim=24", "of the model"),
    ("--data_dir=nowhere", "nowhere"), ("--data_dir=cut", "cut"), ("--data_dir=large", "vocab_size"),
    ("--block_size=40000", "block_size"), ("--grad_accum=0", "grad_accum"), ("--max_iters=1", "max_iters"),
    ("--no_such_flag=1", "no_such_flag"), ("--batch=2", "batch"), ("word", "word"), ("--lr=nan", "lr"),
    ("--lr=fast", "lr"), ("--dtype=foo", "dtype"), ("--device=foo", "device"), ("--preset=foo", "preset"),
    ("--n_kv_groups=3", "n_kv_groups"), ("--seed=-1", "seed"), ("--batch_size=1000000000000", "batch_size"),
    ("--context_length=2000 --block_size=2001", "block_size"), ("--out=no/folder/out.pt", "no/folder"),
    ("--out=data", "out"), ("--out=pipe", "pipe"), ("--out=pipe --overwrite", "pipe"),
    ("--preset=finetune", "init_from"), ("--block_size=65", "exceeds 64"), ("--max_iters=1", "grad_accum"),
    ("--out=out.pt", "--resume goes on"), ("--resume --out=nowhere.pt", "nowhere.pt"),
    ("--resume --out=data/train.bin", "train.bin"), ("--resume --emb_dim=24", "another model"),
    ("--resume --preset=270m", "another model"), ("--resume --data_dir=large", "vocab_size"),
    ("--resume --data_dir=other", "vocabulary"), ("--resume --data_dir=cut", "cut"),
    ("--resume --data_dir=large --vocab_size=41", "another model"),
    ("--resume --block_size=40000", "block_size"), ("--resume --grad_accum=0", "grad_accum")))
def test_a_mistake_gives_one_line_and_changes_no_file(wrong, word, workplace, monkeypatch, capsys, tmp_path):
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main([*([] if "--resume" in wrong else flags(**TOY, out="new.pt")), *wrong.split()])
    assert stopped.value.code not in (0, None)
    line = capsys.readouterr().err
    assert re.fullmatch(r"gemma270m\.py: error: .*\n", line) and word in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def refusal(program, argv):
    """The one line that a program says before it ends with status 2."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(said):
        program(argv)
    assert stopped.value.code == 2 and re.fullmatch(r"\w+\.py: error: .*\S.*\n", said.getvalue())
    return said.getvalue()


WRONG = {  # what no field of a type takes
    int: st.integers(max_value=-1) | st.integers(min_value=2 ** 31) | st.sampled_from(("1.5", "1e3", "nan")),
    float: st.floats(max_value=-1e-9) | st.sampled_from((math.nan, math.inf, "", "1,5", "fast", "0x10")),
    bool: st.sampled_from(("yes", "1", "")),
    str: st.sampled_from(("nowhere", "CPU", "tiny ", "\u00e9", "None"))}


@given(data=st.data())
def test_any_wrong_flags_give_one_line_that_names_one_of_them_and_write_nothing(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("wrong")
    kinds = {field.name: field.type for field in fields(TrainConfig) if field.name != "out"}
    names = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=4, unique=True))
    wrong = {name: data.draw(WRONG[kinds[name]]) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = refusal(main, flags(**{**TOY, "data_dir": folder, **wrong}))
    assert any(name in line or f" {value} " in line for name, value in wrong.items())
    assert not list(folder.iterdir())


def test_ctrl_c_before_training_ends_without_a_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gemma270m, "load_data", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        main(flags(**TOY, out=tmp_path / "out.pt"))
    assert stopped.value.code == 130 and capsys.readouterr().err == "\n"


def test_a_second_run_in_the_same_folder_is_told_its_choices(run, whole, data, tmp_path):
    out = tmp_path / "out.pt"
    save_checkpoint(out, whole)
    line = refusal(main, flags(**TOY, data_dir=data, out=out))
    assert all(word in line for word in (f"{out} exists", "--resume", "--overwrite", "--out"))
    assert load_checkpoint(out)["rows"] == whole["rows"]
    assert run(out=out, overwrite=True)["rows"] != whole["rows"]  # another speed


def test_a_run_goes_on_with_other_data_only_if_they_are_named(run, tmp_path):
    out, tokens = tmp_path / "out.pt", np.arange(700) % 40
    mine = write_data(tmp_path / "data", tokens[:600], tokens[600:], source="mine")
    run(data_dir=mine, out=out)
    write_data(mine, tokens[:500], tokens[500:], source="others", train_tokens=500, val_tokens=200)
    before = out.read_bytes()
    line = refusal(main, flags(resume=True, max_iters=16, out=out))
    assert "data" in line and "--data_dir" in line and out.read_bytes() == before
    state = run(resume=True, overwrite=False, max_iters=16, data_dir=mine, out=out)
    assert state["iteration"] == 16 and state["data"]["source"] == "others"
    main(flags(resume=True, max_iters=20, out=out))
    assert load_checkpoint(out)["iteration"] == 20


@pytest.mark.parametrize("name, log", (("o.csv", "o.csv.csv"), ("o", "o.csv"), ("o.pt", "o.csv")))
def test_checkpoint_and_log_are_two_files_whatever_the_name(name, log, run, tmp_path):
    run(out=tmp_path / name)
    assert load_checkpoint(tmp_path / name)["iteration"] == 12
    assert {path.name for path in tmp_path.iterdir()} == {name, log}


def test_a_checkpoint_can_be_timed_without_being_written(whole, tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "out.pt", whole)
    before = (tmp_path / "out.pt").read_bytes()
    monkeypatch.setattr(gemma270m.benchmark, "Timer", lambda *args, **kwargs: mock.Mock(
        **{"blocked_autorange.return_value.median": 1.0}))
    main(flags(resume=True, bench=True, out=tmp_path / "out.pt"))
    assert f"{Gemma(GemmaConfig(**SHAPE)).num_parameters():,} parameters" in capsys.readouterr().out
    assert (tmp_path / "out.pt").read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_bench_needs_no_data_and_writes_no_file(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gemma270m.benchmark, "Timer", lambda stmt, globals, num_threads: mock.Mock(
        **{"blocked_autorange.return_value.median": 2.0 if globals["f"]() is not None else math.nan}))
    main([f"--{name}={value}" for name, value in SHAPE.items()]
         + "--bench --device=cpu --dtype=float32 --batch_size=2 --block_size=8 --grad_accum=4".split())
    lines = capsys.readouterr().out
    assert not [*tmp_path.iterdir()] and "to no file" in lines
    assert "2500.0 ms an iteration, 800 in 33:20, 6 tokens/s" in lines  # 2 s, and a fourth of 2 s


def test_processes_have_a_way_to_agree_on_the_cpu_beside_any_accelerator(run, monkeypatch, capsys):
    def init(backend=None):  # without one, torch takes that of the accelerator alone
        devices = dist.distributed_c10d.BackendConfig(dist.Backend(backend)).get_device_backend_map()
        raise ValueError(f"cpu by {devices['cpu']}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", init)
    with pytest.raises(SystemExit):
        run()
    assert "cpu by gloo" in capsys.readouterr().err


def test_micro_batches_that_processes_cannot_share_are_refused(data, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = refusal(main, flags(**{**TOY, "grad_accum": 4}, data_dir=data, out=tmp_path / "out.pt"))
    assert "grad_accum 4" in line and "3 processes" in line


def test_a_single_token_to_validate_on_is_refused(tmp_path):
    data = write_data(tmp_path / "data", range(40), [1])
    assert "val.bin" in refusal(main, flags(**TOY, data_dir=data, out=tmp_path / "out.pt"))
    assert not (tmp_path / "out.pt").exists()


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


def test_a_newcomer_without_a_gpu_gets_the_tiny_preset(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(flags(data_dir=data, max_iters=1, batch_size=1, block_size=64))
    assert "tiny" in capsys.readouterr().out
    shape = {name: value for name, value in PRESETS["tiny"].items() if hasattr(GemmaConfig, name)}
    assert load_checkpoint("out.pt")["model_config"] == GemmaConfig(vocab_size=40, **shape)
    assert {path.name for path in tmp_path.iterdir()} == {"out.pt", "out.csv"}

# ---- prepare.py --------------------------------------------------------------------------------------

END = prepare.END_OF_TEXT
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def gpt2_reason():
    try:
        prepare.load_tokenizer("gpt2", 5)
    except OSError as error:
        return str(error)


NO_GPT2 = gpt2_reason()
needs_gpt2 = pytest.mark.skipif(bool(NO_GPT2), reason=f"{NO_GPT2}")
tokenizers = pytest.mark.parametrize("tokenizer", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])

# Text that can be written as UTF-8: everything but half surrogate pairs.
texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]),
                          st.sampled_from(" \n\r\t'a<|endoftext>\x1c\u00a0")))
words = st.text(st.sampled_from(" \n\t\r\x1c\x85\u00a0\u3000'ab1!\u00e9\u4e2d\U0001F600sdl"), max_size=60)


def run_prepare(folder, *argv):
    """main() on `folder`/data: the exit status."""
    return prepare.main([*map(str, argv), "--out_dir", str(folder / "data")])


def meta_of(folder):
    return json.loads((folder / "data" / "meta.json").read_text())


def tokens_of(folder, split):
    meta = meta_of(folder)
    tokens = np.fromfile(folder / "data" / f"{split}.bin", meta["dtype"])
    assert len(tokens) == meta[f"{split}_tokens"]
    assert np.count_nonzero(tokens == meta["end_of_text"]) >= meta[f"{split}_stories"] - 1
    return tokens


def stories_of(folder, split):
    """The bytes of each story of a split."""
    meta, encoding = meta_of(folder), prepare.load_tokenizer(meta_of(folder)["tokenizer"])
    tokens = tokens_of(folder, split)
    parts = np.split(tokens, np.flatnonzero(tokens == meta["end_of_text"]) + 1)
    assert len(parts.pop()) == 0, "the file does not end with end-of-text"
    assert len(parts) == meta[f"{split}_stories"]
    return [encoding.decode_bytes(part[:-1].tolist()) for part in parts]


def write(path, documents):
    """Writes `documents` in the format that the name of `path` says."""
    name = path.name
    if ".parquet" in name:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet
        pyarrow.parquet.write_table(pa.table({"text": documents}), path, row_group_size=3)
        return path
    text = (END.join(documents) + END if ".txt" in name else
            "".join(json.dumps({"n": 1, "text": text}, ensure_ascii=i % 2 == 0) + "\n"
                    for i, text in enumerate(documents)))
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](text.encode()))
    return path


@pytest.fixture
def one(tmp_path):
    """A small validation file, for tests that want all of the input in train.bin."""
    return write(tmp_path / "one.txt", ["validation"])


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def unreachable():
        raise ConnectionError("no network in tests")
    monkeypatch.setattr(prepare, "probe_hub", unreachable)


def no_vocabulary(monkeypatch):
    real = prepare.load_tokenizer

    def load(name, timeout=60):
        if name == "gpt2":
            raise OSError("cannot load the GPT-2 vocabulary; set TIKTOKEN_CACHE_DIR")
        return real(name)
    monkeypatch.setattr(prepare, "load_tokenizer", load)


def one_error(capsys, *parts):
    """The single line on stderr, which has all `parts` in it."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("prepare.py: error: "), lines
    for part in parts:
        assert str(part) in lines[0]
    assert "Traceback" not in lines[0] and len(lines[0]) < 600


# Tokenizers

@tokenizers
@given(text=texts)
@settings(max_examples=60)
def test_tokenizer_round_trip(tokenizer, text):
    encoding = prepare.load_tokenizer(tokenizer)
    assert encoding.name == tokenizer
    tokens = encoding.encode(text, disallowed_special=())
    assert encoding.decode_bytes(tokens) == text.encode() and encoding.eot_token not in tokens


def test_byte_tokenizer_is_bytes():
    encoding = prepare.load_tokenizer("bytes")
    assert encoding.n_vocab == 257 and encoding.eot_token == 256 and encoding.decode([256]) == END
    assert encoding.encode_ordinary("a\u00e9\n") == list("a\u00e9\n".encode())
    assert encoding.encode(END, allowed_special="all") == [256]


def test_unknown_tokenizer(tmp_path, one, capsys):
    assert run_prepare(tmp_path, "--input", one, "--tokenizer", "gpt5") == 1
    one_error(capsys, "no tokenizer 'gpt5'", "gpt2", "bytes", "folder")


# Cutting

@needs_gpt2
@given(text=words, size=st.integers(1, 12))
@settings(max_examples=400)
def test_cutting_at_a_boundary_keeps_gpt2_tokens(text, size):
    encoding = prepare.load_tokenizer("gpt2")
    whole = encoding.encode_ordinary(text)
    for match in re.finditer(r"\S(?=[ \n])", text):
        left, right = text[:match.end()], text[match.end():]
        assert encoding.encode_ordinary(left) + encoding.encode_ordinary(right) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", size)
        pieces = list(prepare.cut(text))
    clean = all(re.search(r"\S$", left) and right[0] in " \n" for left, right in itertools.pairwise(pieces))
    if clean:
        assert sum(map(encoding.encode_ordinary, pieces), []) == whole


@given(text=st.text(st.sampled_from("ab <|endoftext|> \n")), size=st.integers(1, 20), keep=st.integers(0, 13))
@settings(max_examples=200)
def test_cut_loses_nothing_and_bounds_the_pieces(text, size, keep):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", size)
        *pieces, last = prepare.cut(text, keep)
    assert "".join(pieces) + last == text
    assert all(0 < len(piece) <= size for piece in pieces) and len(last) <= size + keep
    assert not pieces or len(last) > keep


@given(documents=st.lists(st.text(st.sampled_from("ab \n<|end"), max_size=40), max_size=6),
       size=st.integers(1, 30), closed=st.booleans())
@settings(max_examples=300)
def test_markers_are_found_wherever_the_chunks_end(documents, size, closed):
    text = END.join(documents) + (END if closed else "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", size)
        pieces = list(prepare.read_txt(io.BytesIO(text.encode())))
    found = "".join(END if piece is None else piece for piece in pieces).split(END)
    assert found.pop() == ""
    # One of white space only is skipped when it is shorter than a piece.
    assert [d for d in found if d.strip()] == [d for d in text.split(END) if d.strip()]
    assert all(len(document) > size for document in found if not document.strip())


@tokenizers
@pytest.mark.parametrize("character", ["a", " ", "\n", "!", "\u4e2d"])
def test_long_runs_of_one_character(tmp_path, one, tokenizer, character):
    text = "x" + character * 1_200_000 + "y"
    assert run_prepare(tmp_path, "--input", write(tmp_path / "run.txt", [text]), "--val_input", one,
               "--tokenizer", tokenizer) == 0
    assert stories_of(tmp_path, "train") == [text.encode()]


# Formats

@tokenizers
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz",
                                  "a.parquet"])
@given(documents=st.lists(texts.filter(str.strip), min_size=1, max_size=5))
@settings(max_examples=8)
def test_round_trip(tmp_path_factory, tokenizer, name, documents):
    folder = tmp_path_factory.mktemp("round")
    if ".txt" in name:
        documents = [document for document in "\n".join(documents).split(END) if document.strip()]
    if documents:
        one = write(folder / "one.txt", ["validation"])
        path = write(folder / name, documents)
        assert run_prepare(folder, "--input", path, "--val_input", one, "--tokenizer", tokenizer) == 0
        assert stories_of(folder, "train") == [document.encode() for document in documents]
        assert stories_of(folder, "val") == [b"validation"]
        assert sorted(os.listdir(folder / "data")) == ["meta.json", "train.bin", "val.bin"]


@tokenizers
def test_whole_file_comes_back(tmp_path, one, tokenizer):
    text = f"One.\r\n\r\n{END}\n Two\u2028 \ufeff{END}   \n{END}Three, without a marker"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert run_prepare(tmp_path, "--input", path, "--val_input", one, "--tokenizer", tokenizer) == 0
    decoded = prepare.load_tokenizer(tokenizer).decode(tokens_of(tmp_path, "train").tolist())
    assert decoded == text.replace(f"   \n{END}", "") + END


@tokenizers
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_marker_inside_a_row_is_text(tmp_path, one, tokenizer, name):
    documents = [f"before {END} after", END]
    assert run_prepare(tmp_path, "--input", write(tmp_path / name, documents), "--val_input", one,
               "--tokenizer", tokenizer) == 0
    assert stories_of(tmp_path, "train") == [document.encode() for document in documents]


def test_globs_and_several_files_in_order(tmp_path, one):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        write(tmp_path / name, [name])
    (tmp_path / "[odd].txt").write_text("odd")
    inputs = [tmp_path / name for name in ("c.jsonl", "[ab].txt", "[odd].txt")]
    assert run_prepare(tmp_path, "--input", *inputs, "--val_input", one, "--tokenizer", "bytes") == 0
    assert stories_of(tmp_path, "train") == [b"c.jsonl", b"a.txt", b"b.txt", b"odd"]


def test_uint32_for_a_large_vocabulary(tmp_path, one, monkeypatch):
    large = prepare.Encoding("large", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={END: 70_000})
    monkeypatch.setattr(prepare, "load_tokenizer", lambda name, timeout=60: large)
    assert run_prepare(tmp_path, "--input", one, "--val_input", one) == 0
    meta = meta_of(tmp_path)
    assert (meta["dtype"], meta["vocab_size"], meta["end_of_text"]) == ("uint32", 70_001, 70_000)
    assert tokens_of(tmp_path, "train")[-1] == 70_000


# Held-out share and limits

@given(number=st.integers(2, 320), limit=st.one_of(st.none(), st.integers(1, 320)))
@settings(max_examples=12)
def test_held_out_share(tmp_path_factory, number, limit):
    folder = tmp_path_factory.mktemp("held")
    documents = [f"story {i}" for i in range(number)]
    path = write(folder / "a.jsonl", documents)
    argv = ["--input", path, "--tokenizer", "bytes"] + (["--limit", str(limit)] if limit else [])
    assert run_prepare(folder, *argv) == 0
    train, val = stories_of(folder, "train"), stories_of(folder, "val")
    first = (folder / "data" / "train.bin").read_bytes()
    assert run_prepare(folder, *argv) == 0 and (folder / "data" / "train.bin").read_bytes() == first
    assert not set(train) & set(val) and len(val) >= 1
    expected = [text.encode() for i, text in enumerate(documents) if i % 100]
    assert train == expected[:limit]
    assert val == [text.encode() for text in documents[::100]][:len(val)]


@pytest.mark.parametrize("first, told", ((5, False), (50, True)))
def test_a_first_document_that_is_much_of_the_text_is_mentioned(first, told, tmp_path, capsys):
    path = write(tmp_path / "a.txt", ["word " * n for n in (first, 60, 60)])
    assert run_prepare(tmp_path, "--input", path, "--tokenizer", "bytes") == 0
    assert ("--val_input" in capsys.readouterr().out) == told


@tokenizers
@pytest.mark.parametrize("length", [1, 5, 5000])
def test_a_single_document_is_split(tmp_path, tokenizer, length):
    text = "word " * length
    assert run_prepare(tmp_path, "--input", write(tmp_path / "a.txt", [text]), "--tokenizer", tokenizer) == 0
    encoding, meta = prepare.load_tokenizer(tokenizer), meta_of(tmp_path)
    train, val = tokens_of(tmp_path, "train"), tokens_of(tmp_path, "val")
    assert [*train, *val] == encoding.encode_ordinary(text) + [encoding.eot_token]
    assert len(val) == max(min(2, len(train) + len(val) - 1), (len(train) + len(val)) // 100)
    assert meta["train_stories"] == meta["val_stories"] == 1


@few
@given(content=st.binary(max_size=200) | texts.map(str.encode), name=st.sampled_from(
    ("a.txt", "a.jsonl", "a.parquet", "a.txt.gz", "a.jsonl.xz")))
def test_any_bytes_become_their_text_or_one_line(tmp_path_factory, content, name):
    folder, said = tmp_path_factory.mktemp("any"), io.StringIO()
    (folder / name).write_bytes(content)
    with contextlib.redirect_stderr(said):
        status = run_prepare(folder, "--input", folder / name, "--tokenizer", "bytes")
    if status == 0:
        tokens = [*tokens_of(folder, "train"), *tokens_of(folder, "val")]
        assert name != "a.txt" or END.encode() in content or tokens == [*content, 256]
        assert sorted(os.listdir(folder / "data")) == ["meta.json", "train.bin", "val.bin"]
    else:
        assert status == 1 and re.fullmatch(rf"prepare\.py: error: .*{name}.*\n", said.getvalue())
        assert not (folder / "data").exists()


def test_limit_leaves_val_input_alone(tmp_path):
    train, val = write(tmp_path / "a.txt", list("abcdef")), write(tmp_path / "b.txt", list("uvwxyz"))
    flags = ("--input", train, "--val_input", val, "--limit", 2, "--tokenizer", "bytes")
    assert run_prepare(tmp_path, *flags) == 0
    assert (meta_of(tmp_path)["train_stories"], meta_of(tmp_path)["val_stories"]) == (2, 6)


# Failures

def bad(name, data):
    return lambda folder: (folder / name).write_bytes(data)


FAILURES = {  # what is wrong with the input: (name, how to make it, words of the message)
    "missing": ("none.txt", lambda folder: None, ["none.txt", "no such file"]),
    "glob": ("none*.txt", lambda folder: None, ["none*.txt"]),
    "folder": ("sub.txt", lambda folder: (folder / "sub.txt").mkdir(), ["sub.txt", "directory"]),
    "empty": ("a.txt", bad("a.txt", b""), ["a.txt", "no text"]),
    "white": ("a.txt", bad("a.txt", b" \n" + END.encode() + b"\n"), ["no text"]),
    "markers": ("a.txt", bad("a.txt", END.encode() * 100_000), ["no text"]),
    "empty jsonl": ("a.jsonl", bad("a.jsonl", b"\n\n"), ["no text"]),
    "kind": ("a.pdf", bad("a.pdf", b"text"), ["a.pdf", ".jsonl"]),
    "latin-1": ("a.txt", bad("a.txt", b"caf\xe9 au lait"), ["a.txt", "UTF-8"]),
    "cut off": ("a.txt", bad("a.txt", "caf\u00e9".encode()[:-1]), ["a.txt", "UTF-8"]),
    "no field": ("a.jsonl", bad("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n'), ["a.jsonl", "line 2", "text"]),
    "no string": ("a.jsonl", bad("a.jsonl", b'{"text": 3}\n'), ["a.jsonl", "line 1", "text"]),
    "no object": ("a.jsonl", bad("a.jsonl", b'"text"\n'), ["a.jsonl", "line 1", "text"]),
    "no json": ("a.jsonl", bad("a.jsonl", b'{"text": "x"}\n\n{"text": \n'), ["a.jsonl", "line 3"]),
    "deep json": ("a.jsonl", bad("a.jsonl", b"[" * 200_000), ["a.jsonl", "line 1"]),
    "jsonl latin-1": ("a.jsonl", bad("a.jsonl", b'{"text": "caf\xe9"}\n'), ["line 1", "UTF-8"]),
    "surrogate": ("a.jsonl", bad("a.jsonl", rb'{"text": "\ud800"}'), ["a.jsonl", "line 1"]),
    "gz": ("a.txt.gz", bad("a.txt.gz", b"not gzip"), ["a.txt.gz"]),
    "gz cut": ("a.txt.gz", bad("a.txt.gz", gzip.compress(b"words " * 99)[:-9]), ["a.txt.gz"]),
    "xz": ("a.txt.xz", bad("a.txt.xz", b"not xz"), ["a.txt.xz"]),
    "xz cut": ("a.txt.xz", bad("a.txt.xz", lzma.compress(b"words " * 99)[:-9]), ["a.txt.xz"]),
    "parquet": ("a.parquet", bad("a.parquet", b"not parquet"), ["a.parquet"]),
    "no column": ("a.parquet", lambda folder: parquet(folder, {"txt": ["a"]}), ["a.parquet", "text"]),
    "numbers": ("a.parquet", lambda folder: parquet(folder, {"text": [1]}), ["a.parquet", "text", "row 1"]),
    "null": ("a.parquet", lambda folder: parquet(folder, {"text": ["a", None]}), ["a.parquet", "row 2"]),
}


def parquet(folder, columns):
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")


@pytest.mark.parametrize("failure", FAILURES)
def test_bad_input_is_one_line_and_changes_nothing(tmp_path, one, capsys, failure):
    assert run_prepare(tmp_path, "--input", one, "--val_input", one, "--tokenizer", "bytes") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    name, make, parts = FAILURES[failure]
    make(tmp_path)
    capsys.readouterr()
    for argv in (["--input", one, "--val_input", tmp_path / name], ["--input", tmp_path / name]):
        assert run_prepare(tmp_path, *argv, "--tokenizer", "bytes") == 1
        one_error(capsys, *parts)
        assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_a_failure_leaves_no_new_folder(tmp_path, one, capsys):
    (tmp_path / "empty.txt").touch()
    assert run_prepare(tmp_path, "--input", tmp_path / "empty.txt", "--tokenizer", "bytes") == 1
    one_error(capsys, "empty.txt")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("argv, word", [
    (["--limit", "0"], "--limit"), (["--limit", "-3"], "--limit"), (["--limit", "1.5"], "--limit"),
    (["--limit", "\u00b2"], "--limit"), (["--input"], "--input"),
    (["--no_such_flag"], "--no_such_flag"), (["--lim", "3"], "--lim"), (["--val_input", "a.txt"], "--input"),
    (["stray"], "stray")])
def test_bad_flags_are_one_line_and_status_2(tmp_path, capsys, argv, word):
    with pytest.raises(SystemExit) as stop:
        run_prepare(tmp_path, *argv)
    assert stop.value.code == 2
    one_error(capsys, word)
    assert not (tmp_path / "data").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["--help"])
    assert stop.value.code == 0 and "--val_input" in capsys.readouterr().out


def test_too_long_a_line_of_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_LINE", 50)
    path = write(tmp_path / "a.jsonl", ["x", "y" * 60])
    assert run_prepare(tmp_path, "--input", path, "--tokenizer", "bytes") == 1
    one_error(capsys, "a.jsonl", "line 2", "50 bytes")


def test_output_that_cannot_be_written(tmp_path, one, capsys):
    (tmp_path / "data").write_text("a file where the folder should be")
    assert run_prepare(tmp_path, "--input", one, "--tokenizer", "bytes") == 1
    one_error(capsys, "data")


def test_full_disk(tmp_path, one, capsys, monkeypatch):
    def full(self, waiting=0):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(prepare.TokenFile, "flush", full)
    assert run_prepare(tmp_path, "--input", one, "--tokenizer", "bytes") == 1
    one_error(capsys, "No space left on device")
    assert not (tmp_path / "data").exists()


def test_interruption_while_reading(tmp_path, one, capsys, monkeypatch):
    assert run_prepare(tmp_path, "--input", one, "--val_input", one, "--tokenizer", "bytes") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}

    def interrupted(files):
        yield "half a story"
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare, "read_files", interrupted)
    assert run_prepare(tmp_path, "--input", one, "--tokenizer", "bytes") == 130
    one_error(capsys, "interrupted")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


@pytest.mark.parametrize("step", range(3))
def test_interruption_while_renaming_never_looks_finished(tmp_path, one, monkeypatch, step):
    assert run_prepare(tmp_path, "--input", one, "--val_input", one, "--tokenizer", "bytes") == 0
    replace, calls = os.replace, itertools.count()

    def interrupted(*paths):
        if next(calls) == step:
            raise KeyboardInterrupt
        replace(*paths)
    monkeypatch.setattr(os, "replace", interrupted)
    assert run_prepare(tmp_path, "--input", one, "--val_input", one, "--tokenizer", "bytes") == 130
    assert sorted(os.listdir(tmp_path / "data")) == ["train.bin", "val.bin"]


def test_ctrl_c_on_the_command_line(tmp_path):
    """A real SIGINT in the middle of a long run: one line, status 130, an empty folder."""
    (tmp_path / "long.txt").write_text("some words " * 5_000_000)
    command = [sys.executable, ROOT / "prepare.py", "--input", *[tmp_path / "long.txt"] * 20,
               "--tokenizer", "bytes", "--out_dir", tmp_path / "data"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "data" / "train.bin.tmp").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and errors.count("\n") == 1 and "interrupted" in errors
    assert not (tmp_path / "data").exists()


# Fallbacks

def test_offline_fallback_to_built_in_stories_and_bytes(tmp_path, monkeypatch, capsys):
    no_vocabulary(monkeypatch)
    assert run_prepare(tmp_path, "--limit", 300) == 0
    meta, lines = meta_of(tmp_path), capsys.readouterr().out.splitlines()
    assert (meta["tokenizer"], meta["train_stories"], meta["val_stories"]) == ("bytes", 300, 100)
    assert sum("TinyStories" in line and "internet" in line for line in lines) == 1
    assert sum("TIKTOKEN_CACHE_DIR" in line for line in lines) == 1
    assert "python gemma270m.py" in lines[-1] and "--data_dir" in lines[-1]
    train, val = stories_of(tmp_path, "train"), stories_of(tmp_path, "val")
    assert not set(train) & set(val) and len(set(train)) == 300


def test_default_size_of_the_fallback(tmp_path):
    assert run_prepare(tmp_path, "--tokenizer", "bytes") == 0
    assert (meta_of(tmp_path)["train_stories"], meta_of(tmp_path)["val_stories"]) == (24_000, 500)


def test_hanging_network_is_given_up(tmp_path, monkeypatch):
    import tiktoken
    monkeypatch.setattr(prepare, "DEADLINE", 0.3)
    monkeypatch.setattr(prepare, "probe_hub", lambda: time.sleep(30))
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(30))
    assert run_prepare(tmp_path, "--limit", 10) == 0
    assert meta_of(tmp_path)["tokenizer"] == "bytes"


def test_hanging_network_does_not_keep_the_process_alive(tmp_path):
    code = ("import time, sys, tiktoken, prepare; prepare.probe_hub = lambda: time.sleep(60); "
            "tiktoken.get_encoding = lambda name: time.sleep(60); prepare.DEADLINE = 0.2; "
            f"sys.exit(prepare.main(['--limit', '10', '--out_dir', {str(tmp_path / 'data')!r}]))")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=50)


@pytest.mark.parametrize("named", ["input", "tokenizer"])
def test_no_fallback_for_what_was_named(tmp_path, one, monkeypatch, capsys, named):
    no_vocabulary(monkeypatch)
    assert run_prepare(tmp_path, *(["--input", one] if named == "input" else ["--tokenizer", "gpt2"])) == 1
    one_error(capsys, "--tokenizer bytes", "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "data").exists()


def tinystories(monkeypatch, rows):
    """`datasets` with a TinyStories of our own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(prepare, "probe_hub", lambda: None)

    def load_dataset(name, split, streaming):
        assert name == "roneneldan/TinyStories" and streaming
        return rows(split)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_tinystories(tmp_path, monkeypatch):
    tinystories(monkeypatch, lambda split: ({"text": f"{split} {i}" if i else " "} for i in range(400)))
    assert run_prepare(tmp_path, "--tokenizer", "bytes", "--limit", 250) == 0
    train, val = stories_of(tmp_path, "train"), stories_of(tmp_path, "val")
    assert train == [f"train {i}".encode() for i in range(1, 251)]
    assert val == [f"validation {i}".encode() for i in range(1, 101)]


def test_failure_in_the_middle_of_the_download(tmp_path, monkeypatch, capsys):
    def rows(split):
        yield {"text": "a story"}
        raise ConnectionError("connection lost\nwith a second line")
    tinystories(monkeypatch, rows)
    assert run_prepare(tmp_path, "--tokenizer", "bytes") == 1
    one_error(capsys, "TinyStories", "connection lost")
    assert not (tmp_path / "data").exists()


# The built-in stories

def test_built_in_stories():
    stories = list(itertools.islice(prepare.write_stories(), 24_500))
    assert stories[:50] == list(itertools.islice(prepare.write_stories(0), 50))
    assert stories[:50] != list(itertools.islice(prepare.write_stories(1), 50))
    assert len(set(stories)) == 24_500
    lengths = [len(text.split()) for text in stories]
    assert min(lengths) >= 60 and max(lengths) <= 250
    assert sum(len(text) < 750 for text in stories) > 0.98 * len(stories)
    everything = "\n".join(stories)
    assert everything.isascii() and not re.search(r"[{}\[\]|;]|  ", everything)
    assert set(re.findall(r"\b(?:a [aeiou]|an [^aeiou])\w*", everything, re.IGNORECASE)) <= {"an hour"}
    openings = [" ".join(text.split()[:4]) for text in stories]
    assert max(set(openings), key=openings.count) == "Once upon a time,"
    assert all(text[-1] in ".!\"" and text.count('"') % 2 == 0 for text in stories)
    assert 400 < len(set(re.findall(r"[a-z']+", everything.lower()))) < 900
    assert len(prepare.PLOTS) >= 12


def test_import_has_no_side_effects():
    code = ("import sys, prepare; "
            "assert not {'datasets', 'pyarrow', 'huggingface_hub', 'torch'} & set(sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout + result.stderr == "", result.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_input(tmp_path):
    """One document of 100 MB on a single line."""
    path = tmp_path / "long.txt"
    path.write_bytes(b"a" * 100_000_000)
    code = ("import re, sys, prepare; status = prepare.main(sys.argv[1:]); "
            "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr); "
            "sys.exit(status)")
    result = subprocess.run([sys.executable, "-c", code, "--input", path, "--tokenizer", "bytes", "--out_dir",
                             tmp_path / "data"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stderr) < 300_000  # KiB


# ---- sample.py ---------------------------------------------------------------------------------------


@pytest.fixture
def story_teller(tmp_path, monkeypatch):
    """A folder with an untrained checkpoint over the byte vocabulary in out.pt."""
    monkeypatch.chdir(tmp_path)
    config = GemmaConfig(**{**SHAPE, "vocab_size": 257})
    save_checkpoint("out.pt", {
        "model": randomize(Gemma(config)).state_dict(), "optimizer": {}, "scaler": {}, "iteration": 0,
        "rows": [], "losses": [], "skips": 0, "model_config": vars(config),
        "train_config": vars(TrainConfig()),
        "data": {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256}})
    return tmp_path


@given(text=texts)
def test_characters_appear_once_their_bytes_are_complete(text):
    tokens = prepare.load_tokenizer("bytes").encode_ordinary(text)
    shown = sample.Text(prepare.load_tokenizer("bytes"), end=256)
    pieces = [shown.add(token) for token in (*tokens, 256, 65)]
    assert "".join(pieces) + shown.finish() == shown.content == text and shown.ended
    assert all(len(piece) <= 1 or "\ufffd" in piece for piece in pieces)


def test_greedy_sampling_prints_what_generate_returns(story_teller, capsys):
    (story_teller / "start.txt").write_text("ab")
    for prompt in ("ab", "FILE:start.txt"):
        sample.main(["--prompt", prompt, "--temperature=0", "--max_new_tokens=20", "--dtype=float32"])
        out, err = capsys.readouterr()
        model = Gemma(load_checkpoint("out.pt")["model_config"])
        model.load_state_dict(load_checkpoint("out.pt")["model"])
        tokens = model.generate(torch.tensor([[256, 97, 98]]), 20, temperature=0, stop_token=256)
        text = bytes(token for token in tokens[0].tolist() if token < 256).decode(errors="replace")
        assert out == text + "\n"
        assert "tokens/s" in err


def test_several_samples_differ_and_repeat_with_their_seed(story_teller, capsys):
    def texts(seed):
        sample.main(["--num_samples", "3", "--seed", str(seed), "--max_new_tokens", "30"])
        return capsys.readouterr().out.split("\n---------------\n")
    assert len(set(texts(1))) == 3
    assert texts(1) == texts(1) != texts(2)


@pytest.mark.parametrize("wrong", (
    "--ckpt=nowhere.pt", "--ckpt=.", "--temperature=-1", "--temperature=nan", "--top_p=0", "--top_p=1.5",
    "--top_k=0", "--num_samples=0", "--max_new_tokens=0", "--max_new_tokens=-3", "--seed=1e30", "--top_k=1.5",
    f"--seed={10 ** 30}", "--prompt=FILE:nowhere", "--prompt=FILE:out.pt",
    "--device=foo", "--dtype=foo", "--prom=a", f"--prompt={'a' * 64}"))
def test_a_sampling_mistake_gives_one_line(wrong, story_teller, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main([wrong])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert re.fullmatch(r"sample\.py: error: .*\S.*\n", err)


@given(wrong=st.dictionaries(st.sampled_from(("num_samples", "max_new_tokens", "top_k")),
                             st.integers(max_value=0) | st.sampled_from(("1.5", "nan", "")), max_size=2),
       also=st.dictionaries(st.sampled_from(("temperature", "top_p")), WRONG[float], max_size=2),
       last=st.dictionaries(st.sampled_from(("ckpt", "device", "dtype")), WRONG[str], max_size=2))
def test_any_wrong_sampling_flags_give_one_line_that_names_one_of_them(workplace, wrong, also, last):
    wrong = {**wrong, **also, **last}
    assume(wrong)
    line = refusal(sample.main, flags(**{"ckpt": workplace / "out.pt", **wrong}))
    assert any(name in line or f"{value} " in line for name, value in wrong.items())


# ---- folders of transformers -------------------------------------------------------------------------

@contextlib.contextmanager
def no_warning():
    """Fails if anything inside warns, in Python's way or in that of transformers."""
    lines, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not lines


def canonical(config):
    """Where no layer is full, any full_attention_every beyond their number says so."""
    return replace(config, full_attention_every=min(config.full_attention_every, config.n_layers + 1))


def edit_config(folder, **changes):
    """Changes values of config.json; those that become ... are left out."""
    given = {**json.loads((folder / "config.json").read_text()), **changes}
    given = {name: value for name, value in given.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(given))


def gemma_tokenizer():
    """A tokenizer built as Gemma's is: BPE with bytes to fall back on, a <bos> before each text, and a
    special token that has no row in the model. -> the tokenizer, the number of rows"""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)),
              *"\u2581abcdehnt.", "th", "the", "\u2581the", "an", "\u2581\u2581", "\n\n"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "n"), ("\u2581", "\u2581")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>",
                                byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                      decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    made.add_special_tokens([AddedToken(token) for token in (*tokens[:4], "<image_soft_token>")])
    made.add_tokens([AddedToken(token, normalized=False) for token in tokens[-2:]])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>",
                                   pad_token="<pad>", unk_token="<unk>"), len(tokens)


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    """A folder in the layout of google/gemma-3-270m, with a small random model, written by transformers."""
    tokenizer, rows = gemma_tokenizer()
    peer, _ = transformers_peer(GemmaConfig(**{**SHAPE, "vocab_size": rows, "context_length": 512}), 0)
    folder = tmp_path_factory.mktemp("hub") / "gemma"
    peer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@few
@given(config=shapes, dtype=st.sampled_from((torch.float32, torch.bfloat16)), seed=seeds,
       shard=st.sampled_from(("5GB", "2KB")))
def test_a_folder_that_transformers_wrote_gives_its_config_and_logits(config, dtype, seed, shard):
    with tempfile.TemporaryDirectory() as folder:
        transformers_peer(config, seed)[0].to(dtype).save_pretrained(folder, max_shard_size=shard)
        peer = Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model, tokens = Gemma.from_pretrained(folder), some_tokens(config, 2, 30, seed)
    assert model.config == canonical(config)
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in model.parameters())
    assert_close(model(tokens), peer(tokens).logits, atol=1e-4, rtol=0)


@few
@given(config=shapes, seed=seeds)
def test_tensors_and_config_survive_the_way_to_transformers_and_back(config, seed):
    model = randomize(Gemma(config), seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/ours")
        with no_warning():
            peer, info = AutoModelForCausalLM.from_pretrained(f"{folder}/ours", output_loading_info=True)
        assert type(peer) is Gemma3ForCausalLM and not any(info.values())
        tokens = some_tokens(config, 2, 30, seed)
        assert_close(peer(tokens).logits, model(tokens), atol=1e-4, rtol=0)
        peer.save_pretrained(f"{folder}/theirs")
        back = Gemma.from_pretrained(f"{folder}/theirs")
    assert back.config == canonical(config)
    assert_equal(dict(back.state_dict()), dict(model.state_dict()))


def test_the_older_spelling_of_config_json_means_the_same(gemma_folder, tmp_path):
    shutil.copytree(gemma_folder, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, rope_parameters=..., rope_theta=5e5, rope_local_base_freq=7e3, rope_scaling=None,
                layer_types=..., sliding_window_pattern=3, tie_word_embeddings=...,
                attn_logit_softcapping=..., use_bidirectional_attention=None)
    expected = replace(Gemma.from_pretrained(gemma_folder).config, rope_base=5e5, rope_local_base=7e3)
    assert Gemma.from_pretrained(tmp_path).config == expected
    assert expected.full_attention_every == 3 and expected.tie_embeddings
    edit_config(tmp_path, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    assert Gemma.from_pretrained(tmp_path).config.full_attention_every == 2


@pytest.mark.parametrize("name, value", (
    ("model_type", "gemma2"), ("architectures", ["Gemma3ForSequenceClassification"]),
    ("attention_bias", True), ("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0),
    ("hidden_activation", "silu"), ("use_bidirectional_attention", True), ("attention_dropout", 0.1),
    ("rope_scaling", {"rope_type": "linear", "factor": 8.0}),
    ("rope_parameters", {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    ("layer_types", ["full_attention", "sliding_attention", "sliding_attention"]), ("hidden_size", ...),
    ("num_attention_heads", 0), ("head_dim", "8"), ("sliding_window", None), ("sliding_window", 6.0),
    ("vocab_size", 99)))
def test_what_is_not_implemented_is_refused_by_name(name, value, gemma_folder, tmp_path, capsys):
    shutil.copytree(gemma_folder, tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, **{name: value})
    ours = {"num_attention_heads": "n_heads", "vocab_size": "embed_tokens.weight"}.get(name, name)
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--ckpt", str(tmp_path)])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and re.fullmatch(r"sample\.py: error: .*\n", line)
    assert str(tmp_path) in line and ours in line


@pytest.mark.parametrize("wrong, word", (
    (lambda weights: weights.pop("model.norm.weight"), "norm.weight"),
    (lambda weights: weights.update({"lm_head.weight": torch.zeros(2, 2)}), "lm_head.weight"),
    (lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}), "q_proj.bias"),
    (lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}), "norm.weight"),
    (lambda weights: weights["model.norm.weight"].fill_(math.nan), "norm.weight"),
    (lambda weights: weights.update({"model.norm.weight": torch.zeros(16).int()}), "norm.weight"),
    (lambda weights: weights.clear(), "embed_tokens.weight")))
def test_missing_and_unknown_tensors_are_refused_by_name(wrong, word, gemma_folder, tmp_path):
    shutil.copytree(gemma_folder, tmp_path, dirs_exist_ok=True)
    wrong(weights := load_file(tmp_path / "model.safetensors"))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^{tmp_path} cannot be loaded: .*{word}.*$"):
        Gemma.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ("config.json", "model.safetensors"))
def test_a_missing_file_of_a_folder_raises_value_error(name, gemma_folder, tmp_path):
    shutil.copytree(gemma_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        Gemma.from_pretrained(tmp_path)


def loaded_or_refused(folder):
    """The model of a folder, or None if it is refused in one line."""
    try:
        return Gemma.from_pretrained(folder)
    except ValueError as error:
        assert re.fullmatch(rf"{folder} cannot be loaded: .+", str(error))


@given(damage=damages())
def test_damaged_weights_are_as_the_file_has_them_or_refused_in_one_line(gemma_folder, tmp_path_factory,
                                                                         damage):
    folder = shutil.copytree(gemma_folder, tmp_path_factory.mktemp("damaged"), dirs_exist_ok=True)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(damaged := damage(content))
    if model := loaded_or_refused(folder):
        changed = len(content) - sum(map(operator.eq, content, damaged))  # the format has no checksum
        before, after = (nn.utils.parameters_to_vector(m.parameters())
                         for m in (Gemma.from_pretrained(gemma_folder), model))
        assert after.isfinite().all() and (before != after).sum() <= changed


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2, 2 ** 70) | st.floats() | st.text(),
                           lambda values: st.lists(values) | st.dictionaries(st.text(), values), max_leaves=3)


@given(damage=damages(), data=st.data())
def test_a_damaged_config_gives_a_model_that_runs_or_is_refused_in_one_line(gemma_folder, tmp_path_factory,
                                                                            damage, data):
    folder = shutil.copytree(gemma_folder, tmp_path_factory.mktemp("damaged"), dirs_exist_ok=True)
    before = (folder / "config.json").read_bytes()
    known = {*gemma270m.OFFICIAL, *gemma270m.IMPLEMENTED, "rope_parameters", "layer_types"}
    known &= json.loads(before).keys()
    (folder / "config.json").write_bytes(damage(before))
    if data.draw(st.booleans()):
        changes = st.dictionaries(st.sampled_from(sorted(known)), json_values, min_size=1, max_size=2)
        (folder / "config.json").write_bytes(before)
        edit_config(folder, **data.draw(changes))
    if model := loaded_or_refused(folder):
        model.generate(torch.zeros(1, min(9, model.config.context_length - 1), dtype=torch.long), 1)


def test_a_name_on_the_hub_is_fetched_from_there(gemma_folder, monkeypatch, capsys):
    def fetch(name, allow_patterns):
        return str(gemma_folder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr(gemma270m, "snapshot_download", fetch)
    assert Gemma.from_pretrained("google/gemma").config.context_length == 512
    assert prepare.load_tokenizer("google/gemma").name == "google/gemma"

    def unreachable(name, allow_patterns):
        raise ConnectionError("no\nnetwork")
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr(gemma270m, "snapshot_download", unreachable)
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", "google/gemma"])
    assert re.fullmatch(r"sample\.py: error: google/gemma cannot.*network.*\n", capsys.readouterr().err)
    with pytest.raises(ValueError, match="google/gemma"):
        prepare.load_tokenizer("google/gemma")


@tokenizers
def test_an_exported_model_tells_the_same_in_a_pipeline(run, tmp_path, tokenizer, one, capsys):
    assert run_prepare(tmp_path, "--input", one, "--val_input", one, "--tokenizer", tokenizer) == 0
    run(data_dir=tmp_path / "data", out=tmp_path / "out.pt", block_size=2, vocab_size=50_257)
    capsys.readouterr()
    sample.main(["--ckpt", str(tmp_path / "out.pt"), "--export", str(tmp_path / "export")])
    sample.main(["--ckpt", str(tmp_path / "out.pt"), "--prompt=val", "--temperature=0", "--dtype=float32",
                 "--max_new_tokens=40"])
    told = capsys.readouterr().out.splitlines()[1]
    with no_warning():
        pipe = pipeline("text-generation", str(tmp_path / "export"))
        answer = pipe(END + "val", max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert answer.removeprefix(END).removesuffix(END) == told
    encoding, back = prepare.load_tokenizer(tokenizer), prepare.load_tokenizer(str(tmp_path / "export"))
    assert (back.n_vocab, back.eot_token, back.prefix) == (encoding.n_vocab, encoding.eot_token, [])

    @given(text=texts)
    def same(text):
        tokens = encoding.encode_ordinary(text)
        assert back.encode_ordinary(text) == tokens and back.decode(tokens) == text
        assert END in text or pipe.tokenizer(text)["input_ids"] == tokens
    same()
    assert_equal(dict(Gemma.from_pretrained(tmp_path / "export").state_dict()),
                 load_checkpoint(tmp_path / "out.pt")["model"])


@given(text=texts | st.text("abcdehnt. <>eos\n"))
@example("<eos>the <bos>")
@example("  the\n\n   an")
def test_the_tokenizer_of_a_folder_gives_the_tokens_of_transformers_and_the_text_back(gemma_folder, text):
    tokenizer, peer = prepare.load_tokenizer(str(gemma_folder)), AutoTokenizer.from_pretrained(gemma_folder)
    tokens, text = tokenizer.encode_ordinary(text), text.replace("\u2581", " ")
    assert tokenizer.decode(tokens) == text and not {0, 1, 2, 3} & {*tokens}
    assert max(tokens, default=0) < tokenizer.n_vocab
    if not re.search("<(eos|bos|pad|unk|image_soft_token)>", text):
        assert tokenizer.prefix + tokens == peer(text)["input_ids"]
    shown = sample.Text(tokenizer, tokenizer.eot_token)
    assert "".join(map(shown.add, tokens)) + shown.finish() == text


def test_an_added_token_of_a_byte_level_tokenizer_stands_for_itself(tmp_path):
    prepare.load_tokenizer("bytes").save_pretrained(tmp_path)
    given = json.loads((tmp_path / "tokenizer.json").read_text())
    end, = given["added_tokens"]
    given["added_tokens"].append({**end, "id": 257, "content": "\u4e2d ", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(given))
    tokenizer = prepare.load_tokenizer(str(tmp_path))
    assert tokenizer.encode_ordinary("a\u4e2d b") == [97, 257, 98] and tokenizer.n_vocab == 258
    assert tokenizer.decode([97, 257, 98]) == "a\u4e2d b"


def test_documents_start_and_end_as_the_folder_has_it(gemma_folder, tmp_path, one):
    documents = write(tmp_path / "in.txt", ["the the", "an " * 300_000, "b"])  # the second comes in pieces
    (folder := tmp_path / "tokenizer").mkdir()
    cut = json.loads((gemma_folder / "tokenizer.json").read_text())
    cut["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
    (folder / "tokenizer.json").write_text(json.dumps(cut))
    shutil.copy(gemma_folder / "tokenizer_config.json", folder)
    assert run_prepare(tmp_path, "--input", documents, "--val_input", one, "--tokenizer", folder) == 0
    meta, tokens = meta_of(tmp_path), tokens_of(tmp_path, "train")
    assert (meta["tokenizer"], meta["end_of_text"]) == (str(folder), 1)
    assert meta["vocab_size"] == Gemma.from_pretrained(gemma_folder).config.vocab_size
    parts = np.split(tokens, np.flatnonzero(tokens == 2))[1:]
    texts = [prepare.load_tokenizer(str(folder)).decode(part.tolist()[1:-1]) for part in parts]
    assert texts == ["the the", "an " * 300_000, "b"] and all(part[-1] == 1 for part in parts)


@pytest.mark.parametrize("name, wrong", (
    ("tokenizer.json", None), ("tokenizer_config.json", None), ("tokenizer.json", "{"),
    ("tokenizer_config.json", "{}"), ("tokenizer_config.json", '{"eos_token": "<end>"}'),
    ("tokenizer.json", Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>")).to_str())))
def test_an_unusable_tokenizer_of_a_folder_gives_one_line(name, wrong, gemma_folder, tmp_path, one, capsys):
    shutil.copytree(gemma_folder, tmp_path / "folder")
    (tmp_path / "folder" / name).unlink() if wrong is None else (tmp_path / "folder" / name).write_text(wrong)
    assert run_prepare(tmp_path, "--input", one, "--tokenizer", tmp_path / "folder") == 1
    one_error(capsys, tmp_path / "folder")
    assert not (tmp_path / "data").exists()


def test_fine_tuning_a_folder_lowers_its_loss_and_can_be_resumed_sampled_and_exported(
        gemma_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gemma_folder, "gemma")
    write(tmp_path / "mine.txt", ["the the an. " * 9] * 60)
    assert run_prepare(tmp_path, "--input", "mine.txt", "--tokenizer", "gemma") == 0
    assert "--init_from gemma" in capsys.readouterr().out
    given = dict(init_from=tmp_path / "gemma", device="cpu", dtype="float32", block_size=32, lr=1e-2,
                 max_iters=80, warmup_iters=8)
    main(flags(**given))
    lines = capsys.readouterr().out
    assert "finetune" in lines and "lr 0.01" in lines and "gemma" in lines
    state = load_checkpoint("out.pt")
    losses = column(state, "val_loss")
    start = evaluate(Gemma.from_pretrained("gemma"), load_data("data")[1], state["train_config"],
                     contextlib.nullcontext())
    assert losses[0] == pytest.approx(start, rel=1e-5)
    assert losses[-1] < losses[0] - 1
    shutil.move("gemma", "elsewhere")  # a checkpoint needs the folder for its tokenizer only
    main(["--resume", "--max_iters=100"])
    assert load_checkpoint("out.pt")["iteration"] == 100
    assert "no tokenizer" in refusal(sample.main, ["--ckpt=out.pt"])
    capsys.readouterr()
    sample.main("--ckpt=out.pt --prompt=the --temperature=0 --max_new_tokens=9 --dtype=float32 "
                "--tokenizer=elsewhere".split())
    moved = capsys.readouterr().out
    shutil.move("elsewhere", "gemma")
    sample.main(["--ckpt=out.pt", "--prompt=the", "--temperature=0", "--max_new_tokens=9", "--dtype=float32"])
    told = capsys.readouterr().out
    assert told.startswith("the ") and told == moved
    sample.main(["--ckpt=out.pt", "--export=tuned"])
    capsys.readouterr()
    sample.main(["--ckpt=tuned", "--prompt=the", "--temperature=0", "--max_new_tokens=9", "--dtype=float32"])
    assert capsys.readouterr().out == told
    with no_warning():
        answer = pipeline("text-generation", "tuned")("the", max_new_tokens=9, do_sample=False)
    assert answer[0]["generated_text"] == told.removesuffix("\n")


def test_an_export_is_whole_or_not_there(gemma_folder, tmp_path, monkeypatch, capsys):
    model, (tokenizer, _) = Gemma.from_pretrained(gemma_folder), gemma_tokenizer()
    model.save_pretrained(tmp_path / "export", tokenizer)
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    before = (tmp_path / "export" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(gemma_folder), "--export", str(tmp_path / "export")])
    assert re.fullmatch(r"sample\.py: error: .*export is not empty.*\n", capsys.readouterr().err)
    assert (tmp_path / "export" / "model.safetensors").stat().st_mtime_ns == before
    assert Gemma3ForCausalLM.from_pretrained(tmp_path / "export").model.embed_tokens.padding_idx is None
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
    (tmp_path / "file").unlink()
    monkeypatch.setattr(Path, "write_text", mock.Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "other")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers.convert_slow_tokenizer", None)
    with pytest.raises(ValueError, match="transformers"):
        model.save_pretrained(tmp_path / "other", prepare.load_tokenizer("bytes"))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


# ---- README.md ---------------------------------------------------------------------------------------

README = Path(gemma270m.__file__).with_name("README.md").read_text()
RUN = ("--device=cpu --max_iters=2 --grad_accum=2 --batch_size=1 --block_size=64 --eval_tokens=64 "
       "--no-compile").split()
SMALL = [*RUN, "--preset=tiny", "--n_layers=2"]


def test_the_commands_of_the_readme_run(gemma_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gemma_folder, "gemma-3-270m")
    real, vocabulary = prepare.load_tokenizer, prepare.load_tokenizer("bytes")
    monkeypatch.setattr(prepare, "load_tokenizer",  # bytes stand for GPT-2, which may be out of reach
                        lambda name, timeout=60: vocabulary if name == "gpt2" else real(name, timeout))
    for name in ("mine.txt", "held_out.txt", "start.txt"):
        Path(name).write_text(prepare.END_OF_TEXT.join(f"A story of {i} mice. The end." for i in range(99)))
    programs = {"prepare.py": lambda args: prepare.main([*args, "--limit=500"]),
                "gemma270m.py": lambda args: main([*args, *(RUN if "--init_from" in args else SMALL)]),
                "sample.py": lambda args: sample.main([*args, "--max_new_tokens=9"])}
    lines = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).splitlines()
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    commands = [words for words in commands if words[:1] == ["python"] and words[1] in programs]
    assert {words[1] for words in commands} == set(programs)
    for _, program, *args in commands:
        assert programs[program](args) in (0, None), args
        assert "error" not in capsys.readouterr().err


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_readme_tells_the_defaults():
    for config in (GemmaConfig(), TrainConfig()):
        for name, value in re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", README, re.MULTILINE):
            if hasattr(config, name):
                assert float(value.replace(",", "")) == getattr(config, name), name


# ---- speed beside transformers -----------------------------------------------------------------------


def compare_training(args, config, device, theirs):
    """-> forward and backward of a micro-batch, ours and theirs, its number of tokens, and None"""
    ours, (x, y) = Gemma(config).to(device), torch.randint(config.vocab_size, (2, *args.shape), device=device)
    dtypes = [pick_dtype(name, device)[0] for name in (args.dtype, args.their_dtype)]
    our_cast, their_cast = (torch.autocast(device.type, dtype, dtype != torch.float32) for dtype in dtypes)
    for weight in ours.parameters():  # as train has them, which a CUDA graph needs
        weight.grad = torch.zeros_like(weight)

    def our_work(x, y):
        with our_cast:
            loss = ours(x, y)
        loss.backward()
        return loss.detach()

    def their_work():
        with their_cast:
            logits = theirs(input_ids=x, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).backward()

    if device.type == "cuda":
        ours.compile()
        our_work = torch.cuda.make_graphed_callables(our_work, (x, y), num_warmup_iters=1)
        theirs = torch.compile(theirs)
    return lambda: our_work(x, y), their_work, x.numel(), None


def compare_decoding(args, config, device, theirs):
    """-> a call of generate, ours and theirs, the number of new tokens, and the rate of our steps alone"""
    ours = Gemma(config).to(device, pick_dtype(args.dtype, device)[0])
    theirs = theirs.to(pick_dtype(args.their_dtype, device)[0]).eval()
    x, n = torch.randint(config.vocab_size, (args.num_samples, 16), device=device), args.max_new_tokens
    if device.type == "cuda":
        ours.compile(options={"coordinate_descent_tuning": True, "combo_kernels": True})
    cache = {"cache_implementation": "static"} if device.type == "cuda" else {}  # which they compile then

    def steps_alone():  # by the second token, the prompt was read and the CUDA graph recorded
        stream = ours.stream(x, n)
        next(stream), next(stream)[0].item()
        start = time.perf_counter()
        *_, last = stream
        last[0].item()
        return (n - 2) * len(x) / (time.perf_counter() - start)

    return (lambda: ours.generate(x, n),
            lambda: theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=n,
                                    do_sample=True, top_k=0, pad_token_id=0, **cache),
            n * len(x), steps_alone)


def compare(argv=None):
    """Prints the tokens/s of this project and of transformers, measured in turn in one process."""
    parser = argparse.ArgumentParser(description=compare.__doc__)
    parser.add_argument("what", choices=("train", "decode"))
    for name, value in (("batch_size", 32), ("block_size", 512), ("num_samples", 1), ("max_new_tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name in ("dtype", "their_dtype"):
        parser.add_argument(f"--{name}", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    args, config, device = parser.parse_args(argv), GemmaConfig(), gemma270m.pick_device()
    args.shape = args.batch_size, args.block_size
    parser.error("max_new_tokens must be at least 3") if args.max_new_tokens < 3 else None
    torch.set_num_threads(os.cpu_count())
    how = compare_training if args.what == "train" else compare_decoding
    *works, tokens, alone = how(args, config, device, transformers_peer(config, 0)[0].to(device))
    speeds = [[], []]
    for _ in range(7):
        for work, speed in zip(works, speeds):
            start = time.perf_counter()
            work()
            torch.zeros(1, device=device).item()  # waits for the device
            speed.append(tokens / (time.perf_counter() - start))
    ours, theirs = (np.median(speed[2:]) for speed in speeds)  # the first two compile
    ratio = np.median([a / b for a, b in zip(*speeds)][2:])
    steps = f" ({np.median([alone() for _ in range(5)]):,.0f} after the second token)" if alone else ""
    print(f"{args.what}: {ours:,.0f} tokens/s{steps}, transformers {theirs:,.0f}, ratio {ratio:.2f}")


if __name__ == "__main__":
    compare()
