"""Turns text into the tokens that gemma270m.py trains on.

    python prepare.py                                               # TinyStories
    python prepare.py --input my.txt "more/*.jsonl.gz"              # your own text
    python prepare.py --input my.txt --tokenizer 8192               # with words learned from it
    python prepare.py --input my.txt --model google/gemma-3-270m    # to fine-tune that model

Writes train.bin and val.bin, plain arrays of uint16 (uint32 for a vocabulary above 65,536), the
tokenizer's files, with --model the weights as init.pt, and last meta.json, which describes it all.
Text goes through this file as pairs (text, ends): whether its document ends with this text.
"""

import argparse
import errno
import glob
import gzip
import io
import json
import lzma
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from configparser import ConfigParser
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread

# Set before the packages are imported. A download over plain HTTP ends at once with Ctrl-C.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import numpy as np
import tokenizers
from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HTTPError
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
TINYSTORIES = "roneneldan/TinyStories"
ALL_STORIES = 2_119_719  # in its training split
SMALL_STORIES = 10_000  # as many as the preset for a CPU can use in its few minutes
SMALL_VOCABULARY = "4096"  # with GPT-2's words the head would be most of a small model's work
BUILT_IN = "made-up stories of a small built-in grammar"
HERE = Path(__file__).resolve().parent
HELD_OUT = 100  # one document in so many is for validation
BATCH = 256  # parts of documents that are encoded in one call, on all cores
CHUNK = 2**18  # characters of a .txt that are read at once
LEARN_FROM = 10_000  # parts of documents from which a vocabulary is learned
WAITS = (1, 4, 16, 0)  # seconds between tries where the hub's client does not try again itself
GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


class UserError(ValueError):
    """A mistake of the user or an answer of the hub: one line, without a traceback."""


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# ---- tokenizers ----------------------------------------------------------------------------------


class Tokenizer:
    """A tokenizer of transformers from the texts of its files, {"tokenizer.json": text, ...}.

    bos_token: what the tokenizer itself puts before a text, or None. end_tokens: the first ends a
    document in training, each of them a generated text. vocab_size: the rows that a model needs.
    """

    def __init__(self, files):
        names = ("tokenizer_config.json", "config.json", "generation_config.json")
        try:
            self.backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
            given, model, generation = (dict(json.loads(files.get(n, "{}"))) for n in names)
        except Exception as error:  # `tokenizers` raises nothing more special
            raise UserError(
                f"{', '.join(['tokenizer.json', *names])}: one is missing, damaged or a pointer of "
                f"git-lfs, to be pulled: {error!r}"
            ) from error
        self.backend.no_truncation()
        self.backend.no_padding()
        tokens = (given.get("bos_token"), given.get("eos_token"))
        tokens = (token["content"] if isinstance(token, dict) else token or "" for token in tokens)
        bos, eos = map(self.backend.token_to_id, tokens)
        if eos is None:
            raise UserError("tokenizer_config.json names no eos_token, which ends a document")
        adds_bos = given.get("add_bos_token") or self.backend.encode("").ids[:1] == [bos]
        # Where both are the same token, the end of one document is the start of the next.
        self.bos_token = bos if adds_bos and bos != eos else None
        ends = [eos]
        for others in (model.get("eos_token_id"), generation.get("eos_token_id")):
            ends += others if isinstance(others, list) else [others]
        self.end_tokens = [token for token in dict.fromkeys(ends) if token is not None]
        generation |= {"bos_token_id": bos, "eos_token_id": self.end_tokens}
        self.files = {**files, "generation_config.json": json.dumps(generation, indent=2) + "\n"}
        self.files.pop("config.json", None)
        # Special tokens in a text are ordinary text, so the model needs no rows for most of them.
        self.backend.encode_special_tokens = True
        added = self.backend.get_added_tokens_decoder().items()
        special = {token for token, kind in added if kind.special}
        ordinary = set(self.backend.get_vocab().values()) - special
        self.vocab_size = 1 + max(*ordinary, *self.end_tokens, self.bos_token or 0)

    def encode(self, text):
        # A prompt may hold half a surrogate pair, which stands for a broken byte.
        return self.encode_batch([text.encode("utf-8", "replace").decode()])[0]

    def encode_batch(self, texts):
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids):
        return self.backend.decode(ids)


def byte_level(model, trainer=None, texts=()):
    """The Tokenizer that splits text into words as GPT-2 does, and words by a BPE model."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    if trainer:
        # In a thread that nobody waits for after Ctrl-C, which would have to wait for the call.
        worker = Thread(target=backend.train_from_iterator, args=(texts, trainer), daemon=True)
        worker.start()
        worker.join()
    backend.add_special_tokens([END_OF_TEXT])
    config = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    text = json.dumps(config, indent=2) + "\n"
    return Tokenizer({"tokenizer.json": backend.to_str(), "tokenizer_config.json": text})


def learn_tokenizer(texts, size):
    """A vocabulary of `size` words, or as many as there are, learned from an iterator of texts."""
    if size < 257:
        raise UserError(f"a vocabulary of {size} is too small: 257 are the bytes and the end")
    options = {"special_tokens": [END_OF_TEXT], "show_progress": False}
    options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, **options)
    return byte_level(tokenizers.models.BPE(), trainer, list(texts))


def load_tokenizer(name):
    """The Tokenizer "gpt2", or that of a folder of transformers or of a model on the hub."""
    if name != "gpt2":
        wanted = re.compile(r"(.*token.*|(generation_)?config|chat_template.*)\.(json|jinja)")
        paths = [path for path in model_folder(name).iterdir() if wanted.fullmatch(path.name)]
        try:
            return Tokenizer({path.name: path.read_text("utf-8") for path in paths})
        except (ValueError, OSError) as error:
            raise UserError(f"the tokenizer of {name}: {one_line(error)}") from error
    import tiktoken

    try:
        tiktoken.get_encoding("gpt2")  # downloads two files and checks them
        urls = (GPT2 + "encoder.json", GPT2 + "vocab.bpe")
        words, merges = (tiktoken.load.read_file_cached(url).decode() for url in urls)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load GPT-2's vocabulary ({one_line(error)}): set TIKTOKEN_CACHE_DIR to a "
            "folder with another machine's 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 and "
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee, or use --tokenizer 8192"
        ) from error
    pairs = [tuple(line.split()) for line in merges.splitlines()[1:]]
    return byte_level(tokenizers.models.BPE(json.loads(words), pairs))


# ---- models of transformers ----------------------------------------------------------------------

FIELDS = {  # config.json's names of GemmaConfig's fields
    "vocab_size": "vocab_size", "max_position_embeddings": "context_length",
    "hidden_size": "emb_dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_groups", "head_dim": "head_dim", "intermediate_size": "hidden_dim",
    "sliding_window": "sliding_window", "sliding_window_pattern": "full_attention_every",
    "rope_local_base_freq": "rope_local_base", "rope_theta": "rope_base",
    "query_pre_attn_scalar": "query_pre_attn_scalar", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
IMPLEMENTED = {  # other entries, with the only value that is implemented
    "model_type": "gemma3_text", "attention_bias": False, "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "quantization_config": None,
    "use_bidirectional_attention": False, "rope_type": "default", "type": "default",
}  # fmt: skip


def model_folder(name, kinds="json|jinja"):
    """The folder `name`, or that in the hub's cache with the model's files of those kinds."""
    if os.path.isdir(name):
        return Path(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or os.path.isdir(os.path.dirname(name)):
        raise UserError(f"there is no folder {name}")
    paths = [download() for download in hub_files(name, "model", rf"[^/]+\.({kinds})").values()]
    return Path(paths[0]).parent


def read_config(given):
    """What config.json of a Gemma 3 holds -> GemmaConfig. UserError for what is not implemented"""
    from gemma270m import GemmaConfig

    if given.get("model_type") == "gemma3":
        raise UserError("it is multimodal, for text and images: take a text-only Gemma 3")
    ropes = given.get("rope_parameters") or {}
    full, local = (ropes.get(f"{kind}_attention", ropes) for kind in ("full", "sliding"))
    for entries in (given, full, local, given.get("rope_scaling") or {}):
        for name, value in IMPLEMENTED.items():
            if entries.get(name) not in (value, None):
                raise UserError(f"{name} {entries[name]} is not implemented")
    types = given.get("layer_types")
    every = given.get("_sliding_window_pattern", 6)
    if types:
        every = [*types, "full_attention"].index("full_attention") + 1
    given = {
        "tie_word_embeddings": True,
        "rope_theta": full.get("rope_theta", 1e6),
        "rope_local_base_freq": 1e4 if local is ropes else local.get("rope_theta", 1e4),
        "sliding_window_pattern": every,
        **given,
    }
    missing = FIELDS.keys() - given.keys()
    if missing:
        raise UserError(f"config.json has no {min(missing)}")
    config = GemmaConfig(**{ours: given[theirs] for theirs, ours in FIELDS.items()})
    if types and types != config.layer_types:
        raise UserError(f"layer_types {types} is not implemented")
    return config


def read_weights(folder):
    """The weights in a folder under our names, in their own dtype. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = {"model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    weights = {}
    for name in sorted(names):
        if not (folder / name).exists():
            raise UserError(f"there is no {name}, and pytorch_model.bin is not read")
        try:
            weights |= load_file(folder / name)
        except SafetensorError as error:
            reason = f"damaged, not whole, or a pointer of git-lfs, to be pulled ({error})"
            raise UserError(f"{name} is {reason}") from error
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


def read_model(name):
    """A folder of transformers, or a model on the hub -> (GemmaConfig, weights, Tokenizer)"""
    import torch

    from gemma270m import Gemma

    folder = model_folder(name, "json|jinja|safetensors")
    tokenizer = load_tokenizer(str(folder))
    try:
        config = read_config(json.loads((folder / "config.json").read_text("utf-8")))
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"{tokenizer.vocab_size} words exceed vocab_size {config.vocab_size}")
        weights = read_weights(folder)
        for key, weight in weights.items():
            if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise UserError(f"{key} is {weight.dtype}, which is not implemented")
            if not weight.isfinite().all():
                raise UserError(f"{key} is not finite")
        head = weights.pop("lm_head.weight", None) if config.tie_embeddings else None
        with torch.device("meta"):
            Gemma(config).load_state_dict(weights, assign=True)
        if head is not None and not torch.equal(head, weights["embed_tokens.weight"]):
            raise UserError("lm_head.weight is not the embedding, to which it is tied")
    except (ValueError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{name} cannot be loaded: {one_line(error)}") from error
    return config, weights, tokenizer


# ---- the hub -------------------------------------------------------------------------------------


def ask_hub(function, repo, **options):
    """function(repo, ...) of the hub's client, tried again after a passing fault.

    Raises ConnectionError if there positively is no network, and else UserError with the cure.
    """
    for wait in WAITS:
        try:
            return function(repo, **options)
        except (OSError, ValueError, HTTPError) as error:
            causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        status = 504 if any(isinstance(cause, HTTPError) for cause in causes) else 0
        reason = f"{repo}: {one_line(causes[0])}"
        for cause in reversed(causes):
            unreachable = getattr(cause, "errno", None) in (errno.ENETUNREACH, errno.EHOSTUNREACH)
            if unreachable or isinstance(cause, (socket.gaierror, ConnectionRefusedError)):
                raise ConnectionError(f"no network to ask for {repo} ({one_line(cause)})")
            if getattr(cause, "response", None) is not None:
                status = cause.response.status_code
                reason = f"{repo}: {one_line(cause)}"
        if status in (401, 403) and "token" not in options and get_token():
            # What everybody may read is refused to those who come with an expired token.
            print(f"{reason}: trying without the token", flush=True)
            options["token"] = False
        elif wait and (status in (408, 429) or status >= 500):
            print(f"{reason}: trying again in {wait} s", flush=True)
            time.sleep(wait)
        else:
            break
    if status in (401, 403, 404):
        page = f"{constants.ENDPOINT}/{repo}"
        reason += f": check the name, or accept the terms at {page} and run hf auth login"
    elif status:
        reason += ": wait some minutes and run this again"
    elif any(isinstance(cause, json.JSONDecodeError) for cause in causes):
        reason += ": this is not the hub; does a login page of the network answer in its place?"
    raise UserError(reason) from causes[0]


def hub_files(repo, kind, pattern):
    """{name: function} of a repository's files, those in the cache where the hub gives no list.

    The function downloads the file if need be and returns its path.
    """
    try:
        info = ask_hub(HfApi().repo_info, repo, repo_type=kind, timeout=10)
        get = partial(ask_hub, hf_hub_download, repo, repo_type=kind)
        files = {file.rfilename: partial(get, filename=file.rfilename) for file in info.siblings}
    except (ValueError, ConnectionError) as error:
        cache = Path(constants.HF_HUB_CACHE, f"{kind}s--{repo.replace('/', '--')}", "snapshots")
        newest = max(cache.glob("*"), key=os.path.getmtime, default=cache)
        paths = [path for path in newest.rglob("*") if path.is_file()]
        if not paths:
            raise
        print(f"{error}; taking what is in the cache", flush=True)
        files = {path.relative_to(newest).as_posix(): partial(str, path) for path in paths}
    found = {name: files[name] for name in sorted(files) if re.fullmatch(pattern, name)}
    if not found:
        raise UserError(f"{repo} holds nothing called {pattern}")
    return found


# ---- reading -------------------------------------------------------------------------------------

# A new word begins where white space follows something else, so parts that are cut there have the
# tokens of the whole. Only space and newline are white space to everybody.
PARTS = re.compile(r".{1,4096}(?:\Z|(?<=\S)(?=[ \n]))|.{1,4096}", re.DOTALL)


def split(documents, limit=None):
    """The parts of documents, up to `limit` of these, as pairs (part, ends), without blank ones."""
    count = 0
    begins = True
    for text, ends in documents:
        if not (begins and ends) or text.strip():
            parts = PARTS.findall(text) or [""]
            yield from ((part, False) for part in parts[:-1])
            yield parts[-1], ends
            begins = ends
            count += ends
            if count == limit:
                return


def read_txt(file):
    """Documents between end-of-text markers."""
    text = ""
    file = io.TextIOWrapper(file, "utf-8-sig", newline="")
    while chunk := file.read(CHUNK):
        *documents, text = (text + chunk).replace("\r\n", "\n").split(END_OF_TEXT)
        for document in documents:
            yield document, True
        parts = PARTS.findall(text)
        if len(parts) > 2:  # the last ones may end with half a marker
            yield "".join(parts[:-2]), False
            text = "".join(parts[-2:])
    yield text, True


def read_rows(path, file):
    """What stands in `text` of each row of .parquet, or of each line of JSON."""
    if path.endswith(".parquet"):
        table = ParquetFile(path, buffer_size=2**20)
        if "text" not in table.schema_arrow.names:
            raise UserError("there is no column `text`")
        for group in range(table.num_row_groups):  # what has been read stays until its call ends
            for batch in table.iter_batches(64, row_groups=[group], columns=["text"]):
                yield from batch.column("text").to_pylist()
    else:
        for line in file:
            row = json.loads(line)
            yield row.get("text") if isinstance(row, dict) else None


def read_files(patterns, skipped=None):
    """The documents of all files; notes rows without text in the set `skipped`, or refuses them."""
    for path in [path for p in patterns for path in sorted(glob.glob(p, recursive=True)) or [p]]:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
        try:
            with opener(path, "rb") as file:
                if not re.search(r"\.(parquet|json)", path):
                    yield from read_txt(file)
                    continue
                for number, text in enumerate(read_rows(path, file), 1):
                    if isinstance(text, str) and text == text.encode("utf-8", "replace").decode():
                        yield text.removeprefix("\ufeff").replace("\r\n", "\n"), True
                    elif skipped is None:
                        raise UserError(f"row {number}: no text in `text`; see --skip_bad")
                    else:
                        skipped.add((path, number))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8, perhaps UTF-16: save it as UTF-8") from error
        except (ValueError, OSError, EOFError, zlib.error, lzma.LZMAError, ArrowException) as error:
            raise UserError(f"{path}: {one_line(error)}") from error


def read_shards(files):
    """The documents of TinyStories' shards, each downloaded when its turn comes."""
    for download in files.values():
        yield from read_files([download()])
    if f"-of-{len(files):05}" not in min(files):  # the first ones are enough for as many stories
        raise UserError(f"only {len(files)} shards of {TINYSTORIES} are in the cache: go online")


def make_stories(seed=0):
    """Different stories of 60 to 250 words without end, the same ones for the same seed."""
    grammar = ConfigParser(interpolation=None)
    grammar.read_string((HERE / "assets" / "stories.txt").read_text("utf-8"))
    rng = random.Random(seed)
    seen = set()
    while True:
        plot = grammar[rng.choice(grammar.sections()[2:])]
        cast = grammar["casts"][rng.choice(plot["who"].split())]
        words = dict(grammar["words"])
        for prefix, person in zip(("", "f"), rng.sample(cast.split("\n")[1:], 2)):
            keys = (prefix + key for key in "name kind he him his parent phe full".split())
            words |= zip(keys, person.split(", "))
        words |= {key.title(): word.title() for key, word in words.items()}
        case = rng.choice(plot["cases"].split("\n")[1:]).split("; ")
        text = plot["text"].strip()
        while "{" in text:  # more than once, because what is filled in may have blanks too
            text = text.format(*case, **words)
        while "[" in text:  # the innermost choices first
            text = re.sub(r"\[([^][]*)\]", lambda match: rng.choice(match[1].split("|")), text)
        text = "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
        if text not in seen:
            seen.add(text)
            yield text, True


# ---- writing -------------------------------------------------------------------------------------


def encode(documents, tokenizer, limit):
    """The tokens of documents, with those at their begin and end, as pairs (ids, ends)."""
    parts = split(documents, limit)
    begins = True
    while batch := list(islice(parts, BATCH)):
        texts, all_ends = zip(*batch)
        for ids, ends in zip(tokenizer.encode_batch(texts), all_ends):
            if begins and tokenizer.bos_token is not None:
                ids = [tokenizer.bos_token, *ids]
            yield ids + tokenizer.end_tokens[:ends], ends
            begins = ends


def write_tokens(folder, dtype, encoded, total):
    """Writes {split: pairs (ids, ends)} to train.bin and val.bin -> counts of documents and tokens.

    Without a split "val" it gets one training document of HELD_OUT, or, if they are fewer, the last
    HELD_OUT-th part of their tokens.
    """
    counts = Counter(train_documents=0, val_documents=0, train_tokens=0, val_tokens=0)
    train, val = (open(folder / f"{split}.bin", "wb+") for split in ("train", "val"))
    with train, val:
        for split, pairs in encoded.items():
            for ids, ends in tqdm(pairs, total=total, unit=" parts", disable=None):
                number = counts["train_documents"] + counts["val_documents"] + 1
                held_out = "val" not in encoded and number % HELD_OUT == 0
                place = "val" if held_out else split
                (train if place == "train" else val).write(np.array(ids, dtype))
                counts[f"{place}_documents"] += ends
                counts[f"{place}_tokens"] += len(ids)
        if not counts["val_tokens"] and counts["train_tokens"] > 3:
            share = max(2, counts["train_tokens"] // HELD_OUT)
            counts.update(val_documents=1, val_tokens=share, train_tokens=-share)
            size = train.seek(counts["train_tokens"] * np.dtype(dtype).itemsize)
            shutil.copyfileobj(train, val)
            train.truncate(size)
    if min(counts["train_tokens"], counts["val_tokens"]) < 2:
        raise UserError("there is too little text to train on and to validate with")
    return counts


# ---- command line --------------------------------------------------------------------------------


def has_gpu():
    """Whether training takes a GPU; asked in a process of its own, since torch needs 200 MB."""
    code = "import gemma270m, sys; sys.exit(gemma270m.pick_device('auto').type != 'cuda')"
    return subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


def choose_text(args, skipped):
    """-> where text is from, {"train", perhaps "val": function that gives documents}"""
    if args.input:
        texts = {"train": args.input, "val": args.val_input}
        texts = {
            split: partial(read_files, texts[split], skipped) for split in texts if texts[split]
        }
        return " ".join(args.input), texts
    try:
        files = hub_files(TINYSTORIES, "dataset", r"data/(train|validation)-.*\.parquet")
    except ConnectionError as error:
        meta = Path(args.out_dir, "meta.json")
        if meta.exists() and BUILT_IN not in meta.read_text("utf-8"):
            raise UserError(f"{error}; {args.out_dir} keeps the data that it holds") from error
        print(f"No TinyStories but {BUILT_IN}: {error}", flush=True)
        return BUILT_IN, {"train": make_stories, "val": partial(make_stories, 1)}
    train = {name: files[name] for name in files if name.startswith("data/train")}
    val = {name: files[name] for name in files if name not in train}
    return TINYSTORIES, {"train": partial(read_shards, train), "val": partial(read_shards, val)}


def write_data(folder, args, source, texts, name, limit):
    """Writes the files of a data folder, its tokenizer by name -> what its meta.json says"""
    train = texts["train"]
    if args.model:
        from gemma270m import save_checkpoint

        config, weights, tokenizer = read_model(name)
        save_checkpoint(folder / "init.pt", {"model_config": asdict(config), "model": weights})
    elif name.isdecimal():
        parts = islice(split(train(), limit), LEARN_FROM)
        tokenizer = learn_tokenizer((part for part, _ in parts), int(name))
        name = f"{int(name):,} learned from the text"
    else:
        tokenizer = load_tokenizer(name)
    limits = {"train": limit, "val": None}
    if not args.input and limit:
        limits["val"] = max(200, limit // HELD_OUT)
    elif "val" not in texts and limit:
        limits["train"] += (limit - 1) // (HELD_OUT - 1)  # so many more are held out
    encoded = {part: encode(texts[part](), tokenizer, limits[part]) for part in texts}
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    counts = write_tokens(folder, dtype, encoded, None if args.input else limit or ALL_STORIES)
    for file, text in tokenizer.files.items():
        (folder / file).write_text(text, "utf-8")
    meta = {
        "source": source,
        "tokenizer": name,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype,
        "bos_token": tokenizer.bos_token,
        "end_tokens": tokenizer.end_tokens,
        "tokenizer_files": sorted(tokenizer.files),
        **counts,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def prepare(args):
    """Makes the data folder that is asked for, or leaves it as it was, and prints what it holds."""
    decided = (args.tokenizer or args.model) and (args.input or args.limit)
    gpu = not decided and has_gpu()
    skipped = set() if args.skip_bad else None
    source, texts = choose_text(args, skipped)
    small = not gpu or source == BUILT_IN
    limit = args.limit or (SMALL_STORIES if small and not args.input else None)
    name = args.model or args.tokenizer or (SMALL_VOCABULARY if small else "gpt2")
    if not decided:
        amount = f"{limit:,}" if limit else "all"
        print(
            f"{'A' if gpu else 'No'} GPU: {amount} documents of {source}, tokenizer {name}", end=""
        )
        print("; --limit and --tokenizer change that", flush=True)
    out = Path(args.out_dir)
    new = out / ".new"
    made = not out.exists()
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        meta = write_data(new, args, source, texts, name, limit)
        # The old files go first and meta.json comes last: without it the folder looks unfinished.
        for stale in ("meta.json", "init.pt"):
            (out / stale).unlink(missing_ok=True)
        for file in sorted(os.listdir(new), key="meta.json".__eq__):
            os.replace(new / file, out / file)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if made and not any(out.iterdir()):
            out.rmdir()
    for part in ("train", "val"):
        count = f"{meta[f'{part}_documents']:,} documents, {meta[f'{part}_tokens']:,} tokens"
        print(f"{out / part}.bin: {count}")
    if skipped:
        print(f"Rows without text, skipped: {len(skipped):,}")
    print(f"Tokenizer: {meta['tokenizer']}; {meta['vocab_size']:,} different tokens")
    folder = "" if args.out_dir == "data" else f" --data_dir {shlex.quote(args.out_dir)}"
    print(f"Next: python gemma270m.py{folder}")


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser("prepare.py", argparse.SUPPRESS, __doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    flag = parser.add_argument
    flag("--input", nargs="+", metavar="FILE", help=".txt, .jsonl, .json (also .gz, .xz), .parquet")
    flag("--val_input", nargs="+", metavar="FILE", help="else every 100th document is held out")
    flag("--limit", type=int, metavar="N", help="at most N training documents")
    flag("--tokenizer", metavar="NAME", help="gpt2, how many words to learn, or a model")
    flag("--model", metavar="NAME", help="to fine-tune, a folder or hub name")
    flag("--out_dir", default="data", metavar="DIR", help="where to write; default: data")
    flag("--skip_bad", action="store_true", help="skip and count rows without text")
    args = parser.parse_args(argv)
    if args.val_input and not args.input:
        parser.error("--val_input needs --input")
    if args.model and args.tokenizer:
        parser.error("--model brings its own tokenizer: leave out --tokenizer")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be 1 or more")
    try:
        prepare(args)
    except KeyboardInterrupt:
        print("prepare.py: interrupted", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"prepare.py: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads that still compute
