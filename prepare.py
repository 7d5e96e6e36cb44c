"""
Turns text into the token files that gemma270m.py trains on.

    python prepare.py                                      TinyStories with the GPT-2 vocabulary
    python prepare.py --input my.txt "more/*.jsonl.gz"     your own text
    python prepare.py --input my.txt --tokenizer bytes     no vocabulary to download
    python prepare.py --input my.txt --tokenizer FOLDER    that of a model, to fine-tune it

Writes OUT_DIR/train.bin and OUT_DIR/val.bin, plain arrays of uint16 (uint32 for a vocabulary above 65,536) in
which an end-of-text token follows each story, and last OUT_DIR/meta.json, which says what they hold.

A story travels through this file as pieces of text and then None, so that a document of any size needs no
more memory than a small one.
"""
import argparse
import glob
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import shlex
import shutil
import sys
import textwrap
import threading
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
DATASET = "roneneldan/TinyStories"
OUTPUTS = ("train.bin", "val.bin", "meta.json")  # meta.json comes last: it vouches for the other two
PIECE = 2**19     # characters encoded at once; tiktoken's GPT-2 pattern fails on a million spaces in a row
MAX_LINE = 2**27  # bytes; a line of JSON is parsed whole, so the longest one decides the peak of memory
WORKERS = min(8, os.cpu_count() or 1)
DEADLINE = 5      # seconds to wait for the network before going on without it
HELD_OUT = 100    # one story in so many is for validation


def reason(error):
    """One short line for any exception."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return getattr(error, "strerror", None) or textwrap.shorten(text, 160)


@contextmanager
def blame(source):
    """Turns whatever goes wrong inside into a ValueError of one line that starts with `source`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: the text must be UTF-8, and this is not") from error
    except Exception as error:
        raise ValueError(f"{source}: {error if type(error) is ValueError else reason(error)}") from error


def in_background(function, *args):
    """Calls function(*args) in a thread that never keeps the process alive; returns a Future."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


# Tokenizers -----------------------------------------------------------------------------------------------

class Encoding(tiktoken.Encoding):
    """A tiktoken.Encoding that transformers can read too."""
    prefix = []  # what a document starts with
    bos_token_id = eos_token_id = tiktoken.Encoding.eot_token

    def save_pretrained(self, folder):
        """Writes the files from which transformers makes a tokenizer that gives the same tokens."""
        with blame("the tokenizer cannot be written"):
            from transformers.convert_slow_tokenizer import TikTokenConverter
        converter = TikTokenConverter(pattern=self._pat_str, extra_special_tokens=self._special_tokens)
        converter.load_tiktoken_bpe = lambda _: self._mergeable_ranks  # at hand, so no file is needed
        converter.converted().save(str(Path(folder, "tokenizer.json")))
        Path(folder, "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}, indent=2) + "\n")


class FolderTokenizer:
    """The tokenizer of a folder that transformers reads, with the methods of tiktoken.Encoding used here.

    A document ends with the folder's eos_token, and starts with its bos_token if the tokenizer itself puts
    that there, as Gemma's does. Raises ValueError if a file is missing or the tokenizer of another kind.
    """
    FILES = ("tokenizer*", "*_tokens*.json", "chat_template*")

    def __init__(self, name):
        from huggingface_hub import snapshot_download
        from tokenizers import Tokenizer
        local = os.path.isdir(name)
        self.name = os.path.realpath(name) if local else name
        with blame(f"tokenizer.json and tokenizer_config.json of {name}"):
            self.folder = Path(self.name if local else snapshot_download(name, allow_patterns=self.FILES))
            self.tokenizer = Tokenizer.from_str((self.folder / "tokenizer.json").read_text("utf-8"))
            self.decode = self.tokenizer.decode
            given = json.loads((self.folder / "tokenizer_config.json").read_text("utf-8"))
            self.bos_token_id, self.eos_token_id = (
                self.tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or "")
                for token in map(given.get, ("bos_token", "eos_token")))
            self.eot_token = self.eos_token_id
            if self.eot_token is None:
                raise ValueError("there is no eos_token")
            first = self.tokenizer.encode("").ids[:1]
            self.prefix = first if first == [self.bos_token_id] else []
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.tokenizer.encode_special_tokens = True  # as ordinary text
            if "".join(self.decode([token]) for token in self.encode_ordinary(" A b\n")) != " A b\n":
                raise ValueError("the texts of a text's tokens must be that text")
        # Text gives no special token; the model has no row for those that Gemma keeps for images.
        added = self.tokenizer.get_added_tokens_decoder().items()
        tokens = {*self.tokenizer.get_vocab().values()} - {token for token, kind in added if kind.special}
        self.n_vocab = 1 + max(tokens | {self.eot_token, *self.prefix})

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.array(self.encode_ordinary(text), np.uint32)

    def save_pretrained(self, folder):
        for path in itertools.chain.from_iterable(map(self.folder.glob, self.FILES)):
            shutil.copy(path, folder)


def load_tokenizer(name, timeout=60):
    """The tokenizer `name`: "gpt2" or "bytes" as an Encoding, that of a folder as a FolderTokenizer.

    "gpt2" has 50,257 tokens, which tiktoken downloads once; "bytes" has the 256 bytes and end-of-text = 256;
    a folder is one that transformers reads, or by its name, with a slash, one on the hub. Raises ValueError
    for another name, OSError if GPT-2's vocabulary cannot be had within `timeout` seconds.
    """
    if name == "bytes":
        # Nothing merges, so any pattern is exact; this one keeps tiktoken from handling each character alone.
        return Encoding("bytes", pat_str=r"[\s\S]{1,256}", explicit_n_vocab=257,
                        mergeable_ranks={bytes([i]): i for i in range(256)},
                        special_tokens={END_OF_TEXT: 256})
    if name != "gpt2":
        if os.path.isdir(name) or name.count("/") == 1:
            return FolderTokenizer(name)
        raise ValueError(f"no tokenizer {name!r} here; --tokenizer: gpt2, bytes, folder of tokenizer.json")
    try:
        known = in_background(tiktoken.get_encoding, name).result(timeout)
        return Encoding(name, pat_str=known._pat_str, mergeable_ranks=known._mergeable_ranks,
                        special_tokens=known._special_tokens)
    except Exception as error:
        why = str(error) or f"no answer in {timeout} s"  # a timeout has no text of its own
        raise OSError(f"cannot load the GPT-2 vocabulary ({textwrap.shorten(why, 80)}); connect to the "
                      "internet once, or set TIKTOKEN_CACHE_DIR to a folder that has it") from error


# Reading: every source yields pieces of text, and None after each story -----------------------------------

# GPT-2's pattern starts a new word wherever white space follows something visible, so the tokens of the two
# sides are the tokens of the whole. Space and newline only: Python and Rust disagree about rarer white space.
LAST_BOUNDARY = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def cut(text, keep=0):
    """Yields `text` in pieces of about PIECE characters; after a cut, more than `keep` are in the last."""
    start = 0
    while len(text) - start > PIECE + keep:
        boundary = LAST_BOUNDARY.match(text, start, start + PIECE)
        end = boundary.end() if boundary else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def story(text):
    """The pieces of one whole story, or nothing if it is white space only."""
    if text and not text.isspace():
        yield from cut(text)
        yield None


def read_txt(file):
    """Documents between end-of-text markers, byte for byte; those of white space only are skipped."""
    text, begun = "", False  # the unfinished document, and whether pieces of it are out already

    def finish(text):
        return itertools.chain(cut(text), [None]) if begun else story(text)

    file = io.TextIOWrapper(file, encoding="utf-8", newline="")
    while chunk := file.read(PIECE):
        *documents, text = (text + chunk).split(END_OF_TEXT)
        for document in documents:
            yield from finish(document)
            begun = False
        *pieces, text = cut(text, keep=len(END_OF_TEXT))  # the last characters may be half a marker
        yield from pieces
        begun = begun or bool(pieces)
    yield from finish(text)


def read_jsonl(file):
    """Objects with a string `text`, one a line."""
    def text_of(line):
        if len(line) > MAX_LINE:
            raise ValueError(f"longer than {MAX_LINE:,} bytes")
        row = json.loads(line)
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError("no field `text` that holds a string")
        row["text"].encode()  # fails on half a surrogate pair, which is no text and could not be given back
        return row["text"]

    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if not line.isspace():
            with blame(f"line {number}"):
                text = text_of(line)
            yield from story(text)
            del text  # two long ones at a time would be too many


def read_parquet(file):
    """Rows with a string in column `text`."""
    from pyarrow.parquet import ParquetFile
    table = ParquetFile(file, buffer_size=2**20)  # without a buffer each column is read whole
    if "text" not in table.schema_arrow.names:
        raise ValueError("no column `text`")
    number = 0
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group)
        rows = min(1000, max(1, size.num_rows * 2**22 // max(1, size.total_byte_size)))  # about 4 MB
        for batch in table.iter_batches(rows, row_groups=[group], columns=["text"]):
            for value in batch.column(0):
                number += 1
                text = value.as_py()
                if not isinstance(text, str):
                    raise ValueError(f"row {number}: no string in column `text`")
                yield from story(text)


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


def find_files(patterns):
    """The (path, opener, reader) of each file that the names and globs stand for, in order."""
    files = []
    for pattern in patterns:
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise ValueError(f"no such file: {pattern!r}")
        for path in paths:
            stem, suffix = os.path.splitext(path.lower())
            reader = READERS.get(os.path.splitext(stem)[1] if suffix in OPENERS else suffix)
            if not reader:
                raise ValueError(f"{path}: not a .txt, .jsonl (both also .gz or .xz) or .parquet file")
            files.append((path, OPENERS.get(suffix, open), reader))
    return files


def read_files(files):
    """The stories of all `files`, as find_files gives them; ValueError names the file that cannot be read."""
    for path, opener, reader in files:
        with blame(path), opener(path, "rb") as file:
            yield from reader(file)


def probe_hub():
    """Raises whatever keeps the Hugging Face hub from answering."""
    from huggingface_hub import HfApi
    HfApi().dataset_info(DATASET, timeout=DEADLINE)  # one attempt; `datasets` itself tries for a minute


def read_tinystories(split):
    """The stories of one split, "train" or "validation", streamed from the hub."""
    with blame(DATASET):
        from datasets import load_dataset
        for row in load_dataset(DATASET, split=split, streaming=True):
            yield from story(row["text"])


# The built-in stories -------------------------------------------------------------------------------------

BUILT_IN_TRAIN, BUILT_IN_VAL = 24_000, 500

# In a plot, [this|that] is a choice, {name} and the like are filled in, and {0}, {1}, ... are from one case.
PHRASES = {
    "once": "[Once upon a time, there was|Once upon a time, there was|Long ago, there was|There once was] a "
            "[little|little|small|kind|happy|young] {kind} named {name}.",
    "morning": "[One sunny morning|One morning|One warm day|One day]",
}
GIRL, BOY = "she her her", "he him his"
CHILDREN = ([(name, "girl", GIRL) for name in "Lily Mia Anna Sara Emma Lucy Amy Rose Zoe Ella".split()]
            + [(name, "boy", BOY) for name in "Tim Ben Max Tom Sam Jack Leo Dan Nick Joe".split()])
ANIMALS = [(name, kind, pronouns) for kind in "mouse rabbit bear fox cat dog squirrel duck pig goat".split()
           for names, pronouns in (("Ruby Bella Coco Daisy Penny", GIRL), ("Pip Gus Toby Milo Teddy", BOY))
           for name in names.split()]
PARENTS = [("mom", "she", "her"), ("dad", "he", "him"), ("grandma", "she", "her"), ("grandpa", "he", "him")]

# (who can be in it, its cases, the story)
PLOTS = [
    ([CHILDREN], """
kite; in the top of a tall tree; threw a shoe at it; got a ladder and climbed up to it
ball; on the roof of the shed; poked it with a stick; got it down with a long rake
toy plane; on a high branch; threw a small stick at it; shook the branch with a long rake
balloon; under the roof of the barn; jumped from a box; pulled it down with a long rake""", """
{once} {He} had a [red|blue|green|yellow] {0} and played with it every day. {morning}, the {0} got stuck {1}.
["Oh no!" cried {name}.|{name} felt very sad.|] {He} jumped as high as {he} could, but {he} was too small.
Then {he} {2}, but the {0} did not move.

{name} ran to {his} {parent}. "My {0} is stuck," {he} said. "[Can you help me|Will you help me, please]?"
[{His} {parent} smiled.|] {Phe} {3}. [Soon|At last] the {0} was free!

{name} [laughed and jumped for joy|gave {his} {parent} a big hug] and said, "Thank you!" [Now {he} knew
that it is good to ask for help.|{He} was so happy.|]"""),
    ([CHILDREN, ANIMALS], """
red ball; in the garden; under the bed; behind a big flower pot
blue scarf; at the park; behind the door; on a bench
toy boat; by the pond; in the big box; in the tall grass near the water
warm hat; on the hill; under the table; on top of a little bush
silver bell; in the woods; behind the clock; next to a big old tree""", """
{once} {His} favorite thing was a {0}. [{He} took it everywhere.|] One [night|evening], {name} could not find
it. {He} looked {2}, but it was not there. {He} looked [again and again|in every room], and then {he} began to
cry.

{His} {pal} came to help. "[Do not cry|Do not be sad]," said {friend}. "Where did you play today?" [{name}
thought hard.|] "I played {1}," said {name}. They [went|ran] back, and there was the {0}, {3}!

"Thank you, {friend}," said {name}. ["You are a good friend."|"You are a great friend."|] That night,
{he} put the {0} [in a safe place|next to {his} bed] and slept well. [From then on, {he} always put {his}
things away.|]"""),
    ([CHILDREN, ANIMALS], """
swing; at the park; swing
red wagon; in the yard; ride in it
big drum; in the barn; play it
little boat; on the pond; sail in it
blue ball; on the grass; kick it""", """
{once} {morning}, {name} found a {0} {1}. "[It is mine|I saw it first]!" said {name}. {His} {pal} wanted to
{2}, too. "No, it is my turn," said {friend}. They both pulled and shouted. [Soon nobody was having fun.|Soon
both of them were mad.|]

Then {name} stopped. {He} saw [a tear on {friend}'s face|that {friend} was sad], and {he} felt bad. "We can
take turns," {he} said. "You go first, and I will [count to ten|wait]." [{friend} smiled. "That is a good
idea," {fhe} said.|]

First {friend} had a turn, and then {name} had a turn. They laughed and played [all day|until the sun
went down]. {name} learned that [sharing makes every game more fun|it is more fun to play together]."""),
    ([CHILDREN], """
Tap, tap, tap; at the window; a little bird that was cold and wet; made it a warm bed in a box
Scratch, scratch; at the door; a lost kitten; gave it a bowl of warm milk
Squeak, squeak; under the bed; a tiny mouse that was hungry; gave it a piece of cheese
Bump, bump; behind the door; a puppy that was all alone; let it sleep next to {his} bed""", """
{once} {He} was [afraid of|scared of] the dark. One [windy|rainy|cold] night, {he} heard a sound {1}. "{0}!"
{name} pulled the blanket over {his} head. ["It must be a monster," {he} thought.|"Is it a monster?" {he}
thought.] [{He} could not sleep.|]

{name} called {his} {parent}. "[Let us be brave and look|We will look together]," said {his} {parent}, and
{phe} turned on the light. [Hand in hand, they went to see.|] It was not a monster at all. It was {2}!

"You poor thing," said {name}. {He} {3}. [Soon it was fast asleep.|It looked up with happy eyes.|] After
that night, {name} [was not afraid of the dark anymore|knew that the dark is not so bad]."""),
    ([CHILDREN, ANIMALS], """
duckling; on the path; by the old bridge; the pond; mother duck
lamb; next to the road; behind the barn; the green field; mother sheep
chick; under a bush; in the garden; the farm; mother hen
baby bird; in the grass; near the river; the big tree; mother bird""", """
{once} {morning}, {he} was walking [in the sun|down the road|and singing a song] when {he} heard a soft cry. A
tiny {0} sat all alone {1}. "I can not find my mom," it said. ["I went after a [butterfly|leaf|bee], and now I
am lost."|]

"[Do not worry|Do not cry]," said {name}. "I will help you." First they looked {2}, but no one was there. "Let
us be very quiet and listen," said {name}. [Far away|After a while], they heard a voice. "That is my mom!"
cried the {0}.

They ran to {3}, and there was the {4}. She [kissed|hugged] her baby. "Thank you, {name}," she said.
["You are so kind."|"You are very smart."|] {name} went home with [a warm heart|a big smile]."""),
    ([CHILDREN, ANIMALS], """
a cake; eggs
a sweet pie; apples
a loaf of bread; nuts
a big cake; berries""", """
{once} It was the birthday of {his} {parent}, and {name} wanted to bake {0}. But there were no {1} in the
house! [{name} did not know what to do.|{name} sat down and felt sad.|]

{He} went next door to {his} {pal}. "Do you have some {1}?" {he} asked. "[Yes, I do|Yes, take them all]," said
{friend}, "and I will help you, too." They mixed everything and put it in the oven. Then they played and
forgot to look. [Oh no|Oh dear]! It was all black.

"We can try again," said {friend}. This time they [watched it well|did not go away], and it was just
right. {His} {parent} took a bite. "[This is the best birthday ever|It is so good]," {phe} said. [{name}
gave {friend} the biggest piece.|{name} and {friend} were very proud.]"""),
    ([CHILDREN], """
ride a bike; fell on the grass; Look ahead and keep your feet moving; rode all the way down the path
swim; got water in {his} nose; Kick your legs and do not hurry; swam all the way across the pool
skate; fell on the ice; Bend your legs and take small steps; went all the way around the pond
climb a rope; came down with a bump; Hold on with your feet, too; went all the way to the top""", """
{once} {He} wanted to {0} like {his} {pal}. "[It looks so easy|I want to do that, too]," said {name}. But when
{he} tried, {he} {1}. [{He} tried again, and {he} {1} again.|] "I will never learn!" {he} cried, and {he}
wanted to [give up|go home].

{His} {parent} sat down next to {him}. ["No one can do it the first time," {phe} said.|"It is hard for
everyone at first," {phe} said.] "{2}. I will stay close to you." {name} [wiped {his} eyes|took a deep breath]
and tried one more time. [Little by little, it went better.|]

Then, all at once, {he} {3}! "[Look at me|I did it]!" {he} shouted. [{friend} clapped and clapped.|]
{name} was [very proud|so happy]. [Now {he} knew that if you keep trying, you can do hard things.|]"""),
    ([CHILDREN], """
the blue vase; under the rug
the big plate; behind the sofa
the old clock; in a box
the pretty lamp; under the bed""", """
{once} {morning}, {name} was [running|jumping|playing with a ball] in the house, but {his} {parent} had said
not to. Crash! {He} bumped into the table, and {0} fell and broke. [{name} was scared.|] {He} hid the pieces
{1} and said nothing.

At dinner, {name} could not eat. "[What is wrong|Why are you so quiet]?" asked {his} {parent}. [{name} felt
bad and began to cry.|{name} did not want to tell a lie.] At last {he} said, "I broke {0}. I am sorry."

{His} {parent} gave {him} a hug. "I am glad that you told the truth," {phe} said. Together they got some
glue and fixed {0}. It did not look new, but {name} felt [happy|good] again. [It is always best to tell
the truth.|{He} never hid a thing like that again.|]"""),
    ([CHILDREN, ANIMALS], """
a big yellow flower; taller than the fence
an orange pumpkin; as big as a chair
a tall bean plant; all the way up to the roof
a berry bush; full of sweet red berries""", """
{once} One spring day, {his} {parent} gave {him} a tiny seed. ["What will it be?" asked {name}. "Wait and
see," said {his} {parent}.|] {name} put the seed in the ground and gave it water. Every morning {he} ran out
to look, but {he} saw nothing. "[My seed is no good|My seed is asleep]," {he} said. [{He} wanted to dig it
up.|]

"Please wait," said {his} {parent}. "[Good things take time|A seed needs sun and rain and time]." So {name}
waited and [sang to the seed|told it stories]. Then one day a little green leaf came out of the ground!

Day by day it grew and grew. By summer it was {0}, {1}! {name} [danced with joy|jumped up and down].
"[You were right|I am glad that I waited]," {he} said to {his} {parent}."""),
    ([CHILDREN], """
make castles in the sand; at the beach; made the biggest castle of all
play with a ball; at the park; played ball
draw with chalk; in front of the school; drew a long, long train
fly kites; on the hill; flew the kite""", """
{once} {He} loved to {0} {1}. {morning}, {name} saw a new {fkind} there. The {fkind} sat all alone and looked
at the ground. "Hello, I am {name}," said {name}. "Do you want to play?" [But the {fkind} did not say a
word.|The {fkind} looked away.]

[{name} did not give up.|{name} was a little sad, but {he} did not give up.] {He} took {his}
[apple|sandwich|cookie] and broke it in two. "Here, this half is for you," {he} said. The {fkind} gave {him} a
tiny smile. "My name is {friend}," {fhe} said. "I am new here, and I was [shy|scared]."

Then they {2} together until it was time to go home. ["Can we play again?" asked {friend}. "Yes," said
{name}.|] That night they were both happy, for each of them had a new friend."""),
    ([ANIMALS], """
nuts; a pot of warm soup
berries; some bread and honey
apples; a big sweet pie
seeds; some sweet corn""", """
{once} {name} had a big pile of {0}. {His} {pal} came to the door. "I am so hungry," said {friend}. "May I
have some {0}?" "No," said {name}. "They are all mine." {friend} walked away with {fhis} head down.

That night there was a big storm. Water ran into the house and took all the {0} away. [Cold and wet and
hungry, {name}|Now {name} was hungry, too. {He}|{name}] went to {friend}'s house and knocked. "I found {1},"
said {friend}. "Come in, and we will share it."

"I was not kind to you," said {name}. "I am sorry." ["That is all right," said {friend}.|"I am not mad,"
said {friend}.] They ate by the warm fire. From that day on, {name} shared [all {he} had|with everyone]."""),
    ([ANIMALS], """
an old turtle; turtle; Climb on my back; swam slowly to the other side
a strong beaver; beaver; I will help you; pushed a long log over the water
a white swan; swan; Sit on my wings; took {him} to the other side
a big cow; cow; Sit on my back; walked right through the water""", """
{once} {morning}, {his} {pal} was sick in bed. {name} packed [a pot of soup|a basket of berries|a jar of
honey] and set off. But when {he} came to the river, the bridge was gone! [{name} wanted to jump, but the
river was too wide.|] {He} put a piece of wood on the water, but it [was too small|went under].

Just then, {0} came by. "Why are you sad?" asked the {1}. "I can not get to my friend," said {name}. "{2},"
said the {1}. Then the {1} {3}. ["Thank you!" said {name}.|"You are so kind!" said {name}.|]

{friend} was very glad to see {him}. They ate together, and soon {friend} felt better. "You came all this
way for me," said {friend}. "[That is what friends do|You are my friend]," said {name}."""),
]


def write_stories(seed=0):
    """Yields different stories of 60 to 250 words without end, the same ones for the same seed."""
    rng, seen = random.Random(seed), set()
    while True:
        casts, cases, text = rng.choice(PLOTS)
        cast = rng.choice(casts)
        name, kind, pronouns = rng.choice(cast)
        friend, fkind, fpronouns = rng.choice([other for other in cast if other[0] != name])
        parent, phe, phim = rng.choice(PARENTS)
        (he, him, his), (fhe, fhim, fhis) = pronouns.split(), fpronouns.split()
        words = dict(PHRASES, name=name, kind=kind, he=he, him=him, his=his, He=he.title(), His=his.title(),
                     friend=friend, fkind=fkind, fhe=fhe, fhim=fhim, fhis=fhis,
                     pal=f"friend {friend}" if cast is CHILDREN else f"friend {friend} the {fkind}",
                     parent=parent, phe=phe, phim=phim, Phe=phe.title())
        case = rng.choice(cases.strip().split("\n")).split("; ")
        while "{" in text:  # more than once, because what is filled in may have blanks too
            text = text.format(*case, **words)
        while "[" in text:  # the innermost choices first
            text = re.sub(r"\[([^][]*)\]", lambda choice: rng.choice(choice[1].split("|")), text)
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        if text not in seen:
            seen.add(text)
            yield text


# Writing --------------------------------------------------------------------------------------------------

def encode(encoding, pieces, dtype):
    """The tokens of `pieces`, which are text or tokens; a marker inside a text is ordinary text."""
    return np.concatenate([encoding.encode_to_numpy(piece, disallowed_special=()) if isinstance(piece, str)
                           else np.array(piece, np.uint32) for piece in pieces]).astype(dtype)


class TokenFile:
    """Encodes pieces in the threads of `pool` and writes their tokens to `file` in order."""

    def __init__(self, file, encoding, dtype, pool):
        self.file, self.pool, self.encode = file, pool, lambda pieces: encode(encoding, pieces, dtype)
        self.start, self.end, self.previous = encoding.prefix, [encoding.eot_token], None
        self.jobs, self.batch, self.size = deque(), [], 0
        self.stories = self.tokens = 0

    def add(self, piece):
        self.stories += piece is None
        self.batch += [self.end] if piece is None else [piece] if self.previous else [self.start, piece]
        self.previous = piece
        self.size += len(piece or "") + 50  # of short pieces, the arrays are what fills the memory
        if self.size > PIECE:
            self.flush(waiting=WORKERS)

    def flush(self, waiting=0):
        """Hands the batch to the pool and writes finished ones until at most `waiting` are left."""
        if self.batch:
            self.jobs.append(self.pool.submit(self.encode, self.batch))
            self.batch, self.size = [], 0
        while len(self.jobs) > waiting:
            tokens = self.jobs.popleft().result()
            self.file.write(tokens)
            self.tokens += len(tokens)


def fill(target, pieces, limit, held_out=None):
    """Writes up to `limit` stories to `target`, and every HELD_OUT-th, the first included, to `held_out`."""
    with tqdm(unit=" characters", unit_scale=True, disable=None) as bar:
        for piece in pieces:
            hold = held_out and (target.stories + held_out.stories) % HELD_OUT == 0
            (held_out if hold else target).add(piece)
            bar.update(len(piece or ""))
            if target.stories == limit:
                break
    for file in filter(None, (target, held_out)):
        file.flush()


def split_single(train, val):
    """Moves all but the last HELD_OUT-th part of the only story from `val` to `train`."""
    val.file.seek(0)
    shutil.copyfileobj(val.file, train.file)
    width = train.file.tell() // val.tokens  # bytes a token
    share = max(min(2, val.tokens - 1), val.tokens // HELD_OUT)  # a single token has none to predict
    train.tokens, val.tokens = val.tokens - share, share
    train.stories = 1
    val.file.seek(0)
    val.file.truncate()
    train.file.seek(train.tokens * width)
    shutil.copyfileobj(train.file, val.file)
    train.file.truncate(train.tokens * width)


def checksum(paths, meta):
    """What gemma270m.py compares before it trains: the CRC-32 of the files, then of meta as sorted JSON."""
    value = 0
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(2 ** 20):
                value = zlib.crc32(chunk, value)
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode(), value)


def choose(args):
    """What to read, as (encoding, training stories, validation stories or None, their limit, description)."""
    files, val_files = find_files(args.input), find_files(args.val_input)
    offline = False
    if not files:
        try:
            in_background(probe_hub).result(DEADLINE)
        except Exception as error:
            offline = True
            print("Stories come from a small built-in grammar: cannot reach TinyStories "
                  f"({reason(error)}); for the real ones, connect to the internet and run this again.")
    named = args.tokenizer or files  # what was asked for is got or refused, never replaced
    patience = 60 if named else DEADLINE if offline else 2 * DEADLINE
    try:
        encoding = load_tokenizer(args.tokenizer or "gpt2", patience)
    except OSError as error:
        if named:
            raise ValueError(f"{error}, or use --tokenizer bytes") from error
        encoding = load_tokenizer("bytes")
        print(f"Tokens are bytes: {error}.")
    if files:
        val = read_files(val_files) if val_files else None
        return encoding, read_files(files), val, None, " ".join(args.input)
    val_limit = args.limit and max(100, args.limit // 100)  # the share that the whole of TinyStories has
    if offline:
        val = itertools.islice(write_stories(), BUILT_IN_VAL)
        train = itertools.islice(write_stories(), BUILT_IN_VAL, BUILT_IN_VAL + BUILT_IN_TRAIN)
        train, val = (itertools.chain.from_iterable(map(story, texts)) for texts in (train, val))
        return encoding, train, val, val_limit, "built-in story grammar"
    return encoding, read_tinystories("train"), read_tinystories("validation"), val_limit, DATASET


def prepare(args):
    """Writes the three files of args.out_dir, or none of them, and prints what they hold."""
    start = time.time()
    encoding, stories, val_stories, val_limit, source = choose(args)
    dtype = np.dtype(np.uint16 if encoding.n_vocab <= 2**16 else np.uint32)
    out = Path(args.out_dir)
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    temporary = {name: out / f"{name}.tmp" for name in OUTPUTS}
    try:
        with (ThreadPoolExecutor(WORKERS) as pool, open(temporary["train.bin"], "w+b") as train_file,
              open(temporary["val.bin"], "w+b") as val_file):
            train = TokenFile(train_file, encoding, dtype, pool)
            val = TokenFile(val_file, encoding, dtype, pool)
            fill(train, stories, args.limit, held_out=None if val_stories else val)
            if val_stories:
                fill(val, val_stories, val_limit)
            elif val.stories and not train.stories:
                split_single(train, val)
        for file, what in ((train, source), (val, " ".join(args.val_input) or source)):
            if not file.stories:
                raise ValueError(f"{what}: no text in there")
        meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "dtype": dtype.name,
                "end_of_text": encoding.eot_token, "train_tokens": train.tokens, "val_tokens": val.tokens,
                "train_stories": train.stories, "val_stories": val.stories, "source": source}
        meta["crc32"] = checksum((temporary["train.bin"], temporary["val.bin"]), meta)
        temporary["meta.json"].write_text(json.dumps(meta, indent=2) + "\n")
        # From here to the end there is no meta.json: interrupted now, the folder looks unfinished, as it is.
        (out / "meta.json").unlink(missing_ok=True)
        for name in OUTPUTS:
            os.replace(temporary[name], out / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        if new and not any(out.iterdir()):
            out.rmdir()

    for name, file in (("train.bin", train), ("val.bin", val)):
        print(f"{out / name}: {file.stories:,} stories, {file.tokens:,} tokens, "
              f"{file.tokens * dtype.itemsize / 1e6:,.1f} MB")
    if not val_stories and 10 * val.tokens > train.tokens:
        print("Validation took more than a tenth of the text, the first document: --val_input names another.")
    flag = "" if args.out_dir == "data" else f" --data_dir {shlex.quote(args.out_dir)}"
    flag += f" --init_from {shlex.quote(args.tokenizer)}" if isinstance(encoding, FolderTokenizer) else ""
    print(f"Tokenizer {encoding.name} ({encoding.n_vocab:,} different tokens), {time.time() - start:.1f} s.")
    print(f"Next: python gemma270m.py{flag}")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage that argparse puts before it
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")
    return int(text)


def main(argv=None):
    """The command line; returns the exit status."""
    parser = Parser(prog="prepare.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", default=[], metavar="FILE",
                        help="files or globs to read instead of TinyStories: .txt (documents separated by "
                        f"{END_OF_TEXT}) or .jsonl, also .gz or .xz, or .parquet; both with a field `text`")
    parser.add_argument("--val_input", nargs="+", default=[], metavar="FILE",
                        help=f"validation files; without them, every {HELD_OUT}th story of the input is held "
                        f"out, the first one included, or of a single story the last {HELD_OUT}th part")
    parser.add_argument("--limit", type=positive, metavar="N",
                        help="at most N training stories; TinyStories then gives N/100 for validation, "
                        "but no less than 100")
    parser.add_argument("--tokenizer", metavar="NAME", help="gpt2, bytes, or a folder with tokenizer.json, "
                        "also by its name on the hub; gpt2 unless it is out of reach")
    parser.add_argument("--out_dir", default="data", metavar="DIR", help="where to write (default: data)")
    args = parser.parse_args(argv)
    if args.val_input and not args.input:
        parser.error("argument --val_input: needs --input")
    try:
        prepare(args)
        return 0
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except Exception as error:
        message, status = " ".join(str(error).split()) or type(error).__name__, 1
    print(f"prepare.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
