"""Exports: what transformers reads back is the in-memory model, bit for bit; failures leave nothing behind."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import quant
from herd.run.errors import ConfigError, DataError, EnvironmentFault
from quant import exports
from quant.gate_process import GateProcess
from quant.loading import load as load_reference
from quant.loading import load_with_info
from quant.target import finished_layers, making, unfinished
from quant.tensor_files import TensorFiles
from tests.quant.tiny_models import BUILDERS, build_llama

SCHEMES = ("int4", "fp8")


@pytest.fixture(scope="module")
def exported(models: dict, gate: GateProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, tuple]:
    """(model, scheme) -> (the quantised model in memory, its folder)."""
    root = tmp_path_factory.mktemp("exports")
    pairs = {}
    for name, model in models.items():
        for scheme in SCHEMES:
            quantized = quant.quantize(model, scheme=scheme, group_size=32)
            report = quant.export(quantized, root / f"{name}-{scheme}", gate=gate)
            assert report.passed
            pairs[name, scheme] = quantized, root / f"{name}-{scheme}"
    return pairs


def logits(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens_BT).logits


@pytest.mark.parametrize("name, scheme", [("scout", "int4"), ("maverick", "int4"), ("llama", "int4"), ("llama", "fp8")])
def test_plain_transformers_computes_the_in_memory_models_logits(exported, tokens_BT, name, scheme):
    quantized, folder = exported[name, scheme]
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(model, tokens_BT), logits(quantized.model, tokens_BT))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_our_loader_computes_the_in_memory_models_logits(exported, tokens_BT, name, scheme):
    quantized, folder = exported[name, scheme]
    reference_BTV = logits(quantized.model, tokens_BT)
    assert torch.equal(logits(load_with_info(folder)[0], tokens_BT), reference_BTV)
    # Sparse dispatch multiplies the same rows in matrices of another height: bf16 products may round differently.
    torch.testing.assert_close(logits(load_reference(folder), tokens_BT), reference_BTV, atol=0.03, rtol=0.02)


def test_sparse_dispatch_equals_dense_in_fp32(exported, tokens_BT):
    _, folder = exported["scout", "int4"]
    dense, sparse = (torch.nn.Module.float(model) for model in (load_with_info(folder)[0], load_reference(folder)))
    torch.testing.assert_close(logits(sparse, tokens_BT), logits(dense, tokens_BT), atol=1e-5, rtol=1e-5)


def test_quantisation_moves_the_logits_and_leaves_the_original_alone(models, exported, tokens_BT):
    model, (quantized, _) = models["scout"], exported["scout", "int4"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = quant.quantize(model, scheme="int4", group_size=32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (logits(model, tokens_BT) - logits(quantized.model, tokens_BT)).abs().max() > 0.01
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert own.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in again.tensors.values())
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in quantized.tensors.items())


def test_experts_are_stored_one_by_one_and_transposed(models, exported):
    _, folder = exported["scout", "fp8"]
    stored = TensorFiles(folder)
    experts = models["scout"].model.layers[1].feed_forward.experts
    for expert in range(4):
        for part, weight in (
            ("gate_proj", experts.gate_up_proj[expert, :, :64].T),
            ("up_proj", experts.gate_up_proj[expert, :, 64:].T),
            ("down_proj", experts.down_proj[expert].T),
        ):
            name = f"model.layers.1.feed_forward.experts.{expert}.{part}"
            value = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
            assert (value - weight.float()).abs().max() <= weight.abs().max() / 16
    assert not any("gate_up_proj" in name for name in stored)


def test_in_a_moe_layer_every_token_has_its_own_activation_scale(exported):
    _, folder = exported["scout", "fp8"]
    module = "model.layers.0.feed_forward.shared_expert.up_proj"
    input_TH = (torch.randn(6, 64) * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0, 100.0])[:, None]).bfloat16()

    def together_and_alone(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        layer = model.get_submodule(module)
        with torch.inference_mode():
            return layer(input_TH), torch.cat([layer(row_H[None]) for row_H in input_TH])

    together, alone = together_and_alone(load_reference(folder))
    torch.testing.assert_close(together, alone, rtol=0.02, atol=0.0)
    # The flaw that `keep_tokens_apart` mends; when this fails, compressed-tensors has mended it itself.
    stock = AutoModelForCausalLM.from_pretrained(folder)
    stock(input_ids=torch.zeros(1, 1, dtype=torch.long))  # unpacks the weights
    together, alone = together_and_alone(stock)
    assert ((together - alone).abs() > 0.5 * alone.abs()).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_from_memory_from_a_folder_and_from_shards_the_same_bytes(models, folders, exported, gate, tmp_path, scheme):
    _, first = exported["maverick", scheme]
    name = first.name
    quant.export(quant.quantize(folders["maverick"], scheme=scheme, group_size=32), tmp_path / "a" / name, gate=gate)
    models["maverick"].save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    quant.export(quant.quantize(tmp_path / "sharded", scheme=scheme, group_size=32), tmp_path / "b" / name, gate=gate)
    for file in ("model.safetensors", "config.json", "gate.json"):
        content = (first / file).read_bytes()
        assert (tmp_path / "a" / name / file).read_bytes() == content, file
        assert (tmp_path / "b" / name / file).read_bytes() == content, file


def test_the_same_export_twice_is_the_same_bytes_in_every_file(folders, gate, tmp_path):
    facts = {"created": "2026-01-01T00:00:00+00:00", "student": "tiny"}
    for place in ("a", "b"):
        quantized = quant.quantize(folders["scout"], scheme="int4", group_size=32)
        quant.export(quantized, tmp_path / place / "scout-int4", lineage=facts, gate=gate)
    files = sorted(path.name for path in (tmp_path / "a" / "scout-int4").iterdir())
    assert {"README.md", "config.json", "gate.json", "generation_config.json", "lineage.json"} <= set(files)
    for file in files:
        assert (tmp_path / "a" / "scout-int4" / file).read_bytes() == (
            tmp_path / "b" / "scout-int4" / file
        ).read_bytes()


def test_a_sharded_export_loads_to_the_same_weights(models, exported, gate, tmp_path):
    _, single = exported["scout", "int4"]
    quantized = quant.quantize(models["scout"], scheme="int4", group_size=32)
    quant.export(quantized, tmp_path / "out", gate=gate, shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    first, second = TensorFiles(single), TensorFiles(tmp_path / "out")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tied_embeddings_are_stored_once(gate, tmp_path):
    quantized = quant.quantize(build_llama(tied=True), scheme="int4", group_size=32)
    assert quant.export(quantized, tmp_path / "out", gate=gate).passed
    assert "lm_head.weight" not in TensorFiles(tmp_path / "out")


def test_an_fp32_model_is_stored_as_bf16(tokens_BT, gate, tmp_path):
    quantized = quant.quantize(build_llama().float(), scheme="int4", group_size=32)
    quant.export(quantized, tmp_path / "out", gate=gate)
    model = load_reference(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model, tokens_BT), logits(quantized.model, tokens_BT))


def test_the_tokenizer_goes_with_the_model(models, folders, gate, tmp_path):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")))
    quant.export(quant.quantize(models["llama"], scheme="fp8"), tmp_path / "given", tokenizer=words, gate=gate)
    source = shutil.copytree(folders["llama"], tmp_path / "source")
    words.save_pretrained(source)
    quant.export(quant.quantize(source, scheme="fp8"), tmp_path / "copied", gate=gate)
    for place in ("given", "copied"):
        assert AutoTokenizer.from_pretrained(tmp_path / place).get_vocab() == words.get_vocab()


def test_the_card_says_what_is_kept_and_why_and_servers_get_the_temperature_switch(exported):
    _, folder = exported["scout", "int4"]
    card = (folder / "README.md").read_text()
    assert "`*.self_attn.k_proj, *.self_attn.q_proj`: servers reorder the rows of q and k" in card
    assert "so v follows q and k" in card
    assert json.loads((folder / "generation_config.json").read_text())["attn_temperature_tuning"] is True


def test_an_existing_folder_is_never_overwritten(models, gate, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out: exists"):
        quant.export(quant.quantize(models["llama"], scheme="fp8"), tmp_path / "out", gate=gate)


def test_what_a_command_left_that_was_killed_after_its_end_goes_when_it_is_started_again(exported, models, tmp_path):
    out = shutil.copytree(exported["llama", "fp8"][1], tmp_path / "out")
    finished_layers(out).mkdir(parents=True)
    with pytest.raises(ConfigError, match="out: exists"):
        quant.export(quant.quantize(models["llama"], scheme="fp8"), out)
    assert list(tmp_path.iterdir()) == [out]


def test_two_commands_do_not_make_one_export_at_a_time(models, gate, tmp_path):
    out, quantized = tmp_path / "out", quant.quantize(models["llama"], scheme="fp8")
    with making(out):
        (unfinished(out) / "export").mkdir()
        with pytest.raises(ConfigError, match=r"\.out\.incomplete: another command is working there; wait for it"):
            quant.export(quantized, out, gate=gate)
        assert (unfinished(out) / "export").is_dir()
    assert quant.export(quantized, out, gate=gate).passed
    assert list(tmp_path.iterdir()) == [out]


def test_a_disk_without_room_is_noticed_before_anything_is_written(models, gate, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(EnvironmentFault, match=r"1\.0 kB free"):
        quant.export(quant.quantize(models["llama"], scheme="fp8"), tmp_path / "out", gate=gate)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_nothing_and_says_why(models, gate, tmp_path):
    quantized = quant.quantize(models["scout"], scheme="int4", group_size=32)
    name = "model.layers.1.feed_forward.experts.0.up_proj.weight_scale"
    quantized.model  # noqa: B018 (made before the tensors are damaged)
    broken = replace(quantized, tensors=dict(quantized.tensors) | {name: -quantized.tensors[name]})
    broken.__dict__["model"] = quantized.model
    with pytest.raises(DataError, match=r"export gate refused out: weights: .*experts\.0\.up_proj\.weight differs"):
        quant.export(broken, tmp_path / "out", gate=gate)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(models, gate, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "take_probe", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quant.export(quant.quantize(models["llama"], scheme="fp8"), tmp_path / "out", gate=gate)
    assert list(tmp_path.iterdir()) == []


def test_a_gate_process_that_dies_is_reported_as_such(models, tmp_path):
    with GateProcess() as dying:
        dying._process.kill()
        dying._process.wait()
        with pytest.raises(EnvironmentFault, match="gate's process ended with -9"):
            quant.export(quant.quantize(models["llama"], scheme="fp8"), tmp_path / "out", gate=dying)
    assert list(tmp_path.iterdir()) == []


def test_loading_what_is_no_export_is_refused(folders, tmp_path):
    with pytest.raises(DataError, match="no quantization_config"):
        quant.load(folders["llama"])
    with pytest.raises(DataError, match="does not exist"):
        quant.load(tmp_path / "nowhere")
