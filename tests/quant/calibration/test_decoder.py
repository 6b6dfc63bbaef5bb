"""The decoder run layer by layer computes what transformers computes, from memory and from a folder, bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import quant
from herd.run.errors import ConfigError
from quant.calibration.decoder import Decoder, find_layers
from quant.calibration.rows import CalibrationRows
from quant.calibration.settings import Calibration
from quant.plans import make_plan
from quant.schemes import Scheme
from quant.sources import open_source
from tests.quant.tiny_models import build_llama4


def states(source_of: object, tokens_BT: torch.Tensor) -> list[torch.Tensor]:
    source = open_source(source_of)
    decoder = Decoder(make_plan(source, Scheme.named("int4", 32)), source)
    found = [decoder.embed(tokens_BT)]
    for index in range(len(decoder)):
        with decoder.layer(index) as layer:
            found.append(decoder.run(index, layer, found[-1]))
        assert all(parameter.is_meta for parameter in layer.parameters())  # nothing is left in memory
    return found


@pytest.mark.parametrize("name", ["scout", "maverick", "llama"])
def test_hidden_states_are_those_of_transformers(folders: dict[str, Path], tokens_BT: torch.Tensor, name: str):
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model.model(input_ids=tokens_BT, output_hidden_states=True).hidden_states
    for source in (model, folders[name]):
        found = states(source, tokens_BT)
        # The last of transformers' is after the final norm.
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[:-1], wanted[:-1], strict=True))
        assert torch.equal(model.model.norm(found[-1]), wanted[-1])


def test_another_family_needs_no_code_of_its_own(tokens_BT: torch.Tensor, tmp_path: Path):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model.model(input_ids=tokens_BT, output_hidden_states=True).hidden_states
    found = states(tmp_path, tokens_BT)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(model.model.norm(found[-1]), wanted[-1])


def test_of_the_embedding_only_the_rows_of_the_tokens_are_read(folders: dict[str, Path], monkeypatch):
    source = open_source(folders["llama"])
    decoder = Decoder(make_plan(source, Scheme.named("int4", 32)), source)
    asked = []
    whole = source.read_rows
    monkeypatch.setattr(
        source, "read_rows", lambda name, rows: asked.append((name, rows.tolist())) or whole(name, rows)
    )
    decoder.embed(torch.tensor([[5, 9, 5]]))
    assert asked == [("model.embed_tokens.weight", [5, 9])]


def test_a_model_without_a_list_of_layers_is_refused(models):
    skeleton = torch.nn.Module()
    skeleton.config = models["llama"].config
    with pytest.raises(ConfigError, match="0 lists of 2 decoder layers found"):
        find_layers(skeleton)


def test_a_multimodal_folders_text_model_is_found_behind_its_prefix(tokens_BT: torch.Tensor, tmp_path: Path):
    torch.manual_seed(0)
    text = build_llama4(moe_every=1).config.to_dict()
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).to(
        torch.bfloat16
    ).save_pretrained(tmp_path)
    model = Llama4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(input_ids=tokens_BT, output_hidden_states=True).hidden_states
    found = states(tmp_path, tokens_BT)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[:-1], wanted[:-1], strict=True))


def test_input_ranges_are_the_largest_inputs_of_the_unquantised_model(folders: dict[str, Path], tokens_BT):
    rows = CalibrationRows(tokens_BT.repeat(16, 1))
    quantized = quant.quantize(folders["llama"], scheme="fp8-static", calibration=Calibration(rows))
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    largest = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(
                lambda _, given, name=name: largest.update({name: given[0].abs().max().item()})
            )
    with torch.no_grad():
        model(input_ids=tokens_BT)
    for name, value in largest.items():
        assert quantized.tensors[f"{name}.input_scale"].item() == pytest.approx(value / 448, rel=2**-7)
