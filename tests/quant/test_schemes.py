"""Every scheme in every folder it goes into: the gate passes, readers see the same values, misuse is one line."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import quant
from herd.run.errors import ConfigError, DataError
from quant.architectures import input_tie, weight_tie
from quant.gate_process import GateProcess
from quant.loading import load as load_reference
from quant.readers import COMPRESSED, FINE_GRAINED, GGUF, SCHEMES, check_reader, check_scheme, readers
from quant.schemes import Scheme
from quant.tensor_files import TensorFiles
from tests.quant.tiny_models import WIDE_BUILDERS

FOLDERS = [
    (name, size, container)
    for name, kind in SCHEMES.items()
    for container in kind.containers
    for size in ((32, "channel") if kind.grouped else (64,))
    if container != GGUF
]


@pytest.fixture(scope="module")
def wide() -> dict[str, PreTrainedModel]:
    return {name: build() for name, build in WIDE_BUILDERS.items()}


def measured_inputs(model: PreTrainedModel) -> dict[str, float]:
    """Largest magnitudes that enter the layers of a quantised model (whose experts are modules of their own)."""
    largest: dict[str, float] = {}

    def note(name: str):
        def hook(_: nn.Module, inputs: tuple) -> None:
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(input_ids=torch.arange(64)[None])
    for handle in handles:
        handle.remove()
    return largest


def quantised(model: PreTrainedModel, name: str, size: int | str = 64, container: str = COMPRESSED):
    ranges = None
    if name == "fp8-static":
        ranges = measured_inputs(quant.quantize(model, scheme="int8-weights", group_size="channel").model)
    return quant.quantize(model, scheme=name, group_size=size, container=container, input_absmax=ranges)


@pytest.mark.parametrize("model", WIDE_BUILDERS)
@pytest.mark.parametrize("name, size, container", FOLDERS)
def test_every_scheme_passes_the_gate_and_loads_to_the_in_memory_model(
    wide, gate: GateProcess, tokens_BT, tmp_path: Path, model: str, name: str, size: int | str, container: str
):
    moe = model == "wide-scout"
    if container == FINE_GRAINED and moe:
        with pytest.raises(ConfigError, match="fine-grained-fp8 is not for transformers: it keeps Llama 4's experts"):
            quantised(wide[model], name, size, container)
        return
    made = quantised(wide[model], name, size, container)
    report = quant.export(made, tmp_path / "out", gate=gate)
    assert report.passed and report.facts["readers"] == readers(name, container, moe=moe)
    loaded = load_reference(tmp_path / "out")
    with torch.inference_mode():
        wanted, found, original = (m(input_ids=tokens_BT).logits.float() for m in (made.model, loaded, wide[model]))
    torch.testing.assert_close(found, wanted, atol=0.06, rtol=0.02)
    # Random weights: logits move far more than those of a trained model.
    assert 0 < (wanted - original).norm() <= (0.6 if "4" in name else 0.25) * original.norm()


def test_bitsandbytes_runs_our_folder_with_its_own_kernels(wide, gate: GateProcess, tokens_BT, tmp_path: Path):
    made = quantised(wide["wide-scout"], "nf4-double", container="bitsandbytes")
    quant.export(made, tmp_path / "out", gate=gate)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    experts = model.model.layers[0].feed_forward.experts[1]
    assert type(experts.up_proj).__name__ == "Linear4bit"
    with torch.inference_mode():
        wanted, found = (m(input_ids=tokens_BT).logits.float() for m in (made.model, model))
    assert (found - wanted).norm() <= 0.03 * wanted.norm()


@pytest.mark.parametrize("model", WIDE_BUILDERS)
def test_merged_layers_share_nvfp4s_global_scale(wide, model: str):
    made = quantised(wide[model], "nvfp4")
    scales: dict[str, set[float]] = {}
    for name, tensor in made.tensors.items():
        if name.endswith("weight_global_scale"):
            scales.setdefault(weight_tie(name.rpartition(".")[0]), set()).add(tensor.item())
    assert all(len(values) == 1 for values in scales.values())
    assert any(tie.endswith("gate_proj+up_proj") for tie in scales)


def test_static_input_scales_are_shared_by_all_experts_of_a_layer_and_weight_scales_by_merged_ones(wide):
    made = quantised(wide["wide-scout"], "fp8-static")
    inputs: dict[str, set[float]] = {}
    for name, tensor in made.tensors.items():
        if name.endswith("input_scale"):
            inputs.setdefault(input_tie(name.rpartition(".")[0]), set()).add(tensor.item())
    bank = "model.layers.0.feed_forward.experts"
    assert {f"{bank}.gate_proj+up_proj", f"{bank}.down_proj"} <= inputs.keys()
    assert all(len(values) == 1 for values in inputs.values())
    gate, up = (made.tensors[f"{bank}.0.{part}_proj.weight_scale"] for part in ("gate", "up"))
    assert torch.equal(gate, up)


def test_static_scales_without_calibration_or_with_layers_it_never_reached_are_refused(wide):
    with pytest.raises(ConfigError, match=r"fp8-static: input ranges are not calibrated; use fp8"):
        quant.quantize(wide["wide-llama"], scheme="fp8-static")
    ranges = {"model.layers.0.self_attn.q_proj": 3.0}
    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.o_proj: calibrated input range is 0; give rows"):
        quant.quantize(wide["wide-llama"], scheme="fp8-static", input_absmax=ranges)


@pytest.mark.parametrize(
    "model, scheme, message",
    [
        ("llama", "fp8-block", r"shape \[64, 64\], 64 output channels do not divide by blocks of 128; use fp8"),
        ("llama", "nf4", r"down_proj: shape \[64, 96\], 96 input channels do not divide by blocks of 64; use fp8, or"),
    ],
)
def test_layers_that_do_not_fit_are_named(models, model: str, scheme: str, message: str):
    with pytest.raises(ConfigError, match=message):
        quant.quantize(models[model], scheme=scheme)


@pytest.mark.parametrize(
    "scheme, size, container, message",
    [
        ("int4", 48, COMPRESSED, "group_size = 48 is not allowed; use one of 32, 64, 128, channel"),
        ("nf4", 64, GGUF, r"nf4 cannot be stored as gguf; it goes into bitsandbytes \(gguf takes int4, int8-weights\)"),
        ("int4", 64, GGUF, "GGUF's blocks hold 32 weights; use group_size 32"),
        ("int3", 64, COMPRESSED, "'int3' is unknown; use one of int4, int4-asym, int8"),
        ("int4", 64, "awq", "container = 'awq' is unknown; use one of compressed-tensors, bitsandbytes"),
    ],
)
def test_what_cannot_be_stored_is_one_clear_line(scheme: str, size: int | str, container: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_scheme(scheme, size, container)


@pytest.mark.parametrize(
    "scheme, container, reader, moe, message",
    [
        ("int4-asym", COMPRESSED, "vllm", True, "its expert kernels take symmetric integers only; it reads int4, int8"),
        ("int4", GGUF, "vllm", False, "does not read gguf; use container compressed-tensors"),
        ("fp8", COMPRESSED, "llama.cpp", False, "does not read compressed-tensors; it reads int4, int8-weights"),
        ("fp8-block", FINE_GRAINED, "transformers", True, "use container compressed-tensors"),
    ],
)
def test_what_a_reader_cannot_take_is_one_clear_line(scheme, container, reader, moe, message):
    with pytest.raises(ConfigError, match=message):
        check_reader(scheme, container, reader, moe=moe)
    check_reader("int4", COMPRESSED, "vllm", moe=True)


def test_every_scheme_has_a_label_a_format_and_headers():
    for name, kind in SCHEMES.items():
        for container in kind.containers:
            scheme = Scheme.named(name, 32, container)
            assert scheme.label.startswith(name)
            assert scheme.stored((256, 256))
            assert (scheme.grid is None) == (name not in ("int4", "int4-asym", "int8", "int8-weights"))


def test_asymmetric_zeros_are_stored_for_every_eighth_row(wide):
    tensors = quantised(wide["wide-llama"], "int4-asym", 32).tensors
    assert tensors["model.layers.0.mlp.up_proj.weight_zero_point"].shape == (256 // 8, 128 // 32)


def test_experts_have_names_of_their_own_in_a_bitsandbytes_folder(wide, gate: GateProcess, tmp_path: Path):
    quant.export(quantised(wide["wide-scout"], "nf4", container="bitsandbytes"), tmp_path / "out", gate=gate)
    names = set(TensorFiles(tmp_path / "out"))
    bank = "model.layers.0.feed_forward.experts"
    assert {f"{bank}.1.down_proj.weight", f"{bank}.1.down_proj.weight.quant_state.bitsandbytes__nf4"} <= names
    assert not any("gate_up_proj" in name for name in names)
