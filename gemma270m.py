"""Gemma 3 270M in one file: the model, its training loop and its command line, in plain PyTorch.
    python prepare.py                           # TinyStories as tokens in data/
    python gemma270m.py                         # trains; writes out.pt and out.csv
    python sample.py --ckpt out.pt              # tells a story
    torchrun --nproc_per_node 4 gemma270m.py    # the same training on four GPUs
Gemma 3 Technical Report: arXiv 2503.19786. Letters in shapes: B sequences of T tokens, S positions attended
to, E emb_dim, H query heads, G key/value heads (n_kv_groups), D head_dim, V vocab_size, W sliding_window.
"""
import argparse, copy, functools, inspect, json, math, os, re, signal, tempfile, time, zipfile, zlib
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
import numpy as np, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F, tqdm
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch.utils import benchmark, checkpoint as recompute

# ---- configuration -----------------------------------------------------------------------------------
def require(condition, message):
    """Raises ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)
def require_valid(config, zeros=()):
    """Raises ValueError naming the first field of a config with a wrong type, or that is not positive."""
    for f, x in zip(fields(config), astuple(config)):
        kind = (float, int) if f.type is float else f.type
        fits = isinstance(x, kind) and (kind in (bool, str) or 0 < x < 2 ** 31)
        require(fits or x is f.default is None or x == 0 and f.name in zeros, f"{f.name} cannot be {x}")

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
    query_pre_attn_scalar: int = 256  # scores are divided by its square root; usually head_dim
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # one matrix for input embedding and output head
    def __post_init__(self):
        require_valid(self)
        require(self.n_heads % self.n_kv_groups == 0, f"n_kv_groups must divide n_heads, {self.n_heads}")
        require(self.head_dim % 2 == 0, "head_dim must be even: RoPE turns pairs")
    @property
    def layer_types(self) -> list[str]:
        places = range(1, self.n_layers + 1)
        return ["sliding_attention" if i % self.full_attention_every else "full_attention" for i in places]
OFFICIAL = ("vocab_size max_position_embeddings hidden_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim intermediate_size sliding_window sliding_window_pattern "
            "rope_local_base_freq rope_theta query_pre_attn_scalar rms_norm_eps tie_word_embeddings").split()
IMPLEMENTED = {  # OFFICIAL: config.json's names of GemmaConfig's fields, in order; here: other entries
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh", "attention_dropout": 0.0, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "rope_scaling": None, "use_bidirectional_attention": False}
PRESETS = {"270m": {},  # sets of flags; any flag given beside --preset wins
    "finetune": dict(batch_size=8, grad_accum=4, max_iters=800, warmup_iters=80, lr=5e-5, eval_interval=200),
    "tiny": dict(emb_dim=128, n_layers=6, n_heads=2, head_dim=32, hidden_dim=384, sliding_window=128,
                 full_attention_every=3, query_pre_attn_scalar=32, batch_size=3, block_size=720, grad_accum=1,
                 max_iters=800, warmup_iters=60, lr=5e-3, eval_interval=200, eval_tokens=32_768)}

@dataclass
class TrainConfig:
    """One training run. Raises ValueError naming the field that does not fit."""
    preset: str = "auto"  # 270m, tiny, finetune; auto: finetune with --init_from, 270m on a GPU, else tiny
    init_from: str = None  # model to fine-tune: a folder, as sample.py --export writes, or a name on the hub
    data_dir: str = "data"  # folder that prepare.py wrote
    out: str = "out.pt"  # checkpoint; the log lies beside it as .csv
    resume: bool = False  # continue the run in --out; flags given win; best leave batch_size and grad_accum
    overwrite: bool = False  # start anew although --out exists
    bench: bool = False  # time training on random tokens instead, without data and without writing a file
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
        require_valid(self, "warmup_iters min_lr beta1 beta2 weight_decay grad_clip seed".split())
        require(self.min_lr is None or self.min_lr <= self.lr, f"min_lr {self.min_lr} exceeds lr {self.lr}")
        require(max(self.beta1, self.beta2) < 1, f"beta1 {self.beta1} or beta2 {self.beta2} is too large")
        require(self.max_iters >= self.grad_accum, f"max_iters {self.max_iters} is less than grad_accum")
        require(self.preset in ("auto", *PRESETS), f"preset must be auto, {' or '.join(PRESETS)}")
        require(self.dtype in ("auto", "bfloat16", "float16", "float32"), f"dtype cannot be {self.dtype}")

# ---- layers and model --------------------------------------------------------------------------------
def compute_dtype(x):
    """The dtype in which matrix products on x run: autocast's where it is on, otherwise that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype

class RMSNorm(nn.Module):
    """Scales each vector to root mean square 1, then by 1 + weight. (..., dim) -> the same, in x's dtype.
    Zhang and Sennrich 2019 (arXiv 1910.07467). In float32 throughout: bfloat16 cannot tell 1 from 1.003."""
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.zeros(dim))
    def forward(self, x):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale * (1.0 + self.weight.float())).type_as(x)
def rope_tables(positions, head_dim, base):
    """Cosine and signed sine of the angle p / base^(2i/D) of position p and pair i. (T,) -> (2, T, D)
    Su et al. 2021 (arXiv 2104.09864), section 3.2. In float32: bfloat16 knows no position 257."""
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = torch.outer(positions.float(), frequency)  # (T, D/2)
    return torch.stack((angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)))
def apply_rope(x, rope):
    """Turns each pair (x[i], x[i + D/2]) by its position's angle. x (B, H, T, D), rope (2, T, D) -> as x"""
    (cos, sin), y = rope, x.float()
    return (y * cos + y.roll(x.size(-1) // 2, dims=-1) * sin).type_as(x)  # pairs are halves, not neighbours
def sliding_window_attention(q, k, v, window, scale):
    """Causal attention of the last T of S positions to `window` keys, the own one included, in memory linear
    in S. Beltagy et al. 2020 (arXiv 2004.05150), section 3.1. q (B, H, T, D), k, v (B, G, S, D) -> as q"""
    (B, H, T, D), S, attend = q.shape, k.size(2), F.scaled_dot_product_attention
    flash = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)  # kernels of half precision
    flash = flash and q.element_size() == 2 and D <= 256 and D % 8 == 0
    if not (flash and T == S <= window):  # the other ways want H heads
        k, v = (t.repeat_interleave(H // t.size(1), dim=1) for t in (k, v))
    if T == S <= window:
        return attend(q, k, v, is_causal=True, scale=scale, enable_gqa=flash)
    if flash:  # on an H200 twice as fast as FlexAttention and as the blocks below
        from torch.nn.attention.varlen import varlen_attn  # here: it takes a second, and only a GPU has it
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))  # (B * T or S, H, D)
        starts = torch.arange(B + 1, device=q.device, dtype=torch.int32)
        out = varlen_attn(q, k, v, starts * T, starts * S, T, S, scale=scale, window_size=(window - 1, 0))
        return out.unflatten(0, (B, T)).transpose(1, 2)
    def block(i):  # of queries, as long as the window: they see no key before those of the last block
        keys, place = slice(max(0, S - T + i - window), S - T + i + window), torch.arange(S, device=q.device)
        age = place[S - T:][i:i + window, None] - place[keys]  # of each key, seen from each query
        mask = (age >= 0) & (age < window)
        return attend(q[:, :, i:i + window], k[:, :, keys], v[:, :, keys], mask, scale=scale)
    return torch.cat([block(i) for i in range(0, T, window)], dim=2)
def cached_attention(store, positions, q, k, v, window, scale):
    """Attention at positions (T,), whose keys and values join a layer's store (2, B, G, size, D). -> as q"""
    size, new = store.size(3), torch.stack((k, v))  # (2, B, G, T, D)
    if len(positions) > 1:
        old = torch.arange(max(0, int(positions[0]) - size), int(positions[0]), device=q.device)
        k, v = torch.cat((store[:, :, :, old % size], new), dim=3)  # (B, G, S, D), in order
        store.index_copy_(3, positions[-size:] % size, new[:, :, :, -size:])
        return sliding_window_attention(q, k, v, window, scale)
    k, v = store.index_copy_(3, positions % size, new)
    empty = torch.arange(size, device=q.device) > positions  # the others in any order: RoPE marked the keys
    scores = (q * scale).unflatten(1, (k.size(1), -1)).squeeze(3) @ k.mT  # (B, G, H / G, size)
    p = scores.float().masked_fill(empty, -math.inf).softmax(-1).type_as(v)
    return (p @ v).flatten(1, 2).unsqueeze(2)

class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), q, k normalised. x (B, T, E), rope {base: table} -> as x"""
    def __init__(self, config, kind):
        super().__init__()
        E, H, G, D = config.emb_dim, config.n_heads, config.n_kv_groups, config.head_dim
        self.heads, self.scale = (H, G, G), config.query_pre_attn_scalar ** -0.5
        self.rope_base, self.window = ((config.rope_base, config.context_length) if kind == "full_attention"
                                       else (config.rope_local_base, config.sliding_window))
        self.q_proj, self.k_proj = nn.Linear(E, H * D, bias=False), nn.Linear(E, G * D, bias=False)
        self.v_proj, self.o_proj = nn.Linear(E, G * D, bias=False), nn.Linear(H * D, E, bias=False)
        self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)
    def qkv_weight(self):  # one product is faster than three
        return torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
    def forward(self, x, rope, cache=None):
        weight, *place = cache or (self.qkv_weight(),)  # cache: weight, the layer's store, positions of x
        y = F.linear(x, weight).unflatten(-1, (sum(self.heads), -1))  # (B, T, H + 2 G, D)
        q, k, v = y.split(self.heads, dim=2)  # (B, T, H or G, D)
        q = apply_rope(self.q_norm(q).transpose(1, 2), rope[self.rope_base])  # (B, H, T, D)
        k = apply_rope(self.k_norm(k).transpose(1, 2), rope[self.rope_base])  # (B, G, T, D)
        attend = functools.partial(cached_attention, *place) if cache else sliding_window_attention
        out = attend(q, k, v.transpose(1, 2), self.window, self.scale)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, E)

class FeedForward(nn.Module):
    """Feed-forward layer gated by a tanh-GELU (GeGLU, arXiv 2002.05202). (B, T, E) -> (B, T, E)"""
    def __init__(self, config):
        super().__init__()
        E, hidden = config.emb_dim, config.hidden_dim
        self.gate_proj, self.up_proj = nn.Linear(E, hidden, bias=False), nn.Linear(E, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, E, bias=False)
    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))

class Block(nn.Module):
    """Attention, then feed-forward, each between two norms. (B, T, E) -> (B, T, E)"""
    def __init__(self, config, kind):
        super().__init__()
        norm = functools.partial(RMSNorm, config.emb_dim, config.norm_eps)
        self.self_attn, self.mlp = Attention(config, kind), FeedForward(config)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
    def forward(self, x, rope, cache=None):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, cache))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
def run_blocks(blocks, x, rope, caches, recomputed):
    """x through some blocks; recomputed ones keep nothing for the backward pass. (B, T, E) -> (B, T, E)"""
    for block, cache in zip(blocks, caches):
        run = functools.partial(recompute.checkpoint, block, use_reentrant=False, preserve_rng_state=False)
        x = (run if recomputed else block)(x, rope, cache)
    return x

class KVCache:
    """Each layer's q, k, v weights, and keys and values of max_length positions (unchecked) or the last W."""
    def __init__(self, model, batch_size, max_length):
        c, head, self.layers = model.config, model.head, []
        self.length = head.new_zeros((), dtype=torch.long)  # a tensor: the host need not wait
        for layer in (block.self_attn for block in model.layers):
            shape = 2, batch_size, c.n_kv_groups, min(max_length, layer.window), c.head_dim
            self.layers.append((layer.qkv_weight(), head.new_zeros(shape, dtype=compute_dtype(head))))
def softmax_loss(logits, targets, vocab_size):
    """Summed loss over the first vocab_size columns, without targets of -1; its gradient. (N, V), (N, 1)"""
    z, seen = logits.float(), targets >= 0
    z[:, vocab_size:] = -math.inf
    z = z.log_softmax(1)
    loss = -(z.gather(1, targets.clamp(min=0)) * seen).sum()
    wanted = torch.arange(z.size(1), device=z.device) == targets  # subtracted in float32: p - 1 may be tiny
    return loss, z.exp_().add_(wanted, alpha=-1).mul_(seen).type_as(logits)

class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of x @ head.T, in training with gradient. x (N, E), head (V, E), targets (N,)"""
    logits = 2 ** 28  # at a time: 0.5 GB in half precision
    @staticmethod
    def forward(ctx, x, head, targets, softmax_loss, training):
        V, N, head = len(head), max(1, min(4096, ChunkedLoss.logits // len(head))), head.type_as(x)
        head = F.pad(head, (0, 0, 0, -V % 64)) if x.is_cuda and V % 64 else head  # faster in multiples of 64
        total, x_grad, head_grad = 0.0, [], None
        for rows, target in zip(x.split(N), targets[:, None].split(N)):
            loss, grad = softmax_loss(rows @ head.T, target, V)
            total = total + loss
            if training:  # at once: the logits are too large to keep
                part, x_grad = grad.T @ rows, [*x_grad, grad @ head]
                head_grad = part.float() if head_grad is None else head_grad.add_(part)
        ctx.save_for_backward(torch.cat(x_grad), head_grad[:V]) if training else None
        return total
    @staticmethod
    def backward(ctx, scale):
        return *(gradient.mul_(scale) for gradient in ctx.saved_tensors), None, None, None

class Gemma(nn.Module):
    """Gemma 3: model(tokens) -> logits (B, T, V); model(tokens, targets) -> mean cross-entropy, a scalar.
    tokens, targets: (B, T); targets of -1 are ignored. Raises ValueError if T exceeds the context."""
    def __init__(self, config):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.emb_dim)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = RMSNorm(config.emb_dim, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # norms undo a matrix's scale: the smaller it is, the more an update does
                nn.init.normal_(weight, std=config.emb_dim ** -0.5 if name.startswith("embed") else 0.005)
        self.rope_tables, self.run_blocks, self.softmax_loss = rope_tables, run_blocks, softmax_loss
    @property
    def head(self):  # (V, E)
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight
    def compile(self, **options):
        """Compiles what repeats: about as fast as torch.compile(model), and ready in a third of the time."""
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is, after a warning
        self.run_blocks = torch.compile(run_blocks, dynamic=False, **options)
        self.rope_tables, self.softmax_loss = map(torch.compile(dynamic=False), (rope_tables, softmax_loss))
    def features(self, tokens, cache=None):
        """What the output head reads. (B, T) -> (B, T, E)"""
        T, c = tokens.size(1), self.config
        require(T <= c.context_length, f"{T} tokens exceed the context, {c.context_length}")
        run = self.run_blocks if cache is None or T == 1 else run_blocks  # a prompt's length seldom recurs
        tables = self.rope_tables if T == 1 else rope_tables  # only with one token do its small kernels count
        positions = torch.arange(T, device=tokens.device) + (cache.length if cache else 0)
        caches = [(*layer, positions) for layer in cache.layers] if cache else [None] * len(self.layers)
        cache.length.add_(T) if cache else None
        rope = {base: tables(positions, c.head_dim, base) for base in (c.rope_local_base, c.rope_base)}
        x = self.embed_tokens(tokens)  # (B, T, E)
        x = x * torch.tensor(c.emb_dim ** 0.5, dtype=x.dtype)  # 25.25 in bfloat16, as in Gemma
        if torch.is_autocast_enabled(x.device.type):  # less memory to move; in float16 the sum could overflow
            x = x.to(torch.bfloat16 if compute_dtype(x) == torch.bfloat16 else torch.float32)
        for i in range(0, c.n_layers, n := c.full_attention_every):  # equal groups: one compilation for all
            x = run(self.layers[i:i + n], x, rope, caches[i:i + n], self.checkpoint_activations)
        return self.norm(x)
    def forward(self, tokens, targets=None, cache=None):
        x = self.features(tokens, cache)
        if targets is None:
            return F.linear(x, self.head)  # (B, T, V)
        x, targets = x.flatten(0, 1).to(compute_dtype(x)), targets.flatten()
        loss = ChunkedLoss.apply(x, self.head, targets, self.softmax_loss, torch.is_grad_enabled())
        return loss / (targets >= 0).sum().clamp(min=1)
    @torch.inference_mode()
    def stream(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_token=None,
               generator=None):
        """Yields (B,) tokens, one position at a time, that continue tokens (B, T); temperature 0 is greedy.
        Ends after max_new_tokens or when every row has produced stop_token, which rows repeat until then."""
        (B, T), context = tokens.shape, self.config.context_length
        require(0 < T <= T + max_new_tokens <= context, f"{T} + {max_new_tokens} tokens, not 1 to {context}")
        fits = 0 <= temperature < 1e9 and (top_k is None or top_k > 0) and (top_p is None or 0 < top_p <= 1)
        require(fits, f"temperature {temperature}, top_k {top_k} or top_p {top_p} is out of range")
        head = F.pad(self.head, (0, 0, 0, -len(self.head) % 64)) if tokens.is_cuda else self.head
        cache, stopped = KVCache(self, B, T + max_new_tokens), tokens.new_zeros(B, dtype=torch.bool)
        def predict(tokens):
            with torch.backends.mkldnn.flags(tokens.numel() > 1, None, None, None):  # slow with a single row
                return F.linear(self.features(tokens, cache)[:, -1], head)[:, :len(self.head)].float()
        for made in range(max_new_tokens):
            if made == 1 and tokens.is_cuda:  # into a clone, since replaying writes to what was recorded
                predict = torch.cuda.make_graphed_callables(predict, (tokens.clone(),), num_warmup_iters=1)
                cache.length -= 1  # recording took a step
            new = sample_token(predict(tokens), temperature, top_k, top_p, generator)
            new = new.masked_fill(stopped, stop_token or 0)
            stopped |= new == stop_token  # nothing equals None
            yield new
            if stop_token is not None and stopped.all():
                return
            tokens = new[:, None]
    def generate(self, tokens, *args, **kwargs):
        """tokens (B, T) and the n that stream, given the same arguments, yields. -> (B, T + n)"""
        return torch.stack((*tokens.T, *self.stream(tokens, *args, **kwargs)), dim=1)
    @classmethod
    def from_pretrained(cls, folder):
        """The Gemma3ForCausalLM in a folder or on the hub, in float32. ValueError names what does not fit."""
        try:
            if str(folder).count("/") == 1 and not os.path.isdir(folder):
                folder = snapshot_download(str(folder), allow_patterns=["config.json", "model*.safetensors"])
            given = {"tie_word_embeddings": True, **json.loads(Path(folder, "config.json").read_text())}
            for kind, rope in (given.get("rope_parameters") or {}).items():  # the newer spelling
                given[{"full_attention": "rope_theta"}.get(kind, "rope_local_base_freq")] = rope["rope_theta"]
                require(rope["rope_type"] == "default", f"rope_parameters {rope} is not implemented")
            for name, value in IMPLEMENTED.items():
                require(given.get(name) in (value, None), f"{name} {given.get(name)} is not implemented")
            if types := given.get("layer_types"):
                given["sliding_window_pattern"] = [*types, "full_attention"].index("full_attention") + 1
            config = GemmaConfig(*(given[name] for name in OFFICIAL))
            require(types in (None, config.layer_types), f"layer_types {types} is not implemented")
            files = map(load_file, Path(folder).glob("model*.safetensors"))
            weights = {name.removeprefix("model."): w for file in files for name, w in file.items()}
            for name, w in weights.items():
                require(w.is_floating_point() and w.isfinite().all(), f"{name} is not of finite floats")
            model = cls(config)
            model.load_state_dict(weights)
        except Exception as error:  # json, safetensors and the hub raise very different things
            raise ValueError(f"{folder} cannot be loaded: {' '.join(str(error).split()):.300}") from None
        return model
    def save_pretrained(self, folder, tokenizer=None):
        """Writes what transformers reads to a new or empty folder. Raises ValueError or OSError otherwise."""
        require(not any(Path(folder).glob("*")), f"{folder} is not empty: name a new folder")
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos")}
        config = {**IMPLEMENTED, **dict(zip(OFFICIAL, astuple(self.config))), "dtype": "float32", **ids,
                  "layer_types": self.config.layer_types, "pad_token_id": None}
        weights = {("" if name == "lm_head.weight" else "model.") + name: weight.float().cpu()
                   for name, weight in self.state_dict().items()}
        with tempfile.TemporaryDirectory(dir=Path(folder).parent) as temporary:  # it appears when it is whole
            (part := Path(temporary, "part")).mkdir()
            tokenizer.save_pretrained(part) if tokenizer is not None else None
            save_file(weights, part / "model.safetensors", {"format": "pt"})
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            part.replace(folder)
    def num_parameters(self):
        """Trainable numbers; those of a tied head count once."""
        return sum(weight.numel() for weight in self.parameters())
    def flops_per_token(self, T):
        """Operations of a training step for a token in sequences of T (arXiv 2001.08361, section 2.1)."""
        keys = sum(W - W * (W - 1) / (2 * T) for W in (min(T, b.self_attn.window) for b in self.layers))
        weights = self.head.numel() + sum(w.numel() for w in self.layers.parameters() if w.ndim == 2)
        return 6 * weights + 12 * self.config.n_heads * self.config.head_dim * keys
def sample_token(logits, temperature, top_k=None, top_p=None, generator=None):
    """Draws a token from each row of logits by the Gumbel-max trick (arXiv 1611.01144). (B, V) -> (B,)"""
    if temperature < 1e-6:  # the quotient could overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if cut := top_k is not None or top_p is not None:
        logits, tokens = logits.topk(min(top_k or logits.size(1), logits.size(1)))  # in falling order
        p = logits.softmax(-1)  # the fewest that hold top_p stay (arXiv 1904.09751)
        logits = logits.masked_fill(p.cumsum(-1) - p >= (top_p or math.inf), -math.inf)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    drawn = (logits - noise.log()).argmax(-1)  # torch.multinomial would wait for the GPU
    return tokens.gather(1, drawn[:, None]).squeeze(1) if cut else drawn

# ---- data and schedule -------------------------------------------------------------------------------
def load_data(folder):
    """Memory maps of the folder's train.bin and val.bin, and what its meta.json says. Raises ValueError."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        train, val = (np.memmap(Path(folder, name), meta["dtype"], "r") for name in ("train.bin", "val.bin"))
        crc32, text = meta.pop("crc32"), json.dumps(meta, sort_keys=True)
        require(len(val) > 1, "val.bin is too short")
        require(crc32 == zlib.crc32(text.encode(), zlib.crc32(val, zlib.crc32(train))), "a checksum differs")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"no usable data in {folder} ({error}): run python prepare.py") from None
    return train, val, meta
@functools.lru_cache(maxsize=2)
def block_order(n_blocks, seed, epoch):
    """The order in which an epoch visits the blocks of the training data."""
    return np.random.default_rng((seed, epoch)).permutation(n_blocks)
def training_blocks(iteration, batch_size, n_blocks, seed):
    """The blocks of one micro-batch: they depend on these numbers alone, none twice in an epoch."""
    sequences = range(iteration * batch_size, (iteration + 1) * batch_size)
    return [int(block_order(n_blocks, seed, i // n_blocks)[i % n_blocks]) for i in sequences]
def get_batch(data, blocks, T, device):
    """Inputs and targets, the same tokens one place apart; past the data's end targets are -1. 2 x (B, T)"""
    pieces = [data[i * T:(i + 1) * T + 1].astype(np.int64) for i in blocks]
    rows = torch.from_numpy(np.stack([np.pad(p, (0, T + 1 - len(p)), constant_values=-1) for p in pieces]))
    rows = (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)
    return rows[:, :-1].clamp(min=0), rows[:, 1:]
def learning_rate(config, step):
    """The rate of an update: linear warm-up to lr, then a cosine that reaches min_lr in the last one."""
    min_lr = config.lr / 10 if config.min_lr is None else config.min_lr
    iteration, last = (n * config.grad_accum for n in (step + 1, config.max_iters // config.grad_accum))
    rise = min(1.0, iteration / max(1, config.warmup_iters))
    progress = min(1.0, max(0, iteration - config.warmup_iters) / max(1, last - config.warmup_iters))
    return rise * (min_lr + (config.lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2)
@torch.no_grad()
def evaluate(model, data, config, autocast, rank=0, world=1):
    """Mean loss over the same tokens each time, whatever the batch size and the number of processes."""
    blocks, wanted = (math.ceil(n / config.block_size) for n in (len(data) - 1, config.eval_tokens))
    chosen = np.linspace(0, blocks, min(blocks, wanted), endpoint=False, dtype=int)  # all over val.bin
    total = torch.zeros(2, dtype=torch.float64, device=model.head.device)  # loss, tokens
    for i in range(rank * config.batch_size, len(chosen), world * config.batch_size):
        x, y = get_batch(data, chosen[i:i + config.batch_size], config.block_size, total.device)
        with autocast:
            loss, tokens = model(x, y), (y >= 0).sum()
        total += torch.stack((loss * tokens, tokens))
    dist.all_reduce(total) if world > 1 else None
    return (total[0] / total[1]).item()

# ---- checkpoint --------------------------------------------------------------------------------------
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
        require(zipfile.ZipFile(path).testzip() is None, "a checksum does not fit")
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["model_config"] = GemmaConfig(**state["model_config"])
        state["train_config"] = TrainConfig(**state["train_config"])
        require({*"data iteration rows skips losses optimizer scaler".split()} <= state.keys(), "incomplete")
        with torch.device("meta"):  # whether the weights fit
            Gemma(state["model_config"]).load_state_dict(dict(state["model"]), assign=True)
        require(all(weight.isfinite().all() for weight in state["model"].values()), "weights are not finite")
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        raise ValueError(f"{path} cannot be loaded as a checkpoint: {error!r:.120}") from None
    return state

# ---- training ----------------------------------------------------------------------------------------
def pick_device(name="auto"):
    """A torch.device; under torchrun each process has its own GPU. Raises ValueError if it is not there."""
    cuda = name == "cuda" or name == "auto" and torch.cuda.is_available()
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu" if name == "auto" else name
    here = ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())))
    require(name in here, f"device {name} is not here, only {', '.join(here)}")
    torch.cuda.set_device(name) if name.startswith("cuda") else None
    return torch.device(name)
def pick_dtype(name, device):
    """The dtype to compute in, and why; training keeps weights, optimizer, norms and loss in float32."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":  # torch.cuda.is_bf16_supported() counts emulation and says yes on a T4
        major, minor = torch.cuda.get_device_capability(device)
        fast = torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
        return fast, f"compute capability {major}.{minor}"
    full, half = (benchmark.Timer("a @ a", globals=dict(a=torch.ones(512, 512, dtype=t))).blocked_autorange(
        min_run_time=0.1).median for t in (torch.float32, torch.bfloat16))  # some CPUs only emulate it
    return (torch.bfloat16 if half < 0.8 * full else torch.float32), f"bfloat16 {full / half:.2g} x as fast"
def bench(config, model, dtype, began, work, update, x, y):
    """Prints how long training takes, its memory, and its share of the device's rate in matrix products."""
    seconds = lambda f: benchmark.Timer("f()", globals=dict(f=f), num_threads=threads).blocked_autorange(
        min_run_time=3).median  # of a call
    work(x, y)
    update(0.0)
    ready, threads = time.perf_counter() - began, torch.get_num_threads()
    a = torch.randn((8192, 8192) if x.is_cuda else (2048, 2048), device=x.device).to(dtype)
    iteration = seconds(lambda: work(x, y)) + seconds(lambda: update(0.0)) / config.grad_accum
    chip, tokens = 2 * len(a) ** 3 / seconds(lambda: a @ a), x.numel() / iteration  # each a second
    speed, memory = tokens * model.flops_per_token(config.block_size), torch.cuda.max_memory_allocated()
    print(f"start   {ready:.0f} s to the first iteration and update; GPU memory {memory / 2 ** 30:.2f} GiB\n"
          f"speed   {1000 * iteration:.1f} ms an iteration, {config.max_iters:,} in "
          f"{tqdm.tqdm.format_interval(config.max_iters * iteration)}, {tokens:,.0f} tokens/s\n"
          f"chip    {speed / 1e12:.4g} TFLOP/s, {speed / chip:.1%} of a matrix product's {chip / 1e12:.4g}")
def train(config, model, data, state=None):
    """Trains model on what load_data gave, from a checkpoint's state if given; with config.bench times it."""
    began, (train_data, val_data, meta), accum = time.perf_counter(), data, config.grad_accum
    steps, step_tokens = config.max_iters // accum, config.batch_size * accum * config.block_size
    n_blocks, epochs = (len(train_data) - 1) // config.block_size, steps * step_tokens / len(train_data)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    require(world == 1 or not config.bench, "bench wants a single process")
    require(accum % world == 0, f"{world} processes cannot share grad_accum {accum}: take a multiple")
    dtype, reason = pick_dtype(config.dtype, device := pick_device(config.device))
    compiling = device.type == "cuda" if config.compile is None else config.compile
    dist.init_process_group("cpu:gloo" + ",cuda:nccl" * (device.type == "cuda")) if world > 1 else None
    say = (lambda line: (tqdm.tqdm.write(line), print(end="", flush=True))) if rank == 0 else lambda _: None
    say(f"model   {config.preset}, {model.num_parameters():,} parameters, {model.config.vocab_size:,} words\n"
        f"device  {world} x {device.type}, {str(dtype)[6:]} ({reason}){', compiled' * compiling}\n"
        f"data    {meta['tokenizer']}, {len(train_data):,} + {len(val_data):,} tokens, {epochs:.2f} epochs\n"
        f"run     {steps:,} steps of {step_tokens:,} tokens, lr {config.lr:g}, to {config.out}")
    weights = list(model.to(device).parameters())
    groups = [{"params": [w for w in weights if w.ndim > 1], "weight_decay": config.weight_decay},
              {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    step, rate, rows, losses, skips, faults, signals = 0, 0.0, [], [], 0, 0, []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())  # {} if it ran without one
        step, (rows, losses, skips) = state["iteration"] // accum, map(state.get, ("rows", "losses", "skips"))
    model.checkpoint_activations = config.checkpoint_activations
    compiled = copy.copy(model)  # with model's weights; validation keeps to model, ready without compiling
    compiled.compile() if compiling else None
    sums = torch.zeros(model.num_parameters() + 1, device=device)  # all gradients of a step and its loss
    *gradients, loss_sum = sums.split([*(weight.numel() for weight in weights), 1])
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient.view_as(weight)
    def accumulate(x, y):
        with autocast:
            loss = compiled(x, y) / accum
        scaler.scale(loss).backward()
        return loss_sum.add_(loss.detach())
    def update(rate):
        dist.all_reduce(sums) if world > 1 else None
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(weights, config.grad_clip or math.inf)
        loss, norm = torch.cat((loss_sum, norm[None])).tolist()
        if math.isfinite(norm) or scaler.is_enabled():  # the scaler skips an update by itself
            scaler.step(optimizer)
            scaler.update()
        sums.zero_()
        return loss, norm
    def fetch(iteration):
        blocks = training_blocks(iteration, config.batch_size, n_blocks, config.seed)
        return get_batch(train_data, blocks, config.block_size, device)
    def log(**row):
        rows.append({"iteration": step * accum, "step": step, **row})
        say(" | ".join(f"{name.replace('_', ' ')} {value:,.7g}" for name, value in rows[-1].items()))
    def save(needed):
        require(all(weight.isfinite().all() for weight in weights), f"weights are not finite at iteration "
                f"{step * accum:,}, lr {rate:.1e}; {config.out} stays as it was")
        try:
            save_checkpoint(config.out, {
                "model_config": asdict(model.config), "train_config": asdict(config), "data": meta,
                "iteration": step * accum, "rows": rows, "skips": skips, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "losses": losses})
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = (",".join(str(row.get(name, "")) for name in names) for row in rows)
            Path(f"{config.out.removesuffix('.pt')}.csv").write_text("\n".join((",".join(names), *table, "")))
        except (OSError, RuntimeError) as error:  # torch.save hides the first in the second
            os.remove(f"{config.out}.tmp") if os.path.isfile(f"{config.out}.tmp") else None
            why = f"{config.out} or its log cannot be written: {error.__context__ or error}"
            require(not needed, why)
            say(f"warning: {why}; training goes on")
    def validate():
        loss = evaluate(model, val_data, config, autocast, rank, world)
        log(val_loss=loss, perplexity=math.exp(min(loss, 700)))
        save(needed=step in (0, steps)) if rank == 0 else None
    def stop_soon(number, frame):
        if signals and time.monotonic() - signals[0] > 1:  # sooner, it is torchrun repeating a Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        signals.append(time.monotonic())
    (x, y), work, stop = fetch(step * accum + rank), accumulate, torch.zeros(())
    if device.type == "cuda":  # as a CUDA graph: one launch in place of thousands
        work = torch.cuda.make_graphed_callables(accumulate, (x, y), num_warmup_iters=1)
        sums.zero_()
    if config.bench:
        return bench(config, model, dtype, began, work, update, x, y)
    handlers = {number: signal.signal(number, stop_soon) for number in (signal.SIGINT, signal.SIGTERM)}
    validate() if not state else say(f"resumed at iteration {step * accum:,} of {steps * accum:,}")
    bar = tqdm.tqdm(total=steps * accum, initial=step * accum, unit="it", disable=rank > 0 or None)
    clock = time.perf_counter()
    for iteration in range(step * accum + rank, steps * accum, world):  # of each step, this process's share
        work(x, y)
        x, y = fetch(iteration + world)  # while the device computes
        bar.update(world)
        stop.fill_(len(signals))
        dist.all_reduce(stop) if world > 1 else None  # all leave or none, else the rest would wait
        if stop:  # the resumed run takes this step from its start
            save(needed=True) if rank == 0 else None
            say(f"stopped at iteration {step * accum:,}; {config.out} is up to date, --resume goes on here")
            break
        if (iteration + world) // accum == step:  # this process's next micro-batch is in the same step
            continue
        loss, norm = update(rate := learning_rate(config, step))
        step, losses, faults = step + 1, [*losses, loss], 0 if math.isfinite(norm) else faults + 1
        skips += faults > 0
        require(faults < (25 if scaler.is_enabled() else 3), f"no finite gradient in {faults} steps up to "
                f"iteration {step * accum:,}, lr {rate:.1e}; {config.out} is that of the last save")
        if step == steps or step * accum % config.log_interval < accum:  # a multiple lies in this step
            loss, losses, speed = sum(losses) / len(losses), [], step_tokens / (time.perf_counter() - clock)
            log(train_loss=loss, lr=rate, grad_norm=norm, skipped=skips, tokens_per_second=round(speed))
        if step == steps or step * accum % config.eval_interval < accum:
            validate()
        clock = time.perf_counter()
    list(map(signal.signal, handlers, handlers.values()))
    dist.destroy_process_group() if world > 1 else None

# ---- command line ------------------------------------------------------------------------------------
def settings(given):
    """The flags that were given -> TrainConfig, model, data, checkpoint or None. Raises ValueError."""
    out, preset = Path(given.get("out", TrainConfig.out)), given.get("preset", "auto")
    require(out.is_file() or out.parent.is_dir() and not out.exists(), f"out cannot be {out}")
    state = load_checkpoint(out) if given.get("resume") else None
    cuda = pick_device(given.get("device", "auto")).type == "cuda"
    fresh = "finetune" if "init_from" in given else "270m" if cuda else "tiny"
    preset = preset if preset != "auto" else state["train_config"].preset if state else fresh
    old = {**vars(state["model_config"]), **vars(state["train_config"])} if state else PRESETS.get(preset, {})
    values = {**old, **given, "preset": preset, "out": "no file" if given.get("bench") else str(out)}
    config, shape = (kind(**{name: values[name] for name in kind.__dataclass_fields__ if name in values})
                     for kind in (TrainConfig, GemmaConfig))
    fits = state or config.overwrite or config.bench or not out.exists()
    require(fits, f"{out} exists: --resume goes on with it, --overwrite starts anew, --out names another")
    noise = np.random.default_rng(0).integers(shape.vocab_size, size=2 ** 20)
    random = noise, noise, {"tokenizer": "random", "vocab_size": shape.vocab_size}
    data = tokens, _, meta = random if config.bench else load_data(config.data_dir)
    torch.manual_seed(config.seed)  # the same weights in every process
    source, shape.vocab_size = None if state else config.init_from, {**meta, **values}["vocab_size"]
    model = Gemma(shape) if source is None else Gemma.from_pretrained(source)
    require(source or state or config.bench or preset != "finetune", "preset finetune wants init_from")
    fits = source is None or meta["tokenizer"] in ("random", source, os.path.realpath(source))
    require(fits, f"init_from wants data of prepare.py --tokenizer {source}, not of {meta['tokenizer']}")
    require(source is None or not given.keys() & vars(shape).keys(), "init_from takes no flags of the model")
    words, most = model.config.vocab_size, min(len(tokens) - 1, model.config.context_length)
    require(meta["vocab_size"] <= words, f"vocab_size {words} is below the {meta['vocab_size']} of the data")
    kept = ["tokenizer"] if "data_dir" in given else list(meta)  # what the data must have in common
    before = state and [state["model_config"], state["train_config"].preset, *map(state["data"].get, kept)]
    fits = config.bench or before in (None, [model.config, preset, *map(meta.get, kept)])
    require(fits, f"resume: {out} has another model, vocabulary or data (--data_dir names other data)")
    require(config.block_size <= most, f"block_size {config.block_size} exceeds {most}, context or data")
    return config, model, data, state
def main(argv=None):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"gemma270m.py: error: {message}\n")
    for config in (TrainConfig, GemmaConfig):  # a field is a flag, the comment behind it the help text
        comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.M))
        for f in fields(config):
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
            parser.add_argument(f"--{f.name}", help=f"{comments[f.name]} (default: {f.default})", **kind)
    try:
        train(*settings(vars(parser.parse_args(argv))))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error).partition("\n")[0] or repr(error))
    except KeyboardInterrupt:
        parser.exit(130, "\n")

if __name__ == "__main__":
    main()
