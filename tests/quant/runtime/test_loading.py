"""Served folders against the reference path (bf16) and against fp32: same function, few bytes, clear refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import quant
from herd.llama4.balance import RouterTap
from herd.run.errors import ConfigError, DataError, EnvironmentFault
from quant.loading import load as load_reference
from quant.runtime.fp8 import Fp8
from quant.runtime.int4 import Int4
from quant.runtime.int8 import Int8
from quant.runtime.linears import Linear
from quant.runtime.loading import load
from tests.quant.runtime.conftest import SCHEMES
from tests.quant.tiny_models import BUILDERS, WIDE_BUILDERS, build_gemma3, build_llama, build_multimodal

KINDS = {"int4": Int4, "int8": Int8, "fp8": Fp8}


def logits(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens_BT).logits.double()


def stepwise(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    """The same logits from one token at a time, after a prompt of five."""
    with torch.inference_mode():
        output = model(input_ids=tokens_BT[:, :5], use_cache=True)
        found = [output.logits]
        for token_B1 in tokens_BT[:, 5:].split(1, 1):
            output = model(input_ids=token_B1, past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits)
    return torch.cat(found, 1).double()


def divergence(from_BTV: Tensor, to_BTV: Tensor) -> Tensor:
    """KL in nats at each position [B, T]."""
    from_BTV, to_BTV = from_BTV.log_softmax(-1), to_BTV.log_softmax(-1)
    return (from_BTV.exp() * (from_BTV - to_BTV)).sum(-1)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prompts_and_steps_compute_what_the_reference_path_computes(exports, tokens_BT, name, scheme):
    folder = exports[name, scheme]
    reference = load_reference(folder)
    for kernel_rows in (None, 0, 1000) if scheme == "int4" else (None,):
        served = load(folder, kernel_rows=kernel_rows)
        for way in (logits, stepwise):
            found_BT = divergence(way(reference, tokens_BT), way(served, tokens_BT))
            # At a tie of two experts bf16's last bit decides between them, which moves that position alone; and
            # rounding inputs to 8 bits makes whole steps out of last bits.
            assert found_BT.quantile(0.9) < (5e-4 if scheme == "int8" else 1e-4)
            assert found_BT.mean() < 1e-3


@pytest.mark.parametrize("name, scheme", [("scout", "int4"), ("maverick", "fp8"), ("llama", "int4")])
def test_generate_gives_tokens_that_the_reference_path_gives_but_for_ties(exports, tokens_BT, name, scheme):
    prompt_1T = tokens_BT[:1, :12]
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode():
        reference = load_reference(exports[name, scheme])
        found = load(exports[name, scheme], kernel_rows=8).generate(prompt_1T, **settings)
        beams = load(exports[name, scheme], kernel_rows=8).generate(prompt_1T, **settings, num_beams=3)
        scores_TV = reference(found).logits[0, 11:-1].float()
    best_T, given_T = scores_TV.amax(1), scores_TV.gather(1, found[0, 12:, None])[:, 0]
    # Other kernels add in another order: where two tokens are level within bf16's last bits, either may come first.
    assert len(given_T) == 40 and (best_T - given_T <= 2**-6 * best_T.abs()).all()
    assert (given_T == best_T).sum() >= 36
    assert beams.shape == found.shape


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_layers_hold_their_stored_bits_and_nothing_holds_them_twice(exports, name, scheme):
    model, folder = load(exports[name, scheme], kernel_rows=8), exports[name, scheme]
    facts = json.loads((folder / "gate.json").read_text())["facts"]
    layers = [module for module in model.modules() if isinstance(module, KINDS[scheme])]
    assert sum(layer.out_features * layer.in_features for layer in layers) == facts["quantised_weights"]
    stored = load_file(folder / "model.safetensors")
    scales = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith("weight_scale"))
    codes = facts["quantised_weights"] // (2 if scheme == "int4" else 1)
    assert sum(layer.packed_bytes for layer in layers) == codes + scales * (2 if scheme == "int4" else 1)
    kept = sum(t.nbytes for t in stored.values()) - scales - codes
    kept -= sum(t.nbytes for name, t in stored.items() if name.endswith("weight_shape"))
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    rope = sum(buffer.nbytes for name, buffer in model.named_buffers() if "rotary" in name)
    assert sum(storages.values()) == codes + scales * (2 if scheme == "int4" else 1) + kept + rope


def test_each_stored_tensor_is_read_once(exports, monkeypatch):
    from quant.tensor_files import TensorFiles

    read: list[str] = []
    inner = TensorFiles.__getitem__
    monkeypatch.setattr(TensorFiles, "__getitem__", lambda files, name: read.append(name) or inner(files, name))
    load(exports["maverick", "int4"], kernel_rows=8)
    assert sorted(read) == sorted(load_file(exports["maverick", "int4"] / "model.safetensors"))


def test_shapes_are_measured_once_and_a_given_number_of_rows_is_taken(exports):
    rows = {
        layer.kernel_rows
        for layer in load(exports["scout", "int4"], kernel_rows=5).modules()
        if isinstance(layer, Int4)
    }
    assert rows == {5}
    by_shape: dict[tuple[int, int], set[int]] = {}
    for layer in load(exports["maverick", "int4"]).modules():
        if isinstance(layer, Int4):
            by_shape.setdefault((layer.out_features, layer.in_features), set()).add(layer.kernel_rows)
    assert all(len(found) == 1 for found in by_shape.values())


def test_it_stays_a_transformers_model_whose_routers_can_be_watched(exports, tokens_BT):
    model = load(exports["scout", "int4"])
    assert type(model).__name__ == "Llama4ForCausalLM" and not model.training
    tap = RouterTap(model)
    with torch.inference_mode():
        output = model(input_ids=tokens_BT, output_hidden_states=True, output_router_logits=True)
    assert len(output.hidden_states) == 5
    taken = tap.take()
    assert all(torch.equal(a, b) for a, b in zip(taken, output.router_logits, strict=True)) and len(taken) == 4


def test_it_stays_on_the_cpu_in_bf16_and_is_not_saved(exports, tmp_path):
    model = load(exports["llama", "int4"])
    assert model.to("cpu") is model
    for change in (lambda: nn.Module.float(model), lambda: model.to("meta")):
        with pytest.raises(ConfigError, match=r"packed for this CPU; use quant\.loading\.load"):
            change()
    with pytest.raises(ConfigError, match="copy the folder it came from"):
        model.save_pretrained(tmp_path)


def changed(folder: Path, to: Path, change) -> Path:
    """A copy of a folder with its tensors changed, as another program may have written it: without a gate's report."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("gate.json"))
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("model.layers.1.feed_forward.experts.2.up_proj.weight_scale"),
            "up_proj.weight_scale is missing",
        ),
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.ones(1)), "tensor extra belongs to no layer"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"model.norm.weight is \[3\], expected \[64\]"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(exports, tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        load(changed(exports["scout", "int4"], tmp_path / "broken", change))


def test_a_flipped_bit_of_an_export_is_refused(exports, tmp_path):
    folder = shutil.copytree(exports["scout", "int4"], tmp_path / "flipped")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-7] ^= 4
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"flipped: model\.safetensors differs from gate\.json; copy it again"):
        load(folder)


def test_a_configuration_that_contradicts_the_tensors_is_refused(exports, tmp_path):
    name = "model.layers.0.feed_forward.shared_expert.up_proj"
    for number, (change, message) in enumerate(
        (
            (
                lambda s: s["config_groups"]["group_0"]["weights"].update(group_size=64),
                "groups of 32, config.json says 64",
            ),
            (lambda s: s["ignore"].append(name), f"{name} is stored quantised, but config.json ignores it"),
        )
    ):
        folder = changed(exports["scout", "int4"], tmp_path / str(number), lambda _: None)
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(DataError, match=message):
            load(folder)


def test_a_folder_without_its_gates_report_is_served_with_a_word_about_it(exports, tmp_path, capsys):
    load(changed(exports["scout", "int4"], tmp_path / "copy", lambda _: None))
    assert "no gate.json, so that nothing tells" in capsys.readouterr().err


def test_layers_of_one_input_in_two_formats_are_refused(exports, tmp_path):
    def half(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.feed_forward.shared_expert.up_proj"
        for suffix in ("weight_packed", "weight_scale", "weight_shape"):
            tensors.pop(f"{name}.{suffix}")
        tensors[f"{name}.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)

    with pytest.raises(DataError, match=r"gate_proj and .*up_proj: one is quantised and the other is not"):
        load(changed(exports["scout", "int4"], tmp_path / "split", half))


def test_what_is_no_export_and_what_is_no_device_are_refused(exports, folders, tmp_path):
    with pytest.raises(DataError, match="no quantization_config"):
        quant.load(folders["llama"])
    with pytest.raises(DataError, match="does not exist"):
        quant.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="device = 'gpu': no such kind"):
        load(exports["llama", "int4"], device="gpu")
    with pytest.raises(EnvironmentFault, match="device = 'xpu': not usable"):
        load(exports["llama", "int4"], device="xpu")


def test_a_scheme_without_a_kernel_is_unpacked_and_said_so(models, gate, tokens_BT, tmp_path, capsys):
    quant.export(quant.quantize(models["llama"], scheme="int8-weights", group_size=32), tmp_path / "out", gate=gate)
    model = load(tmp_path / "out")
    assert (
        "no CPU kernel for compressed-tensors pack-quantized; weights are unpacked to bf16" in capsys.readouterr().err
    )
    assert not any(isinstance(module, Linear) for module in model.modules())
    assert torch.equal(logits(model, tokens_BT), logits(load_reference(tmp_path / "out"), tokens_BT))


@pytest.mark.parametrize("build", [lambda: build_llama(tied=True), build_multimodal, build_gemma3])
def test_tied_multimodal_and_gemma_models_are_served_too(gate, tokens_BT, tmp_path, build):
    quant.export(quant.quantize(build(), scheme="int4", group_size=32), tmp_path / "out", gate=gate)
    served, reference = load(tmp_path / "out"), load_reference(tmp_path / "out")
    for way in (logits, stepwise):
        found_BT = divergence(way(reference, tokens_BT), way(served, tokens_BT))
        assert found_BT.quantile(0.9) < 1e-4 and found_BT.mean() < 1e-3


@pytest.mark.parametrize("scheme", ["nf4", "nf4-double"])
def test_nf4_runs_in_bitsandbytes_own_layers(gate, tokens_BT, tmp_path, scheme):
    quant.export(quant.quantize(WIDE_BUILDERS["wide-scout"](), scheme=scheme), tmp_path / "out", gate=gate)
    model = load(tmp_path / "out")
    assert type(model.model.layers[0].feed_forward.experts[1].up_proj).__name__ == "Linear4bit"
    found_BT = divergence(logits(load_reference(tmp_path / "out"), tokens_BT), stepwise(model, tokens_BT))
    assert found_BT.quantile(0.9) < 2e-4 and found_BT.mean() < 1e-3


@pytest.mark.gpu
def test_on_a_gpu_transformers_own_path_computes_the_same(exports, tokens_BT, capsys):
    model = load(exports["scout", "int4"], device="cuda")
    assert model.device.type == "cuda" and "vLLM serves the folder" in capsys.readouterr().err
    found_BTV = logits(model, tokens_BT.cuda()).cpu()
    assert divergence(logits(load_reference(exports["scout", "int4"]), tokens_BT), found_BTV).mean() < 1e-3
