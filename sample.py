"""Continues a prompt with a model of gemma270m.py, shown as it comes; or exports the model.

python sample.py --ckpt out.pt --prompt "Once upon a time"
python sample.py --ckpt out.pt --prompt FILE:start.txt --num_samples 4 --temperature 0.7
python sample.py --ckpt FOLDER --chat "Why is the sky blue?"    # a model of transformers
python sample.py --ckpt out.pt --export FOLDER                  # for transformers
"""

import argparse
import contextlib
import functools
import json
import math
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from gemma270m import Gemma, UserError, causal_attention, load_checkpoint, pick_device, pick_dtype
from prepare import FIELDS, Tokenizer, read_model


# ---- Cache ---------------------------------------------------------------------------------------
class LayerCache:
    """The keys and values of one layer, and attention to them in place of causal_attention.

    They lie in a ring buffer as long as the layer's window: position p has place p % size, where it
    overwrites one that no later query sees. The order of places does not matter to attention,
    because RoPE has turned each key by its position.
    """

    def __init__(self, length, shape, like):
        self.length = length  # positions so far, a tensor that all layers share
        self.keys = torch.zeros(shape, dtype=like.dtype, device=like.device)  # (B, G, size, D)
        self.values = torch.zeros_like(self.keys)

    def __call__(self, q, k, v, window, scale):
        """Stores k, v (B, G, T, D) and attends with q (B, H, T, D).

        T is 1, but for the first call, which takes the prompt.
        """
        T = k.size(2)
        size = self.keys.size(2)
        positions = self.length + torch.arange(T, device=k.device)
        places = positions[-size:] % size
        self.keys.index_copy_(2, places, k[:, :, -size:].type_as(self.keys))
        self.values.index_copy_(2, places, v[:, :, -size:].type_as(self.values))
        if T > 1:  # nothing comes before the prompt
            return causal_attention(q, k, v, window, scale)

        # One query sees all that the ring holds. The query heads that share a key/value head are
        # rows of one matrix.
        q = q.squeeze(2).unflatten(1, (k.size(1), -1))  # (B, G, H / G, D)
        scores = (q * scale) @ self.keys.mT  # (B, G, H / G, size)
        empty = torch.arange(size, device=k.device) > positions  # none, once the ring is full
        p = scores.float().masked_fill(empty, -math.inf).softmax(-1)
        y = p.type_as(v) @ self.values  # (B, G, H / G, D)
        return y.flatten(1, 2).unsqueeze(2)


class KVCache:
    """A LayerCache for each layer: whole for the full layers, the window for the sliding ones."""

    def __init__(self, model, batch_size, max_length):
        c = model.config
        self.length = torch.zeros((), dtype=torch.long, device=model.head.device)
        self.layers = []
        for layer in model.layers:
            size = min(max_length, layer.self_attn.window)
            shape = (batch_size, c.n_kv_groups, size, c.head_dim)
            self.layers.append(LayerCache(self.length, shape, model.head))


def linear_in_halves(x, weight, bias=None):
    """F.linear as a batch of two products, of the two halves of the weight's rows.

    For up to four rows of float32 on a CPU, which reads a weight in this way two to three times as
    fast: PyTorch leaves the product with a single row to one core.
    """
    columns = x.flatten(0, -2).T  # (in, rows)
    half = len(weight) // 2
    halves = weight[: 2 * half].unflatten(0, (2, half))  # (2, out / 2, in)
    y = torch.bmm(halves, columns.expand(2, -1, -1)).flatten(0, 1)  # (out, rows)
    rest = weight[2 * half :]  # of an odd number of rows the last one
    y = torch.cat((y, rest @ columns)).T.unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class InHalves(TorchFunctionMode):
    """Puts linear_in_halves in the place of F.linear, in all layers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear:
            function = linear_in_halves
        return function(*args, **(kwargs or {}))


def predict(model, cache, tokens):
    """The logits (B, V) of the token that follows tokens (B, T), which join the cache.

    The first call takes the prompt, each other one a single token.
    """
    head = model.head
    rows = tokens.numel()
    plain = head.device.type == "cpu" and head.dtype == torch.float32
    products = InHalves() if plain and rows <= 4 else contextlib.nullcontext()
    # On a CPU, oneDNN is slow with a single row; its other settings stay as they are.
    with torch.backends.mkldnn.flags(rows > 1, None, None, None), products:
        x = model.features(tokens, cache.length, cache.layers)
        logits = F.linear(x[:, -1], head)
    cache.length += tokens.size(1)
    return logits.float()


# ---- Generation ----------------------------------------------------------------------------------
def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draws one token from each row of logits (B, V) -> (B,). Temperature 0 takes the likeliest.

    From the top_k likeliest, and of these from the fewest that hold the probability top_p.
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits / temperature
    tokens = torch.arange(logits.size(-1), device=logits.device).expand_as(logits)
    if top_k or top_p:
        k = min(top_k or logits.size(-1), logits.size(-1))
        logits, tokens = logits.topk(k)  # in falling order
    if top_p:
        # Nucleus sampling (arXiv 1904.09751)
        p = logits.softmax(-1)
        likelier = p.cumsum(-1) - p
        logits = logits.masked_fill(likelier >= top_p, -math.inf)
    # The Gumbel-max trick (arXiv 1611.01144), because torch.multinomial would wait for the GPU.
    noise = torch.empty_like(logits).exponential_(generator=generator)
    drawn = (logits - noise.log()).argmax(-1)
    return tokens.gather(1, drawn[:, None]).squeeze(1)


@torch.inference_mode()
def stream(
    model, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop_tokens=(),
    generator=None,
):  # fmt: skip
    """Yields (B,) tokens that continue tokens (B, T), one position at a time, with an exact cache.

    Rows have equal length and no padding. Ends after max_new_tokens, or once each row has made one
    of stop_tokens; till then a row repeats the first of them. UserError if a value is out of range.
    """
    B, T = tokens.shape
    if T < 1 or max_new_tokens < 1 or T + max_new_tokens > model.config.context_length:
        raise UserError(f"a prompt of {T} tokens and {max_new_tokens} do not fit into the context")
    if not 0 <= temperature < 1e9:
        raise UserError(f"temperature cannot be {temperature}")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k cannot be {top_k}; 0 turns it off")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")

    cache = KVCache(model, B, T + max_new_tokens)
    step = functools.partial(predict, model, cache)
    stops = torch.tensor(stop_tokens, device=tokens.device, dtype=tokens.dtype)
    stopped = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    for made in range(max_new_tokens):
        if made == 1 and tokens.is_cuda:
            # From here on each step has the same shape, so it is recorded as a CUDA graph: one
            # launch in place of hundreds. The warm-up before it takes this token once too often.
            step = torch.cuda.make_graphed_callables(step, (tokens.clone(),), num_warmup_iters=1)
            cache.length -= 1
        new = sample_token(step(tokens), temperature, top_k, top_p, generator)
        if len(stops) > 0:
            new = torch.where(stopped, stops[0], new)
            stopped |= torch.isin(new, stops)
        yield new
        if stopped.all():
            return
        tokens = new[:, None]


class Text:
    """The text of tokens that come one by one; a character appears once its last byte is there."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.content = ""
        self.ended = False
        self.waiting = []  # tokens whose last character may want more bytes

    def add(self, token):
        """Takes a token and returns the characters that it completes; none after an end token."""
        self.ended = self.ended or token in self.tokenizer.end_tokens
        if not self.ended:
            self.waiting.append(token)
        if self.tokenizer.decode(self.waiting).endswith("\ufffd"):
            return ""
        return self.finish()

    def finish(self):
        """Returns the characters of the tokens that wait, with U+FFFD for what is not whole."""
        characters = self.tokenizer.decode(self.waiting)
        self.waiting = []
        self.content += characters
        return characters


# ---- Reading and writing models ------------------------------------------------------------------
def load(path):
    """A checkpoint, folder or hub name -> model, tokenizer, end tokens. Raises UserError."""
    try:
        if Path(path).is_file() or path.endswith(".pt"):
            model, state = load_checkpoint(path)
            files = state.get("data", {}).get("tokenizer_files")
            if not files:
                raise UserError(f"{path} holds no tokenizer: an init.pt, or an earlier version's?")
            tokenizer = Tokenizer(files)
        else:
            config, weights, tokenizer = read_model(path)
            model = Gemma(config)
            model.load_state_dict(weights)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    return model, tokenizer, tokenizer.end_tokens


def start_of_document(tokenizer):
    """What a document begins with in training: the start token, or the end of the one before."""
    return tokenizer.end_tokens[0] if tokenizer.bos_token is None else tokenizer.bos_token


MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
# license: to be chosen by the owner of the weights
---
A Gemma 3 text model of {:,} parameters, exported by sample.py of gemma270m.py.

    from transformers import pipeline
    pipeline("text-generation", "{}")("{}Once upon a time")
"""


def export(model, tokenizer, folder):
    """Writes what transformers reads to a new or empty folder, or raises UserError."""
    folder = Path(folder).resolve()
    if folder.is_file() or folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: name a new folder")
    c = model.config
    config = {
        **{official: getattr(c, ours) for official, ours in FIELDS.items()},
        "hidden_activation": "gelu_pytorch_tanh",
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "layer_types": c.layer_types,
        "dtype": "float32",
        "bos_token_id": start_of_document(tokenizer),
        "eos_token_id": tokenizer.end_tokens,
        "pad_token_id": None,
    }
    files = dict(tokenizer.files)
    tokenizer_config = json.loads(files["tokenizer_config.json"])
    # llama.cpp reads here whether a text begins with a start token; in training each one does.
    start = tokenizer.backend.id_to_token(start_of_document(tokenizer))
    tokenizer_config["add_bos_token"] = True
    tokenizer_config["bos_token"] = start
    tokenizer_config["model_max_length"] = c.context_length
    files["tokenizer_config.json"] = json.dumps(tokenizer_config, indent=2) + "\n"
    files["config.json"] = json.dumps(config, indent=2) + "\n"
    # transformers puts a start token before a prompt only if the tokenizer has one of its own.
    written = start if tokenizer.bos_token is None else ""
    files["README.md"] = MODEL_CARD.format(model.num_parameters(), folder.name, written)
    weights = {}
    for name, weight in model.state_dict().items():
        official = name if name == "lm_head.weight" else f"model.{name}"
        weights[official] = weight.float().cpu().contiguous()
    try:
        # All is written before anything appears; an empty folder may be where another disk begins.
        place = folder if folder.exists() else folder.parent
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as temporary:
            for name, text in files.items():
                Path(temporary, name).write_text(text, encoding="utf-8")
            save_file(weights, Path(temporary, "model.safetensors"), {"format": "pt"})
            folder.mkdir(exist_ok=True)
            for path in Path(temporary).iterdir():
                path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {error}") from error


def llama_cpp_warnings(config, tokenizer):
    """What llama.cpp takes for granted and this model does not have, a line each."""
    lines = []
    if config.full_attention_every not in (1, 6):
        lines.append("llama.cpp takes full_attention_every as 6: it will give other text")
    if config.query_pre_attn_scalar != config.head_dim:
        lines.append("llama.cpp takes query_pre_attn_scalar as head_dim: it will give other text")
    if json.loads(tokenizer.files["tokenizer.json"])["model"].get("byte_fallback"):
        lines.append("llama.cpp also wants tokenizer.model: copy it from the original's folder")
    elif tokenizer.vocab_size != 50_257:
        lines.append("llama.cpp's converter knows GPT-2's words only: see README, Google's weights")
    return lines


# ---- Command line --------------------------------------------------------------------------------
def read_text(flag, text):
    """What is given, or for FILE:PATH the file, no byte order mark and one kind of line end."""
    if text.startswith("FILE:"):
        try:
            text = Path(text.removeprefix("FILE:")).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} cannot be read as UTF-8 text: {error}") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def chat_tokens(tokenizer, question):
    """The tokens of a question in the model's chat template, up to where the answer begins."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    config = json.loads(tokenizer.files["tokenizer_config.json"])
    template = tokenizer.files.get("chat_template.jinja", config.get("chat_template"))
    if not isinstance(template, str):  # a list holds several, each with a name
        raise UserError("chat: this model has no chat template; use --prompt")
    names = {"messages": [{"role": "user", "content": question}], "add_generation_prompt": True}
    for name in ("bos_token", "eos_token"):
        token = config.get(name) or ""
        names[name] = token["content"] if isinstance(token, dict) else token
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        text = environment.from_string(template).render(**names)
    except (TemplateError, TypeError) as error:
        raise UserError(f"chat: the model's chat template fails: {error}") from error
    # Here the names of special tokens, such as <start_of_turn>, are not ordinary text.
    tokenizer.backend.encode_special_tokens = False
    tokens = tokenizer.encode(text)
    tokenizer.backend.encode_special_tokens = True
    return tokens


# With these options of torch.compile a GPU makes a single token in three quarters of the time.
DECODING = {"coordinate_descent_tuning": True, "combo_kernels": True}


def sample(args, model, tokenizer):
    """Prints args.num_samples continuations. Raises UserError for what cannot be done."""
    start = [start_of_document(tokenizer), *tokenizer.encode(args.prompt)]
    if args.chat is not None:
        start = chat_tokens(tokenizer, args.chat)
    if max(start) >= model.config.vocab_size:
        raise UserError(f"prompt: the model has no token {max(start)}")
    room = min(args.max_new_tokens, model.config.context_length - len(start))
    if room < 1:
        raise UserError(f"prompt: {len(start)} tokens do not fit into the context with an answer")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if device.type == "cpu" and model.num_parameters() < 20_000_000:
        torch.set_num_threads(1)  # so small that a second one would only wait for the first
    model.to(device, dtype)  # the weights too, which only training needs in float32
    generator = torch.Generator(device)
    generator.manual_seed(generator.seed() if args.seed is None else args.seed % 2**63)
    tokens = torch.tensor([start] * args.num_samples, device=device)
    choice = (args.temperature, args.top_k, args.top_p, tokenizer.end_tokens, generator)
    texts = [Text(tokenizer) for _ in tokens]
    alone = len(texts) == 1
    made = 0
    began = time.perf_counter()
    # In float16 autocast keeps the residual stream in float32.
    with torch.autocast(device.type, dtype, enabled=dtype == torch.float16, cache_enabled=False):
        for new in stream(model, tokens, room, *choice):
            made += 1
            if made == 1 and args.compile:  # after the prompt, which has another shape
                model.compile_parts(DECODING)
            shown = [text.add(token) for text, token in zip(texts, new.tolist())]
            if alone:
                print(args.prompt if made == 1 else "", shown[0], sep="", end="", flush=True)
            if made == 2:  # what the prompt and the recording took is not decoding
                began = time.perf_counter()
    speed = max(0, made - 2) * len(texts) / (time.perf_counter() - began)
    rests = [text.finish() for text in texts]
    contents = [args.prompt + text.content for text in texts]
    print(rests[0] if alone else "\n---------------\n".join(contents), flush=True)
    ended = f"{sum(text.ended for text in texts)} of {len(texts)} ended by themselves"
    print(f"{made * len(texts):,} tokens, {speed:,.0f} tokens/s, {ended}", file=sys.stderr)


def parse_flags(argv):
    """-> the flags with their values; ends the program if one is wrong"""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    flag = functools.partial(parser.add_argument, metavar="")
    flag("--ckpt", default="out.pt", help="checkpoint, folder of transformers, or name on the hub")
    flag("--export", help="write the model to this folder for transformers, and end")
    flag("--prompt", default="", help="text to continue, or FILE:PATH; without one a new document")
    flag("--chat", help="question to an instruction-tuned model, in its chat template")
    flag("--num_samples", type=int, default=1, help="continuations in one batch (default: 1)")
    flag("--max_new_tokens", type=int, default=512, help="longest continuation (default: 512)")
    flag("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    flag("--top_k", type=int, default=64, help="draw from the k likeliest; 0: off (default: 64)")
    flag(
        "--top_p",
        type=float,
        default=0.95,
        help="and from the fewest with this share; 1: off (0.95)",
    )
    flag("--seed", type=int, help="the same seed gives the same text (default: another each time)")
    flag("--device", default="auto", help="cuda, mps, cpu; auto takes a GPU if there is one")
    names = ("auto", "bfloat16", "float16", "float32")
    flag("--dtype", default="auto", choices=names, help=f"of weights and products: {names}")
    parser.add_argument("--compile", action="store_true", help="faster on a GPU, after a minute")
    args = parser.parse_args(argv)
    if args.num_samples < 1 or args.max_new_tokens < 1:
        parser.error("num_samples and max_new_tokens must be at least 1")
    if args.chat is not None and args.prompt:
        parser.error("--chat takes no --prompt beside it")
    return args


def main(argv=None):
    """The command line. Raises UserError for what cannot be done."""
    args = parse_flags(argv)
    args.prompt = read_text("prompt", args.prompt)
    if args.chat is not None:
        args.chat = read_text("chat", args.chat)
    model, tokenizer, _ = load(args.ckpt)
    if args.export is None:
        sample(args, model, tokenizer)
        return
    export(model, tokenizer, args.export)
    for line in llama_cpp_warnings(model.config, tokenizer):
        print(f"warning: {line}", file=sys.stderr)
    print(f"{args.export}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    if sys.stdout:  # a closed one is None
        sys.stdout.reconfigure(errors="replace")  # for a terminal that lacks a character
    if hasattr(signal, "SIGPIPE"):  # a closed pipe ends it in silence, as it ends other tools
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        main()
    except (UserError, PermissionError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"sample.py: error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
