"""The command `python -m quant generate`: its flags, and what it prints; torch is imported only to run it.

options = parse(["--model", "exports/scout-int4", "--prompt", "def main("])
run(options)
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from herd.run import cli
from herd.run.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST = 2**63  # what torch's generators and counters hold


def parse(words: list[str]) -> argparse.Namespace:
    """The flags; mistakes leave with exit code 2."""
    parser = cli.parser(
        "quant generate",
        description="Continue a prompt with a quantised folder, in low bits on the CPU. The text streams to stdout;\n"
        "tokens per second and peak memory follow on stderr.",
        examples=(
            "python -m quant generate --model exports/scout-int4 --prompt 'def main('",
            "python -m quant generate --model DIR --prompt TEXT --temperature 0.8 --seed 1 --json",
        ),
        config=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="quantised model folder, with its tokenizer")
    add("--prompt", required=True, metavar="TEXT", help="text to continue")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="tokens at most (128)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0 (default): the likeliest token; else sampled")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    add("--threads", type=cli.threads, metavar="N", help="CPU threads (OMP_NUM_THREADS, else all cores)")
    add("--device", default="cpu", metavar="NAME", help="cpu (default): low bits; cuda: transformers' own path")
    add("--json", action="store_true", help="print text and figures as JSON at the end instead")
    return parser.parse_args(words)


def check(options: argparse.Namespace) -> None:
    """What can be refused before the heavy imports."""
    if not options.model.is_dir():
        raise ConfigError(f"--model {options.model}: no such folder; give the folder of a quantised model")
    for flag, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0)):
        value = getattr(options, flag)
        if not least <= value < MOST:
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: must be {least} or more, and below 2^63")
    if not options.prompt:
        raise ConfigError("--prompt is empty; give the text to continue")
    if any("\ud800" <= letter <= "\udfff" for letter in options.prompt):  # what Python makes of such bytes
        raise ConfigError(f"--prompt {options.prompt!a}: bytes that are not UTF-8; give it in UTF-8")


def run(options: argparse.Namespace) -> None:
    """Load, stream, report."""
    check(options)
    import torch
    import transformers

    from herd.data.tokenizer import load_tokenizer
    from quant.runtime.generation import Stream
    from quant.runtime.loading import load

    transformers.logging.set_verbosity_error()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = load(options.model, device=options.device)  # first: it knows whether a file is missing or was changed
    tokenizer = load_tokenizer(options.model)
    prompt_1T = encode(tokenizer, options, model)
    stream = Stream(model, max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed)
    said = ""
    for _ in stream.run(prompt_1T.to(options.device)):
        text = whole_text(tokenizer, stream.tokens)
        if not options.json:
            print(text[len(said) :], end="", flush=True)
        said = text
    figures = summary(prompt_1T.shape[1], stream)
    if options.json:
        print(json.dumps({"text": tokenizer.decode(stream.tokens), "tokens": stream.tokens, **figures}, indent=1))
    else:
        print(tokenizer.decode(stream.tokens, skip_special_tokens=True)[len(said) :], flush=True)
        print(describe(figures), file=sys.stderr, flush=True)


def encode(tokenizer: "PreTrainedTokenizerBase", options: argparse.Namespace, model: "PreTrainedModel") -> Any:
    """Token ids [1, T] of the prompt; they and what is to come must fit the model."""
    text = model.config.get_text_config()
    prompt_1T = tokenizer(options.prompt, return_tensors="pt").input_ids
    length = prompt_1T.shape[1]
    if length == 0:
        raise ConfigError(f"--prompt {options.prompt!r}: no token in it; give a longer text")
    if prompt_1T.max() >= text.vocab_size:
        raise DataError(
            f"{options.model}: its tokenizer gives token {prompt_1T.max().item()}, the model knows "
            f"{text.vocab_size}; the tokenizer is another model's"
        )
    most = getattr(text, "max_position_embeddings", MOST)  # Mamba knows no positions
    if length + options.max_new_tokens > most:
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens}: {length} tokens of prompt and these exceed the model's "
            f"{most}; use {max(0, most - length)} at most"
        )
    return prompt_1T


def whole_text(tokenizer: "PreTrainedTokenizerBase", tokens: list[int]) -> str:
    """The text so far, without the character that its last bytes only begin."""
    return tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def summary(prompt_tokens: int, stream: Any) -> dict[str, Any]:
    """Counts, seconds, tokens per second of prompt and generation apart, and the process's peak memory."""
    later = len(stream.tokens) - 1
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(stream.tokens),
        "prefill_seconds": stream.prefill_seconds,
        "prefill_tokens_per_second": prompt_tokens / stream.prefill_seconds,
        "decode_seconds": stream.decode_seconds,
        "decode_tokens_per_second": later / stream.decode_seconds if later else None,
        "peak_memory_bytes": peak_memory(),
    }


def describe(figures: dict[str, Any]) -> str:
    """The figures in one line."""
    speed, peak = figures["decode_tokens_per_second"], figures["peak_memory_bytes"]
    parts = [
        f"prompt {figures['prompt_tokens']} tokens, {figures['prefill_tokens_per_second']:.1f} tokens/s",
        f"generated {figures['new_tokens']} tokens" + (f", {speed:.1f} tokens/s" if speed else ""),
        f"peak memory {peak / 1e6:,.0f} MB" if peak else "peak memory unknown on this system",
    ]
    return "; ".join(parts)


def peak_memory() -> int | None:
    """Bytes the process held at most (Linux's VmHWM: getrusage would include the parent's); None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
