"""Turns text into the tokens that gemma270m.py trains on.

    python prepare.py                                               # TinyStories
    python prepare.py --input my.txt "more/*.jsonl.gz"              # your own text
    python prepare.py --input my.txt --tokenizer 8192               # with words learned from it
    python prepare.py --input my.txt --model google/gemma-3-270m    # to fine-tune that model

Writes train.bin and val.bin, plain arrays of uint16 (uint32 for a vocabulary above 65,536), the
tokenizer's files, with --model the weights as init.pt, and last meta.json, which describes it all.
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
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread

# A download over plain HTTP ends at once with Ctrl-C. The package reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

import numpy as np
import tokenizers
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError, HTTPError
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
TINYSTORIES = "roneneldan/TinyStories"
BUILT_IN = "made-up stories of a small built-in grammar"
ALL_STORIES = 2_119_719  # of TinyStories, for training
FIRST_STORIES = 500_000  # the first of its files holds as many
SMALL_STORIES = 10_000  # as many as the preset for a CPU can use in its few minutes
SMALL_VOCABULARY = "4096"  # with GPT-2's words the head would be most of a small model's work
HELD_OUT = 100  # one token in so many is for validation
CHUNK = 2**16  # characters of a .txt that are read at once
BATCH = 512  # pieces that are encoded in one call, on all cores
LEARN_FROM = 20_000  # pieces and ends of documents from which a vocabulary is learned
TOKENIZER_FILES = r"([^/]*token[^/]*|(generation_)?config|chat_template[^/]*)\.(json|jinja)"
DAMAGE = (ValueError, OSError, LookupError, EOFError, zlib.error, lzma.LZMAError, ArrowException)
UNREACHABLE = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH)
WAITS = (1, 4, 16, 0)  # seconds between tries where the hub's client does not try again itself
HERE = Path(__file__).resolve().parent
GPT2 = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


class UserError(ValueError):
    """A mistake of the user or an answer of the hub: one line, without a traceback."""

    def __str__(self):
        return " ".join(super().__str__().split())


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
            whole = "".join(self.decode([token]) for token in self.encode(" one two"))
        except Exception as error:  # `tokenizers` raises nothing more special
            reason = f"tokenizer.json or a file beside it is missing or damaged: {error!r}"
            raise UserError(reason) from error
        if whole != " one two":
            raise UserError(
                "this tokenizer loses spaces between tokens: GPT-2's kind and Gemma's do not"
            )
        self.backend.no_truncation()
        self.backend.no_padding()
        tokens = (given.get("bos_token"), given.get("eos_token"))
        tokens = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        bos, eos = (self.backend.token_to_id(token or "") for token in tokens)
        if eos is None:
            raise UserError("tokenizer_config.json names no eos_token, which ends a document")
        adds_bos = given.get("add_bos_token") or self.backend.encode("").ids[:1] == [bos]
        # Where both are the same token, the end of one document is the start of the next.
        self.bos_token = bos if adds_bos and bos != eos else None
        ends = [eos]
        for others in (model.get("eos_token_id"), generation.get("eos_token_id")):
            ends += others if isinstance(others, list) else [others]
        self.end_tokens = [token for token in dict.fromkeys(ends) if token is not None]
        # config.json is not kept, so its end tokens move to the other file.
        generation |= {"bos_token_id": bos, "eos_token_id": self.end_tokens}
        self.files = {**files, "generation_config.json": json.dumps(generation, indent=2)}
        self.files.pop("config.json", None)
        # Special tokens in a text are ordinary text, so the model needs no rows for most of them.
        self.backend.encode_special_tokens = True
        added = self.backend.get_added_tokens_decoder().items()
        special = {token for token, kind in added if kind.special}
        ordinary = set(self.backend.get_vocab().values()) - special
        self.vocab_size = 1 + max(*ordinary, *self.end_tokens, self.bos_token or 0)
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"

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
        # In a thread of its own: Ctrl-C would have to wait for the call to end. Nobody waits for
        # the thread, see the end of this file.
        worker = Thread(target=backend.train_from_iterator, args=(texts, trainer), daemon=True)
        worker.start()
        worker.join()
    backend.add_special_tokens([END_OF_TEXT])
    config = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": backend.to_str()}
    return Tokenizer({**files, "tokenizer_config.json": json.dumps(config, indent=2)})


def learn_tokenizer(texts, size):
    """A vocabulary of `size` words, or as many as there are, learned from the first texts."""
    if not 257 <= size <= 2**20:
        raise UserError(f"a vocabulary of {size}: learn 257, the bytes and the end, to 1,048,576")
    options = {"special_tokens": [END_OF_TEXT], "show_progress": False}
    options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, **options)
    first = [text for text in islice(texts, LEARN_FROM) if text]
    return byte_level(tokenizers.models.BPE(), trainer, first)


def load_tokenizer(name):
    """The Tokenizer "gpt2", or that of a folder of transformers or of a model on the hub."""
    if name != "gpt2" or os.path.isdir(name):
        paths = map(Path, fetch(name, "model", TOKENIZER_FILES))
        try:
            return Tokenizer({path.name: path.read_text("utf-8", "replace") for path in paths})
        except UserError as error:
            raise UserError(f"{name} cannot be loaded: {error}") from error
    import tiktoken

    try:
        tiktoken.get_encoding("gpt2")  # downloads two files and checks them
        urls = (GPT2 + "encoder.json", GPT2 + "vocab.bpe")
        words, merges = (tiktoken.load.read_file_cached(url).decode() for url in urls)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load GPT-2's vocabulary ({error}): set TIKTOKEN_CACHE_DIR to a folder with "
            "another machine's 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6 and "
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee, or use --tokenizer 8192"
        ) from error
    pairs = [tuple(line.split()) for line in merges.splitlines()[1:]]
    return byte_level(tokenizers.models.BPE(json.loads(words), pairs))


# ---- models of transformers and the hub ----------------------------------------------------------

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


def read_config(given):
    """What config.json of a Gemma 3 holds -> GemmaConfig. UserError for what is not implemented"""
    from gemma270m import GemmaConfig

    ropes = given.get("rope_parameters") or {}
    full = ropes.get("full_attention", ropes)
    local = ropes.get("sliding_attention", {})
    for entries in (given, full, local, given.get("rope_scaling") or {}):
        for name, value in IMPLEMENTED.items():
            if entries.get(name) not in (value, None):
                other = f"{name} {entries[name]}"
                raise UserError(f"{other} is not implemented, nor are multimodal models")
    types = given.get("layer_types")
    every = given.get("sliding_window_pattern", given.get("_sliding_window_pattern", 6))
    if types:
        every = [*types, "full_attention"].index("full_attention") + 1
    given = {
        "tie_word_embeddings": True,
        "rope_theta": full.get("rope_theta", 1e6),
        "rope_local_base_freq": local.get("rope_theta", 1e4),
        **given,
        "sliding_window_pattern": every,
    }
    config = GemmaConfig(**{ours: given[theirs] for theirs, ours in FIELDS.items()})
    if types and types != config.layer_types:
        raise UserError(f"layer_types {types} is not implemented")
    return config


def read_model(name):
    """A folder of transformers, or a model on the hub -> (GemmaConfig, weights, Tokenizer)"""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from gemma270m import Gemma

    tokenizer = load_tokenizer(name)
    paths = fetch(name, "model", r"config\.json")
    if not paths:
        raise UserError(f"{name} has no config.json")
    try:
        config = read_config(json.loads(Path(paths[0]).read_text("utf-8")))
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"{tokenizer.vocab_size} words exceed vocab_size {config.vocab_size}")
    except (*DAMAGE, AttributeError, TypeError) as error:
        raise UserError(f"{name} cannot be loaded, because of config.json: {error}") from error

    # The weights are large, so they are asked for once the rest is known to be of use.
    paths = fetch(name, "model", r"[^/]+\.safetensors(\.index\.json)?")
    files = {os.path.basename(path): path for path in paths}
    if not files:
        raise UserError(f"{name} has no *.safetensors; pytorch_model.bin is not read")
    shards = ["model.safetensors"]
    try:
        if "model.safetensors" not in files:
            index = Path(files["model.safetensors.index.json"]).read_text("utf-8")
            shards = set(json.loads(index)["weight_map"].values())
        weights = {}
        for shard in shards:
            weights |= load_file(files[shard])
        weights = {key.removeprefix("model."): weight for key, weight in weights.items()}
        for key, weight in weights.items():
            if weight.itemsize == 1 or not weight.isfinite().all():
                raise UserError(f"{key} has only 8 bits, or is not finite")
        head = weights.get("lm_head.weight")
        if config.tie_embeddings and head is not None:
            if torch.equal(head, weights["embed_tokens.weight"]):
                del weights["lm_head.weight"]
        # A model without memory tells whether names and shapes fit.
        with torch.device("meta"):
            Gemma(config).load_state_dict(weights, assign=True)
    except (*DAMAGE, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        cure = "pull pointers of git-lfs and damaged files again"
        raise UserError(f"{name} cannot be loaded: {error} ({cure})") from error
    return config, weights, tokenizer


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
        root = causes[-1]  # the system's own error, which the client wraps
        if isinstance(root, socket.gaierror) or getattr(root, "errno", None) in UNREACHABLE:
            raise ConnectionError(f"no network to ask for {repo} ({root})")
        # The cause that holds the hub's answer tells the hub's own reason.
        answers = [cause for cause in causes if getattr(cause, "response", None) is not None]
        status = answers[0].response.status_code if answers else None
        reason = UserError(f"{repo}: {[*answers, *causes][0]}")
        passing = any(isinstance(cause, HTTPError) for cause in causes)
        if wait == 0 or not passing or status in (401, 403, 404):
            break
        print(f"{reason}: trying again in {wait} s", flush=True)
        time.sleep(wait)
    if isinstance(causes[0], (OSError, HFValidationError)) and not passing:
        raise reason from causes[0]  # not the hub's fault: a full disk, offline by wish, a name
    cure = "wait some minutes and run this again; or does a login page of the network answer?"
    if status in (401, 403, 404):
        folder = "datasets/" if options["repo_type"] == "dataset" else ""
        page = f"{constants.ENDPOINT}/{folder}{repo}"
        cure = f"check the name, or accept the terms at {page} and run hf auth login"
    raise UserError(f"{reason}: {cure}") from causes[0]


def fetch(name, kind, pattern):
    """The paths of the files that match in a folder, or in a repository of the hub, downloaded.

    Where the hub gives no list of files, those have to do that are in the cache.
    """
    if os.path.isdir(name):
        return [str(path) for path in Path(name).iterdir() if re.fullmatch(pattern, path.name)]
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or os.path.isdir(os.path.dirname(name)):
        raise UserError(f"there is no folder {name}, nor is it gpt2, a number or owner/name")
    # The data set is public, and with an expired token the hub would refuse it.
    options = {"repo_type": kind, "token": False if kind == "dataset" else None}
    try:
        info = ask_hub(HfApi().repo_info, name, timeout=10, **options)
        files = [file.rfilename for file in info.siblings]
    except (UserError, ConnectionError) as error:
        cache = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")
        newest = cache / "refs" / "main"  # the name of a snapshot
        snapshot = cache / "snapshots" / (newest.read_text() if newest.exists() else "none")
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")]
        if not any(re.fullmatch(pattern, file) for file in files):
            raise
        print(f"{error}; taking what is in the cache", flush=True)
    wanted = sorted(file for file in files if re.fullmatch(pattern, file))
    return [ask_hub(hf_hub_download, name, filename=file, **options) for file in wanted]


# ---- text in, tokens out -------------------------------------------------------------------------

# Documents are read as pieces, with None behind the last one of each. A new word begins where white
# space follows something else, so pieces that are cut there have the tokens of the whole. Only
# space and newline are white space to everybody.
PIECES = re.compile(r".{1,4096}(?:\Z|(?<=\S)(?=[ \n]))|.{1,4096}", re.DOTALL)


def read_txt(file):
    """Documents between end-of-text markers."""
    text = ""
    file = io.TextIOWrapper(file, "utf-8-sig", newline="")
    while chunk := file.read(CHUNK):
        *documents, text = (text + chunk).replace("\r\n", "\n").split(END_OF_TEXT)
        for document in documents:
            yield from [*PIECES.findall(document), None]
        pieces = PIECES.findall(text)
        yield from pieces[:-2]
        text = "".join(pieces[-2:])  # where the text may end with half a marker
    yield from [*PIECES.findall(text), None]


def read_rows(path, file):
    """What stands in `text` of each row of .parquet, or of each line of JSON."""
    if path.endswith(".parquet"):
        table = ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        for batch in table.iter_batches(64, columns=["text"]):
            yield from batch.column("text").to_pylist()
    else:
        for line in file:
            try:
                row = json.loads(line.strip() or '{"text": ""}')  # blank lines are no rows
            except ValueError:
                row = None
            yield row.get("text") if isinstance(row, dict) else None


def read_files(patterns, skipped=None):
    """The documents of all files; notes rows without text in the set `skipped`, or refuses them."""
    paths = [path for p in patterns for path in sorted(glob.glob(p, recursive=True)) or [p]]
    for path in paths:
        if len(paths) > 1 and os.path.isdir(path):
            continue  # ** matches folders too
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
        try:
            with opener(path, "rb") as file:
                if not re.search(r"\.(parquet|jsonl?)(\.gz|\.xz)?$", path):
                    yield from read_txt(file)
                    continue
                for number, text in enumerate(read_rows(path, file), 1):
                    if isinstance(text, str) and text == text.encode("utf-8", "replace").decode():
                        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
                        yield from [*PIECES.findall(text), None]
                    elif skipped is None:
                        fault = f"row {number}: no object, on one line, with whole text in `text`"
                        raise UserError(f"{fault}; see --skip_bad")
                    else:
                        skipped.add((path, number))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8, perhaps UTF-16: save it as UTF-8") from error
        except DAMAGE as error:
            raise UserError(f"{path}: {error}") from error


def make_stories(seed=0):
    """Stories of about 90 to 150 words without end, the same ones for the same seed."""
    grammar = json.loads((HERE / "assets" / "stories.json").read_text("utf-8"))
    rng = random.Random(seed)
    while True:
        plot = rng.choice(grammar["plots"])
        person, friend = rng.sample(grammar[rng.choice(plot["who"])], 2)
        words = {**grammar["words"], **person, **{f"f{key}": friend[key] for key in friend}}
        words |= {key.title(): word.title() for key, word in words.items()}
        case = rng.choice(plot["cases"])
        text = "\n\n".join(plot["text"])
        while "{" in text:  # more than once, because what is filled in may have blanks too
            text = text.format(*case, **words)
        while "[" in text:  # the innermost choices first
            text = re.sub(r"\[([^][]*)\]", lambda match: rng.choice(match[1].split("|")), text)
        yield from [text, None]


def write_tokens(folder, split, pieces, tokenizer, limit):
    """Writes up to `limit` documents, blank ones left out -> how many, with how many tokens."""
    documents = 0
    tokens = 0
    begins = True
    total = limit if split == "train" else None  # validation may have less
    bar = tqdm(desc=split, total=total, unit=" documents", disable=None)
    with open(folder / f"{split}.bin", "wb") as file, bar:
        while documents != limit and (batch := list(islice(pieces, BATCH))):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece or "" for piece in batch])):
                if begins and not (piece or "").strip():
                    continue  # nothing of this document has been written, so it leaves no end
                if begins and tokenizer.bos_token is not None:
                    ids = [tokenizer.bos_token, *ids]
                begins = piece is None
                if begins:
                    ids = tokenizer.end_tokens[:1]
                    documents += 1
                    bar.update()
                file.write(np.array(ids, tokenizer.dtype))
                tokens += len(ids)
                if documents == limit:
                    break
    if documents == 0:
        raise UserError(f"there is too little text, for {split}")
    return {f"{split}_documents": documents, f"{split}_tokens": tokens}


def hold_out(folder, meta):
    """Moves the last HELD_OUT-th part of the tokens from train.bin to val.bin."""
    train = np.memmap(folder / "train.bin", meta["dtype"], "r")
    if len(train) < 4:
        raise UserError("there is too little text, for training and validation")
    val = train[-(len(train) // HELD_OUT + 2) :].copy()  # at least an input and a target
    val.tofile(folder / "val.bin")
    os.truncate(folder / "train.bin", train.nbytes - val.nbytes)
    meta["val_documents"] = int(np.count_nonzero(val == meta["end_tokens"][0]))
    meta["val_tokens"] = len(val)
    for count in ("documents", "tokens"):
        meta[f"train_{count}"] -= meta[f"val_{count}"]


# ---- command line --------------------------------------------------------------------------------
def has_gpu():
    """Whether training takes a GPU; asked in a process of its own, since torch needs 200 MB."""
    code = "import gemma270m, sys; sys.exit(gemma270m.pick_device('auto').type != 'cuda')"
    return subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


def find_tinystories(limit, out):
    """-> where `limit` stories are from, {"train", "val": paths, or seeds for made-up ones}"""
    shards = "train-00000" if limit <= FIRST_STORIES else "train"
    try:
        train = fetch(TINYSTORIES, "dataset", f"data/{shards}-.*")
        val = fetch(TINYSTORIES, "dataset", "data/validation-.*")
    except ConnectionError as error:
        meta = out / "meta.json"
        if meta.exists() and BUILT_IN not in meta.read_text("utf-8"):
            raise UserError(f"{error}; {out} keeps the data that it holds") from error
        print(f"No TinyStories but {BUILT_IN}: {error}", flush=True)
        return BUILT_IN, {"train": 0, "val": 1}
    if shards == "train" and not any(f"-of-{len(train):05}-" in path for path in train):
        raise UserError(f"only {len(train)} shards of {TINYSTORIES} are in the cache: go online")
    return TINYSTORIES, {"train": train, "val": val}


def put_in_place(new, out, meta):
    """Moves the new files to the data folder."""
    (new / "meta.json").write_text(json.dumps(meta, indent=2))  # while the old files are whole
    # The old files go first and meta.json comes last: without it the folder looks unfinished.
    for stale in ("meta.json", "init.pt"):
        (out / stale).unlink(missing_ok=True)
    for path in sorted(new.iterdir(), key=lambda path: path.name == "meta.json"):
        path.replace(out / path.name)


def prepare(args):
    """Makes the data folder that is asked for, or leaves it as it was, and prints what it holds."""
    out = Path(args.out_dir)
    skipped = set() if args.skip_bad else None
    read = partial(read_files, skipped=skipped)
    limit = args.limit
    name = args.model or args.tokenizer
    # With a GPU all stories and GPT-2's words; it is looked for where one of the two is not given.
    large = not (name and (args.input or limit)) and has_gpu()
    if args.input:
        source = " ".join(args.input)
        texts = {"train": args.input, "val": args.val_input}
    else:
        source, texts = find_tinystories(limit or (ALL_STORIES if large else SMALL_STORIES), out)
        if source == BUILT_IN:
            read = make_stories
            large = False
        limit = limit or (ALL_STORIES if large else SMALL_STORIES)
    name = name or ("gpt2" if large else SMALL_VOCABULARY)
    print(f"Documents: {limit or 'all'} of {source}; tokenizer: {name}", flush=True)

    if args.model:
        config, weights, tokenizer = read_model(name)
    elif name.isdecimal():
        tokenizer = learn_tokenizer(read(texts["train"]), int(name))
        name = f"{tokenizer.vocab_size:,} learned from the text"
    else:
        tokenizer = load_tokenizer(name)

    new = out / ".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        if args.model:
            from gemma270m import save_checkpoint  # torch is large and often not needed

            save_checkpoint(new / "init.pt", {"model_config": asdict(config), "model": weights})
        for file, text in tokenizer.files.items():
            (new / file).write_text(text, "utf-8")
        meta = {"source": source, "tokenizer": name, "tokenizer_files": sorted(tokenizer.files)}
        for field in ("vocab_size", "dtype", "bos_token", "end_tokens"):
            meta[field] = getattr(tokenizer, field)
        for split, text in texts.items():
            if text is None:
                hold_out(new, meta)
            else:
                meta |= write_tokens(new, split, read(text), tokenizer, limit)
        put_in_place(new, out, meta)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if not any(out.iterdir()):
            out.rmdir()
    print(f"Tokens: {meta['train_tokens']:,} for training, {meta['val_tokens']:,} for validation")
    if skipped:
        print(f"Rows without text, skipped: {len(skipped):,}")
    print(f"Next: python gemma270m.py --data_dir {out}")


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    flag = parser.add_argument
    flag("--input", nargs="+", metavar="FILE", help=".txt, .jsonl (also .gz, .xz), .parquet")
    flag("--val_input", nargs="+", metavar="FILE", help="else the last hundredth is for validation")
    flag("--limit", type=int, metavar="N", help="at most N documents, and as many for validation")
    flag("--tokenizer", metavar="NAME", help="gpt2, how many words to learn, a folder or hub name")
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
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    if sys.stdout:  # a closed one is None
        sys.stdout.reconfigure(errors="replace")  # for a terminal that lacks a character
    status = main()
    if sys.stdout:
        sys.stdout.flush()
    os._exit(status)  # without waiting for threads that still compute
