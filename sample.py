"""Continues a prompt with a model that gemma270m.py trained, and shows the text as it comes.

    python sample.py --ckpt out.pt --prompt "Once upon a time"
    python sample.py --ckpt out.pt --prompt FILE:start.txt --num_samples 4 --temperature 0.7

The text goes to standard output, the speed to standard error.
"""
import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

from gemma270m import Gemma, load_checkpoint, pick_device, pick_dtype, require
from prepare import load_tokenizer


def read_prompt(prompt):
    """The prompt itself, or the content of PATH for FILE:PATH. Raises ValueError if that is no UTF-8 text."""
    if not prompt.startswith("FILE:"):
        return prompt
    try:
        return Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompt from {prompt.removeprefix('FILE:')}: {error}") from None


class Text:
    """The text of tokens that come one by one; characters appear once their bytes are complete."""

    def __init__(self, tokenizer, end):
        self.tokenizer, self.end = tokenizer, end
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.content, self.ended = "", False

    def add(self, token):
        """Appends a token, unless end-of-text came before, and returns the characters it completes."""
        self.ended = self.ended or token == self.end
        piece = "" if self.ended else self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))
        self.content += piece
        return piece


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"sample.py: error: {message}\n")
    parser.add_argument("--ckpt", default="out.pt", help="checkpoint to sample from (default: %(default)s)")
    parser.add_argument("--prompt", default="", help="text to continue, or FILE:PATH; none starts a new document")
    parser.add_argument("--num_samples", type=int, default=1, help="continuations, sampled in one batch")
    parser.add_argument("--max_new_tokens", type=int, help="longest continuation (default: 256; 1024 for bytes)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=64, help="draw from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, default=0.95, help="draw from the likeliest tokens that hold this share")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text; none gives another each time")
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    args = parser.parse_args(argv)
    try:
        sample(args)
    except ValueError as error:
        parser.error(error)
    except (OSError, torch.OutOfMemoryError) as error:
        parser.exit(1, f"sample.py: error: {str(error).splitlines()[0]}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\n")


def sample(args):
    """Prints args.num_samples continuations of args.prompt. Raises ValueError for what cannot be done."""
    require(args.num_samples > 0, f"num_samples cannot be {args.num_samples}")
    require(args.max_new_tokens is None or args.max_new_tokens > 0, f"max_new_tokens cannot be {args.max_new_tokens}")
    prompt, device = read_prompt(args.prompt), pick_device(args.device)
    state = load_checkpoint(args.ckpt)
    tokenizer = load_tokenizer(state["data"]["tokenizer"])
    end = state["data"]["end_of_text"]
    start = [end, *tokenizer.encode_ordinary(prompt)]  # in training, every document follows an end-of-text
    room = state["model_config"].context_length - len(start)
    require(room > 0, f"the prompt has {len(start)} tokens, and the context of the model holds {len(start) + room}")
    wanted = args.max_new_tokens or (1024 if tokenizer.name == "bytes" else 256)

    model = Gemma(state["model_config"])
    model.load_state_dict(state["model"])
    model.to(device).eval()
    dtype, _ = pick_dtype(args.dtype, device)
    generator = torch.Generator(device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    tokens = torch.tensor([start] * args.num_samples, device=device)
    texts = [Text(tokenizer, end) for _ in range(args.num_samples)]
    alone = args.num_samples == 1
    print(prompt if alone else "", end="", flush=True)
    began, steps = time.perf_counter(), 0
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for new in model.stream(tokens, min(wanted, room), args.temperature, args.top_k, args.top_p, end, generator):
            steps += 1
            pieces = [text.add(token) for text, token in zip(texts, new.tolist())]
            print(pieces[0] if alone else "", end="", flush=True)
    seconds = time.perf_counter() - began
    print("" if alone else "\n---------------\n".join(prompt + text.content for text in texts))
    ended = sum(text.ended for text in texts)
    print(f"{steps} tokens each, {steps * args.num_samples / seconds:,.0f} tokens/s; {ended} of {args.num_samples} "
          f"reached end-of-text", file=sys.stderr)


if __name__ == "__main__":
    main()
