"""
Gemma 3 270M in one file: the model, its training loop and its command line, in plain PyTorch.

    python prepare.py                           # text as tokens in data/
    python gemma270m.py                         # trains; writes out.pt and out.csv
    python sample.py --ckpt out.pt              # tells a story
    torchrun --nproc_per_node 4 gemma270m.py    # the same training on four GPUs

The model: Gemma 3 Technical Report, arXiv 2503.19786. Official code: transformers, models/gemma3.
Letters in shapes: B sequences, T tokens, E emb_dim, H query heads, G key/value heads, D head_dim,
V vocab_size, N = B x T.
"""

import argparse
import contextlib
import csv
import functools
import inspect
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute_in_backward


# ---- Configuration: each field is a flag, the comment behind it is its help text -----------------
class UserError(ValueError):
    """A mistake of the user: at the command line one line, without a traceback."""


def check_numbers(config):
    """Raises UserError that names the first number of a configuration that is out of range."""
    for field in fields(config):
        value = getattr(config, field.name)
        may_be_zero = field.type is float or field.name in ("warmup_iters", "seed")
        smallest = 0 if may_be_zero else 1
        if field.type in (int, float):  # an int may stand for a float
            if type(value) not in (int, field.type) or not smallest <= value < 2**31:
                raise UserError(f"{field.name} cannot be {value}")


@dataclass
class GemmaConfig:
    """Shape of the model; the defaults are Gemma 3 270M with the vocabulary of GPT-2."""

    vocab_size: int = 50_257  # words in the vocabulary; training takes it from the data's meta.json
    context_length: int = 32_768  # longest sequence, in tokens
    emb_dim: int = 640  # width of the residual stream
    n_layers: int = 18  # blocks
    n_heads: int = 4  # query heads
    n_kv_groups: int = 1  # key/value heads, each shared by n_heads / n_kv_groups query heads
    head_dim: int = 256  # width of one head
    hidden_dim: int = 2_048  # width of the feed-forward layer
    sliding_window: int = 512  # keys that a sliding layer sees, the token itself included
    full_attention_every: int = 6  # every n-th layer attends to the whole context
    rope_local_base: float = 10_000.0  # RoPE base of the sliding layers
    rope_base: float = 1_000_000.0  # RoPE base of the full layers
    query_pre_attn_scalar: int = 256  # scores are divided by its square root; usually head_dim
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # one matrix for input embedding and output head

    def __post_init__(self):
        check_numbers(self)
        if self.n_heads % self.n_kv_groups != 0:
            raise UserError(f"n_kv_groups {self.n_kv_groups} must divide n_heads {self.n_heads}")
        if self.head_dim % 2 != 0:
            raise UserError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")

    @property
    def layer_types(self):
        """The kind of each layer: of 18, layers 5, 11 and 17 see the whole context."""
        full = [(layer + 1) % self.full_attention_every == 0 for layer in range(self.n_layers)]
        return ["full_attention" if f else "sliding_attention" for f in full]


@dataclass
class TrainConfig:
    """One run. An iteration is one micro-batch; a step is grad_accum of them and one update."""

    preset: str = "auto"  # auto: finetune where the data have init.pt, else 270m on a GPU, or tiny
    data_dir: str = "data"  # folder that prepare.py wrote
    out: str = "out.pt"  # checkpoint; the log lies beside it as .csv
    resume: bool = False  # go on with the run in --out if there is one; flags given win
    overwrite: bool = False  # start anew although --out exists
    batch_size: int = 32  # sequences in a micro-batch
    grad_accum: int = 32  # micro-batches, over all processes, in a step
    block_size: int = 512  # tokens in a training sequence
    max_iters: int = 150_000  # length of the run, in iterations (micro-batches, not updates)
    warmup_iters: int = 1_000  # iterations of linear warm-up
    lr: float = 1e-4  # peak learning rate
    min_lr: float = 1e-5  # learning rate at the end of the cosine
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    weight_decay: float = 0.1  # on matrices only, not on norms
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    eval_interval: int = 500  # iterations between validations; each one writes the checkpoint
    eval_tokens: int = 524_288  # validation tokens, the same ones each time
    log_interval: int = 32  # iterations between log lines
    seed: int = 1337  # of the initial weights and of the order of the data
    device: str = "auto"  # cuda, mps, cpu; auto takes an NVIDIA or AMD GPU if there is one
    dtype: str = "auto"  # of matrix products; auto takes what the hardware does well
    compile: bool | None = None  # torch.compile blocks and loss; on CUDA if not given
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: less memory

    def __post_init__(self):
        check_numbers(self)
        if max(self.beta1, self.beta2) >= 1:
            raise UserError("beta1 and beta2 must be below 1")
        if self.min_lr > self.lr:
            raise UserError(f"min_lr {self.min_lr} is above lr {self.lr}: give both")
        if self.max_iters < self.grad_accum:
            raise UserError(f"max_iters {self.max_iters} is less than a step, {self.grad_accum}")

    @property
    def steps(self):
        """Updates in the run."""
        return self.max_iters // self.grad_accum


# Flags that a preset sets; those given beside it win. quick is a short run of the same model.
PRESETS = {
    "270m": {},
    "quick": dict(grad_accum=1, max_iters=2_432, warmup_iters=200, lr=3e-3, min_lr=3e-4),
    "finetune": dict(batch_size=8, grad_accum=4, max_iters=800, warmup_iters=80, lr=5e-5,
                     min_lr=5e-6, eval_interval=200),
    "tiny": dict(emb_dim=96, n_layers=4, n_heads=2, head_dim=48, query_pre_attn_scalar=48,
                 hidden_dim=256, sliding_window=256, block_size=256, batch_size=4, grad_accum=1,
                 max_iters=1_700, warmup_iters=200, lr=1e-2, min_lr=0.0, beta2=0.99,
                 eval_tokens=32_768, log_interval=50),
}  # fmt: skip
CHOICES = {"preset": ["auto", *PRESETS], "dtype": ["auto", "bfloat16", "float16", "float32"]}


# ---- Layers, from the smallest to the block ------------------------------------------------------
class RMSNorm(nn.Module):
    """Scales each vector to root mean square 1, then by 1 + weight (arXiv 1910.07467)."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        # In float32, because bfloat16 cannot tell 1 from 1.003.
        y = F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps)
        return y.type_as(x)


def rope_table(positions, head_dim, base):
    """Cosine and sine of the angles p / base^(2i/D) (arXiv 2104.09864). (T,) -> 2 x (T, 1, D/2)"""
    # In float32, because bfloat16 knows no position 257.
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = torch.outer(positions.float(), 1.0 / base**exponents)[:, None]
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Turns each pair (x[i], x[i + D/2]) by the angle of its position. x (B, T, H, D) -> as x"""
    x1, x2 = x.float().chunk(2, dim=-1)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), dim=-1).type_as(x)


def causal_attention(q, k, v, window, scale):
    """Attention in which a query sees the last `window` keys, its own included (arXiv 2004.05150).

    q (B, H, T, D), k and v (B, G, T, D) -> as q. Which keys (columns) the queries (rows) see:

        full layer      sliding layer with a window of 3
        1 . . . .       1 . . . .
        1 1 . . .       1 1 . . .
        1 1 1 . .       1 1 1 . .
        1 1 1 1 .       . 1 1 1 .
        1 1 1 1 1       . . 1 1 1
    """
    B, H, T, D = q.shape
    # Fast: bfloat16 on a GPU, see pick_dtype, and a width that its kernels take. The one in case 1
    # lets query heads share a key/value head; everywhere else each has its own copy of it.
    fast = q.is_cuda and q.dtype == torch.bfloat16 and D <= 256 and D % 8 == 0
    if not (fast and T <= window):
        k = k.repeat_interleave(H // k.size(1), dim=1)  # (B, H, T, D)
        v = v.repeat_interleave(H // v.size(1), dim=1)

    # 1) The window hides nothing.
    if T <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=fast)

    # 2) A kernel skips what the window hides. Its import takes a second, and only a GPU has it.
    if fast:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # end to end: (B * T, H, D)
        bounds = torch.arange(B + 1, device=q.device, dtype=torch.int32) * T  # where each begins
        keys = (window - 1, 0)  # before the query and after it
        y = varlen_attn(q, k, v, bounds, bounds, T, T, scale=scale, window_size=keys)
        return y.unflatten(0, (B, T)).transpose(1, 2)

    # 3) In blocks of `window` queries, so that time and memory grow with T and not with T x T:
    #    a block sees keys of itself and of the block before it, no others.
    positions = torch.arange(T, device=q.device)
    blocks = []
    for start in range(0, T, window):
        queries = slice(start, start + window)
        keys = slice(max(0, start - window), start + window)
        age = positions[queries, None] - positions[keys]  # of each key, seen from each query
        mask = (age >= 0) & (age < window)
        inputs = (q[:, :, queries], k[:, :, keys], v[:, :, keys], mask)
        blocks.append(F.scaled_dot_product_attention(*inputs, scale=scale))
    return torch.cat(blocks, dim=2)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys."""

    def __init__(self, config, layer_type):
        super().__init__()
        E, H, G, D = config.emb_dim, config.n_heads, config.n_kv_groups, config.head_dim
        self.q_proj = nn.Linear(E, H * D, bias=False)
        self.k_proj = nn.Linear(E, G * D, bias=False)
        self.v_proj = nn.Linear(E, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, E, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps)
        self.k_norm = RMSNorm(D, config.norm_eps)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.head_dim = D
        # The window of a full layer is the whole context, so that it hides nothing.
        is_full = layer_type == "full_attention"
        self.window = config.context_length if is_full else config.sliding_window

    def forward(self, x, cos, sin, attend):
        """x (B, T, E), cos and sin of its positions -> as x

        attend: causal_attention, or the cache of sample.py, which stores k and v before it attends.
        """
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, D)
        q = apply_rope(self.q_norm(q), cos, sin)
        k = apply_rope(self.k_norm(k), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or G, T, D)
        y = attend(q, k, v, self.window, self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A hidden layer times the tanh-GELU of a gate: GeGLU (arXiv 2002.05202). (B, T, E) -> as x"""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.emb_dim, bias=False)

    def forward(self, x):
        hidden = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        if hidden.dtype == torch.float16:
            # The product may exceed float16's largest number, and infinity would spread.
            hidden = hidden.clamp(-65_504, 65_504)
        return self.down_proj(hidden)


class Block(nn.Module):
    """Attention, then feed-forward, each between two norms. (B, T, E) -> as x"""

    def __init__(self, config, layer_type):
        super().__init__()
        self.self_attn = Attention(config, layer_type)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.emb_dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.emb_dim, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.emb_dim, config.norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.emb_dim, config.norm_eps)

    def forward(self, x, cos, sin, attend=causal_attention):
        # With float16 the stream x is float32 (see Gemma.features), and y float16. A norm's output
        # has its input's dtype and may exceed float16, so y is widened before the norm.
        y = self.self_attn(self.input_layernorm(x), cos, sin, attend)
        x = x + self.post_attention_layernorm(y.type_as(x))
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y.type_as(x))


# ---- Loss ----------------------------------------------------------------------------------------
# The logits of 32 x 512 tokens are 3.3 GB in float32, and their gradient as much again. So a chunk
# of at most this many logits is made at a time, and its gradient is taken in the forward pass,
# before it goes.
LOGITS_AT_ONCE = 2**28


def summed_cross_entropy(logits, targets, vocab_size):
    """Over the rows whose target is not -1. logits (N, V or more), targets (N,) -> a scalar"""
    logits = logits.float()
    if logits.size(1) > vocab_size:  # the last columns only pad the head, see below
        columns = torch.arange(logits.size(1), device=logits.device)
        logits = logits.masked_fill(columns >= vocab_size, -math.inf)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the logits x @ head.T. x (N, E), head (V, E), targets (N,)"""

    @staticmethod
    def forward(ctx, x, head, targets, gradient_and_loss):
        # The last argument gives both of summed_cross_entropy; Gemma made it.
        V = len(head)
        matrix = head.type_as(x)
        if x.is_cuda:  # whose matrix products are faster when their sides are multiples of 64
            matrix = F.pad(matrix, (0, 0, 0, -V % 64))
        head_grad = None
        x_grads = []
        total = 0.0
        # 4,096 rows keep a GPU busy; with more than 65,536 words LOGITS_AT_ONCE allows fewer.
        n = min(4096, LOGITS_AT_ONCE // V)
        for rows, row_targets in zip(x.split(n), targets.split(n)):
            logits = rows @ matrix.T  # (n or fewer, V padded)
            if ctx.needs_input_grad[0]:  # in training: in validation x wants none
                logits_grad, loss = gradient_and_loss(logits, row_targets, V)
                x_grads.append(logits_grad @ matrix)
                part = logits_grad.T @ rows
                head_grad = part.float() if head_grad is None else head_grad + part
            else:
                loss = summed_cross_entropy(logits, row_targets, V)
            total += loss
        if x_grads:
            # Only a padded one is sliced, since autograd cannot add to a slice in place.
            if len(head_grad) > V:
                head_grad = head_grad[:V]
            ctx.save_for_backward(torch.cat(x_grads), head_grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale):
        x_grad, head_grad = ctx.saved_tensors
        # In place, because the two are large; autograd sees it and refuses a second backward pass.
        return x_grad.mul_(scale), head_grad.mul_(scale), None, None


# ---- Model ---------------------------------------------------------------------------------------
class Gemma(nn.Module):
    """Gemma 3. Its parameters have the official names, without "model." in front of them."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        # Kept here so that compile_parts can replace it.
        self.gradient_and_loss = torch.func.grad_and_value(summed_cross_entropy)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.emb_dim)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.emb_dim, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        # A norm follows most matrices and undoes their scale: small ones only learn faster.
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.005)
        nn.init.normal_(self.embed_tokens.weight, std=config.emb_dim**-0.5)  # features makes it 1

    @property
    def head(self):
        """The output matrix (V, E)."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def num_parameters(self):
        """Numbers in all weights; those of a tied head count once."""
        return sum(weight.numel() for weight in self.parameters())

    def compile_parts(self, options=None):
        """Compiles what repeats: about as fast as torch.compile(model), and ready much sooner."""
        for block in self.layers:
            block.compile(dynamic=False, options=options)
        self.gradient_and_loss = torch.compile(self.gradient_and_loss, dynamic=False)

    def features(self, tokens, start=0, attends=None):
        """What the head reads. tokens (B, T) at positions start, start + 1, ... -> (B, T, E)"""
        c = self.config
        T = tokens.size(1)
        if T > c.context_length:
            raise UserError(f"{T} tokens exceed the context of {c.context_length}")
        attends = attends or [causal_attention] * c.n_layers  # or the cache of sample.py
        positions = torch.arange(T, device=tokens.device) + start
        rope = {
            "sliding_attention": rope_table(positions, c.head_dim, c.rope_local_base),
            "full_attention": rope_table(positions, c.head_dim, c.rope_base),
        }
        x = self.embed_tokens(tokens)
        # The factor has the weights' dtype, as in Gemma: 25.298, and for bfloat16 weights 25.25.
        x = x * torch.tensor(c.emb_dim**0.5, dtype=x.dtype)
        # Under autocast the residual stream is bfloat16 too, which halves the memory to move. With
        # float16 it stays float32: Google's weights make it reach 1e5, and float16 ends at 65,504.
        if torch.is_autocast_enabled(x.device.type):
            wide = torch.get_autocast_dtype(x.device.type) == torch.float16
            x = x.float() if wide else x.bfloat16()
        for block, kind, attend in zip(self.layers, c.layer_types, attends):
            if self.checkpoint_activations:
                options = {"use_reentrant": False, "preserve_rng_state": False}
                block = functools.partial(recompute_in_backward, block, **options)
            x = block(x, *rope[kind], attend)
        return self.norm(x)

    def forward(self, tokens, targets=None):
        """tokens (B, T) -> logits (B, T, V), or mean cross-entropy with targets; -1 is ignored."""
        x = self.features(tokens)
        if targets is None:
            return F.linear(x, self.head)
        inputs = (x.flatten(0, 1), self.head, targets.flatten())
        loss = ChunkedCrossEntropy.apply(*inputs, self.gradient_and_loss)
        return loss / (targets >= 0).sum().clamp(min=1)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, generator=None):
        """Continues tokens (B, T) -> (B, T + n), plainly; sample.py's stream is the fast way."""
        for _ in range(max_new_tokens):
            logits = self(tokens)[:, -1].float()  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                p = (logits / temperature).softmax(-1)
                new = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens


# ---- Data, learning rate, validation -------------------------------------------------------------
def load_data(folder):
    """Memory maps of train.bin and val.bin, and what meta.json says. Raises UserError."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text("utf-8"))
        # The checkpoint will take the tokenizer along.
        names = meta["tokenizer_files"]
        meta["tokenizer_files"] = {name: Path(folder, name).read_text("utf-8") for name in names}
        train = np.memmap(Path(folder, "train.bin"), meta["dtype"], mode="r")
        val = np.memmap(Path(folder, "val.bin"), meta["dtype"], mode="r")
        if not {"source", "bos_token", "end_tokens"} <= meta.keys():
            raise ValueError("meta.json is not whole")
        for part, length in ((train, meta["train_tokens"]), (val, meta["val_tokens"])):
            if len(part) != length or length < 2 or part.max() >= meta["vocab_size"]:
                raise ValueError("the tokens do not fit meta.json")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no usable data in {folder} ({error}): run python prepare.py") from error
    return train, val, meta


def count_blocks(n_tokens, block_size, bos):
    """Blocks of the data. With a start token (bos) all are targets, else all but the first."""
    targets = n_tokens - 1 if bos is None else n_tokens
    return math.ceil(targets / block_size)


@functools.lru_cache(maxsize=2)  # a micro-batch may reach into the next epoch
def block_order(n_blocks, seed, epoch):
    """The order in which an epoch visits the blocks of the training data."""
    return np.random.default_rng((seed, epoch)).permutation(n_blocks)


def training_blocks(iteration, batch_size, n_blocks, seed):
    """Which blocks of the data make a micro-batch; no block comes twice in an epoch."""
    # They depend on these numbers alone, so a resumed run goes on where the first one was.
    blocks = []
    for i in range(iteration * batch_size, (iteration + 1) * batch_size):
        epoch, place = divmod(i, n_blocks)
        blocks.append(int(block_order(n_blocks, seed, epoch)[place]))
    return blocks


def get_batch(data, blocks, block_size, bos, device):
    """Inputs padded with 0 and, one place on, targets padded with -1. -> 2 x (B, T)"""
    rows = np.full((len(blocks), block_size + 1), -1, dtype=np.int64)
    length = block_size + 1 if bos is None else block_size  # leaves a place for the start token
    for row, block in zip(rows, blocks):
        piece = data[block * block_size :][:length]
        # Each row begins with one start token: without it Gemma predicts badly.
        if bos is not None and piece[0] != bos:
            piece = np.insert(piece, 0, bos)
        row[: len(piece)] = piece
    rows = torch.from_numpy(rows)
    if device.type == "cuda":
        rows = rows.pin_memory()  # so that Python need not wait for the GPU
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


def learning_rate(config, step):
    """Linear warm-up to lr, then a cosine that reaches min_lr in the last step."""
    warmup_steps = config.warmup_iters / config.grad_accum
    if step + 1 <= warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / (config.steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + cosine * (config.lr - config.min_lr)


@torch.no_grad()
def evaluate(model, data, config, bos, device, autocast, rank=0, world=1):
    """Mean loss over eval_tokens of data, the same ones whatever the batch size or processes."""
    n_blocks = count_blocks(len(data), config.block_size, bos)
    wanted = min(n_blocks, math.ceil(config.eval_tokens / config.block_size))
    spread = np.linspace(0, n_blocks, wanted, endpoint=False, dtype=int)
    total = torch.zeros(2, dtype=torch.float64)  # of the losses, of the targets
    for i in range(rank * config.batch_size, wanted, world * config.batch_size):
        blocks = spread[i : i + config.batch_size]
        x, y = get_batch(data, blocks, config.block_size, bos, device)
        targets = (y >= 0).sum()
        with autocast:
            total += torch.stack((model(x, y) * targets, targets)).cpu()
    if world > 1:
        dist.all_reduce(total)  # on the CPU, through gloo: see main
    return (total[0] / total[1]).item()


# ---- Checkpoints ---------------------------------------------------------------------------------
def save_checkpoint(path, state):
    """Writes beside path, then renames, so that path is always a whole checkpoint; or OSError."""
    path = os.path.realpath(path)  # a link stays one
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the content must reach the disk before the new name does
        os.replace(temporary, path)
    except RuntimeError as error:  # from torch.save, which hides a full disk behind it
        raise OSError(error.__context__ or error) from error
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name is on the disk once its folder is
        folder = os.open(temporary.parent, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not all file systems can
            os.fsync(folder)
        os.close(folder)


def load_checkpoint(path):
    """The model in float32 on the CPU, and all that the checkpoint holds. Raises UserError."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch.load compares no checksums
            raise ValueError("it is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            model = Gemma(GemmaConfig(**state["model_config"]))
        weights = {name: weight.contiguous() for name, weight in state["model"].items()}
        model.load_state_dict(weights, assign=True)
    # A damaged file, or one that is no checkpoint, may raise any of these.
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
            zlib.error, zipfile.BadZipFile, pickle.UnpicklingError) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be loaded as a checkpoint: {reason}") from error
    return model.float(), state


# ---- Training ------------------------------------------------------------------------------------
def say(line):
    """Prints a line in the first process. A closed terminal or pipe must not end the run."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(line, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def pick_device(name="auto"):
    """The torch.device, under torchrun each process's own GPU. UserError if it cannot compute."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        # The sum fails on a GPU that torch's build does not serve.
        device = torch.ones(1, device=name).add(1).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {name} cannot be used: {reason}; try --device cpu") from error
    return device


def pick_dtype(name, device):
    """The dtype of matrix products; weights, optimizer, norms and loss stay in float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported() counts emulation and says yes on a T4.
        major, _ = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16
        return torch.float16 if major == 7 else torch.float32
    has_bfloat16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def prepare_model(model, config, device):
    """Puts the model on its device. -> its optimizer, whose rate train sets"""
    model.to(device)
    model.checkpoint_activations = config.checkpoint_activations
    if config.compile or (config.compile is None and device.type == "cuda"):
        model.compile_parts()
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learned:
        weight.grad = torch.zeros_like(weight)  # for good, because a CUDA graph has its address
    # Weight decay is for matrices: it would pull a norm's learned scale, 1 + weight, back to 1.
    matrices = [weight for weight in learned if weight.ndim >= 2]
    norms = [weight for weight in learned if weight.ndim < 2]
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=config.weight_decay, fused=True)


stop_times = []  # of the signals that ask the run to end


def request_stop(number, frame):
    """Handles a signal: the first one lets the run save and end, a second one ends it at once."""
    # A Ctrl-C comes from the terminal and again from torchrun, within a second.
    if stop_times and time.monotonic() - stop_times[0] > 1:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    stop_times.append(time.monotonic())


def any_process_stops(world):
    """All processes must leave together, or the rest would wait for those that left."""
    stops = torch.tensor(len(stop_times))
    if world > 1:
        dist.all_reduce(stops)
    return bool(stops)


def log(rows, **row):
    """Adds a row to the log and prints it."""
    rows.append(row)
    formats = {int: ",", float: ".5g"}
    say(" | ".join(f"{name} {value:{formats[type(value)]}}" for name, value in row.items()))


def log_path(out):
    """Where the log of a checkpoint lies."""
    return str(out).removesuffix(".pt") + ".csv"


def save_run(path, state, needed):
    """Writes the checkpoint, and its log as a table. If that fails: UserError, or a warning."""
    try:
        save_checkpoint(path, state)
        rows = state["rows"]
        columns = dict.fromkeys(name for row in rows for name in row)  # as a set, but in order
        with open(log_path(path), "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        reason = f"{path} or its log cannot be written: {error}"
        if needed:
            raise UserError(reason) from error
        say(f"warning: {reason}; training goes on")


def forward_backward(model, autocast, scaler, accum, loss_sum, x, y):
    """Adds a micro-batch's gradient to .grad and its loss to loss_sum; a CUDA graph records it."""
    with autocast:
        loss = model(x, y) / accum
    scaler.scale(loss).backward()  # the scale is a tensor: a replay sees its updates
    loss_sum += loss.detach()
    return loss_sum  # a recorded function must return a tensor


def train(config, model, train_data, val_data, meta, state=None):
    """Trains model on what load_data gave; state: a checkpoint's, to resume. Raises UserError."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device)
    accum = config.grad_accum
    bos = meta["bos_token"]
    n_blocks = count_blocks(len(train_data), config.block_size, bos)
    dtype = pick_dtype(config.dtype, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizer = prepare_model(model, config, device)

    step = 0  # updates made
    rows = []  # of the log
    skipped = 0  # updates left out because the gradient was not finite
    faults = 0  # such updates in a row
    if state is not None:
        step = state["step"]
        rows = state["rows"]
        skipped = state["skipped"]
        # Its moments; rates and decay are the configuration's, which flags may have changed.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    # Each step's gradients and loss add up in these tensors: a CUDA graph replays fixed addresses.
    loss_sum = torch.zeros((), device=device)
    sums = [loss_sum, *(weight.grad for weight in model.parameters() if weight.requires_grad)]
    micro_batch = functools.partial(forward_backward, model, autocast, scaler, accum, loss_sum)
    if device.type == "cuda":
        # It records backward() too. Its warm-up adds to the sums, which each step sets to zero.
        example = get_batch(train_data, [0] * config.batch_size, config.block_size, bos, device)
        micro_batch = torch.cuda.make_graphed_callables(micro_batch, example, num_warmup_iters=1)
    while True:
        # validate at the start, the end and once a step has reached a multiple of eval_interval,
        # but not again where a stopped or resumed run has done so
        iteration = step * accum
        validated = any(row["step"] == step and "val_loss" in row for row in rows)
        due = step == config.steps or iteration % config.eval_interval < accum
        validating = due and not validated
        if validating:
            with torch.compiler.set_stance("force_eager"):  # else blocks would be compiled twice
                val_loss = evaluate(model, val_data, config, bos, device, autocast, rank, world)
            if not math.isfinite(val_loss):
                raise UserError(f"val loss {val_loss} at step {step}; {config.out} stays as it is")
            log(rows, iteration=iteration, step=step, val_loss=val_loss)

        # save, and end if that is asked for
        stopping = any_process_stops(world)
        if rank == 0 and (validating or stopping):
            checkpoint = {
                "model_config": asdict(model.config), "train_config": asdict(config), "data": meta,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "step": step, "rows": rows, "skipped": skipped,
            }  # fmt: skip
            # At step 0 too: a path that cannot be written shows before hours of training.
            save_run(config.out, checkpoint, needed=stopping or step in (0, config.steps))
        if stopping:
            say(f"stopped at iteration {iteration:,}; {config.out} is up to date, --resume goes on")
        if stopping or step == config.steps:
            break

        # forward and backward of this process's share of the step's micro-batches
        started = time.perf_counter()
        for tensor in sums:
            tensor.zero_()
        for i in range(iteration + rank, iteration + accum, world):
            blocks = training_blocks(i, config.batch_size, n_blocks, config.seed)
            micro_batch(*get_batch(train_data, blocks, config.block_size, bos, device))
            stopping = any_process_stops(world)
            if stopping:
                break
        if stopping:
            continue  # saves at the top of the loop; a resumed run takes this step from its start
        if world > 1:
            for tensor in sums:
                dist.all_reduce(tensor)

        # update
        lr = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
        finite = math.isfinite(norm)
        if finite:
            scaler.step(optimizer)
        scaler.update()
        step += 1
        skipped += 0 if finite else 1
        faults = 0 if finite else faults + 1
        if faults == 25:  # a scaler needs some to find its scale
            raise UserError(f"no finite gradient in {faults} steps up to {step}, lr {lr:.1e}")

        # log
        if step == config.steps or step * accum % config.log_interval < accum:
            tokens = accum * config.batch_size * config.block_size
            speed = round(tokens / (time.perf_counter() - started))
            row = {"train_loss": loss_sum.item(), "lr": lr, "grad_norm": norm, "skipped": skipped}
            log(rows, iteration=step * accum, step=step, **row, tokens_per_second=speed)


# ---- Command line --------------------------------------------------------------------------------
def parse_flags(argv):
    """-> the flags that were given, as a dictionary"""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for config in (TrainConfig, GemmaConfig):
        # The comment behind a field is the help text of its flag.
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
        for field in fields(config):
            options = {"type": field.type, "choices": CHOICES.get(field.name)}
            if field.type in (bool, bool | None):
                options = {"action": argparse.BooleanOptionalAction}
            help = f"{comments[field.name]} (default: {field.default})"
            parser.add_argument(f"--{field.name}", help=help, **options)
    return vars(parser.parse_args(argv))


def make(config_class, values):
    """A config_class from values, which may hold more than its fields."""
    return config_class(**{field.name: values[field.name] for field in fields(config_class)})


def main(argv=None):
    """The command line. Raises UserError for what cannot be done."""
    given = parse_flags(argv)
    values = asdict(GemmaConfig()) | asdict(TrainConfig()) | given
    out = Path(values["out"])
    init = Path(values["data_dir"], "init.pt")
    preset = values["preset"]
    if preset == "auto" and init.exists():
        preset = "finetune"
    elif preset == "auto":
        preset = "270m" if pick_device(values["device"]).type == "cuda" else "tiny"
    values |= PRESETS[preset] | given | {"preset": preset}  # what is given wins
    settings = {name: values[name] for name in PRESETS[preset]}
    if out.exists() and not out.is_file():
        raise UserError(f"out: {out} is a folder or a device, not a file")
    for file in (out, Path(log_path(out))):
        if file.exists() and not values["resume"] and not values["overwrite"]:
            raise UserError(f"{file} exists: --resume goes on with it, --overwrite starts anew")
    state = None

    if values["resume"] and out.exists():
        # 1) go on with the run in --out: its own settings replace those of the preset
        model, state = load_checkpoint(out)
        run_parts = {"train_config", "data", "optimizer", "scaler", "step", "rows", "skipped"}
        if not run_parts <= state.keys():
            raise UserError(f"resume: {out} is not of a run, or of an earlier version")
        begun = state["train_config"]
        if given.get("preset", "auto") not in ("auto", begun["preset"]):
            raise UserError(f"resume: {out} is a run of preset {begun['preset']}")
        values |= begun | given | {"out": str(out), "preset": begun["preset"]}
        train_data, val_data, meta = load_data(values["data_dir"])
        # Other data are welcome where --data_dir names them and the vocabulary is the same.
        same_words = state["data"]["tokenizer_files"] == meta["tokenizer_files"]
        if not same_words or ("data_dir" not in given and state["data"] != meta):
            raise UserError(f"resume: {out} has other data or another vocabulary; see --data_dir")
        say(f"resume  {out} after {state['step']:,} steps")
    elif preset == "finetune":
        # 2) start from the weights that prepare.py --model has put beside the data
        train_data, val_data, meta = load_data(values["data_dir"])
        if not init.exists():
            raise UserError(f"there is no {init}: prepare.py --model writes it")
        model, _ = load_checkpoint(init)
        say(f"start   from {init}, preset {preset} {settings}")
    else:
        # 3) start from scratch, with a vocabulary of the data's size
        train_data, val_data, meta = load_data(values["data_dir"])
        torch.manual_seed(values["seed"])
        model = Gemma(make(GemmaConfig, values | {"vocab_size": meta["vocab_size"]} | given))
        say(f"start   from scratch, preset {preset} {settings}")

    config = make(TrainConfig, values)
    shape = asdict(model.config)
    if any(name in shape and shape[name] != value for name, value in given.items()):
        raise UserError("the model has another shape than the flags say")
    if meta["vocab_size"] > model.config.vocab_size:
        raise UserError(f"vocab_size {model.config.vocab_size} is less than that of the data")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if config.grad_accum % world != 0:
        raise UserError(f"{world} processes cannot share grad_accum {config.grad_accum} evenly")
    if state is not None and state["step"] >= config.steps:
        say(f"nothing is left to do: max_iters is {config.max_iters:,}")
        return
    device = pick_device(config.device)
    if device.type == "cpu" and config.device == "auto" and shutil.which("nvidia-smi"):
        say("device  nvidia-smi is there, but torch cannot use a GPU: check driver and torch")
    # A resumed run will have the same dtype, wherever it runs.
    config.dtype = str(pick_dtype(config.dtype, device)).removeprefix("torch.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    say(f"data    {meta['source']}, {len(train_data):,} + {len(val_data):,} tokens")
    say(f"model   {model.num_parameters():,} parameters, {model.config.vocab_size:,} words")
    say(f"run     {config.steps:,} steps on {world} x {name} in {config.dtype}, to {out}")

    # Whatever happens, the process group and the handlers of signals are put back.
    with contextlib.ExitStack() as at_end:
        if world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            at_end.callback(dist.destroy_process_group)
        stop_times.clear()
        for signal_name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, signal_name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                previous = signal.signal(number, request_stop)
                at_end.callback(signal.signal, number, previous)
        train(config, model, train_data, val_data, meta, state)


if __name__ == "__main__":
    if sys.stdout:  # a closed one is None
        sys.stdout.reconfigure(errors="replace")  # for a terminal that lacks a character
    try:
        main()
    except (UserError, PermissionError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"gemma270m.py: error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
