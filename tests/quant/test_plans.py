"""Plans: what is quantised and kept, and every bad input refused with its name."""

import json
import re
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import quant
from herd.run.errors import ConfigError, DataError, NumericalError
from herd.run.files import sha256
from quant.architectures import check_layout
from quant.plans import make_plan
from quant.schemes import Scheme
from quant.sources import open_source
from tests.quant.tiny_models import build_llama, build_llama4


def plan_of(model, scheme: str = "int4", group_size: int = 32, ignore: tuple[str, ...] = ()):
    return make_plan(open_source(model), Scheme.named(scheme, group_size), ignore=ignore)


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_llama4_experts_and_mlps_are_quantised_and_attention_routers_and_head_are_not(models):
    plan = plan_of(models["maverick"])
    quantised = {layer.name for layer in plan.layers}
    for layer, moe in enumerate((False, True, False, True)):
        prefix = f"model.layers.{layer}."
        banks = [f"experts.{e}." for e in range(4)] + ["shared_expert."] if moe else [""]
        wanted = {f"{prefix}feed_forward.{b}{p}_proj" for b in banks for p in ("gate", "up", "down")}
        kept = {f"{prefix}self_attn.{p}_proj" for p in "qkvo"} | ({f"{prefix}feed_forward.router"} if moe else set())
        assert {name for name in quantised if name.startswith(prefix)} == wanted
        assert {name for name in plan.ignored if name.startswith(prefix)} == kept
    assert "lm_head" in plan.ignored


def test_a_dense_model_keeps_only_its_head(models):
    plan = plan_of(models["llama"])
    assert list(plan.ignored) == ["lm_head"]
    assert len(plan.layers) == 2 * 7


def test_sizes_are_those_of_the_format(models):
    plan = plan_of(models["llama"], group_size=32)
    weights = sum(p.numel() for name, p in models["llama"].named_parameters() if "_proj" in name)
    assert plan.quantised_weights == weights
    assert plan.bits_per_quantised_weight == 4 + 16 / 32
    assert plan.bytes_before == 2 * plan.all_weights == sum(p.nbytes for p in models["llama"].parameters())
    kept = sum(2 * prod(shape) for _, shape in plan.kept.values())
    assert plan.bytes_after == kept + weights * 4.5 / 8 + 16 * len(plan.layers)


def test_ignored_layers_come_from_globs_and_expressions(models):
    plan = plan_of(models["llama"], ignore=("*.mlp.down_proj", r"re:model\.layers\.0\.self_attn\..*"))
    assert set(plan.ignored) == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"} | {
        f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"
    }


def test_an_ignore_pattern_that_matches_nothing_is_refused(models):
    with pytest.raises(ConfigError, match="'nothing' matches no linear layer"):
        plan_of(models["llama"], ignore=("nothing",))


@pytest.mark.parametrize(
    "model, pattern, merged",
    [
        ("llama", "*.q_proj", r"self_attn\.\{q_proj,k_proj,v_proj\}"),
        ("llama", "*.up_proj", r"mlp\.\{gate_proj,up_proj\}"),
        ("scout", "*.experts.2.*", r"experts \(all experts of a layer\)"),
    ],
)
def test_splitting_layers_that_servers_merge_is_refused(models, model, pattern, merged):
    with pytest.raises(ConfigError, match=merged):
        plan_of(models[model], ignore=(pattern,))


def test_ignoring_everything_is_refused(models):
    with pytest.raises(ConfigError, match="no layer is left"):
        plan_of(models["llama"], ignore=("*",))
    with pytest.raises(ConfigError, match="no layer is left"):
        quant.quantize(models["llama"], allocation={"*": "fp8"}, ignore=("*",))


def test_a_group_that_does_not_divide_names_the_layer_its_shape_and_what_is_allowed():
    message = r"layers\.0\.mlp\.down_proj: shape \[64, 96\], 96 .* group_size 64; use group_size 32 or channel"
    with pytest.raises(ConfigError, match=message):
        plan_of(build_llama(), group_size=64)


def test_the_mend_named_for_layers_that_do_not_fit_is_one_that_is_taken(models):
    odd = build_llama(hidden_size=96, intermediate_size=200, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(ConfigError, match=r"q_proj: shape \[96, 96\], .*; use group_size channel$"):
        plan_of(odd, group_size=64)  # 32 would do for the attention, and not for the MLPs
    assert plan_of(odd, group_size="channel").layers
    with pytest.raises(ConfigError, match=r"blocks of 64; use fp8$"):  # nothing would be left
        plan_of(odd, scheme="nf4")
    wide = build_llama4(moe_every=2, hidden_size=128, intermediate_size=128, intermediate_size_mlp=192)
    with pytest.raises(ConfigError, match="use fp8, or keep what does not fit in bf16: ") as caught:
        plan_of(wide, scheme="fp8-block")
    patterns = re.findall(r"--ignore '(.*?)'", str(caught.value))
    assert len(plan_of(wide, scheme="fp8-block", ignore=patterns).layers) == 2 * (4 + 1) * 3


def test_a_head_stored_apart_from_the_embeddings_it_is_said_to_be_tied_to_is_kept(tmp_path, gate, tokens_BT, caplog):
    folder = tmp_path / "tied"
    build_llama(tied=True).save_pretrained(folder)
    assert "lm_head.weight" not in plan_of(folder).headers()
    embeddings = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": embeddings.clone()}))
    assert "lm_head.weight" not in plan_of(folder).headers()  # the same values: tied, as transformers has it
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": embeddings.flip(0)}))
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for number, source in enumerate((folder, whole)):
        quantized = quant.quantize(source, scheme="int8-weights", group_size=32)
        assert quant.export(quantized, tmp_path / f"export-{number}", gate=gate).passed
        assert not json.loads((tmp_path / f"export-{number}" / "config.json").read_text())["tie_word_embeddings"]
        with torch.inference_mode():
            wanted, found = (
                model(tokens_BT).logits.float() for model in (whole, quant.load(tmp_path / f"export-{number}"))
            )
        assert torch.nn.functional.cosine_similarity(wanted.flatten(), found.flatten(), dim=0) > 0.999
    assert "both are kept" in caplog.text


@pytest.mark.parametrize("scheme, size, message", [("int4", 48, "32, 64, 128"), ("int3", 64, "int4, int4-asym, int8")])
def test_unknown_schemes_and_group_sizes_are_refused(models, scheme, size, message):
    with pytest.raises(ConfigError, match=message):
        quant.quantize(models["llama"], scheme=scheme, group_size=size)


def test_nan_in_one_expert_is_named():
    model = build_llama4(moe_every=1)
    model.model.layers[2].feed_forward.experts.gate_up_proj.data[3, 5, 70] = torch.nan
    with pytest.raises(NumericalError, match=r"layers\.2\.feed_forward\.experts\.3\.up_proj: 1 of 4096"):
        quant.quantize(model, scheme="int4", group_size=32)


def test_inf_in_a_kept_tensor_is_named():
    model = build_llama()
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(NumericalError, match=r"model\.norm\.weight: 1 of 64"):
        quant.quantize(model, scheme="fp8")


def test_fused_experts_of_an_unknown_layout_are_refused():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"experts\.\w+_proj: fused experts"):
        quant.quantize(MixtralForCausalLM(config), scheme="int4", group_size=32)


def test_fused_experts_in_matrices_are_refused_and_mambas_decays_are_not():
    dbrx = DbrxConfig(
        d_model=64, n_heads=4, n_layers=1, vocab_size=128, attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "hidden_size": 64},
    )  # fmt: skip
    mamba = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, state_size=8)
    with torch.device("meta"):
        check_layout(MambaForCausalLM(mamba))
        with pytest.raises(ConfigError, match=r"ffn\.experts\.mlp\.\w+: fused experts"):
            check_layout(DbrxForCausalLM(dbrx))


@pytest.mark.parametrize(
    "change, line",
    [
        ({"hidden_size": "abc"}, "'hidden_size'.*expected int, got str"),
        ({"num_attention_heads": 7}, "hidden size .64. is not a multiple of the number of attention heads"),
        ({"quantization_config": 5}, "quantization_config = 5 is no mapping; leave it out"),
        ({"quantization_config": "int4"}, "quantization_config = 'int4' is no mapping; leave it out"),
        ({"num_attention_heads": 0}, "integer modulo by zero"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0: must be 1 or more"),
        ({"max_position_embeddings": -4}, "max_position_embeddings = -4: must be 1 or more"),
        ({"hidden_act": "nosuch"}, r"no LlamaForCausalLM can be built from it .KeyError: 'nosuch'.; mend it"),
        ({"architectures": 7}, "architectures = 7; supported: "),
        ({"architectures": ["BertModel"]}, r"architectures = \['BertModel'\]; supported: .*to add one"),
        ({"is_encoder_decoder": True}, "supported: .*to add one"),
        ({"model_type": "foo"}, "model_type = 'foo' is unknown to transformers .*supported: .*to add one"),
        ({"model_type": [1]}, "cannot be read"),
    ],
)
def test_a_configuration_that_cannot_be_one_is_one_line(folders, tmp_path, change, line):
    folder = copy(folders["llama"], tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=rf"config\.json.*{line}") as caught:
        plan_of(folder)
    assert "\n" not in str(caught.value)


def test_a_quantised_folder_is_refused(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="already quantised"):
        quant.quantize(folder, scheme="int4")


def test_a_missing_folder_and_a_missing_config_are_named(tmp_path):
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        quant.quantize(tmp_path / "nowhere", scheme="int4")


@pytest.mark.parametrize(
    "index, line",
    [
        ("[1]", "cannot be read"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "names ../a.safetensors, which is not beside it"),
    ],
)
def test_an_index_that_is_none_or_leads_out_of_the_folder_is_refused(folders, tmp_path, index, line):
    folder = copy(folders["llama"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=rf"index\.json {re.escape(line)}"):
        quant.quantize(folder, scheme="int4")


def test_an_unknown_architecture_is_named(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["StrangeForCausalLM"]}))
    with pytest.raises(DataError, match=r"StrangeForCausalLM.*supported"):
        quant.quantize(folder, scheme="int4")


def test_a_folder_without_safetensors_is_refused(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"neither model\.safetensors nor"):
        quant.quantize(folder, scheme="int4")


def test_a_truncated_file_is_named(folders, tmp_path):
    path = copy(folders["llama"], tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"model\.safetensors: \d+ bytes, its header describes \d+"):
        quant.quantize(path.parent, scheme="int4")


def test_a_missing_shard_is_named(models, tmp_path):
    models["llama"].save_pretrained(tmp_path / "model", max_shard_size="50KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing"):
        quant.quantize(tmp_path / "model", scheme="int4")


def test_a_shard_that_lacks_a_listed_tensor_is_named(models, tmp_path):
    models["llama"].save_pretrained(tmp_path / "model", max_shard_size="50KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(DataError, match=f"{shard.name} lacks {name}"):
        quant.quantize(tmp_path / "model", scheme="int4")


def test_missing_strange_and_misshapen_tensors_are_named(folders, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = edit(copy(folders["llama"], tmp_path / "lacking"), lambda tensors: tensors.pop(name))
    with pytest.raises(DataError, match=f"{name} is missing"):
        quant.quantize(lacking, scheme="int4")
    strange = edit(copy(folders["llama"], tmp_path / "strange"), lambda t: t.update(extra=torch.zeros(2)))
    with pytest.raises(DataError, match="extra does not belong"):
        quant.quantize(strange, scheme="int4")
    cut = edit(copy(folders["llama"], tmp_path / "cut"), lambda t: t.update({name: t[name][:50].clone()}))
    with pytest.raises(DataError, match=rf"{name} has shape \(50, 64\)"):
        quant.quantize(cut, scheme="int4")


def test_a_layer_that_is_quantised_already_is_named(folders, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight_scale"
    half = edit(copy(folders["llama"], tmp_path / "half"), lambda t: t.update({name: torch.ones(96, 1)}))
    with pytest.raises(DataError, match=r"model\.layers\.0\.mlp\.up_proj is already quantised"):
        quant.quantize(half, scheme="int4")
    weight = "model.layers.1.mlp.up_proj.weight"
    coded = edit(copy(folders["llama"], tmp_path / "coded"), lambda t: t.update({weight: t[weight].to(torch.int8)}))
    with pytest.raises(DataError, match=f"{weight} is not stored in plain floating point"):
        quant.quantize(coded, scheme="int4")


@pytest.mark.parametrize(
    "change, line",
    [
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0: must be 1 to num_local_experts = 4"),
        ({"num_experts_per_tok": 99}, "num_experts_per_tok = 99: must be 1 to num_local_experts = 4"),
        ({"attention_chunk_size": 0}, "attention_chunk_size = 0: chunked attention needs 1 token or more"),
        ({"attention_chunk_size": None}, "attention_chunk_size = None: chunked attention needs 1 token or more"),
        ({"no_rope_layers": [1]}, "no_rope_layers has 1 entries: must have one for each of num_hidden_layers = 4"),
    ],
)
def test_a_llama4_that_could_be_built_and_not_run_is_one_line(folders, tmp_path, change, line):
    folder = copy(folders["scout"], tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(DataError, match=line):
        quant.quantize(folder, scheme="fp8")


def test_a_wrong_checksum_names_the_file(folders, tmp_path):
    folder = copy(folders["llama"], tmp_path / "model")
    sums = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / "SHA256SUMS").write_text("".join(sums))
    assert quant.quantize(folder, scheme="fp8").plan.layers
    (folder / "SHA256SUMS").write_text("".join(sums) + "see the README\n")
    with pytest.raises(DataError, match=rf"SHA256SUMS: line {len(sums) + 1} is no checksum and name"):
        quant.quantize(folder, scheme="fp8")
    (folder / "SHA256SUMS").write_text("".join(sums))
    edit(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(DataError, match=r"model\.safetensors does not have the checksum"):
        quant.quantize(folder, scheme="fp8")
    (folder / "generation_config.json").unlink()
    with pytest.raises(DataError, match=r"generation_config\.json is missing \(SHA256SUMS lists it\)"):
        quant.quantize(folder, scheme="fp8")
