"""GGUF: bits by gguf's own dequantiser, layout by llama.cpp's names, damage refused, misfits named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import evals
import quant
from evals.evaluation import read_scheme
from evals.footprint import count_parameters, measure_disk
from herd.data.special_tokens import SPECIAL_TOKENS
from herd.data.tokenizer_training import PIECES, dress
from herd.run.errors import ConfigError, DataError
from quant import gate as quant_gate
from quant.architectures import build_skeleton, tied_names
from quant.formats.blocks import Blocks
from quant.formats.format import Ranges
from quant.formats.grid import Grid
from quant.gate_process import GateProcess
from quant.gguf.layout import layout
from quant.gguf.metadata import context_length, metadata, rope_factors
from quant.gguf.reading import MODEL, open_gguf, read_headers, read_values
from quant.gguf.tokenizer import splitter, tokenizer_metadata
from quant.readers import GGUF
from quant.sources import ModelSource
from tests.quant.tiny_models import build_llama, build_llama4

BLOCKS = [Blocks(Grid(bits, True, 32, half=True)) for bits in (4, 8)]
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TEXT = "Hello World's 123456 naïve 中文 <|eot|> def f(x):\n\n    return x  # HELLO"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small one made as the workbench makes its own."""
    bpe = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), level])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    bpe.train_from_iterator([Path(__file__).read_text()], trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return dress(bpe)


@pytest.fixture(scope="module")
def models_by_name() -> dict[str, PreTrainedModel]:
    return {
        "scout": build_llama4(moe_every=1, vocab_size=448),
        "maverick": build_llama4(moe_every=2, vocab_size=448),
        "llama": build_llama(vocab_size=448),
        "tied": build_llama(vocab_size=448, tied=True, attention_bias=True, mlp_bias=True),
        "long": build_llama(vocab_size=448, rope_parameters=LLAMA3_ROPE),
    }


@pytest.fixture(scope="module")
def exported(models_by_name, tokenizer, gate: GateProcess, tmp_path_factory) -> dict[tuple[str, str], tuple]:
    root = tmp_path_factory.mktemp("gguf")
    made = {}
    for name, model in models_by_name.items():
        for scheme in ("int4", "int8-weights"):
            quantized = quant.quantize(model, scheme=scheme, group_size=32, container=GGUF)
            report = quant.export(quantized, root / f"{name}-{scheme}", gate=gate, tokenizer=tokenizer)
            assert report.passed and report.facts["readers"] == ["llama.cpp"]
            made[name, scheme] = quantized, root / f"{name}-{scheme}"
    return made


@given(seed=st.integers(0, 10_000), blocks=st.integers(1, 5), rows=st.integers(1, 5), format=st.sampled_from(BLOCKS))
def test_blocks_are_what_ggufs_own_dequantiser_reads(seed: int, blocks: int, rows: int, format: Blocks):
    weight_NK = 0.02 * torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    tensors = format.compress(weight_NK, Ranges())
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == format.stored(tuple(weight_NK.shape))
    theirs = gguf.quants.dequantize(tensors["blocks"].numpy(), gguf.GGMLQuantizationType[format.kind])
    codes_NK, parameters = format.unpack(tensors)
    exact = codes_NK.double().unflatten(1, (-1, 32)) * parameters.scale_NG.double()[..., None]
    assert np.array_equal(theirs.astype(np.float64), exact.flatten(1).numpy())
    assert torch.equal(torch.from_numpy(theirs).bfloat16(), format.decompress(tensors))


def test_the_values_are_those_of_the_compressed_tensors_int4():
    model = build_llama()
    first, second = (quant.quantize(model, scheme="int4", group_size=32, container=c) for c in (None, GGUF))
    state, other = (made.model.state_dict() for made in (first, second))
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_four_bit_blocks_err_less_than_ggufs_own_quantiser(models_by_name):
    weight_NK = models_by_name["llama"].model.layers[0].mlp.up_proj.weight.detach()
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight_NK.float().numpy(), kind), kind)
    ours = BLOCKS[0].decompress(BLOCKS[0].compress(weight_NK, Ranges()))
    error = [(weight_NK.double() - torch.as_tensor(value).double()).norm() for value in (ours, theirs)]
    assert error[0] < 0.95 * error[1]


@pytest.mark.parametrize("scheme", ["int4", "int8-weights"])
@pytest.mark.parametrize("name", ["scout", "maverick", "llama", "tied", "long"])
def test_the_file_loads_to_the_in_memory_model_bit_for_bit(exported, tokens_BT, name: str, scheme: str):
    quantized, folder = exported[name, scheme]
    model = quant.load(folder)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in quantized.model.state_dict().items())
    with torch.inference_mode():
        wanted, found = (m(input_ids=tokens_BT).logits for m in (quantized.model, model))
    torch.testing.assert_close(found, wanted, atol=0.06, rtol=0.02)


def test_experts_are_stacked_and_the_router_is_precise(exported):
    headers = read_headers(open_gguf(exported["maverick", "int4"][1] / MODEL))
    assert headers["blk.1.ffn_gate_exps.weight"] == ("Q4_0", (4, 64, 64))
    assert headers["blk.1.ffn_down_shexp.weight"] == ("Q4_0", (64, 64))
    assert headers["blk.0.ffn_up.weight"] == ("Q4_0", (128, 64))
    assert headers["blk.1.ffn_gate_inp.weight"] == ("F32", (4, 64))
    assert headers["blk.0.attn_q.weight"] == ("BF16", (64, 64))
    assert headers["output.weight"][0] == "BF16" and "output.weight" not in read_headers(
        open_gguf(exported["tied", "int4"][1] / MODEL)
    )


def test_the_rows_of_a_llamas_queries_are_interleaved_and_those_of_a_llama4_are_not(exported, models_by_name):
    for name, interleaved in (("llama", True), ("scout", False)):
        reader = open_gguf(exported[name, "int8-weights"][1] / MODEL)
        stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight")
        values = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        original = models_by_name[name].model.layers[0].self_attn.q_proj.weight.detach().float()
        order = torch.arange(64)
        if interleaved:  # head by head: row i of the first half, then row i of the second
            order = torch.cat([8 * half + torch.arange(8) + 16 * h for h in range(4) for half in (0, 1)])
            order = order.view(4, 2, 8).transpose(1, 2).flatten()
        assert (values - original[order]).norm() < 0.02 * original.norm()


def test_metadata_and_tokens_are_in_the_file(exported, tokenizer):
    values = read_values(open_gguf(exported["scout", "int4"][1] / MODEL))
    assert values["general.architecture"] == "llama4" and values["general.file_type"] == 2
    assert (values["llama4.expert_count"], values["llama4.interleave_moe_layer_step"]) == (4, 1)
    assert (values["llama4.feed_forward_length"], values["llama4.expert_feed_forward_length"]) == (128, 64)
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == 448 and all(tokens[number] == text for text, number in tokenizer.get_vocab().items())
    assert kinds[tokenizer.convert_tokens_to_ids("<|eot|>")] == gguf.TokenType.CONTROL
    assert kinds[tokenizer.convert_tokens_to_ids("a")] == gguf.TokenType.NORMAL
    assert kinds[447] == gguf.TokenType.UNUSED and tokens[447] == "[PAD447]"
    assert values["tokenizer.ggml.pre"] == "llama4" and values["tokenizer.ggml.add_bos_token"] is True
    assert values["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id


def config_of(model: PreTrainedModel) -> PretrainedConfig:
    return ModelSource(model).config


def longest(**changes: object) -> int:
    return context_length(config_of(build_llama4(moe_every=1, **changes)))


def test_the_context_is_as_long_as_llama_cpp_computes_this_very_model():
    assert longest() == 128  # chunks of 128, against its 8192
    longer = {"max_position_embeddings": 65536, "attention_chunk_size": 8192}
    assert longest(**longer) == 65536
    assert longest(**longer, floor_scale=4096) == 4095
    assert longest(**longer, attn_temperature_tuning=False) == 8191
    assert context_length(config_of(build_llama())) == 256


def test_rope_factors_turn_plain_frequencies_into_transformers_own(models_by_name, exported):
    config = models_by_name["long"].config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(plain / rope_factors(config).double(), scaled.double(), rtol=1e-6, atol=0)
    assert read_headers(open_gguf(exported["long", "int4"][1] / MODEL))["rope_freqs.weight"] == ("F32", (8,))


def test_evaluations_read_the_folder(exported):
    _, folder = exported["scout", "int4"]
    disk = measure_disk(folder)
    assert disk.quantised_bits_per_weight(count_parameters(folder)) == 4.5
    assert read_scheme(folder) == "int4-gguf" and evals.load(folder).model.config.num_hidden_layers == 4


def test_the_same_model_gives_the_same_file_from_memory_and_from_a_folder(
    models_by_name, exported, tokenizer, gate: GateProcess, tmp_path: Path
):
    _, first = exported["maverick", "int4"]
    models_by_name["maverick"].save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    made = quant.quantize(tmp_path / "source", scheme="int4", group_size=32, container=GGUF)
    quant.export(made, tmp_path / first.name, gate=gate)
    assert (tmp_path / first.name / MODEL).read_bytes() == (first / MODEL).read_bytes()


def damage(folder: Path, to: Path, change: Callable[[Path], None]) -> str:
    shutil.copytree(folder, to)
    change(to / MODEL)
    report = quant_gate.inspect(to)
    assert not report.passed
    return report.reason


def test_damage_is_named(exported, tmp_path: Path):
    _, folder = exported["scout", "int4"]

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-5000])

    def rename(path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"blk.2.ffn_up_exps", b"blk.2.ffn_up_exqs"))

    def relabel(path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"<|eot|>", b"<|eoT|>", 1))

    assert "model.gguf is truncated or not GGUF" in damage(folder, tmp_path / "a", truncate)
    assert "blk.2.ffn_up_exps.weight is missing; blk.2.ffn_up_exqs.weight is unexpected" in damage(
        folder, tmp_path / "b", rename
    )
    assert "metadata: tokenizer.ggml.tokens is" in damage(folder, tmp_path / "c", relabel)
    assert "model.gguf is missing" in damage(folder, tmp_path / "d", Path.unlink)


def test_a_changed_code_is_refused_and_leaves_nothing(models_by_name, gate: GateProcess, tmp_path: Path):
    quantized = quant.quantize(models_by_name["scout"], scheme="int4", group_size=32, container=GGUF)
    quantized.model  # noqa: B018 (made before the tensors are damaged)
    quantized.tensors["model.layers.1.feed_forward.experts.2.up_proj.blocks"][3, 7] ^= 1
    with pytest.raises(DataError, match=r"export gate refused out: weights: .*experts\.2\.up_proj\.weight differs"):
        quant.export(quantized, tmp_path / "out", gate=gate)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"no_rope_layers": [1, 0, 1, 0]}, r"no_rope_layers = \[1, 0, 1, 0\]: llama.cpp computes \[1, 1, 1, 0\]"),
        ({"use_qk_norm": False}, "use_qk_norm = False: llama.cpp computes True for a Llama 4 of this size"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu: llama.cpp computes silu"),
    ],
)
def test_a_model_llama_cpp_would_compute_otherwise_is_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        quant.quantize(build_llama4(moe_every=1, **changes), scheme="int4", group_size=32, container=GGUF)


def test_other_architectures_and_scalings_are_refused():
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    mistral = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(ConfigError, match="MistralForCausalLM has no GGUF layout here; supported: LlamaForCausalLM"):
        quant.quantize(mistral, scheme="int4", group_size=32, container=GGUF)
    config = config_of(build_llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}))
    with pytest.raises(ConfigError, match="rope_type = linear: not written to GGUF"):
        metadata(config, kind="Q4_0", name="")


def test_a_tokenizer_llama_cpp_cannot_follow_is_refused(tokenizer):
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="BPE over Whitespace; GGUF takes byte-level BPE"):
        splitter(other)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    with pytest.raises(ConfigError, match=r"which llama\.cpp has no name for"):
        splitter(other)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert splitter(other) == "gpt-2"
    with pytest.raises(ConfigError, match="id 431 is beyond the model's vocabulary of 300"):
        tokenizer_metadata(tokenizer, 300)


def test_every_tensor_of_the_model_is_in_the_layout_once(models_by_name):
    for model in models_by_name.values():
        config = config_of(model)
        skeleton = build_skeleton(config)
        entries = layout(config, skeleton, set(), "Q4_0")
        sources = [source for entry in entries for source in entry.sources]
        assert len(sources) == len(set(sources))
        assert set(sources) == set(skeleton.state_dict()) - tied_names(skeleton)


def test_transformers_refuses_the_folder_by_name(exported):
    config = json.loads((exported["llama", "int4"][1] / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "gguf", "type": "Q4_0", "ignore": ["lm_head"]}
