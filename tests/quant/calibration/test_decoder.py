"""The decoder run layer by layer computes what transformers computes, from memory and from a folder, bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from herd.run.errors import ConfigError
from quant.calibration.decoder import Decoder, find_layers
from quant.plans import make_plan
from quant.schemes import Scheme
from quant.sources import open_source


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
