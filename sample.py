"""Continues a prompt with a model that gemma270m.py trained, and shows the text as it comes; or exports it.

    python sample.py --ckpt out.pt --prompt "Once upon a time"
    python sample.py --ckpt out.pt --prompt FILE:start.txt --num_samples 4 --temperature 0.7
    python sample.py --ckpt FOLDER              # with a model and tokenizer that transformers reads
    python sample.py --ckpt out.pt --export FOLDER

The text goes to standard output; speed and reason for the end go to standard error.
"""
import argparse
import sys
import time
from pathlib import Path

import torch

from gemma270m import Gemma, load_checkpoint, pick_device, pick_dtype, require
from prepare import load_tokenizer


class Text:
    """The text of tokens that come one by one; a character appears once its last byte is there."""
    def __init__(self, tokenizer, end):
        self.tokenizer, self.end, self.content, self.ended = tokenizer, end, "", False
        self.waiting = []  # tokens whose last character may want more bytes

    def add(self, token):
        """Takes a token and returns the characters that it completes; none from end-of-text on."""
        self.ended = self.ended or token == self.end
        known = not self.ended and token < self.tokenizer.n_vocab  # a padded vocabulary has more
        self.waiting += [token] if known else []
        return "" if self.tokenizer.decode(self.waiting).endswith("\ufffd") else self.finish()

    def finish(self):
        """Returns the characters of the tokens that wait, with U+FFFD for what was never completed."""
        characters, self.waiting = self.tokenizer.decode(self.waiting), []
        self.content += characters
        return characters


def read_prompt(prompt):
    """The prompt itself, or for FILE:PATH what the file holds. Raises ValueError if that is no UTF-8 text."""
    if not prompt.startswith("FILE:"):
        return prompt
    path = prompt.removeprefix("FILE:")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt: {path} cannot be read as UTF-8 text: {error}") from None


def load(ckpt, tokenizer=None):
    """The model of a checkpoint or of a folder, its tokenizer and end-of-text token. Raises ValueError.

    `tokenizer` names one to take in place of that of the checkpoint, whose folder may have moved.
    """
    if not (ckpt.endswith(".pt") or Path(ckpt).is_file()):
        model, tokenizer = Gemma.from_pretrained(ckpt), load_tokenizer(tokenizer or ckpt)
        return model, tokenizer, tokenizer.eot_token
    state = load_checkpoint(ckpt)
    require({"tokenizer", "end_of_text"} <= state["data"].keys(), f"{ckpt} does not name its tokenizer")
    model = Gemma(state["model_config"])
    model.load_state_dict(state["model"])
    return model, load_tokenizer(tokenizer or state["data"]["tokenizer"]), state["data"]["end_of_text"]


def sample(args):
    """Prints args.num_samples continuations of args.prompt. Raises ValueError for what cannot be done."""
    require(args.num_samples > 0, f"num_samples cannot be {args.num_samples}")
    require(args.seed is None or abs(args.seed) < 2 ** 63, f"seed cannot be {args.seed}")
    require(args.max_new_tokens is None or args.max_new_tokens > 0, "max_new_tokens must be at least 1")
    prompt, device = read_prompt(args.prompt), pick_device(args.device)
    model, tokenizer, end = load(args.ckpt, args.tokenizer)
    if args.export:
        model.save_pretrained(args.export, tokenizer)
        print(f"{args.export}: {model.num_parameters():,} parameters, tokenizer {tokenizer.name}")
        return
    config, start = model.config, tokenizer.prefix or [end]  # in training each document follows one of these
    start = [*start, *tokenizer.encode_ordinary(prompt)]
    fits = max(start) < config.vocab_size
    require(fits, f"prompt: token {max(start)} is beyond the vocabulary of {config.vocab_size}")
    room = config.context_length - len(start)
    require(room > 0, f"prompt: {len(start)} tokens leave no room in a context of {config.context_length}")
    wanted = args.max_new_tokens or (2048 if tokenizer.name == "bytes" else 256)  # a story in either

    dtype, _ = pick_dtype(args.dtype, device)
    model.to(device, dtype)
    if args.compile:  # with these options, products with one row become kernels of their own
        model.compile(options={"coordinate_descent_tuning": True, "combo_kernels": True})
    generator = torch.Generator(device)
    generator.seed() if args.seed is None else generator.manual_seed(args.seed)
    tokens = torch.tensor([start] * args.num_samples, device=device)
    stream = model.stream(tokens, min(wanted, room), args.temperature, args.top_k, args.top_p, end, generator)
    texts, alone, made = [Text(tokenizer, end) for _ in tokens], args.num_samples == 1, 0
    began, before = time.perf_counter(), 0
    halved = dtype == torch.float16  # then autocast keeps the residual stream in float32
    with torch.autocast(device.type, dtype, enabled=halved, cache_enabled=False):
        for new in stream:
            shown = [text.add(token) for text, token in zip(texts, new.tolist())]
            if alone:
                print(shown[0] if made else prompt + shown[0], end="", flush=True)
            made += len(shown)
            if made == 2 * len(shown):  # what prompt and preparations took is not decoding
                began, before = time.perf_counter(), made
    seconds = time.perf_counter() - began
    shown = [text.finish() for text in texts]
    print(*shown if alone else (prompt + text.content for text in texts), sep="\n---------------\n")
    speed = f"{(made - before) / seconds:,.0f} tokens/s, " if made > before else ""  # none to time
    ended = sum(text.ended for text in texts)
    print(f"{made:,} tokens, {speed}{ended} of {args.num_samples} ended by end-of-text", file=sys.stderr)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"sample.py: error: {message}\n")
    add = parser.add_argument
    add("--ckpt", default="out.pt", help="checkpoint of gemma270m.py, or a folder that transformers "
        "reads, or its name on the hub (default: %(default)s)")
    add("--tokenizer", metavar="FOLDER", help="the checkpoint's tokenizer, if its folder has moved")
    add("--export", metavar="FOLDER", help="write the model there for transformers, and end")
    add("--prompt", default="", help="text to continue, or FILE:PATH; without one a new document starts")
    add("--num_samples", type=int, default=1, help="continuations in one batch (default: %(default)s)")
    add("--max_new_tokens", type=int, help="longest continuation (default: 256; 2048 if tokens are bytes)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: %(default)s)")
    add("--top_k", type=int, default=64, help="draw from the k likeliest tokens (default: %(default)s)")
    add("--top_p", type=float, default=0.95, help="and from the fewest that hold this probability "
        "(default: %(default)s)")
    add("--seed", type=int, help="the same seed gives the same text (default: another each time)")
    add("--device", default="auto", help="cuda, cpu; auto takes a GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"),
        help="of matrix products; auto takes what is fast and safe on this hardware")
    add("--compile", action="store_true", help="faster on a GPU, after half a minute: for long or many texts")
    try:
        sample(parser.parse_args(argv))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error).splitlines()[0])
    except KeyboardInterrupt:
        parser.exit(130, "\n")


if __name__ == "__main__":
    main()
