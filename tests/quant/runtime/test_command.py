"""`python -m quant generate`: streams, tells its figures, answers mistakes in one line."""

import json
import subprocess
import sys

import pytest
import torch

from herd.run.errors import NumericalError
from quant import gate
from quant.__main__ import main
from quant.loading import load as load_reference
from quant.runtime.generation import Stream
from tests.quant.runtime.conftest import byte_tokenizer


def test_help_comes_before_torch():
    code = """
import sys
from quant.__main__ import main
try:
    main(["generate", "--help"])
except SystemExit as stop:
    print(stop.code)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m quant generate")


def test_the_command_streams_text_to_stdout_and_figures_to_stderr(exports):
    words = ["--model", str(exports["scout", "fp8"]), "--prompt", "abc", "--max-new-tokens", "12", "--threads", "1"]
    done = subprocess.run([sys.executable, "-m", "quant", "generate", *words], capture_output=True, check=True)
    reference = load_reference(exports["scout", "fp8"])
    prompt_1T = byte_tokenizer()("abc", return_tensors="pt").input_ids
    stream = Stream(reference, max_new_tokens=12)
    tokens = list(stream.run(prompt_1T))
    assert done.stdout.decode().removesuffix("\n") == byte_tokenizer().decode(tokens, skip_special_tokens=True)
    line = done.stderr.decode().splitlines()[-1]
    assert line.startswith("prompt 3 tokens, ") and f"generated {len(tokens)} tokens" in line
    assert "peak memory " in line and "Traceback" not in done.stderr.decode()


def test_json_holds_tokens_and_figures(exports, capsys):
    words = [
        "generate",
        "--model",
        str(exports["llama", "fp8"]),
        "--prompt",
        "hello",
        "--max-new-tokens",
        "5",
        "--json",
    ]
    assert main([*words, "--temperature", "1.5", "--seed", "3"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main([*words, "--temperature", "1.5", "--seed", "3"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert first["tokens"] == again["tokens"] and first["text"] == byte_tokenizer().decode(first["tokens"])
    assert (first["prompt_tokens"], first["new_tokens"]) == (5, len(first["tokens"]))
    assert first["decode_tokens_per_second"] > 0 and first["peak_memory_bytes"] > 1 << 20


@pytest.mark.parametrize(
    "more, code, line",
    [
        (["--model", "missing"], 2, "--model missing: no such folder"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens 0: must be 1 or more"),
        (["--max-new-tokens", "999"], 2, "exceed the model's 256; use 253 at most"),
        (["--seed", "99999999999999999999"], 2, "--seed 99999999999999999999: must be 0 or more, and below 2^63"),
        (["--temperature", "-1"], 2, "--temperature -1.0: must be 0 or more"),
        (["--temperature", "nan"], 2, "--temperature nan: must be 0 or more"),
        (["--prompt", ""], 2, "--prompt is empty"),
        (["--prompt", "caf\udce9"], 2, r"--prompt 'caf\udce9': bytes that are not UTF-8; give it in UTF-8"),
        (["--device", "gpu"], 2, "device = 'gpu': no such kind of device"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(exports, capsys, more, code, line):
    assert main(["generate", "--model", str(exports["scout", "int4"]), "--prompt", "abc", *more]) == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and line in error and "\n" not in error


@pytest.mark.parametrize("words", [["generate", "--model", "m", "--prompt", "x"], None])
@pytest.mark.parametrize("number", ["0", "100000", "two"])
def test_threads_that_no_machine_has_are_refused(words, number, capsys):
    with pytest.raises(SystemExit) as stop:
        gate.main(["m", "--threads", number]) if words is None else main([*words, "--threads", number])
    assert stop.value.code == 2
    assert f"argument --threads: {number}: must be a whole number, 1 to " in capsys.readouterr().err


def test_a_folder_that_is_not_quantised_is_refused(folders, capsys):
    byte_tokenizer().save_pretrained(folders["llama"])
    assert main(["generate", "--model", str(folders["llama"]), "--prompt", "abc"]) == 4
    assert "no quantization_config" in capsys.readouterr().err


def test_logits_that_are_no_numbers_end_a_stream_with_a_line(exports):
    model = load_reference(exports["llama", "int4"])
    model.lm_head.weight[3, 0] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(
            NumericalError, match=r"token 1: the model's logits are NaN or Inf; `python -m quant\.gate`"
        ):
            list(Stream(model, max_new_tokens=2, temperature=temperature).run(torch.tensor([[5, 6, 7]])))


def test_a_stream_ends_with_an_end_token_and_counts_it(exports):
    model = load_reference(exports["llama", "int4"])
    prompt_1T = torch.tensor([[5, 6, 7]])
    free = Stream(model, max_new_tokens=6)
    tokens = list(free.run(prompt_1T))
    model.generation_config.eos_token_id = [tokens[2]]
    ended = Stream(model, max_new_tokens=6)
    assert list(ended.run(prompt_1T)) == tokens[: tokens.index(tokens[2]) + 1] == ended.tokens
