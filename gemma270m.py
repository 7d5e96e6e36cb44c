"""Gemma 3 270M in one file: the model, its training loop and its command line, in plain PyTorch.

    python prepare.py                           # TinyStories as tokens in data/
    python gemma270m.py                         # trains; writes out.pt and out.csv
    python sample.py --ckpt out.pt              # tells a story
    torchrun --nproc_per_node 4 gemma270m.py    # the same training on four GPUs

The architecture is that of the Gemma 3 Technical Report (arXiv 2503.19786), with the parameter names of the
official checkpoint. Letters in shapes: B sequences, T tokens of each, S positions attended to, E emb_dim,
H query heads, G key/value heads (n_kv_groups), D head_dim, V vocab_size, W sliding_window.
"""
import argparse
import contextlib
import functools
import inspect
import json
import math
import os
import re
import signal
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

# ---- configuration -----------------------------------------------------------------------------------
def require(condition, message):
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)

def require_positive(config, or_zero=()):
    """Raises ValueError naming the first number of a config that is not positive and finite."""
    for name, value in vars(config).items():
        if type(value) in (int, float):
            require(0 < value < math.inf or value == 0 and name in or_zero, f"{name} cannot be {value}")

@dataclass
class GemmaConfig:
    """Shape of the model. Raises ValueError naming the field that does not fit."""
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
    query_pre_attn_scalar: float = 256  # scores are divided by its square root; usually head_dim
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # one matrix for input embedding and output head

    def __post_init__(self):
        require_positive(self)
        require(self.n_heads % self.n_kv_groups == 0, f"n_kv_groups must divide n_heads, {self.n_heads}")
        require(self.head_dim % 2 == 0, "head_dim must be even: RoPE turns pairs")

    @property
    def layer_types(self) -> list[str]:
        full = range(self.full_attention_every - 1, self.n_layers, self.full_attention_every)
        return ["full_attention" if i in full else "sliding_attention" for i in range(self.n_layers)]

PRESETS = {  # sets of flags; any flag given beside --preset wins
    "270m": {},
    "tiny": dict(emb_dim=128, n_layers=6, n_heads=2, head_dim=32, hidden_dim=384, sliding_window=128,
                 full_attention_every=3, query_pre_attn_scalar=32, batch_size=4, grad_accum=1, max_iters=800,
                 warmup_iters=60, lr=5e-3, eval_interval=200, eval_tokens=32_768, log_interval=50),
}

@dataclass
class TrainConfig:
    """One training run. Raises ValueError naming the field that does not fit."""
    preset: str = "auto"  # 270m, tiny, or auto: 270m on a GPU, tiny on a CPU
    data_dir: str = "data"  # folder that prepare.py wrote
    out: str = "out.pt"  # checkpoint; the log lies beside it as .csv (and .png if matplotlib is installed)
    resume: bool = False  # continue the run in --out; new flags count, but keep batch_size and grad_accum
    batch_size: int = 32  # sequences in a micro-batch; an iteration is one micro-batch
    grad_accum: int = 32  # micro-batches, over all processes, in a step (one optimizer update)
    block_size: int = 512  # tokens in a training sequence
    max_iters: int = 150_000  # length of the run, in iterations
    warmup_iters: int = 1_000  # iterations of linear warm-up
    lr: float = 1e-4  # peak learning rate
    min_lr: float = None  # learning rate at the end of the cosine; a tenth of lr if not given
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    weight_decay: float = 0.1  # on matrices only, not on norms
    grad_clip: float = 1.0  # largest gradient norm; 0 turns clipping off
    eval_interval: int = 500  # iterations between validations; each one writes the checkpoint
    eval_tokens: int = 524_288  # validation tokens, the same ones each time, spread over val.bin
    log_interval: int = 32  # iterations between log lines
    seed: int = 1337  # of the initial weights and of the order of the data
    device: str = "auto"  # cuda, cpu; auto takes a GPU if there is one
    dtype: str = "auto"  # bfloat16, float16, float32; auto takes what is fast and safe on this hardware
    compile: bool = None  # torch.compile the model; on CUDA if not given
    checkpoint_activations: bool = False  # recompute blocks in the backward pass: less memory, more time

    def __post_init__(self):
        require_positive(self, "warmup_iters min_lr beta1 beta2 weight_decay grad_clip seed".split())
        require(self.min_lr is None or self.min_lr <= self.lr, f"min_lr {self.min_lr} exceeds lr {self.lr}")
        require(self.beta1 < 1 and self.beta2 < 1, f"beta1 {self.beta1} or beta2 {self.beta2} is not below 1")
        require(self.max_iters >= self.grad_accum, f"max_iters {self.max_iters} is less than one step")
        require(self.preset in ("auto", *PRESETS), f"preset must be auto, {' or '.join(PRESETS)}")
        require(self.dtype in ("auto", "bfloat16", "float16", "float32"), f"dtype cannot be {self.dtype}")

# ---- layers ------------------------------------------------------------------------------------------
def compute_dtype(x):
    """The dtype in which matrix products on x run: autocast's where it is on, otherwise that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

class RMSNorm(nn.Module):
    """Scales each vector to root mean square 1, then by 1 + weight. (..., dim) -> the same, in x's dtype.
    Zhang and Sennrich 2019 (arXiv 1910.07467). In float32 throughout: bfloat16 cannot tell 1 from 1.003."""
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)

def rope_tables(length, head_dim, base, device=None):
    """Cosine and sine of the angle p / base^(2i/D) of position p and pair i. -> (2, length, D/2), float32
    Su et al. 2021 (arXiv 2104.09864), section 3.2. In bfloat16 the positions above 256 would collide."""
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency)  # (length, D/2)
    return torch.stack((angle.cos(), angle.sin()))

def apply_rope(x, rope):
    """Turns each pair (x[i], x[i + D/2]) by its position's angle. x (B, H, T, D), rope (2, T, D/2) -> as x"""
    cos, sin = rope
    x1, x2 = x.float().chunk(2, dim=-1)  # Gemma pairs the halves, not neighbours
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).type_as(x)

def grouped_attention(q, k, v, scale, mask=None, is_causal=False):
    """Softmax attention; H / G query heads share each k and v. q (B, H, T, D), k, v (B, G, S, D) -> as q"""
    flash = (q.is_cuda and mask is None and q.dtype != torch.float32
             and torch.cuda.get_device_capability(q.device) >= (8, 0))
    if not flash:  # the other kernels want H heads: a view for one key/value head, a copy for more
        k, v = (t.unsqueeze(2).expand(-1, -1, q.size(1) // t.size(1), -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=flash)

def sliding_window_attention(q, k, v, window, scale):
    """Causal attention to the last `window` keys, the own one included, in memory linear in T.
    q (B, H, T, D), k, v (B, G, T, D) -> as q. Beltagy et al. 2020 (arXiv 2004.05150), section 3.1. In blocks
    as long as the window, a query sees no key outside its own block and the one before: one mask fits all."""
    B, T = q.size(0), q.size(2)
    if T <= window:
        return grouped_attention(q, k, v, scale, is_causal=True)
    q, k, v = (F.pad(t, (0, 0, 0, -T % window)).unflatten(2, (-1, window)).transpose(1, 2)
               for t in (q, k, v))  # (B, n, heads, W, D) in n blocks
    first = grouped_attention(q[:, 0], k[:, 0], v[:, 0], scale, is_causal=True)  # (B, H, W, D)
    k, v = (torch.cat((t[:, :-1], t[:, 1:]), dim=3).flatten(0, 1) for t in (k, v))  # (B * (n - 1), G, 2W, D)
    place = torch.arange(2 * window, device=q.device)
    age = place[window:, None] - place  # (W, 2W), of each key, seen from each query
    rest = grouped_attention(q[:, 1:].flatten(0, 1), k, v, scale, mask=(age >= 0) & (age < window))
    out = torch.cat((first[:, None], rest.unflatten(0, (B, -1))), dim=1)  # (B, n, H, W, D)
    return out.transpose(1, 2).flatten(2, 3)[:, :, :T]

class KVCache:
    """Keys and values of the positions so far, for decoding without computing them again.
    A full layer keeps max_length positions, a sliding layer a ring of W in which position p has slot p % W.
    `length`, the positions so far, is a tensor, so that decoding never waits for the device."""
    def __init__(self, config, batch_size, max_length, device=None, dtype=torch.float32):
        self.length = torch.zeros((), dtype=torch.long, device=device)
        sizes = (min(max_length, config.sliding_window) if kind == "sliding_attention" else max_length
                 for kind in config.layer_types)
        self.layers = [torch.zeros(2, batch_size, config.n_kv_groups, size, config.head_dim, dtype=dtype,
                                   device=device) for size in sizes]

    def attend(self, layer, q, k, v, window, scale):
        """Stores the keys and values of T new positions and attends to all that is visible. -> as q"""
        T, store, size = q.size(2), self.layers[layer], self.layers[layer].size(3)
        new = torch.stack((k, v))  # (2, B, G, T, D)
        positions = self.length + torch.arange(T, device=q.device)
        if T == 1:
            store.index_copy_(3, positions % size, new)
            filled = torch.arange(size, device=q.device) <= positions  # in any order: RoPE marked the keys
            return grouped_attention(q, *store, scale, mask=filled[None])
        end = int(self.length)
        old = torch.arange(max(0, end - size), end, device=q.device)
        k, v = torch.cat((store[:, :, :, old % size], new), dim=3)  # (B, G, S, D), in order
        q = F.pad(q, (0, 0, len(old), 0))  # old keys get empty queries, so that the counts agree
        store.index_copy_(3, positions[-size:] % size, new[:, :, :, -size:])
        return sliding_window_attention(q, k, v, window, scale)[:, :, len(old):]

class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys. (B, T, E) -> (B, T, E)"""
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.scale = layer, config.head_dim, config.query_pre_attn_scalar ** -0.5
        sliding = config.layer_types[layer] == "sliding_attention"
        self.window = config.sliding_window if sliding else config.context_length
        self.q_proj = nn.Linear(config.emb_dim, config.n_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.emb_dim, config.n_kv_groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.emb_dim, config.n_kv_groups * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.emb_dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, rope, cache=None):
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim))
                   for project in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H or G, D)
        q = apply_rope(self.q_norm(q).transpose(1, 2), rope)  # (B, H, T, D)
        k = apply_rope(self.k_norm(k).transpose(1, 2), rope)  # (B, G, T, D)
        v = v.transpose(1, 2)
        attend = functools.partial(cache.attend, self.layer) if cache else sliding_window_attention
        out = attend(q, k, v, self.window, self.scale)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, E)

class FeedForward(nn.Module):
    """Feed-forward layer gated by a tanh-GELU (GeGLU, arXiv 2002.05202). (B, T, E) -> (B, T, E)"""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.up_proj = nn.Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.down_proj = nn.Linear(config.hidden_dim, config.emb_dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))

class Block(nn.Module):
    """Attention, then feed-forward, each between two norms. (B, T, E) -> (B, T, E)"""
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.emb_dim, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.emb_dim, config.norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.emb_dim, config.norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.emb_dim, config.norm_eps)

    def forward(self, x, rope, cache=None):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))

# ---- model -------------------------------------------------------------------------------------------
class Gemma(nn.Module):
    """Gemma 3: model(tokens) -> logits (B, T, V); model(tokens, targets) -> mean cross-entropy, a scalar.
    tokens, targets: (B, T); targets of -1 are ignored. Raises ValueError if T exceeds the context."""
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.emb_dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.emb_dim, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # norms undo a matrix's scale: the smaller it is, the more an update does
                nn.init.normal_(weight, std=config.emb_dim ** -0.5 if name.startswith("embed") else 0.005)
        self._apply(lambda tensor: tensor)  # makes the RoPE tables, which are neither weights nor buffers

    def _apply(self, fn, recurse=True):
        """Moves or casts the model, except its RoPE tables: they are made anew and stay in float32."""
        super()._apply(fn, recurse)
        bases = {"sliding_attention": self.config.rope_local_base, "full_attention": self.config.rope_base}
        make = functools.partial(rope_tables, self.config.context_length, self.config.head_dim)
        self.rope = {kind: make(base, self.head.device) for kind, base in bases.items()}
        return self

    @property
    def head(self):  # (V, E)
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def features(self, tokens, cache=None):
        """What the output head reads. (B, T) -> (B, T, E)"""
        T = tokens.size(1)
        require(T <= self.config.context_length, f"{T} tokens exceed context {self.config.context_length}")
        visited = slice(T) if cache is None else cache.length + torch.arange(T, device=tokens.device)
        rope = {kind: table[:, visited] for kind, table in self.rope.items()}  # (2, T, D/2)
        x = self.embed_tokens(tokens)  # (B, T, E)
        x = x * torch.tensor(self.config.emb_dim ** 0.5, dtype=x.dtype)  # 25.25 in bfloat16, as in Gemma
        if compute_dtype(x) == torch.bfloat16:  # less memory to move; in float16 the sum could overflow
            x = x.bfloat16()
        for block, kind in zip(self.layers, self.config.layer_types):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = recompute(block, x, rope[kind], use_reentrant=False)
            else:
                x = block(x, rope[kind], cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, tokens, targets=None, cache=None):
        x = self.features(tokens, cache)
        if targets is None:
            return F.linear(x, self.head)  # (B, T, V)

        def summed_loss(x, targets):  # (N, E), (N,) -> scalar
            return F.cross_entropy(F.linear(x, self.head).float(), targets, ignore_index=-1, reduction="sum")
        N = max(1, 2 ** 27 // self.config.vocab_size)  # 0.5 GB of float32 logits, recomputed in backward
        chunks = zip(x.flatten(0, 1).split(N), targets.flatten().split(N))
        total = sum(recompute(summed_loss, *chunk, use_reentrant=False) for chunk in chunks)
        return total / (targets >= 0).sum().clamp(min=1)

    @torch.inference_mode()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None,
               generator=None):
        """Yields (B,) tokens, one position at a time, that continue tokens (B, T); temperature 0 is greedy.
        Ends after max_new_tokens or when every row has produced stop_token, which rows repeat until then."""
        (B, T), context = tokens.shape, self.config.context_length
        require(T > 0, "the prompt is empty")
        require(T + max_new_tokens <= context, f"{T} + {max_new_tokens} tokens exceed the context, {context}")
        require(0 <= temperature < math.inf, f"temperature cannot be {temperature}")
        require(top_k is None or top_k > 0, f"top_k cannot be {top_k}")
        require(top_p is None or 0 < top_p <= 1, f"top_p must lie in (0, 1], not be {top_p}")
        cache = KVCache(self.config, B, T + max_new_tokens, tokens.device, compute_dtype(self.head))
        stopped = torch.zeros(B, dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            logits = F.linear(self.features(tokens, cache)[:, -1], self.head).float()  # (B, V)
            new = sample_token(logits, temperature, top_k, top_p, generator)
            if stop_token is not None:
                new = torch.where(stopped, stop_token, new)
                stopped |= new == stop_token
            yield new
            if stop_token is not None and stopped.all():
                return
            tokens = new[:, None]

    def generate(self, tokens, *args, **kwargs):
        """tokens (B, T) and the n that stream, given the same arguments, yields. -> (B, T + n)"""
        return torch.stack((*tokens.T, *self.stream(tokens, *args, **kwargs)), dim=1)

    def num_parameters(self):
        """Trainable numbers; those of a tied head count once."""
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self, T):
        """Operations per token of forward and backward on sequences of T tokens: six per weight of a matrix
        product (arXiv 2001.08361, section 2.1), twelve per entry of a visible key."""
        c = self.config
        spans = (min(T, c.sliding_window) if kind == "sliding_attention" else T for kind in c.layer_types)
        keys = sum(W - W * (W - 1) / (2 * T) for W in spans)  # seen by the average query, over all layers
        weights = self.head.numel() + sum(w.numel() for w in self.layers.parameters() if w.ndim == 2)
        return 6 * weights + 12 * c.n_heads * c.head_dim * keys

def sample_token(logits, temperature, top_k=None, top_p=None, generator=None):
    """Draws a token from each row of logits. (B, V) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        logits[logits < logits.topk(min(top_k, logits.size(1))).values[:, -1:]] = -math.inf
    if top_p is not None:  # nucleus sampling, arXiv 1904.09751: the fewest tokens that hold top_p together
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        logits = logits.scatter(1, index, ordered.masked_fill(p.cumsum(-1) - p >= top_p, -math.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)

# ---- data and schedule -------------------------------------------------------------------------------
def load_data(folder):
    """Memory maps of the folder's train.bin and val.bin, and what its meta.json says. Raises ValueError."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        train, val = (np.memmap(Path(folder, name), meta["dtype"], "r") for name in ("train.bin", "val.bin"))
        require(len(train) == meta["train_tokens"] and len(val) == meta["val_tokens"], "a file was cut short")
        require(meta.keys() >= {"tokenizer", "vocab_size", "end_of_text"}, "meta.json is incomplete")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"no usable data in {folder} ({error}): run python prepare.py") from None
    return train, val, meta

@functools.lru_cache(maxsize=2)
def block_order(n_blocks, seed, epoch):
    """The order in which an epoch visits the blocks of the training data."""
    return np.random.default_rng((seed, epoch)).permutation(n_blocks)

def training_blocks(iteration, batch_size, n_blocks, seed):
    """The blocks of one micro-batch: a function of nothing else, without repetition within an epoch."""
    sequences = range(iteration * batch_size, (iteration + 1) * batch_size)
    return [int(block_order(n_blocks, seed, i // n_blocks)[i % n_blocks]) for i in sequences]

def get_batch(data, blocks, block_size, device):
    """Inputs and targets, the same tokens one place apart; past the data's end targets are -1. 2 x (B, T)"""
    rows = np.full((len(blocks), block_size + 1), -1)
    for row, block in zip(rows, blocks):
        piece = data[block * block_size:(block + 1) * block_size + 1]
        row[:len(piece)] = piece
    rows = torch.from_numpy(rows)
    if device.type == "cuda":  # from pinned memory the copy runs beside the computation
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1].clamp(min=0), rows[:, 1:]

def learning_rate(config, step):
    """The rate of an update: linear warm-up to lr, then a cosine that reaches min_lr in the last one."""
    min_lr = config.lr / 10 if config.min_lr is None else config.min_lr
    iteration, last = (n * config.grad_accum for n in (step + 1, config.max_iters // config.grad_accum))
    if iteration < config.warmup_iters:
        return config.lr * iteration / config.warmup_iters
    progress = min(1.0, (iteration - config.warmup_iters) / max(1, last - config.warmup_iters))
    return min_lr + (config.lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2

@torch.no_grad()
def evaluate(model, data, config, autocast, rank=0, world=1):
    """Mean loss over the same tokens each time, whatever the batch size and the number of processes."""
    blocks = math.ceil((len(data) - 1) / config.block_size)
    count = min(blocks, math.ceil(config.eval_tokens / config.block_size))
    chosen = [i * blocks // count for i in range(count)]  # spread over the whole of val.bin
    total = torch.zeros(2, dtype=torch.float64, device=model.head.device)  # loss, tokens
    for start in range(rank * config.batch_size, count, world * config.batch_size):
        x, y = get_batch(data, chosen[start:start + config.batch_size], config.block_size, total.device)
        with autocast:
            loss, tokens = model(x, y), (y >= 0).sum()
        total += torch.stack((loss * tokens, tokens))
    if world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()

# ---- checkpoint and log ------------------------------------------------------------------------------
def save_checkpoint(path, state):
    """Writes tensors and plain values beside path, then renames: path is a whole checkpoint at any moment."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # the content must reach the disk before the new name does
    os.replace(f"{path}.tmp", path)

def load_checkpoint(path):
    """What train saved, on the CPU. Raises ValueError if the file is missing, damaged or something else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model_config"] = GemmaConfig(**state["model_config"])
        state["train_config"] = TrainConfig(**state["train_config"])
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        raise ValueError(f"{path} cannot be loaded as a checkpoint: {error!r:.120}") from None
    return state

LOG_FORMAT = {"iteration": ",", "step": ",", "train_loss": ".4f", "val_loss": ".4f", "perplexity": ".1f",
              "lr": ".2e", "grad_norm": ".2f", "tokens_per_second": ",.0f", "time_left": ""}

def write_log(path, rows):
    """Writes the log beside the checkpoint as CSV and, after a validation, with matplotlib as a picture."""
    table = [LOG_FORMAT, *([row.get(name, "") for name in LOG_FORMAT] for row in rows)]
    Path(path).with_suffix(".csv").write_text("".join(",".join(map(str, row)) + "\n" for row in table))
    with contextlib.suppress(ImportError):
        if "val_loss" in rows[-1]:
            from matplotlib.figure import Figure
            axes = Figure(layout="constrained").subplots()
            for name in ("train_loss", "val_loss"):
                points = {row["iteration"]: row[name] for row in rows if name in row}
                axes.plot(points.keys(), points.values(), label=name.replace("_", " "))
            axes.set(xlabel="iteration", ylabel="cross-entropy, nats per token")
            axes.legend()
            axes.figure.savefig(Path(path).with_suffix(".png"))

# ---- training ----------------------------------------------------------------------------------------
def pick_device(name="auto"):
    """A torch.device; under torchrun each process has its own GPU. Raises ValueError if it is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    here = ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))
    require(name in here, f"device {name} is not here, only {', '.join(here)}")
    return torch.device(name)

def pick_dtype(name, device):
    """The dtype of activations, and why; weights, optimizer, norms and loss are float32 in any case."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() counts emulation and says yes on a T4
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 7:
            return (torch.bfloat16 if major >= 8 else torch.float16), f"compute capability {major}.{minor}"
    elif torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has instructions for it"
    return torch.float32, "this hardware has nothing faster"

def train(config, model_config, state=None):
    """Trains as config says and leaves config.out; state is a checkpoint to continue.
    Under torchrun each process runs this; micro-batch i of a step belongs to process i % world."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    accum, steps = config.grad_accum, config.max_iters // config.grad_accum
    require(accum % world == 0, f"grad_accum {accum} cannot be divided among {world} processes")
    device = pick_device(config.device)
    dtype, reason = pick_dtype(config.dtype, device)
    train_data, val_data, meta = load_data(config.data_dir)
    n_blocks = (len(train_data) - 1) // config.block_size
    require(n_blocks > 0, f"block_size {config.block_size} exceeds the {len(train_data)} tokens of train.bin")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = tqdm.write if rank == 0 else lambda line: None
    torch.manual_seed(config.seed)
    model = Gemma(model_config).to(device)
    model.checkpoint_activations = config.checkpoint_activations
    groups = [{"params": [w for w in model.parameters() if w.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [w for w in model.parameters() if w.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step, rows, losses = 0, [], []  # losses of the steps since the last log line
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())  # empty if it ran without one
        step, rows = state["iteration"] // accum, state["rows"]
        losses = [loss.to(device) for loss in state["losses"]]

    def fetch(iteration):
        blocks = training_blocks(iteration, config.batch_size, n_blocks, config.seed)
        return get_batch(train_data, blocks, config.block_size, device)
    x, y = fetch(step * accum + rank)
    step_tokens = config.batch_size * accum * config.block_size
    compiling = device.type == "cuda" if config.compile is None else config.compile
    say(f"model   {config.preset}, {model.num_parameters():,} parameters, {model_config.vocab_size:,} words\n"
        f"data    {config.data_dir}, {meta['tokenizer']}, {len(train_data):,} + {len(val_data):,} tokens\n"
        f"run     {config.max_iters:,} iterations, {steps:,} steps of {step_tokens:,} tokens, "
        f"{steps * step_tokens / len(train_data):.2f} epochs\n"
        f"device  {world} x {device.type}, {str(dtype)[6:]} ({reason}), torch {torch.__version__}, "
        f"{'compiling takes a minute' if compiling else 'not compiled'}\n"
        f"writes  {config.out} at each validation, {Path(config.out).with_suffix('.csv')} at each line")
    if config.preset == "tiny":
        say("note    the tiny model is for a first look on a CPU; --preset 270m trains the full one")
    def stop(number, frame):
        nonlocal stopping
        stopping = True
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once

    stopping = False
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    run = torch.compile(model) if compiling else model
    if compiling:
        try:
            with autocast:
                run(x, y).backward()
        except Exception as error:
            say(f"warning: torch.compile failed ({error!r:.200}); going on without it")
            run = model
        optimizer.zero_grad()
    run = nn.parallel.DistributedDataParallel(run, gradient_as_bucket_view=True) if world > 1 else run
    def log(**row):
        row = {"iteration": step * accum, "step": step, **row}
        say(" | ".join(f"{name.replace('_', ' ')} {value:{LOG_FORMAT[name]}}" for name, value in row.items()))
        rows.append(row)
        if rank == 0:
            write_log(config.out, rows)

    def save():
        if rank == 0:
            save_checkpoint(config.out, {
                "model_config": asdict(model_config), "train_config": asdict(config), "data": meta,
                "iteration": step * accum, "rows": rows, "losses": losses, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})

    def validate():
        loss = evaluate(model, val_data, config, autocast, rank, world)
        log(val_loss=loss, perplexity=math.exp(min(loss, 700)))
        save()

    def due(interval):  # at the first step's end at or after each multiple, and at the end of the run
        return step == steps or step * accum % interval < accum
    if not state:
        validate()
    say(f"nothing left to do after iteration {step * accum:,}") if step >= steps else None
    bar = tqdm(total=steps * accum, initial=step * accum, unit="it", disable=rank > 0 or None)
    clock, clocked = time.perf_counter(), step
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        total = torch.zeros((), device=device)
        for micro in range(rank, accum, world):
            last = micro + world >= accum
            with contextlib.nullcontext() if last or world == 1 else run.no_sync():
                with autocast:
                    loss = run(x, y) / accum
                scaler.scale(loss * world).backward()  # DistributedDataParallel averages over the processes
            total += loss.detach()
            x, y = fetch(step * accum + micro + world)  # while the device computes
            bar.update(world)
            if stopping:
                break
        if stopping:  # the resumed run takes this step from its start
            break
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total)
        step += 1
        if due(config.log_interval):
            seconds = (time.perf_counter() - clock) / (step - clocked)
            mean, losses = torch.stack(losses).mean().item(), []
            left = tqdm.format_interval(seconds * (steps - step))
            log(train_loss=mean, lr=learning_rate(config, step - 1), grad_norm=norm.item(),
                tokens_per_second=step_tokens / seconds, time_left=left)
            clock, clocked = time.perf_counter(), step
        if due(config.eval_interval):
            validate()
            clock, clocked = time.perf_counter(), step  # the speed is that of training alone
    bar.close()
    if stopping:
        save()
        say(f"stopped at iteration {step * accum:,}; {config.out} is up to date, --resume goes on from there")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if world > 1:
        dist.destroy_process_group()

# ---- command line ------------------------------------------------------------------------------------
def add_flags(parser, config_class):
    """One flag for each field of a dataclass; the comment behind the field is its help text."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config_class), re.MULTILINE))
    for field in fields(config_class):
        kind = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
        help = f"{comments[field.name]} (default: {field.default})"
        parser.add_argument(f"--{field.name}", help=help, **kind)

def settings(given):
    """The flags that were given -> (TrainConfig, GemmaConfig, checkpoint or None). Raises ValueError."""
    out = given.setdefault("out", TrainConfig.out)
    state = load_checkpoint(out) if given.get("resume") else None
    if given.get("preset", "auto") == "auto":
        on_gpu = pick_device(given.get("device", "auto")).type == "cuda"
        given["preset"] = state["train_config"].preset if state else "270m" if on_gpu else "tiny"
    given = given if state else {**PRESETS.get(given["preset"], {}), **given}
    model_given = {name: given.pop(name) for name in list(given) if name in GemmaConfig.__dataclass_fields__}
    config = replace(state["train_config"], **given) if state else TrainConfig(**given)
    meta = load_data(config.data_dir)[-1]
    if state:
        model_config = replace(state["model_config"], **model_given)
        same = model_config == state["model_config"] and config.preset == state["train_config"].preset
        require(same, f"resume: {out} holds another model than these flags describe")
        same = all(meta[key] == state["data"][key] for key in ("tokenizer", "vocab_size"))
        require(same, f"resume: the data in {config.data_dir} have another vocabulary than {out}")
    else:
        model_config = GemmaConfig(**{"vocab_size": meta["vocab_size"], **model_given})
    for name, value, limit in (("vocab_size", meta["vocab_size"], model_config.vocab_size),
                               ("block_size", config.block_size, model_config.context_length)):
        require(value <= limit, f"{name}: {value} does not fit a model made for {limit}")
    require(not Path(out).is_dir() and Path(out).suffix not in (".csv", ".png"), f"out cannot be {out}")
    return config, model_config, state

def main(argv=None):
    parser = argparse.ArgumentParser(description="Trains Gemma 3 on the tokens that prepare.py wrote.",
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"gemma270m.py: error: {message}\n")
    add_flags(parser.add_argument_group("training"), TrainConfig)
    add_flags(parser.add_argument_group("model"), GemmaConfig)
    try:
        train(*settings(vars(parser.parse_args(argv))))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error).splitlines()[0])

if __name__ == "__main__":
    main()
