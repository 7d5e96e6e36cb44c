"""Tests of gemma270m.py, prepare.py and sample.py. The first part specifies the model.

HYPOTHESIS_PROFILE=long python -m pytest -k kill_9    # searches 25 times as far
"""

import argparse
import contextlib
import copy
import csv
import functools
import gzip
import importlib
import io
import itertools
import json
import logging
import lzma
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

import numpy as np
import pyarrow.parquet
import pytest
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, pipeline
from transformers.models.gemma3 import modeling_gemma3 as gemma3

import gemma270m
import prepare
import sample
from gemma270m import Gemma, GemmaConfig, TrainConfig, UserError

CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
common = {"deadline": None, "database": None, "suppress_health_check": CHECKS}
settings.register_profile("short", derandomize=True, max_examples=16, **common)
settings.register_profile("long", max_examples=400, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
few = settings(max_examples=settings().max_examples // 3)  # for properties that take long
torch.set_num_threads(1)  # the models here are too small to share out
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it

# ---- What the parts share ------------------------------------------------------------------------
SHAPE = dict(vocab_size=40, context_length=64, emb_dim=16, n_layers=3, n_heads=4, n_kv_groups=2,
             head_dim=8, hidden_dim=24, sliding_window=6, full_attention_every=3,
             query_pre_attn_scalar=8)  # fmt: skip
TOY = dict(SHAPE, preset="tiny", device="cpu", dtype="float32", batch_size=2, grad_accum=2,
           block_size=16, lr=1e-2, min_lr=1e-3, max_iters=12, warmup_iters=4, eval_interval=4,
           eval_tokens=80, log_interval=4)  # fmt: skip
CPU = torch.device("cpu")
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
seeds = st.integers(0, 999)
sizes = st.integers(1, 30)
assert_equal = functools.partial(assert_close, rtol=0, atol=0)


def randomize(model, seed=0):
    """Gives every weight a random value, those that start at zero too."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, std=0.3 if "norm" in name else 0.1)
    return model


def toy_config(**changes):
    return GemmaConfig(**{**SHAPE, **changes})


def toy_model(seed=0, **changes):
    return randomize(Gemma(toy_config(**changes)), seed)


def some_tokens(B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(40, (B, T), generator=generator)


def write_data(folder, train, val, vocab_size=40, source="a test"):
    """Writes what training reads of a folder of prepare.py. -> the folder"""
    folder.mkdir(exist_ok=True)
    dtype = "uint16" if vocab_size <= 2**16 else "uint32"
    np.asarray(train, dtype).tofile(folder / "train.bin")
    np.asarray(val, dtype).tofile(folder / "val.bin")
    (folder / "tokenizer.json").write_text("words")
    meta = dict(source=source, vocab_size=vocab_size, dtype=dtype, bos_token=None,
                end_tokens=[39], train_tokens=len(train), val_tokens=len(val),
                tokenizer_files=["tokenizer.json"])  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def flags(**values):
    """The command line that gives these values; a switch that is False is left out."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in values.items()
        if value is not False
    ]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of 37 + 7 blocks of 16 in which each token says much about the next."""
    steps = np.random.default_rng(0).integers(1, 4, size=700)
    walk = np.cumsum(steps) % 40
    return write_data(tmp_path_factory.mktemp("data"), walk[:593], walk[593:])


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A function that trains a toy through the command line and returns its checkpoint."""
    # From the usual scale of float16 a toy's first updates would be skipped.
    small_scale = functools.partial(torch.amp.GradScaler, init_scale=16.0)

    def run(**given):
        given = {**TOY, "data_dir": data, "overwrite": True, **given}
        given.setdefault("out", tmp_path_factory.mktemp("run") / "out.pt")
        with mock.patch.object(torch.amp, "GradScaler", small_scale):
            gemma270m.main(flags(**given))
        return torch.load(given["out"])

    return run


@pytest.fixture(scope="session")
def whole(run):
    """The checkpoint of a toy run that nothing interrupted."""
    return run()


def refuses(program, argv, *words):
    """Asserts that main(argv) ends with one line about the mistake, which holds the words."""
    said = io.StringIO()
    reason = ""
    with contextlib.redirect_stderr(said):
        try:
            assert program.main(list(map(str, argv))) == 1  # of prepare.py, which prints its line
        except (UserError, SystemExit) as stopped:
            reason = f"error: {stopped}"
    # argparse prints the usage and then the line.
    *usage, line = said.getvalue().splitlines() or [reason]
    assert not usage or usage[0].startswith("usage: ")
    assert "error: " in line and "\n" not in line
    assert all(str(word) in line for word in words), line


@st.composite
def damages(draw):
    """A function that cuts bytes short or overwrites some of them."""
    place = draw(st.floats(0, 1, exclude_max=True))
    wrong = draw(st.none() | st.binary(min_size=1, max_size=40))

    def damage(content):
        i = int(place * len(content))
        rest = b"" if wrong is None else wrong + content[i + len(wrong) :]
        return content[:i] + rest

    return damage


class TensorsMade(TorchDispatchMode):
    """Lists the shape of each tensor that any operation makes."""

    def __enter__(self):
        self.shapes = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.shapes += [x.shape for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


# ---- Layers --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@given(scale=st.floats(1e-3, 1e3), eps=st.floats(1e-8, 1e-2), seed=seeds)
def test_rms_norm_is_that_of_transformers(dtype, scale, eps, seed):
    torch.manual_seed(seed)
    ours = gemma270m.RMSNorm(20, eps)
    theirs = gemma3.Gemma3RMSNorm(20, eps)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    x = scale * torch.randn(5, 20, dtype=dtype)
    assert_close(ours(x), theirs(x))
    assert_close(ours.to(dtype)(x), theirs.to(dtype)(x))


def as_complex(x):
    """Each pair that RoPE turns as one complex number."""
    return torch.complex(*x.chunk(2, dim=-1))


@given(T=st.integers(1, 300), D=st.sampled_from((2, 4, 16)), base=st.floats(2, 1e6), seed=seeds)
def test_rope_turns_pairs_as_complex_numbers(T, D, base, seed):
    torch.manual_seed(seed)
    x = torch.randn(2, T, 3, D)
    cos, sin = gemma270m.rope_table(torch.arange(T), D, base)
    turned = gemma270m.apply_rope(x, cos, sin)
    angles = torch.outer(torch.arange(T), base ** -(torch.arange(0, D, 2) / D))
    expected = as_complex(x) * torch.exp(1j * angles[:, None])
    assert_close(as_complex(turned), expected, atol=1e-3, rtol=0)


def dense_attention(q, k, v, window, scale):
    """All scores at once: query i sees key j if 0 <= i - j < window."""
    shared = q.size(1) // k.size(1)
    k = k.repeat_interleave(shared, dim=1)
    v = v.repeat_interleave(shared, dim=1)
    positions = torch.arange(q.size(2))
    age = positions[:, None] - positions
    hidden = (age < 0) | (age >= window)
    scores = scale * q @ k.mT
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def with_gradients(attention, qkv, window):
    """What attention returns, and the gradients of q, k and v behind it."""
    y = attention(*qkv, window, 0.3)
    weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return y, *torch.autograd.grad(y, qkv, weight.to(y))


@given(
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    T=st.integers(1, 40),
    window=st.integers(1, 45),
    seed=seeds,
)
def test_attention_and_its_gradient_are_those_of_the_dense_formula(groups, shared, T, window, seed):
    torch.manual_seed(seed)
    heads = (groups * shared, groups, groups)
    qkv = [torch.randn(2, n, T, 4).double().requires_grad_() for n in heads]
    got = with_gradients(gemma270m.causal_attention, qkv, window)
    assert_close(got, with_gradients(dense_attention, qkv, window))


def test_a_sliding_layer_makes_nothing_of_size_t_by_t():
    T = 512
    q, k, v = torch.randn(3, 1, 2, T, 8, requires_grad=True)
    with TensorsMade() as made:
        gemma270m.causal_attention(q, k, v, 4, 1.0).sum().backward()
    largest = max(shape.numel() for shape in made.shapes)
    assert q.numel() <= largest < T * T / 8


# ---- Model ---------------------------------------------------------------------------------------
shapes = st.builds(
    toy_config,
    emb_dim=st.sampled_from((12, 24)),
    n_layers=st.integers(1, 4),
    n_kv_groups=st.sampled_from((1, 2, 4)),
    head_dim=st.sampled_from((2, 8, 12)),
    hidden_dim=st.integers(1, 30),
    sliding_window=st.integers(1, 9),
    full_attention_every=st.integers(1, 4),
    rope_local_base=st.floats(5, 1e4),
    rope_base=st.floats(5, 1e6),
    query_pre_attn_scalar=st.integers(4, 30),
    norm_eps=st.floats(1e-6, 1e-2),
    tie_embeddings=st.booleans(),
)
models = st.builds(randomize, st.builds(Gemma, shapes), seeds)


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_numbers_of_parameters_and_operations():
    with torch.device("meta"):
        model = Gemma(GemmaConfig())
        untied = Gemma(GemmaConfig(tie_embeddings=False))
        google = Gemma(GemmaConfig(vocab_size=262_144))
    assert model.num_parameters() == 132_490_496
    assert untied.num_parameters() == 164_654_976
    assert google.num_parameters() == 268_098_176  # the 270M of its name
    period = ["sliding_attention"] * 5 + ["full_attention"]
    assert model.config.layer_types == period * 3
    assert our_flops_per_token(model, 1024) == pytest.approx(884e6, rel=1e-3)
    assert our_flops_per_token(toy_model(), 1) == 6 * 8_704 + 12 * 32 * 3


def transformers_peer(c, seed):
    """A Gemma3ForCausalLM of the same shape with random weights, and a Gemma that loaded them."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": c.rope_local_base},
        "full_attention": {"rope_type": "default", "rope_theta": c.rope_base},
    }
    config = gemma3.Gemma3TextConfig(
        vocab_size=c.vocab_size, hidden_size=c.emb_dim, intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers, layer_types=c.layer_types, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_groups, head_dim=c.head_dim, sliding_window=c.sliding_window,
        query_pre_attn_scalar=c.query_pre_attn_scalar, max_position_embeddings=c.context_length,
        rope_parameters=rope, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tie_embeddings,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    peer = randomize(gemma3.Gemma3ForCausalLM(config), seed).eval()
    weights = {name.removeprefix("model."): weight for name, weight in peer.named_parameters()}
    model = Gemma(c)
    model.load_state_dict(weights)
    return peer, model


@given(config=shapes, T=st.integers(2, 40), seed=seeds)
@example(config=toy_config(), T=40, seed=0)
def test_logits_and_gradients_are_those_of_transformers(config, T, seed):
    peer, model = transformers_peer(config, seed)
    tokens = some_tokens(2, T, seed)
    theirs = peer(tokens, labels=tokens)
    assert_close(model(tokens), theirs.logits, atol=1e-4, rtol=0)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    expected = gradients(theirs.loss, peer)
    assert_close(gradients(loss, model), expected, atol=1e-4, rtol=1e-3)


@given(model=models)
def test_recomputed_activations_give_the_same_gradient(model):
    tokens = some_tokens(2, 20)
    with TensorsMade() as made:
        plain = gradients(model(tokens, tokens), model)
    model.checkpoint_activations = True
    with TensorsMade() as remade:
        recomputed = gradients(model(tokens, tokens), model)
    assert_equal(recomputed, plain)
    assert len(remade.shapes) > len(made.shapes)


@pytest.mark.parametrize(
    "weights, factor",
    (("embed_tokens", 1e6), ("post_feedforward_layernorm", 2e5), ("gate_proj|up_proj", 400)),
)
def test_numbers_beyond_float16_survive_its_autocast(weights, factor):
    model = toy_model(tie_embeddings=False)
    for name, weight in model.named_parameters():
        if re.search(weights, name):
            weight.data *= factor
    tokens = some_tokens(2, 30)
    with torch.autocast("cpu", torch.float16):
        got = model(tokens)
    error = got - model(tokens)
    assert error.isfinite().all() and error.abs().mean() < 0.05


def test_the_whole_model_with_its_loss_compiles_into_one_graph():
    model = toy_model()
    tokens = some_tokens(2, 20)
    loss = model(tokens, tokens)
    compiled_loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, tokens)
    assert_close(compiled_loss, loss)
    assert_close(gradients(compiled_loss, model), gradients(loss, model))


@pytest.mark.parametrize("name", ("q_proj", "k_proj", "v_proj", "o_proj"))
def test_a_module_in_place_of_a_matrix_learns(name):
    model = toy_model()
    tokens = some_tokens(2, 20)
    attention = model.layers[0].self_attn
    matrix = getattr(attention, name)
    adapter = nn.Linear(matrix.out_features, matrix.out_features)
    setattr(attention, name, nn.Sequential(matrix, adapter))
    model(tokens, tokens).backward()
    assert adapter.weight.grad.any() and matrix.weight.grad.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantised_model_says_nearly_the_same():
    model = toy_model()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not isinstance(quantised.layers[0].self_attn.q_proj, nn.Linear)
    tokens = some_tokens(2, 20)
    error = quantised(tokens) - model(tokens)
    assert error.std() < 0.1


# ---- Loss ----------------------------------------------------------------------------------------
def loss_in_chunks(model, rows):
    """Lets the loss take so few rows at a time."""
    return mock.patch.object(gemma270m, "LOGITS_AT_ONCE", rows * model.config.vocab_size)


@given(model=models, rows=sizes, ignored=st.sets(st.integers(0, 23)))
@example(model=toy_model(), rows=9, ignored=range(24))
def test_the_loss_and_its_gradient_are_those_of_plain_cross_entropy(model, rows, ignored):
    tokens = some_tokens(2, 12)
    targets = some_tokens(1, 24, seed=1)[0]
    targets[list(ignored)] = -1
    logits = model(tokens).flatten(0, 1)
    total = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    expected = total / max(1, 24 - len(ignored))  # 0, not NaN, if all are ignored
    with loss_in_chunks(model, rows):
        loss = model(tokens, targets.view(2, 12))
    assert_close(loss, expected)
    assert_close(gradients(loss, model), gradients(expected, model))


def test_training_never_holds_all_logits_and_validation_makes_no_gradient():
    model = toy_model(vocab_size=1_000)
    tokens = some_tokens(2, 50)
    with TensorsMade() as made, loss_in_chunks(model, rows=20):
        loss = model(tokens, tokens)
        kept = loss.grad_fn.next_functions[0][0].saved_tensors  # for the backward pass
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):  # and no second gradient that is wrong
        loss.backward()
    logits = [shape.numel() for shape in made.shapes if shape[-1:] == (1_000,)]
    assert max(logits) == 20 * 1_000  # of 100 * 1,000
    assert [tensor.shape for tensor in kept] == [(100, 16), (1_000, 16)]
    with torch.no_grad(), FlopCounterMode(display=False) as for_logits:
        model(tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as for_loss:
        model(tokens, tokens)
    assert for_loss.get_total_flops() == for_logits.get_total_flops() > 0


@given(lead=st.floats(0, 9), seed=seeds)
def test_the_gradient_of_a_confident_bfloat16_row_is_rounded_once(lead, seed):
    torch.manual_seed(seed)
    targets = torch.randint(9, (30,))
    wanted = F.one_hot(targets, 11)
    logits = (torch.randn(30, 11) + lead * wanted).bfloat16()  # two of the columns are padding
    gradient, loss = torch.func.grad_and_value(gemma270m.summed_cross_entropy)(logits, targets, 9)
    p = F.pad(logits[:, :9].double().softmax(1), (0, 2))
    assert_close(loss.double(), -(p * wanted).sum(1).log().sum(), rtol=1e-5, atol=1e-5)
    assert_close(gradient.double(), p - wanted, rtol=0.005, atol=1e-6)


# ---- Generation and its cache --------------------------------------------------------------------
@given(temperature=st.floats(0.1, 4), seed=seeds)
def test_generate_draws_from_the_softmax_at_the_temperature(temperature, seed):
    model = toy_model()
    tokens = some_tokens(2, 9, seed)
    torch.manual_seed(seed)
    got = model.generate(tokens, 1, temperature)
    torch.manual_seed(seed)
    p = (model(tokens)[:, -1] / temperature).softmax(-1)
    expected = torch.multinomial(p, 1)
    assert torch.equal(got, torch.cat((tokens, expected), dim=1))


def with_the_cache(model, tokens, n):
    """The greedy text that Gemma.generate makes without one."""
    new = list(sample.stream(model, tokens, n, temperature=0))
    return torch.cat((tokens, torch.stack(new, dim=1)), dim=1)


@given(model=models, T=sizes)
def test_greedy_text_with_the_cache_is_that_without(model, T):
    tokens = some_tokens(2, T)
    text = model.generate(tokens, 16, temperature=0)
    assert torch.equal(with_the_cache(model, tokens, 16), text)


@given(model=models, prompt=sizes, new=sizes)
def test_the_cache_is_exact_and_none_of_its_rings_exceeds_the_window(model, prompt, new):
    tokens = some_tokens(2, prompt + new)
    parts = tokens.split([prompt, *[1] * new], dim=1)
    cache = sample.KVCache(model, 2, prompt + new)
    with torch.no_grad():
        logits = [sample.predict(model, cache, part) for part in parts]
        expected = model(tokens)[:, prompt - 1 :]
    assert_close(torch.stack(logits, dim=1), expected, atol=1e-4, rtol=0)
    for layer, ring in zip(model.layers, cache.layers):
        size = min(layer.self_attn.window, prompt + new)
        assert ring.keys.size(2) == ring.values.size(2) == size


# ---- Data, learning rate, validation -------------------------------------------------------------
@given(n_blocks=sizes, batch_size=sizes, seed=seeds)
def test_every_block_comes_once_an_epoch_in_another_order(n_blocks, batch_size, seed):
    order = []
    for i in range(3 * n_blocks):
        order += gemma270m.training_blocks(i, batch_size, n_blocks, seed)
    epochs = np.reshape(order[: 3 * n_blocks], (3, n_blocks))
    assert np.array_equal(np.sort(epochs), [range(n_blocks)] * 3)
    assert n_blocks < 12 or len(np.unique(epochs, axis=0)) == 3


@given(
    length=st.integers(2, 60),
    block_size=sizes,
    document=st.integers(2, 30),
    bos=st.none() | st.just(7),
)
def test_every_token_is_a_target_once_an_epoch(length, block_size, document, bos):
    tokens = np.arange(100, 100 + length)
    expected = tokens[1:].tolist()
    if bos is not None:
        tokens[::document] = bos
        # A start token that begins a block is only seen.
        expected = [token for i, token in enumerate(tokens) if token != bos or i % block_size > 0]
    blocks = range(gemma270m.count_blocks(length, block_size, bos))
    x, y = gemma270m.get_batch(tokens, blocks, block_size, bos, CPU)
    assert y[y >= 0].tolist() == expected
    assert torch.equal(x[:, 1:], y[:, :-1].clamp(min=0))
    if bos is not None:  # then each row begins with one start token
        assert (x[:, 0] == bos).all() and (y[:, 0] != bos).all()


@given(accum=st.integers(1, 8), max_iters=st.integers(8, 480), warmup=st.integers(0, 300))
def test_learning_rate_rises_to_its_peak_and_falls_to_min_lr(accum, max_iters, warmup):
    lengths = dict(grad_accum=accum, max_iters=max_iters, warmup_iters=warmup)
    config = TrainConfig(**lengths, lr=0.5, min_lr=0.1)
    rates = [gemma270m.learning_rate(config, step) for step in range(config.steps)]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if accum < warmup:
        assert rates[0] == pytest.approx(0.5 * accum / warmup)
    if warmup < config.steps * accum:  # something is left for the cosine
        assert rates[peak] <= 0.5
        assert rates[-1] == pytest.approx(0.1)
        assert abs((peak + 1) * accum - warmup) <= accum


@given(
    tokens=st.lists(st.integers(1, 39), min_size=2, max_size=60).map(np.array),
    block_size=sizes,
    eval_tokens=st.integers(1, 130),
    bos=st.none() | st.just(0),
)
def test_validation_is_the_same_for_any_batch_size(tokens, block_size, eval_tokens, bos):
    model = toy_model()
    config = TrainConfig(block_size=block_size, eval_tokens=eval_tokens, batch_size=3)
    how = (bos, CPU, contextlib.nullcontext())
    loss = gemma270m.evaluate(model, tokens, config, *how)
    one_by_one = gemma270m.evaluate(model, tokens, replace(config, batch_size=1), *how)
    assert one_by_one == pytest.approx(loss, rel=1e-5)
    if eval_tokens >= len(tokens):  # then all of them count
        blocks = range(gemma270m.count_blocks(len(tokens), block_size, bos))
        x, y = gemma270m.get_batch(tokens, blocks, block_size, bos, CPU)
        assert loss == pytest.approx(model(x, y).item(), rel=1e-5)


# ---- Checkpoints ---------------------------------------------------------------------------------
def column(state, name):
    return [row[name] for row in state["rows"] if name in row]


def assert_same_run(got, expected):
    for part in ("step", "skipped", "model", "optimizer", "scaler"):
        assert_equal(got[part], expected[part])
    for name in ("iteration", "step", "train_loss", "val_loss", "lr", "grad_norm", "skipped"):
        assert column(got, name) == column(expected, name)


def test_a_checkpoint_reaches_the_disk_before_its_name_and_then_the_folder_does(tmp_path):
    out = tmp_path / "o.pt"
    seen = []

    def fsync(number):
        synced = Path(f"/proc/self/fd/{number}").resolve()
        seen.append((synced.name, out.exists()))

    with mock.patch.object(os, "fsync", fsync):
        gemma270m.save_checkpoint(out, {"step": 1})
    assert seen == [("o.pt.tmp", False), (tmp_path.name, True)]


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Malice(), "out.pt")
    with pytest.raises(UserError, match="out.pt cannot be loaded"):
        gemma270m.load_checkpoint("out.pt")
    assert os.listdir() == ["out.pt"]


@pytest.mark.parametrize("name", ("meta.json", "train.bin", "val.bin", "tokenizer.json", "out.pt"))
@given(damage=damages())
def test_a_damaged_file_is_usable_or_refused(data, whole, tmp_path_factory, name, damage):
    folder = shutil.copytree(data, tmp_path_factory.mktemp("damaged"), dirs_exist_ok=True)
    out = folder / "out.pt"
    torch.save(whole, out)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    try:
        train, val, meta = gemma270m.load_data(folder)
        _, state = gemma270m.load_checkpoint(out)
    except UserError as error:
        reason = rf"{out} cannot be loaded as a checkpoint: .+"
        if name != "out.pt":
            reason = rf"no usable data in {folder} \(.+\): run python prepare.py"
        assert re.fullmatch(reason, str(error))
    else:
        assert [len(train), len(val)] == [meta["train_tokens"], meta["val_tokens"]]
        assert max(train.max(), val.max()) < meta["vocab_size"]
        assert_same_run(state, whole)


RUN_PARTS = "model model_config train_config data optimizer scaler step rows skipped".split()
WRONG_PARTS = (
    ("model", "norm.weight", torch.zeros(32)),
    ("model", "more.weight", torch.zeros(1)),
    ("model_config", "emb_dims", 16),
)


@pytest.mark.parametrize("change", (*RUN_PARTS, *WRONG_PARTS), ids=str)
def test_a_checkpoint_with_a_part_that_does_not_fit_is_refused(whole, data, tmp_path, change):
    state = copy.deepcopy(whole)
    if change in RUN_PARTS:
        del state[change]
    else:
        part, name, value = change
        state[part][name] = value
    torch.save(state, tmp_path / "out.pt")
    refuses(gemma270m, flags(resume=True, out=tmp_path / "out.pt", data_dir=data, max_iters=16))


# ---- Runs ----------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def start(data):
    """A function that starts a process, which executes some code and then a toy run."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once
    context.set_forkserver_preload(["gemma270m", "torch._dynamo"])

    def start(code="", **given):
        names = {"argv": flags(**{**TOY, "data_dir": data, **given}), "out": str(given["out"])}
        code = f"import gemma270m, os, time\n{code}\ngemma270m.main(argv)"
        process = context.Process(target=exec, args=(code, names), daemon=True)
        process.start()
        return process

    return start


def before_each(name, happen):
    """Calls happen(n, *args) before the n-th call of that function of gemma270m.py."""
    plain = getattr(gemma270m, name)
    numbers = itertools.count()

    def call(*args):
        happen(next(numbers), *args)
        return plain(*args)

    return mock.patch.object(gemma270m, name, call)


def signalled(number, place):
    """The signal comes before that batch, and at once again, as torchrun's echo of a Ctrl-C."""

    def happen(n, *args):
        if n == place:
            signal.raise_signal(number)
            signal.raise_signal(number)

    return before_each("get_batch", happen)


stop_signals = st.sampled_from((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


@few
@given(stops=st.lists(st.tuples(stop_signals, st.integers(1, 30)), min_size=1, max_size=3))
@example(stops=[(signal.SIGINT, 9), (signal.SIGTERM, 6), (signal.SIGHUP, 3)])
def test_a_stopped_run_resumes_bit_for_bit(run, whole, tmp_path_factory, stops):
    out = tmp_path_factory.mktemp("stopped") / "out.pt"
    for number, place in stops:
        with signalled(number, place):
            run(out=out, resume=True)
        assert signal.getsignal(number) != gemma270m.request_stop
    assert_same_run(run(out=out, resume=True), whole)


def test_a_signal_stops_a_run_in_the_middle_of_a_step(run):
    with signalled(signal.SIGTERM, 8):
        assert run(grad_accum=1_000, max_iters=1_000)["step"] == 0


def wait_for_new(path, process):
    """Until the file is written anew or the process has ended."""
    before = path.exists() and path.stat().st_mtime_ns
    while process.is_alive() and before == (path.exists() and path.stat().st_mtime_ns):
        time.sleep(0.0005)


def test_kill_9_at_any_moment_loses_nothing_and_sighup_saves(run, start, tmp_path):
    kills = settings().max_examples // 4
    out = tmp_path / "out.pt"
    given = dict(max_iters=400 + 20 * kills, eval_interval=2, log_interval=2)
    chance = random.Random(0)
    for kill in range(kills):
        number = signal.SIGHUP if kill % 5 == 1 else signal.SIGKILL
        process = start(out=out, resume=True, **given)
        wait_for_new(out, process)
        process.join(chance.uniform(0, 0.02))
        os.kill(process.pid, number)
        process.join()
        gemma270m.load_checkpoint(out)
        assert process.exitcode == (0 if number == signal.SIGHUP else -number)
    assert_same_run(run(out=out, resume=True, **given), run(**given))


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_second_signal_ends_a_run_at_once(start, tmp_path, number):
    hang = "gemma270m.learning_rate = lambda *_: open(out + '.hangs', 'w') and time.sleep(3600)"
    process = start(hang, out=tmp_path / "out.pt")
    wait_for_new(tmp_path / "out.pt.hangs", process)
    signals = 0
    while process.is_alive() and signals < 30:
        os.kill(process.pid, number)
        process.join(1.1)  # one within a second may be torchrun's echo
        signals += 1
    assert signals > 1 and process.exitcode == -number


def test_nohup_keeps_sighup_ignored(run, whole):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signalled(signal.SIGHUP, 10):
        state = run()
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert_same_run(state, whole)


def dead_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stop", (None, 10))  # in the second validation
@pytest.mark.parametrize("output", (dead_pipe, functools.partial(open, "/dev/full", "w")))
def test_an_output_that_cannot_be_written_ends_no_run(run, whole, tmp_path, output, stop):
    out = tmp_path / "out.pt"
    with output() as nowhere, contextlib.redirect_stdout(nowhere), signalled(signal.SIGINT, stop):
        state = run(out=out)
    assert state["step"] == (6 if stop is None else 2)
    assert_same_run(run(out=out, resume=True), whole)


def test_a_mistake_in_the_code_is_raised_and_handlers_and_process_group_put_back(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", mock.Mock())
    monkeypatch.setattr(dist, "destroy_process_group", mock.Mock())
    mistake = ValueError("shapes differ")
    happen = mock.Mock(side_effect=mistake)
    with before_each("get_batch", happen), pytest.raises(ValueError) as raised:
        run()
    assert raised.value is mistake  # and no UserError, which loses its traceback
    assert signal.getsignal(signal.SIGINT) != gemma270m.request_stop
    dist.init_process_group.assert_called_once_with("gloo")
    dist.destroy_process_group.assert_called_once()


@pytest.mark.parametrize("room", (0.5, 0.01))  # torch.save raises OSError, or RuntimeError
def test_a_disk_that_fills_up_ends_no_run_before_its_end(run, whole, tmp_path, capsys, room):
    out = tmp_path / "out.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*args):
        if out.exists():
            room_left = int(room * out.stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (room_left, limits[1]))

    refused = pytest.raises(UserError, match="out.pt .*cannot be written: .+")
    try:
        with before_each("get_batch", fill), refused:
            run(out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("warning: ") == 2  # at iterations 4 and 8
    assert set(os.listdir(tmp_path)) == {"out.pt", "out.csv"}
    assert_same_run(run(out=out, resume=True), whole)


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@few
@given(bad=st.sets(st.integers(0, 11), max_size=5), factor=st.sampled_from((math.inf, math.nan)))
@example(bad={2, 5, 6}, factor=math.nan)
def test_steps_without_a_finite_gradient_are_skipped_and_counted(run, dtype, bad, factor):
    def spoil(n, model, *args):
        if n in bad:
            model.norm.weight.grad[0] = factor

    with before_each("forward_backward", spoil):
        state = run(dtype=dtype)
    updates = state["optimizer"]["state"][0]["step"]
    steps = {iteration // 2 for iteration in bad}
    assert column(state, "skipped")[-1] == len(steps) == 6 - updates


def test_a_run_without_finite_gradients_ends(run):
    def spoil(n, model, *args):
        if n < 10 or n >= 20:
            model.norm.weight.grad[0] = math.inf

    with before_each("forward_backward", spoil), pytest.raises(UserError, match="up to 35, lr"):
        run(max_iters=100)


def test_weights_that_are_not_finite_are_not_saved(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gemma270m, "learning_rate", lambda config, step: 1e300)
    with pytest.raises(UserError, match="out.pt stays as it is"):
        run(out=tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt")["step"] == 0


def test_memory_and_open_files_stay_the_same_over_a_thousand_iterations(run):
    pages = []
    files = []

    def measure(n, *args):
        if n % 250 == 0:
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
            files.append(len(os.listdir("/proc/self/fd")))

    with before_each("get_batch", measure):
        run(max_iters=1_000, n_layers=1, batch_size=1, eval_interval=50, log_interval=50)
    assert len(files) > 4 and files[1] == files[-1]
    assert (pages[-1] - pages[1]) * resource.getpagesize() < 2**21


def test_log_lines_come_at_the_steps_after_each_multiple_and_make_a_table(run, tmp_path):
    sizes = dict(grad_accum=3, max_iters=20, eval_interval=7, log_interval=4)
    rows = run(**sizes, out=tmp_path / "o.csv")["rows"]
    assert [row["iteration"] for row in rows if "val_loss" in row] == [0, 9, 15, 18]
    assert [row["iteration"] for row in rows if "train_loss" in row] == [6, 9, 12, 18]
    assert all(row["iteration"] == 3 * row["step"] for row in rows)
    table = list(csv.DictReader((tmp_path / "o.csv.csv").open(newline="")))
    assert table == [{name: str(row.get(name, "")) for name in table[0]} for row in rows]


# ---- Several processes, dtype, device ------------------------------------------------------------
def assert_equal_to_rounding(got, expected):
    weights = nn.utils.parameters_to_vector(expected["model"].values())
    error = nn.utils.parameters_to_vector(got["model"].values()) - weights
    assert error.norm() < 2e-3 * weights.norm()
    for name in ("train_loss", "val_loss", "lr", "grad_norm"):
        assert column(got, name) == pytest.approx(column(expected, name), rel=1e-3)


def test_any_number_of_processes_makes_the_updates_of_one(run, start, tmp_path, monkeypatch):
    one_batch = dict(batch_size=8, grad_accum=1, max_iters=4, warmup_iters=1)
    one = run(**one_batch, lr=1e-3, eval_interval=1, log_interval=1)
    given = dict(batch_size=2, grad_accum=4, max_iters=16, lr=1e-3, checkpoint_activations=True)

    def together(world, out):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        names = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
        ranks = [f"os.environ.update({names}, RANK='{rank}')" for rank in range(world)]
        for process in [start(code, out=out, **given) for code in ranks]:
            process.join(100)
            assert process.exitcode == 0
        return torch.load(out)

    assert_equal_to_rounding(together(2, tmp_path / "2.pt"), one)
    assert_equal_to_rounding(together(4, tmp_path / "4.pt"), one)
    given |= dict(resume=True, max_iters=32)
    one = run(out=tmp_path / "4.pt", **given)
    assert_equal_to_rounding(together(4, tmp_path / "2.pt"), one)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes cannot share grad_accum 4"):
        run(**given)


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGHUP, signal.SIGKILL))
def test_a_signal_ends_torchrun_and_the_run_resumes(run, data, tmp_path, number):
    killed = number == signal.SIGKILL
    given = {**TOY, "out": tmp_path / "out.pt", "grad_accum": 4, "data_dir": data}
    endless = {**given, "max_iters": 10**6, "eval_interval": 4 if killed else 10**6}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, gemma270m.__file__, *flags(**endless)]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, **pipe) as process:
        next(line for line in process.stdout if "step 12 " in line)
        process.stdout.close()  # nobody reads it any more
        time.sleep(0.1)
        target = process.pid
        if killed:  # one worker, which cannot save; the checkpoint is that of a validation
            children = subprocess.check_output(["pgrep", "-P", f"{target}", "-f", "gemma270m"])
            target = int(children.split()[-1])
        os.kill(target, number)
        process.wait(60)
    assert process.returncode == 1  # torchrun fails at any signal
    step = torch.load(given["out"])["step"]
    assert step > 9
    given |= {"resume": True, "max_iters": 4 * step + 8}
    assert run(**given)["step"] == step + 2


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_an_update_is_clipped_and_has_its_rate_in_float32_whatever_the_dtype(run, whole, dtype):
    state = run(dtype=dtype, grad_clip=0.01, max_iters=2)
    means = [moment["exp_avg"] for moment in state["optimizer"]["state"].values()]
    weights = list(state["model"].values())
    assert {tensor.dtype for tensor in (*means, *weights)} == {torch.float32}
    norm = nn.utils.parameters_to_vector(means).norm().item()
    assert norm == pytest.approx(0.1 * 0.01, rel=1e-3)  # (1 - beta1) * grad_clip
    losses = column(run(dtype=dtype), "val_loss")
    assert losses == pytest.approx(column(whole, "val_loss"), rel=0.03)

    matrices, norms = state["optimizer"]["param_groups"]
    assert matrices["lr"] == norms["lr"] == column(state, "lr")[-1]
    assert matrices["weight_decay"] == 0.1 and norms["weight_decay"] == 0
    assert len(norms["params"]) == sum(weight.ndim == 1 for weight in weights)


def test_a_run_keeps_the_dtype_that_the_hardware_chose_unless_told(run, tmp_path, monkeypatch):
    given = dict(out=tmp_path / "out.pt", resume=True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    run(**given, dtype="auto", max_iters=4)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    gemma270m.main(flags(**given, max_iters=8))
    assert torch.load(tmp_path / "out.pt")["train_config"]["dtype"] == "bfloat16"
    for max_iters, dtype in ((12, "float32"), (16, "float16"), (20, "bfloat16")):
        state = run(**given, dtype=dtype, max_iters=max_iters)
        assert state["step"] == max_iters / 2
        assert bool(state["scaler"]) == (dtype == "float16")


def test_dtype_follows_the_compute_capability(monkeypatch):
    gpu = torch.device("cuda")
    capability = mock.Mock()
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    for major, dtype in ((6, torch.float32), (7, torch.float16), (8, torch.bfloat16)):
        capability.return_value = (major, 5)
        assert gemma270m.pick_dtype("auto", gpu) == dtype
        assert gemma270m.pick_dtype("float16", gpu) == torch.float16


def test_a_gpu_that_torch_cannot_use_is_refused_or_said_aloud(run, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(device="auto")
    assert "torch cannot use a GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    no_kernel = RuntimeError("no kernel image is available\nfor execution")
    monkeypatch.setattr(torch, "ones", mock.Mock(side_effect=no_kernel))
    with pytest.raises(UserError, match="no kernel image is available; try --device cpu"):
        gemma270m.pick_device()


# ---- Command line --------------------------------------------------------------------------------
def test_resume_starts_goes_on_with_its_settings_and_ends(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(out="out.pt", max_iters=4, preset="auto", resume=True)
    assert capsys.readouterr().out.startswith("start   from scratch, preset tiny")
    os.renames("out.pt", "moved/out.pt")
    gemma270m.main(flags(resume=True, max_iters=8, lr=0.5, beta1=0.5, out="moved/out.pt"))
    assert capsys.readouterr().out.startswith("resume  moved/out.pt after 2 steps")
    state = torch.load("moved/out.pt")
    assert state["optimizer"]["param_groups"][0]["betas"] == (0.5, 0.99)
    config = state["train_config"]
    expected = {**gemma270m.PRESETS["tiny"], **TOY}
    expected |= {"max_iters": 8, "lr": 0.5, "beta1": 0.5, "out": "moved/out.pt"}
    assert config == {name: expected.get(name, value) for name, value in config.items()}
    before = Path("moved/out.pt").read_bytes()
    gemma270m.main(flags(resume=True, out="moved/out.pt"))
    assert capsys.readouterr().out.endswith("nothing is left to do: max_iters is 8\n")
    assert Path("moved/out.pt").read_bytes() == before


def test_weights_beside_the_data_are_fine_tuned(run, data, whole, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    weights = {name: weight.bfloat16() for name, weight in whole["model"].items()}
    torch.save({**whole, "model": weights}, folder / "init.pt")
    state = run(preset="auto", data_dir=folder)
    assert state["train_config"]["preset"] == "finetune"
    assert column(state, "val_loss")[0] == pytest.approx(column(whole, "val_loss")[-1], rel=0.01)
    assert {weight.dtype for weight in state["model"].values()} == {torch.float32}


def test_a_run_goes_on_with_other_data_only_if_they_are_named(run, tmp_path):
    out = tmp_path / "out.pt"
    mine = write_data(tmp_path / "data", range(40), range(40), source="mine")
    run(data_dir=mine, out=out)
    write_data(mine, range(30), range(40), source="others")
    given = dict(resume=True, max_iters=16, out=out)
    refuses(gemma270m, flags(**given), "data", "--data_dir")
    state = run(**given, data_dir=mine)
    assert state["step"] == 8 and state["data"]["source"] == "others"
    (mine / "tokenizer.json").write_text("{}")
    refuses(gemma270m, flags(**given, data_dir=mine), "vocabulary")


def test_help_shows_every_field_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        gemma270m.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    source = Path(gemma270m.__file__).read_text()
    for field in (*fields(TrainConfig), *fields(GemmaConfig)):
        (comment,) = re.findall(rf"^    {field.name}: .*  # (.+)$", source, re.MULTILINE)
        assert f"--{field.name}" in text
        assert "".join(f"{comment} (default: {field.default})".split()) in text


def test_a_mistake_and_ctrl_c_end_the_program_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the project's folder may hold an out.pt
    monkeypatch.setattr(sys, "argv", ["gemma270m.py", "--data_dir=nowhere"])
    with pytest.raises(SystemExit, match=r"^gemma270m\.py: error: no usable data in nowhere .*$"):
        runpy.run_path(gemma270m.__file__, run_name="__main__")
    monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="^130$"):
        runpy.run_path(gemma270m.__file__, run_name="__main__")


END = prepare.END_OF_TEXT

# Text that UTF-8 can hold, rich in what splits words and documents.
common_characters = st.sampled_from(" \n\t\r'<|endoftext|>ab1é中😀\x1c\xa0")
any_text = st.text(st.characters(exclude_categories=["Cs"]) | common_characters)


# ---- prepare.py ----------------------------------------------------------------------------------
def prepared(folder, *inputs, **given):
    """The documents in folder/data that prepare.py makes of the inputs, with bytes as words."""
    given = {"tokenizer": 257, "out_dir": folder / "data", **given}
    argv = ["--input", *map(str, inputs)] if inputs else []
    assert prepare.main([*argv, *flags(**given)]) == 0
    return documents_in(folder)


def documents_in(folder):
    """The documents that the tokens in folder/data stand for, those for validation last."""
    train, val, meta = gemma270m.load_data(folder / "data")
    tokens = np.concatenate([train, val])
    ends = np.flatnonzero(tokens == meta["end_tokens"][0]) + 1
    assert len(ends) == meta["train_documents"] + meta["val_documents"]
    tokenizer = prepare.Tokenizer(meta["tokenizer_files"])
    *texts, rest = [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends)]
    assert rest == "", "the last document has no end"
    return texts


def write_documents(path, documents):
    """Writes documents in the format that the name of `path` says -> path"""
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": documents})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
        return path
    text = END.join(documents)
    if ".json" in path.name:
        text = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in documents)
    compress = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(text.encode()))
    return path


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(prepare, "has_gpu", lambda: False)


def contents(folder):
    """{name: bytes} of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_gpt2_gives_the_ids_of_tiktoken():
    try:
        gpt2 = prepare.load_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))
    reference = tiktoken.get_encoding("gpt2")
    assigned = (range(0xD800), range(0xE000, 0x33500), range(0xE0000, 0xE0200))
    codes = itertools.chain(*assigned, range(0x33500, 0x110000, 997))
    while some := list(map(chr, itertools.islice(codes, 1000))):
        for text in ("".join(some), "".join(f"a{c} {c}1  {c}\n\n" for c in some)):
            assert gpt2.encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.xz", "a.jsonl", "a.json.gz", "a.parquet"])
@given(st.lists(any_text, max_size=5), st.integers(3, 30))
@example(["\ufeffone\r\ntwo\r\n", "three\rfour", " \n"], 3)
def test_documents_come_out_as_they_went_in(tmp_path, monkeypatch, name, texts, chunk):
    def clean(text):
        return text.removeprefix("\ufeff").replace("\r\n", "\n")

    monkeypatch.setattr(prepare, "CHUNK", chunk)
    pattern = prepare.PIECES.pattern.replace("4096", "20")
    monkeypatch.setattr(prepare, "PIECES", re.compile(pattern, re.DOTALL))
    path = write_documents(tmp_path / name, [*texts, "the end"])
    documents = clean(END.join(texts)).split(END) if ".txt" in name else map(clean, texts)
    # Twenty blanks are a piece here, and a first piece that is blank is left out.
    kept = [re.sub(r"^(\s{20})+(?=\s*\S)", "", text) for text in documents if text.strip()]
    assert prepared(tmp_path, path) == [*kept, "the end"]


@pytest.mark.parametrize("length", [9, 9_999])
def test_each_document_has_one_start_token(tmp_path, gemma_folder, length):
    text = ("the hen, " * length)[:length]
    path = write_documents(tmp_path / "a.txt", [text, " \n", text, text])
    prepared(tmp_path, path, tokenizer=gemma_folder, limit=2, val_input=path)
    train, val, meta = gemma270m.load_data(tmp_path / "data")
    words = prepare.load_tokenizer(str(gemma_folder))
    assert (meta["bos_token"], meta["end_tokens"]) == (2, [1, 6])
    assert train.tolist() == val.tolist() == [2, *words.encode(text), 1] * 2


@given(st.integers(1, 450), st.integers(1, 500))
def test_the_last_hundredth_is_held_out(tmp_path, count, limit):
    texts = [f"story {i}" for i in range(count)]
    path = write_documents(tmp_path / "a.txt", texts)
    assert prepared(tmp_path, path, limit=limit) == texts[:limit]
    train, val, _ = gemma270m.load_data(tmp_path / "data")
    assert len(val) == (len(train) + len(val)) // 100 + 2


def test_globs_and_several_files(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_documents(tmp_path / "deep" / "er" / "b.jsonl.xz", ["b"])
    write_documents(tmp_path / "c[1].txt", ["c"])
    inputs = (tmp_path / "deep" / "**" / "*.xz", tmp_path / "c[1].txt")
    assert prepared(tmp_path, *inputs, val_input=tmp_path / "c*.txt") == ["b", "c", "c"]


BAD_ROWS = ['{"text": null}', '{"text": 5}', '{"text": "half \\ud800"}', '{"text": "cut', "[{"]


@given(st.lists(st.sampled_from([*BAD_ROWS, "", '{"text": "good"}']), min_size=1, max_size=8))
def test_rows_without_text(tmp_path, capsys, rows):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    bad = [i for i, row in enumerate(rows, 1) if row in BAD_ROWS]
    if bad:
        argv = ["--input", path, "--tokenizer=257", "--out_dir", tmp_path / "none"]
        refuses(prepare, argv, path, f"row {bad[0]}:", "--skip_bad")
    good = rows.count('{"text": "good"}')
    assume(good)
    assert prepared(tmp_path, path, skip_bad=True) == ["good"] * good
    assert (f"without text, skipped: {len(bad)}" in capsys.readouterr().out) == bool(bad)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.jsonl", "a.parquet"])
@given(change=damages())
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name, change):
    path = write_documents(tmp_path / name, [f"{'A mouse went out. ' * 9}{i}" for i in range(9)])
    prepared(tmp_path, path)
    before = contents(tmp_path / "data")
    path.write_bytes(change(path.read_bytes()))
    argv = ["--input", path, "--tokenizer=257", "--out_dir", tmp_path / "data"]
    if prepare.main(list(map(str, argv))):
        refuses(prepare, argv, name if path.stat().st_size else "")
        assert contents(tmp_path / "data") == before


def test_a_mistake_in_the_code_of_prepare_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "write_tokens", lambda *_: np.stack([np.zeros(3), np.zeros(4)]))
    with pytest.raises(ValueError, match="same shape"):
        prepared(tmp_path, write_documents(tmp_path / "a.txt", ["a story"]))
    assert not (tmp_path / "data").exists()


def test_new_data_replace_all_of_the_old(tmp_path):
    for folder in (tmp_path / "data", tmp_path / "data" / ".new"):  # of a killed process
        folder.mkdir()
        (folder / "init.pt").write_text("stale weights")
    prepared(tmp_path, write_documents(tmp_path / "a.txt", ["a story"]))
    names = {"train.bin", "val.bin", "meta.json", "generation_config.json"}
    assert set(os.listdir(tmp_path / "data")) == names | {"tokenizer.json", TOKENIZER}


def test_gpt2_out_of_reach_names_the_cures(tmp_path, monkeypatch):
    refuse = mock.Mock(side_effect=ConnectionError("no way there"))
    monkeypatch.setattr("tiktoken.load.read_file_cached", refuse)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    argv = ["--input", write_documents(tmp_path / "a.txt", ["a story"]), "--tokenizer", "gpt2"]
    name = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # SHA-1 of vocab.bpe's address
    refuses(prepare, argv, "TIKTOKEN_CACHE_DIR", name, "--tokenizer 8192")


def test_built_in_stories():
    stories = list(filter(None, itertools.islice(prepare.make_stories(), 4_000)))
    assert stories[:50] == list(filter(None, itertools.islice(prepare.make_stories(0), 100)))
    assert len(set(stories)) > 0.99 * len(stories)
    for story in stories:
        assert re.fullmatch(r"[A-Za-z0-9 ,.!?'\"\n-]+", story)
        assert not re.search(r"  |^\s|\s$", story) and " \n" not in story
        assert 50 < len(story.split()) < 260 and story[-1] in '.!?"'
        assert len(set(re.findall(r"named (\w+)", story))) == 1


def start_prepare(folder, *argv, before="", **environment):
    """prepare.py, or its main after some code, in a process that writes to folder/data -> Popen"""
    code = f"import os, sys, prepare; {before}; status = prepare.main(sys.argv[1:])"
    code += "; sys.stdout.flush(); os._exit(status)"
    program = ["-c", code] if before else [prepare.__file__]
    program += ["--tokenizer", "300", "--out_dir", folder / "data"]
    command = [sys.executable, *program, *map(str, argv)]
    cleared = {name: os.environ[name] for name in os.environ if not name.startswith("HF_")}
    paths = {"PYTHONPATH": str(prepare.HERE), "HF_HOME": str(folder / "hf")}
    environment = {**cleared, **paths, **environment}
    return subprocess.Popen(command, env=environment, text=True, **PIPES)


def finish_prepare(process):
    """-> exit status, standard output, standard error"""
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def test_one_long_document_needs_little_memory(tmp_path):
    lines = (f"A mouse met {n} cats in the old garden.{' ' * (n % 99)}\n" for n in range(100_000))
    (tmp_path / "a.txt").write_text("".join(lines))
    tell = "os._exit = lambda status: print(open('/proc/self/status').read(), flush=True)"
    argv = ["--input", tmp_path / "a.txt", "--limit", 1]
    status, out, _ = finish_prepare(start_prepare(tmp_path, *argv, before=tell))
    assert status == 0
    assert int(re.search(r"VmHWM:\s*(\d+)", out)[1]) < 200_000  # kB


# ---- the hub -------------------------------------------------------------------------------------
STORIES = [f"Story {i} of a mouse that met {i} cats." for i in range(1_000)]
SHARDS = {  # of the stand-in's TinyStories: stories
    "data/train-00000-of-00002-a1.parquet": STORIES[:400],
    "data/train-00001-of-00002-b2.parquet": STORIES[400:800],
    "data/validation-00000-of-00001-c3.parquet": STORIES[800:],
}
NOWHERE = "http://127.0.0.1:1"  # nothing listens there


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks for, with one `fault` at a time."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, body, **headers):
        self.send_response(status)
        headers |= {"X-Repo-Commit": "0" * 40, "Content-Length": len(body)}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append(path)
        fault = self.server.fault
        name = path.partition("/resolve/main/")[2]
        if fault.get("times", 0) > 0 and fault["on"] in path:
            fault["times"] -= 1
            time.sleep(fault.get("delay", 0))
            if fault.get("status"):
                body = PAGE if fault["status"] == 200 else b'{"error": "so says the hub"}'
                return self.answer(fault["status"], body)
        if "expired" in self.headers.get("Authorization", ""):
            return self.answer(401, b'{"error": "User Access Token is expired"}')
        if path.startswith("/api/datasets/roneneldan/TinyStories"):
            siblings = [{"rfilename": name} for name in self.server.files]
            info = {"id": "roneneldan/TinyStories", "sha": "0" * 40, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode())
        if name not in self.server.files:
            return self.answer(404, b'{"error": "nothing here"}', X_Error_Code="RepoNotFound")
        return self.answer(200, self.server.files[name], ETag=f'"{hash(name)}"')

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """A stand-in of the hub; hub.fault = {"on": part of a path, "times": n, "status": 503}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.files = {}
    server.asked = []
    server.fault = {}
    for name, stories in SHARDS.items():
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": stories}), sink, row_group_size=100)
        server.files[name] = sink.getvalue()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def ask(folder, url, *argv, **environment):
    """prepare.py against a hub, with short waits and shards -> exit status, output, errors"""
    short = "prepare.WAITS = (0.1, 0); prepare.FIRST_STORIES = 400"
    process = start_prepare(folder, *argv, before=short, HF_ENDPOINT=url, **environment)
    return finish_prepare(process)


def test_tinystories_online_and_then_from_the_cache(tmp_path, hub):
    # An expired token is left out.
    status, out, _ = ask(tmp_path, hub.url, "--limit", 500, HF_TOKEN="hf_expired")
    assert status == 0
    _, _, meta = gemma270m.load_data(tmp_path / "data")
    assert documents_in(tmp_path) == STORIES[:500] + STORIES[800:]
    assert meta["vocab_size"] == 300 and meta["source"] == prepare.TINYSTORIES
    assert f"python gemma270m.py --data_dir {tmp_path / 'data'}" in out
    before = contents(tmp_path / "data")
    # Without the hub, and by the user's will; an older snapshot does not matter.
    (snapshot,) = (tmp_path / "hf").rglob("snapshots/*")
    shutil.copytree(snapshot, snapshot.with_name("older"))
    for url, environment in ((NOWHERE, {}), (hub.url, {"HF_HUB_OFFLINE": "1"})):
        status, out, _ = ask(tmp_path, url, "--limit", 500, **environment)
        assert status == 0 and "in the cache" in out
        assert contents(tmp_path / "data") == before
    # A cache that holds some of the shards is enough for some of the stories.
    for shard in (tmp_path / "hf").rglob("train-00001*"):
        shard.unlink()
    assert ask(tmp_path, NOWHERE, "--limit", 400)[0] == 0
    status, _, err = ask(tmp_path, NOWHERE, "--limit", 401)
    assert status == 1 and "only 1 shards" in err


def test_made_up_stories_without_a_network(tmp_path, hub):
    status, out, _ = ask(tmp_path, NOWHERE, "--limit", 120)
    assert status == 0 and out.startswith("No TinyStories but made-up stories")
    assert gemma270m.load_data(tmp_path / "data")[2]["source"] == prepare.BUILT_IN
    assert len(documents_in(tmp_path)) == 240
    assert ask(tmp_path, NOWHERE, "--limit", 110)[0] == 0, "made-up ones may be made anew"
    assert ask(tmp_path, hub.url, "--limit", 100)[0] == 0
    before = contents(tmp_path / "data")
    for path in (tmp_path / "hf").rglob("*.parquet"):
        path.unlink()
    status, _, err = ask(tmp_path, NOWHERE)
    assert status == 1 and "keeps the data" in err
    assert contents(tmp_path / "data") == before


PAGE = b"<html>Please log in to the network of this hotel</html>"
FAULTS = """ what, where, how often, the hub's status (0: none), that of prepare.py, what it says
503 once            /api/datasets   1       503     0       trying again
429 on a shard      train-00000     2       429     0       429
a slow answer       /api/datasets   1       0       0       Documents
503                 /api/datasets   99      503     1       503
429                 /api/datasets   99      429     1       so says the hub
404                 /api/datasets   99      404     1       check the name
403                 resolve         99      403     1       hf auth login
a login page        /               99      200     1       login page
a damaged shard     train-00000     99      200     1       roneneldan
"""


@pytest.mark.parametrize("fault", FAULTS.splitlines()[1:])
def test_faults_of_the_hub_are_retried_or_refused(tmp_path, hub, fault):
    _, place, *numbers, said = re.split(" {2,}", fault)
    times, answer, expected = map(int, numbers)
    hub.fault = {"on": place, "times": times, "status": answer, "delay": 2 * (answer == 0)}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.json").write_text('{"source": "mine"}')
    before = contents(tmp_path / "data")
    status, out, err = ask(tmp_path, hub.url, "--limit", 100)
    assert status == expected and said in out + err, (out, err)
    if status:
        assert err.splitlines()[-1].startswith("prepare.py: error: ") and "roneneldan" in err
        assert contents(tmp_path / "data") == before
    else:
        assert documents_in(tmp_path) == STORIES[:100] + STORIES[800:900]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["downloads", "learns", "writes"])
def test_a_signal_ends_it_at_once_and_keeps_what_was_there(tmp_path, hub, number, moment):
    texts = [" ".join(f"mouse{300 * i + j}" for j in range(300)) for i in range(2_000)]
    path = write_documents(tmp_path / "a.txt", texts)
    prepared(tmp_path, write_documents(tmp_path / "short.txt", texts[:9]))
    data = tmp_path / "data"
    before = contents(data)
    hub.fault = {"on": "train-00000", "delay": 30, "times": 1}
    long = ["--input", *[path] * 20]
    argv, reached = {
        "downloads": (["--limit", 100], lambda: "train-00000" in " ".join(hub.asked)),
        "learns": (long, lambda: process.stdout.readline().startswith("Documents: all")),
        "writes": ([*long, "--tokenizer", data], (data / ".new" / "train.bin").exists),
    }[moment]
    process = start_prepare(tmp_path, *argv, HF_ENDPOINT=hub.url)
    while not reached():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    process.wait(2)
    assert finish_prepare(process)[0] == 130
    assert contents(data) == before
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


# ---- sample.py -----------------------------------------------------------------------------------
@given(logits=st.lists(st.floats(-5, 5, width=16), min_size=2, max_size=9, unique=True),
       temperature=st.floats(0.2, 4), top_k=st.none() | st.integers(0, 10),
       top_p=st.none() | st.floats(0.01, 0.99))  # fmt: skip
def test_sampling_draws_from_the_smallest_nucleus_of_the_best_k(logits, temperature, top_k, top_p):
    p = np.exp(np.array(logits) / temperature)
    best = np.argsort(-p)[: top_k or None]
    order = best if top_k or top_p else np.arange(len(p))  # in which they are raced
    if top_p is not None:
        share = np.cumsum(p[best] / p[best].sum())
        assume(np.abs(share - top_p).min() > 1e-5)
        best = best[: np.searchsorted(share, top_p) + 1]
    # The draw is a race of exponential times divided by p. Here all of the nucleus arrive together,
    # and the others long before; whoever of the nucleus is a thousandth faster must win.
    times = np.full(len(p), 1e-9)
    times[best] = p[best] / p[best].sum()
    noise = torch.from_numpy(times[order])
    with mock.patch.object(torch.Tensor, "exponential_", lambda x, generator: x.copy_(noise)):
        for place in np.flatnonzero(np.isin(order, best)):
            noise[place] *= 0.999
            token = sample.sample_token(torch.tensor([logits]), temperature, top_k, top_p)
            noise[place] /= 0.999
            assert token == order[place]


@given(temperature=st.floats(0, 1e-3), top_k=st.integers(0, 9), top_p=st.none() | st.floats(0.1, 1))
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature, top_k, top_p):
    logits = torch.tensor([[-90.0, 80.0, 79.0], [500.0, -300.0, 0.0]])
    assert sample.sample_token(logits, temperature, top_k, top_p).tolist() == [1, 0]


@few
@given(temperature=st.floats(0.1, 3), stops=st.lists(st.integers(0, 9), unique=True), seed=seeds)
def test_a_stream_repeats_with_its_seed_and_ends_once_all_rows_have(temperature, stops, seed):
    def streamed(**more):
        generator = torch.Generator().manual_seed(seed)
        tokens = some_tokens(3, 2, seed)
        steps = sample.stream(model, tokens, 30, temperature, generator=generator, **more)
        return torch.stack(list(steps), dim=1)

    model = toy_model(seed)
    free = streamed()
    assert torch.equal(streamed(top_k=0), free)
    stop = torch.isin(free, torch.tensor(stops, dtype=torch.long)).long()
    after = stop.cumsum(1) > stop  # where the row has had one already
    length = int((~after).sum(1).max())
    expected = free.masked_fill(after, stops[0] if stops else -1)[:, :length]
    assert torch.equal(streamed(stop_tokens=stops), expected)


@pytest.fixture(scope="session")
def teller(tmp_path_factory):
    """The checkpoint of a model with random weights; its data folder is nowhere."""
    words = prepare.learn_tokenizer(["the cat sat on the mat. "] * 9, 300)
    model = toy_model(vocab_size=words.vocab_size, context_length=2_048)
    path = tmp_path_factory.mktemp("teller") / "out.pt"
    data = {"tokenizer_files": words.files}
    state = {"model_config": asdict(model.config), "model": model.state_dict(), "data": data}
    gemma270m.save_checkpoint(path, state)
    return path


def tell(capsys, ckpt, **given):
    """What sample.py prints with these flags, in this process: (out, err)."""
    capsys.readouterr()
    usual = {"device": "cpu", "dtype": "float32", "max_new_tokens": 20}
    sample.main(flags(ckpt=ckpt, **{**usual, **given}))
    return capsys.readouterr()


@given(text=any_text.map(lambda text: text.replace("\ufffd", "")))
@example("a<|endoftext|>b")
def test_a_character_appears_as_soon_as_its_last_byte_is_there(teller, text):
    _, words, end_tokens = sample.load(str(teller))
    shown = sample.Text(words)
    tokens = words.encode(text)
    for i, token in enumerate(tokens):
        before = shown.content
        assert before + shown.add(token) == shown.content
        assert shown.content == words.decode(tokens[: i + 1]).rstrip("\ufffd")
    assert shown.content == text and not shown.ended
    assert shown.add(end_tokens[0]) == shown.add(65) == "" and shown.ended


def test_greedy_text_is_that_of_generate_up_to_any_end_token(teller, tmp_path, capsys):
    (tmp_path / "start.txt").write_bytes(b"\xef\xbb\xbfthe cat\r\nsat")
    model, words, _ = sample.load(str(teller))
    start = [0, *words.encode("the cat\nsat")]
    tokens = model.generate(torch.tensor([start]), 20, temperature=0)[0].tolist()
    for prompt in ("the cat\nsat", f"FILE:{tmp_path}/start.txt"):
        out, err = tell(capsys, teller, prompt=prompt, temperature=0)
        assert out == words.decode(tokens) + "\n"
        assert re.fullmatch(r"20 tokens, .+ tokens/s, 0 of 1 ended by themselves\n", err)

    end = tokens[len(start) + 6]
    state = torch.load(teller)
    state["data"]["tokenizer_files"]["generation_config.json"] = f'{{"eos_token_id": [0, {end}]}}'
    gemma270m.save_checkpoint(tmp_path / "other.pt", state)
    out, err = tell(capsys, tmp_path / "other.pt", prompt="the cat\nsat", temperature=0)
    assert out == words.decode(tokens[: tokens.index(end, len(start))]) + "\n"
    assert "1 of 1 ended" in err


def test_samples_of_a_batch_differ_and_repeat_with_their_seed(teller, capsys):
    given = {"num_samples": 3, "top_k": 0, "prompt": "the"}
    told = tell(capsys, teller, seed=1, **given).out
    assert tell(capsys, teller, seed=1, **given).out == told
    assert tell(capsys, teller, seed=2, **given).out != told
    texts = told.removesuffix("\n").split("\n---------------\n")
    assert len(set(texts)) == 3
    assert all(text.startswith("the") for text in texts)


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system knows no SIGPIPE")
def test_as_a_process_it_needs_no_network_and_takes_what_output_there_is(teller, tmp_path):
    def start(prompt, n):
        given = {"ckpt": teller, "temperature": 0, "max_new_tokens": n}
        command = [sys.executable, sample.__file__, *flags(**given), "--prompt", prompt]
        environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": tmp_path, "TIKTOKEN_CACHE_DIR": tmp_path}
        environment = {**os.environ, **environment, "PYTHONIOENCODING": "cp1252"}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, **PIPES)

    closed = start("the cat", 2_000)
    assert closed.stdout.read(5) == b"the c"
    closed.stdout.close()
    assert closed.stderr.read() == b""
    assert closed.wait() == -signal.SIGPIPE
    out, err = start(b"caf\xe9 " + "日本: ".encode(), 9).communicate()  # one byte is broken
    assert out.startswith(b"caf? ??: ")
    assert re.fullmatch(rb"9 tokens, .+ tokens/s, .+\n", err)


# ---- Mistakes at the three command lines ---------------------------------------------------------
MISTAKES = """
gemma270m --data_dir=nowhere                    no usable data in nowhere
gemma270m --data_dir=short                      no usable data in short
gemma270m --data_dir=beyond                     no usable data in beyond
gemma270m --preset=finetune                     no data/init.pt
gemma270m --preset=1b                           preset
gemma270m --device=gpu                          device gpu
gemma270m --batch=2                             --batch
gemma270m --batch_size=2.5                      batch_size
gemma270m --beta2=1                             beta2
gemma270m --lr=nan                              lr cannot be nan
gemma270m --seed=-1                             seed cannot be -1
gemma270m --context_length=2147483648           context_length cannot be 2147483648
gemma270m --max_iters=1                         max_iters 1
gemma270m --min_lr=1                            min_lr 1.0 is above lr 0.01
gemma270m --n_kv_groups=3                       n_kv_groups 3
gemma270m --head_dim=7                          head_dim 7
gemma270m --vocab_size=39                       vocab_size 39
gemma270m --block_size=65                       65 tokens exceed the context of 64
gemma270m --out=no/folder/out.pt                no/folder
gemma270m --out=data                            data is a folder
gemma270m --out=long.pt                         long.csv exists
gemma270m --out=out.pt                          out.pt exists: --resume goes on with it, --overwrite
gemma270m --resume --out=out.pt --emb_dim=24    shape
gemma270m --resume --out=out.pt --preset=quick  preset tiny
gemma270m --resume --out=out.pt --grad_accum=0  grad_accum
prepare --input none.txt                        none.txt
prepare --input utf16.txt                       UTF-16
prepare --input empty.txt                       too little text
prepare --input other.parquet                   other.parquet
prepare --input a.txt --val_input empty.txt     too little text
prepare --input a.txt --tokenizer 257           too little text
prepare --input a.txt --tokenizer 256           257
prepare --input a.txt --tokenizer 2000000       1,048,576
prepare --input a.txt --tokenizer gpt5          no folder gpt5
prepare --input a.txt --tokenizer ./mine/gpt2   no folder ./mine/gpt2
prepare --input a.txt --tokenizer folder/typo   no folder folder/typo
prepare --input a.txt --model folder            tokenizer.json
prepare --input a.txt --out_dir a.txt           a.txt
prepare --val_input a.txt                       --input
prepare --model a --tokenizer b                 --tokenizer
prepare --limit 0                               --limit
prepare --lim 9                                 --lim
sample --num_samples=0                          num_samples
sample --max_new_tokens=-3                      max_new_tokens
sample --prompt=FILE:long.csv                    do not fit into the context
sample --top_k=-1                               top_k
sample --top_p=0                                top_p
sample --top_p=1.1                              top_p
sample --top_p=nan                              top_p
sample --temperature=-1                         temperature
sample --temperature=nan                        temperature
sample --temperature=inf                        temperature
sample --device=nowhere                         device
sample --chat=hello                             chat: this model has no chat template
sample --prompt=FILE:nowhere                    prompt
sample --prompt=the --chat=hello                --prompt
sample --prom=the                               prom
sample --ckpt=nowhere.pt                        nowhere.pt
sample --ckpt=no/where                          no/where
sample --ckpt=old.pt                            old.pt holds no tokenizer
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_a_mistake_gives_one_line(mistake, data, whole, teller, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "data")
    write_data(Path("short"), range(40), [1])
    write_data(Path("beyond"), range(40), range(41))
    gemma270m.save_checkpoint("out.pt", whole)
    gemma270m.save_checkpoint("old.pt", {**whole, "data": {"tokenizer": "gpt2"}})
    Path("folder").mkdir()
    write_documents(Path("a.txt"), ["a"])
    Path("utf16.txt").write_bytes("a story".encode("utf-16"))
    Path("empty.txt").write_bytes(b"\n \n")
    Path("long.csv").write_text("a" * 2_048)
    pyarrow.parquet.write_table(pyarrow.table({"story": ["a"]}), "other.parquet")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    usual = {
        "gemma270m": flags(**TOY, out="new.pt"),
        "prepare": ["--out_dir=new"],
        "sample": flags(ckpt=teller),
    }
    wrong, words = re.split(" {2,}", mistake)
    name, *argv = wrong.split()
    refuses(sys.modules[name], [*usual[name], *argv], words)
    assert name != "sample" or not capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---- Folders of transformers ---------------------------------------------------------------------
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


@functools.cache
def gemma_tokenizer():
    """Gemma's tokenizer with few words and a special token that has no row. -> it, the rows"""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    characters = [*(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdehnt.<>\n"]
    pairs = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "n"), ("\u2581", "\u2581")]
    tokens = [*special, *characters, *map("".join, pairs)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    options = {"extra_special_tokens": [*special[5:], "<image_soft_token>"]}
    options |= {"add_bos_token": True, "chat_template": CHAT_TEMPLATE}
    return GemmaTokenizer(vocabulary, pairs, **options), len(tokens)


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory):
    """A folder in the layout of google/gemma-3-270m-it, with a toy model, by transformers."""
    folder = tmp_path_factory.mktemp("hub") / "gemma"
    tokenizer, rows = gemma_tokenizer()
    peer, _ = transformers_peer(toy_config(vocab_size=rows, context_length=128), 0)
    peer.generation_config.eos_token_id = [1, 6]
    peer.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@few
@given(config=shapes, dtype=st.sampled_from(("float32", "bfloat16")), seed=seeds,
       shard=st.sampled_from(("5GB", "9KB")))  # fmt: skip
def test_a_model_survives_the_way_there_and_back(tmp_path_factory, config, dtype, seed, shard):
    folder = tmp_path_factory.mktemp("theirs")
    tokenizer, rows = gemma_tokenizer()
    peer, expected = transformers_peer(replace(config, vocab_size=rows), seed)
    peer.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    model, tokenizer, _ = sample.load(str(folder))
    # Where no layer is full, any full_attention_every beyond their number says so.
    every = min(config.full_attention_every, config.n_layers + 1)
    assert model.config == replace(expected.config, full_attention_every=every)
    weights = dict(model.state_dict())
    assert_equal(weights, dict(expected.to(peer.dtype).float().state_dict()))

    sample.export(model, tokenizer, folder / "ours")
    peer, info = AutoModelForCausalLM.from_pretrained(folder / "ours", output_loading_info=True)
    assert not any(info.values())
    tokens = some_tokens(2, 30, seed)
    assert_close(peer(tokens).logits, model(tokens), atol=1e-4, rtol=0)
    back, tokenizer, end_tokens = sample.load(str(folder / "ours"))
    assert (back.config, tokenizer.bos_token, end_tokens) == (model.config, 2, [1])
    assert_equal(dict(back.state_dict()), weights)


def changed(folder, changes, copy):
    """A copy of a folder with changed files: None removes one, text replaces it, a function makes
    other bytes of its bytes, a dictionary changes entries of its JSON or tensors (... removes)."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    for name, change in changes.items():
        path = copy / name
        if change is None:
            path.unlink()
        elif isinstance(change, str):
            path.write_text(change)
        elif callable(change):
            path.write_bytes(change(path.read_bytes()))
        else:
            is_json = path.suffix == ".json"
            given = {**(json.loads(path.read_text()) if is_json else load_file(path)), **change}
            kept = {key: value for key, value in given.items() if value is not ...}
            path.write_bytes(json.dumps(kept).encode() if is_json else save(kept))
    return copy


def with_head(content):
    """Weights of a tied model with their head beside them."""
    weights = load(content)
    return save({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})


CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer_config.json"
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00002.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 536223056\n"
NORM = "model.layers.0.input_layernorm.weight"
FULL, SLIDING = {"rope_theta": 1e6}, {"rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 8.0, **FULL}
SAME = (  # changes after which a folder means the same
    {CONFIG: {"rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}}},
    {CONFIG: {"rope_parameters": {"rope_type": "default", **FULL}}},
    {CONFIG: {"rope_parameters": ..., "rope_theta": 1e6, "rope_local_base_freq": 1e4,
              "rope_scaling": None, "layer_types": ..., "sliding_window_pattern": 3,
              "attn_logit_softcapping": ..., "use_bidirectional_attention": None}},
    {CONFIG: {"layer_types": ..., "_sliding_window_pattern": 3}},
    {CONFIG: {"sliding_window_pattern": 6}},  # layer_types, which is newer, wins
    {CONFIG: {"rope_scaling": {"rope_type": "default"}, "tie_word_embeddings": ...}},
    {INDEX: json.dumps({"weight_map": {NORM: "of-another-time.safetensors"}})},
    {WEIGHTS: with_head},
    {"chat_template.jinja": None, TOKENIZER: {"chat_template": CHAT_TEMPLATE}},
)  # fmt: skip
IMPLEMENTED = """model_type attention_bias attn_logit_softcapping final_logit_softcapping
hidden_activation use_bidirectional_attention quantization_config""".split()
OTHER_SHAPES = {
    "head_dim": "8",
    "hidden_size": ...,
    "layer_types": ["full_attention", *["sliding_attention"] * 2],
    "sliding_window": None,
    "vocab_size": 99,
}
OTHER_WEIGHTS = (
    ...,
    torch.zeros(3),
    torch.full((16,), math.nan),
    torch.zeros(16).int(),
    torch.zeros(16).to(torch.float8_e4m3fn),
)
UNUSABLE = (  # changes after which a folder is refused, and a part of the reason
    *(({CONFIG: {name: "other"}}, name) for name in IMPLEMENTED),
    *(({CONFIG: {name: value}}, name) for name, value in OTHER_SHAPES.items()),
    *(({CONFIG: {f"rope_{name}": LINEAR}}, "rope_type") for name in ("scaling", "parameters")),
    ({CONFIG: {"rope_scaling": {"type": "linear"}}}, "type linear"),
    ({CONFIG: {"num_attention_heads": 0}}, "n_heads"),
    ({CONFIG: '{"model_type": "gemma3", "text_config": {}}'}, "multimodal"),
    ({CONFIG: None}, CONFIG),
    ({CONFIG: "[]"}, "cannot be loaded"),
    *(({WEIGHTS: {NORM: value}}, NORM.removeprefix("model.")) for value in OTHER_WEIGHTS),
    *(({WEIGHTS: {name: torch.zeros(2)}}, name) for name in ("lm_head.weight", "more")),
    ({WEIGHTS: POINTER}, "git-lfs"),
    ({WEIGHTS: None, "pytorch_model.bin": ""}, "pytorch_model.bin is not read"),
    ({WEIGHTS: None, INDEX: json.dumps({"weight_map": {NORM: SHARD}})}, SHARD),
    ({"tokenizer.json": None}, "tokenizer.json"),
    ({"tokenizer.json": {"decoder": None}}, "spaces"),
    *(({"chat_template.jinja": text}, "chat") for text in ("{% no %}", "{{ 1 + 'a' }}")),
    *(({TOKENIZER: text}, "token") for text in (None, '{"eos_token": "no"}')),
)


@pytest.mark.parametrize("changes, reason", [*((same, None) for same in SAME), *UNUSABLE], ids=str)
def test_a_folder_is_read_or_refused_with_its_reason(gemma_folder, tmp_path, changes, reason):
    folder = changed(gemma_folder, changes, tmp_path)
    if reason is not None:
        refuses(sample, ["--ckpt", folder, "--chat=hi"], reason, "" if reason == "chat" else folder)
    else:
        config, weights, tokenizer = prepare.read_model(str(folder))
        expected = prepare.read_model(str(gemma_folder))
        assert config == expected[0]
        assert_equal(weights, expected[1])
        assert sample.chat_tokens(tokenizer, "hi") == sample.chat_tokens(expected[2], "hi")


@pytest.mark.parametrize("name", (CONFIG, WEIGHTS, "tokenizer.json", TOKENIZER))
@few
@given(damage=damages())
def test_a_damaged_folder_tells_or_is_refused(gemma_folder, tmp_path_factory, name, damage):
    folder = changed(gemma_folder, {name: damage}, tmp_path_factory.mktemp("damaged"))
    try:
        sample.main(flags(ckpt=folder, prompt="the", device="cpu", max_new_tokens=3))
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


def test_a_chat_has_the_tokens_and_the_answer_of_transformers(gemma_folder, capsys):
    _, tokenizer, _ = sample.load(str(gemma_folder))
    peer = AutoTokenizer.from_pretrained(gemma_folder)
    for question in ("the cat", " <end_of_turn>\n the", "日本 {{ 1 }}"):
        messages = [{"role": "user", "content": question}]
        start = peer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert sample.chat_tokens(tokenizer, question) == start
        assert 6 not in tokenizer.encode("<end_of_turn>")  # this is ordinary text again
    model = AutoModelForCausalLM.from_pretrained(gemma_folder)
    tokens = model.generate(torch.tensor([start]), max_new_tokens=20, do_sample=False)[0]
    answer = peer.decode(tokens[len(start) :], skip_special_tokens=True)
    assert tell(capsys, gemma_folder, chat=question, temperature=0).out == answer + "\n"


@pytest.fixture(scope="session")
def tuned(gemma_folder, tmp_path_factory):
    """The checkpoint of a folder's model after some steps on other text."""
    place = tmp_path_factory.mktemp("tuned")
    (place / "mine.txt").write_text(END.join(["the the an. " * 9] * 60))
    given = {"input": place / "mine.txt", "model": gemma_folder, "out_dir": place / "data"}
    assert prepare.main(flags(**given)) == 0
    given = {"data_dir": place / "data", "out": place / "out.pt", "device": "cpu", "lr": 2e-2}
    gemma270m.main(flags(**given, dtype="float32", block_size=32, max_iters=150, grad_accum=1))
    shutil.rmtree(place / "data")
    losses = column(torch.load(place / "out.pt"), "train_loss")
    assert losses[-1] < 0.1 < 1 < losses[0]  # it knows the text by heart
    return place / "out.pt"


@pytest.fixture(scope="session", params=("teller", "tuned"))
def exported(request, tmp_path_factory):
    """A checkpoint, its tokenizer, and the folder that sample.py has made of it."""
    checkpoint = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("exported") / "model"
    sample.main(["--ckpt", str(checkpoint), "--export", str(folder)])
    return checkpoint, sample.load(str(checkpoint))[1], folder


@given(text=any_text | st.text("abcdehnt. \n"))
@example("  the\n\n   an")
@example("caf\udce9")
def test_every_text_has_the_tokens_of_transformers_and_comes_back(exported, text):
    _, tokenizer, folder = exported
    tokens = tokenizer.encode(text)
    text = text.replace("\udce9", "?")
    learned = tokenizer.bos_token is None
    start = [] if learned else [tokenizer.bos_token]
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == start + tokens
    assert max(tokens, default=0) < tokenizer.vocab_size
    assert not set(tokens) & set(tokenizer.end_tokens)
    # Gemma's tokenizer writes a blank as U+2581.
    assert tokenizer.decode(tokens) == (text if learned else text.replace("\u2581", " "))


def test_an_exported_model_tells_the_same_in_transformers(exported, monkeypatch, capsys, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    checkpoint, tokenizer, folder = exported
    told = tell(capsys, checkpoint, prompt="the", temperature=0).out
    assert tell(capsys, folder, prompt="the", temperature=0).out == told
    start = END if tokenizer.bos_token is None else ""
    continues = pipeline("text-generation", str(folder))
    (answer,) = continues(start + "the", max_new_tokens=20, do_sample=False)
    text = answer["generated_text"].removeprefix(start).removesuffix(END)
    assert text + "\n" == told
    assert not caplog.records


def test_an_export_has_what_other_tools_read(exported):
    checkpoint, tokenizer, folder = exported
    names = (CONFIG, "generation_config.json", TOKENIZER, "tokenizer.json")
    config, generation, words, backend = (json.loads((folder / name).read_text()) for name in names)
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.end_tokens
    assert words["model_max_length"] == config["max_position_embeddings"]
    assert "# license: to be chosen" in (folder / "README.md").read_text()

    # llama.cpp's converter reads here whether a text begins with a start token; it knows GPT-2's
    # way to split text by what transformers makes of one, without that token.
    assert words["add_bos_token"] is True
    assert backend["model"]["type"] == "BPE" and len(backend["model"]["merges"][0]) == 2
    if tokenizer.bos_token is None:
        assert backend["pre_tokenizer"]["type"] == "ByteLevel"
        assert backend["normalizer"] is backend["post_processor"] is None
        lacks = "GPT-2"
    else:
        assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
        assert tokenizer.end_tokens == [1, 6]
        lacks = "tokenizer.model"
    usual = toy_config(full_attention_every=6)
    (line,) = sample.llama_cpp_warnings(usual, tokenizer)
    assert lacks in line
    for name in ("full_attention_every", "query_pre_attn_scalar"):
        first, *rest = sample.llama_cpp_warnings(replace(usual, **{name: 9}), tokenizer)
        assert name in first and rest == [line]


@pytest.mark.parametrize("error", (OSError("disk full"), SafetensorError("disk full")), ids=repr)
def test_an_export_appears_whole_or_not_at_all(teller, tmp_path, capsys, error):
    folder = tmp_path / "export"
    argv = ["--ckpt", str(teller), "--export", str(folder)]
    with mock.patch.object(sample, "save_file", side_effect=error):
        refuses(sample, argv, folder, "cannot be written", "disk full")
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    sample.main(argv)
    assert "warning: llama.cpp takes full_attention_every as 6" in capsys.readouterr().err
    before = (folder / WEIGHTS).stat()
    refuses(sample, argv, folder, "is not empty")
    assert (folder / WEIGHTS).stat() == before
    assert list(tmp_path.iterdir()) == [folder]


# ---- README.md -----------------------------------------------------------------------------------
README = Path(gemma270m.__file__).with_name("README.md").read_text()


def test_the_commands_of_the_readme_run(gemma_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("more").mkdir()
    stories = [f"A story of {i} mice. The end." for i in range(120)]
    for name in ("mine.txt", "start.txt", "more/a.jsonl.gz"):
        write_documents(Path(name), stories)
    # A folder stands for the models on the hub, and a text file for TinyStories.
    places = {"FOLDER": "my-gemma"}
    places |= dict.fromkeys(("google/gemma-3-270m", "google/gemma-3-270m-it"), str(gemma_folder))
    short = dict(device="cpu", max_iters=2, grad_accum=2, batch_size=1, block_size=64)
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    commands = re.findall(r"python (\w+)\.py([^&\n]*)", blocks)
    assert {program for program, _ in commands} == {"prepare", "gemma270m", "sample"}
    for program, rest in commands:
        args = [places.get(arg, arg) for arg in shlex.split(rest, comments=True)]
        if program == "prepare":
            source = [] if "--input" in args else ["--input", "mine.txt"]
            words = [] if "--model" in args else ["--tokenizer", "300"]
            assert prepare.main([*args, *source, *words]) == 0
        elif program == "gemma270m":
            shape = {} if "data-gemma" in args else {"preset": "tiny"}
            gemma270m.main([*args, *flags(**short, **shape, eval_tokens=64, overwrite=True)])
        else:
            sample.main([*args, "--max_new_tokens", "9"])
    assert "error" not in capsys.readouterr().err


def test_the_readme_is_short_and_its_python_runs():
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1_500
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(block, {})


# ---- GPU -----------------------------------------------------------------------------------------
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_gpu_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(gemma270m.UserError, match="device cuda:0 cannot be used.*--device cpu"):
        gemma270m.pick_device("cuda")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("T, H, G", ((40, 4, 1), (300, 4, 1), (300, 6, 2)))
def test_attention_on_a_gpu_equals_the_dense_reference(dtype, T, H, G):
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, T, 16, requires_grad=True) for heads in (H, G, G)]
    on_gpu = [x.detach().cuda().to(dtype).requires_grad_() for x in inputs]
    expected = with_gradients(dense_attention, inputs, 50)
    got = with_gradients(gemma270m.causal_attention, on_gpu, 50)
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    for a, b in zip(got, expected):
        assert (a.float().cpu() - b).norm() < bound * b.norm()


@needs_gpu
@pytest.mark.parametrize("compiled", (False, True))
def test_recorded_steps_on_a_gpu_give_the_text_of_plain_generation(compiled):
    model = toy_model(0).cuda()
    tokens = some_tokens(3, 9).cuda()
    expected = model.generate(tokens, 40, temperature=0)
    if compiled:
        model.compile_parts(sample.DECODING)
    assert torch.equal(with_the_cache(model, tokens, 40), expected)


@needs_gpu
@pytest.mark.parametrize("dtype, apart", (("float32", 1e-3), ("bfloat16", 0.1), ("float16", 0.1)))
@pytest.mark.parametrize("more", ({}, {"checkpoint_activations": True}), ids=str)
@pytest.mark.parametrize("switch", ("compile", "no-compile"))
def test_training_on_a_gpu_follows_that_on_a_cpu(run, whole, dtype, apart, more, switch):
    torch.compiler.reset()  # it compiles for a few models only and then takes them as they are
    state = run(device="cuda", dtype=dtype, **{switch: True}, **more)
    expected = column(whole, "val_loss")
    assert column(state, "val_loss") == pytest.approx(expected, rel=0, abs=apart)


# ---- Speed ---------------------------------------------------------------------------------------
# python test_gemma270m.py bench [flags of gemma270m.py] [--nanogpt FILE]    training as it is
# python test_gemma270m.py train [flags of gemma270m.py]    a micro-batch beside transformers
# python test_gemma270m.py decode [flags of sample.py]      sample.stream beside transformers


def flops_per_token(matrices, width, windows, T):
    """Operations of training for a token in sequences of T (arXiv 2001.08361, section 2.1).

    matrices: their numbers, the head's too; width: of all heads; windows: keys a layer may see
    """
    keys = sum(W - W * (W - 1) / (2 * T) for W in (min(T, window) for window in windows))
    return 6 * matrices + 12 * width * keys


def our_flops_per_token(model, T):
    c = model.config
    matrices = sum(w.numel() for w in model.layers.parameters() if w.ndim == 2)
    windows = [layer.self_attn.window for layer in model.layers]
    return flops_per_token(matrices + model.head.numel(), c.n_heads * c.head_dim, windows, T)


def median_seconds(device, *works):
    """The times of works that take turns, in seven rounds of which the first two compile."""
    rounds = []
    for _ in range(7):
        times = [time.perf_counter()]
        for work in works:
            work()
            torch.zeros(1, device=device).item()  # waits for the device
            times.append(time.perf_counter())
        rounds.append(np.diff(times))
    return np.median(rounds[2:], axis=0)


def report(name, seconds, tokens, flops, chip):
    speed = tokens / seconds
    print(
        f"{name:8}{1000 * seconds:,.1f} ms, {speed:,.0f} tokens/s, {speed * flops / 1e12:,.4g}"
        f" TFLOP/s, {speed * flops / chip:.1%} of a matrix product's {chip / 1e12:,.4g}"
    )


def micro_batch(model, x, dtype, graph=False):
    """-> a function that takes model(x, y), a loss, and its gradient as training does"""
    autocast = torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(x.device.type, enabled=False)
    loss_sum = torch.zeros((), device=x.device)
    step = functools.partial(gemma270m.forward_backward, model, autocast, scaler, 1, loss_sum)
    y = x.roll(-1, dims=1)
    if graph:
        step = torch.cuda.make_graphed_callables(step, (x, y), num_warmup_iters=1)
    return functools.partial(step, x, y)


def time_nanogpt(file, B, T, device, dtype, chip):
    """Prints the time of forward and backward of nanoGPT 124M, whose model.py is file."""
    sys.path.insert(0, str(Path(file).resolve().parent))
    nanogpt = importlib.import_module(Path(file).stem)
    model = nanogpt.GPT(nanogpt.GPTConfig(block_size=T, bias=False)).to(device)
    compiled = torch.compile(model) if device.type == "cuda" else model
    c = model.config
    x = torch.randint(c.vocab_size, (B, T), device=device)
    (seconds,) = median_seconds(device, micro_batch(lambda x, y: compiled(x, y)[1], x, dtype))
    flops = flops_per_token(model.get_num_params(), c.n_embd, [T] * c.n_layer, T)
    report("nanoGPT", seconds, B * T, flops, chip)


def bench(argv):
    """Trains on random tokens with the flags of gemma270m.py, leaves no file, and prints times.

    start: from this call to the first update. ours: a micro-batch with its share of the update and
    of all that the loop does, the median over the steps of 15 seconds, and four at least. The
    matrix product is the largest that this device does well, in the same dtype.
    """
    began = time.perf_counter()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nanogpt")
    args, argv = parser.parse_known_args(argv)
    given = {"preset": "270m", "vocab_size": GemmaConfig.vocab_size, **gemma270m.parse_flags(argv)}
    updates = []  # when each one was logged

    def log(rows, **row):
        if "train_loss" in row:
            updates.append(time.perf_counter())
            if len(updates) > 4 and updates[-1] > updates[0] + 15:
                signal.raise_signal(signal.SIGINT)  # the run saves and ends

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(gemma270m, "log", log):
        words = given["vocab_size"]
        tokens = np.random.default_rng(0).integers(words, size=2**22)
        write_data(Path(folder), tokens, tokens[: 2**16], words, source="random tokens")
        given |= {"data_dir": folder, "out": f"{folder}/out.pt", "resume": False}
        given |= {"log_interval": 1, "eval_interval": 2**31 - 1, "eval_tokens": 1}
        gemma270m.main(flags(**given))
        memory = torch.cuda.max_memory_allocated() / 2**30
        model, state = gemma270m.load_checkpoint(given["out"])
    config = TrainConfig(**state["train_config"])
    device = gemma270m.pick_device(config.device)
    dtype = getattr(torch, config.dtype)
    size = 8192 if device.type == "cuda" else 1024
    square = torch.randn(size, size, device=device).to(dtype)
    (seconds,) = median_seconds(device, lambda: [square @ square for _ in range(5)])
    chip = 5 * 2 * size**3 / seconds
    B, T = config.batch_size, config.block_size
    iteration = np.median(np.diff(updates)) / config.grad_accum
    print(f"start   {updates[0] - began:.1f} s; GPU memory {memory:.2f} GiB")
    report("ours", iteration, B * T, our_flops_per_token(model, T), chip)
    if args.nanogpt:
        time_nanogpt(args.nanogpt, B, T, device, dtype, chip)


def test_bench_times_the_real_loop_and_leaves_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bench(flags(**SHAPE, device="cpu", batch_size=2, grad_accum=2, block_size=16, max_iters=12))
    said = capsys.readouterr().out
    assert re.search(r"random tokens(.|\n)+ours +\S+ ms, \S+ tokens/s", said)
    assert not list(tmp_path.iterdir())


def report_both(what, tokens, ours, theirs):
    print(f"{what}: {tokens / ours:,.0f} tokens/s, ", end="")
    print(f"transformers {tokens / theirs:,.0f}, ratio {theirs / ours:.2f}")


def train(argv):
    """Forward and backward of the same micro-batch: ours, as training does it, and theirs."""
    values = asdict(TrainConfig()) | asdict(GemmaConfig()) | gemma270m.parse_flags(argv)
    config = gemma270m.make(TrainConfig, values)
    device = gemma270m.pick_device(config.device)
    dtype = gemma270m.pick_dtype(config.dtype, device)
    if config.compile is None:
        config.compile = device.type == "cuda"
    theirs, ours = transformers_peer(gemma270m.make(GemmaConfig, values), 0)
    theirs.to(device)
    gemma270m.prepare_model(ours, config, device)
    if config.compile:
        theirs = torch.compile(theirs)
    shape = (config.batch_size, config.block_size)
    x = torch.randint(values["vocab_size"], shape, device=device)
    our_work = micro_batch(ours, x, dtype, graph=device.type == "cuda")

    def their_loss(x, y):
        return theirs(input_ids=x, labels=x, use_cache=False).loss

    times = median_seconds(device, our_work, micro_batch(their_loss, x, dtype))
    report_both(f"train on {device}, {dtype}", x.numel(), *times)


def decode(argv):
    """The same number of new tokens by sample.stream and by transformers."""
    args = sample.parse_flags(argv)
    device = gemma270m.pick_device(args.device)
    dtype = gemma270m.pick_dtype(args.dtype, device)
    theirs, ours = (model.to(device, dtype) for model in transformers_peer(GemmaConfig(), 0))
    if args.compile:
        ours.compile_parts(sample.DECODING)
    n = args.max_new_tokens
    x = torch.randint(GemmaConfig.vocab_size, (args.num_samples, 16), device=device)
    options = {"max_new_tokens": n, "do_sample": True, "top_k": 0}
    options |= {"attention_mask": torch.ones_like(x), "pad_token_id": 0}
    if device.type == "cuda":
        options["cache_implementation"] = "static"  # transformers compiles its steps then

    def first_tokens(number):
        tokens = sample.stream(ours, x, n)
        with torch.compiler.set_stance("force_eager"):  # the prompt is not compiled
            next(tokens)
        list(itertools.islice(tokens, number - 1))

    all_ours, two, all_theirs = median_seconds(
        device,
        lambda: first_tokens(n),
        lambda: first_tokens(2),  # the prompt, and on a GPU the recording
        lambda: theirs.generate(x, **options),
    )
    report_both(f"decode on {device}, {dtype}", n * len(x), all_ours, all_theirs)
    print(f"after the second token: {(n - 2) * len(x) / (all_ours - two):,.0f} tokens/s")


PROGRAMS = {"bench": bench, "train": train, "decode": decode}

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    name, *argv = sys.argv[1:] or ["no measurement"]
    try:
        if name not in PROGRAMS:
            raise UserError(f"there are {', '.join(PROGRAMS)}, not {name}")
        PROGRAMS[name](argv)
    except UserError as error:
        raise SystemExit(f"test_gemma270m.py: error: {error}") from error
