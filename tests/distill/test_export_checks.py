"""The configuration's names are those of the package."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.export_checks import check_exports
from distill.export_plans import check_export_plans
from distill.plan import plan_run
from herd.llama4.source import read_config
from herd.run.config import load
from herd.run.errors import ConfigError
from herd.run.schema import Quantize
from quant.methods.names import METHODS
from quant.readers import CONTAINERS, GROUP_SIZES, SCHEMES


def configured(tmp_path: Path, quantize: str):
    text = f"run: {{name: try, steps: 10}}\nstudents: {{scout: {{source: scout-nano, quantize: [{quantize}]}}}}\n"
    (tmp_path / "config.yaml").write_text(text)
    return load(tmp_path / "config.yaml", [])


def test_the_schema_lists_every_scheme_group_size_container_and_method():
    fields = Quantize.model_fields
    assert set(get_args(get_args(fields["scheme"].annotation)[0])) == set(SCHEMES)
    assert get_args(fields["group_size"].annotation) == GROUP_SIZES
    assert get_args(fields["method"].annotation) == tuple(METHODS)
    assert get_args(get_args(fields["container"].annotation)[0]) == CONTAINERS


def test_a_method_that_does_not_fit_the_scheme_is_refused_before_training(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"students\.scout\.quantize: method = gptq: works on int4, .* for fp8"):
        check_exports(configured(tmp_path, "{scheme: fp8, method: gptq}"))


def test_exports_that_can_be_made_are_accepted(tmp_path: Path):
    check_exports(
        configured(
            tmp_path,
            "int4, nf4, fp8-block, {scheme: int4, method: gptq}, {scheme: int4, group_size: 32, container: gguf}",
        )
    )


@pytest.mark.parametrize(
    "quantize, message",
    [
        ("{scheme: int4, container: gguf}", "students.scout.quantize: group_size = 64: GGUF's blocks hold 32 weights"),
        ("{scheme: fp8, container: gguf}", "students.scout.quantize: fp8 cannot be stored as gguf"),
        ("{scheme: fp8-block, container: fine-grained-fp8}", "students.scout.quantize: .* is not for transformers"),
    ],
)
def test_exports_that_cannot_be_made_are_refused_before_training(tmp_path: Path, quantize: str, message: str):
    with pytest.raises(ConfigError, match=message):
        check_exports(configured(tmp_path, quantize))


def test_an_allocation_that_cannot_be_read_is_refused_before_anything_is_imported(tmp_path: Path):
    config = configured(tmp_path, f"{{allocation: {tmp_path}/none.json}}")
    with pytest.raises(ConfigError, match=r"scout\.quantize: allocation .*none\.json: no such file; give a JSON"):
        check_exports(config)


@pytest.mark.parametrize(
    "content, quantize, fault",
    [
        ('{"*": "int4-g63"}', "{allocation: FILE}", "FILE: 'int4-g63' is no choice; the nearest is int4-g64"),
        (
            '{"*.mlp.experts": "fp8", "*": "fp8"}',
            "{allocation: FILE}",
            "FILE: .* matches no group of layers",
        ),
        ('{"*.experts": "fp8"}', "{allocation: FILE}", "FILE: allocation: nothing is said about"),
        ('{"*": "nvfp4", "*.experts": "int8"}', "{allocation: FILE, method: gptq}", "FILE: method = gptq: works on"),
        ("", "int4", ".*experts.0.down_proj: .* 96 input channels do not divide by group_size 64; use group_size 32"),
    ],
)
def test_an_export_that_does_not_fit_the_model_is_refused_before_training(tmp_path: Path, content, quantize, fault):
    file = tmp_path / "bits.json"
    file.write_text(content)
    student = configured(tmp_path, quantize.replace("FILE", str(file))).students["scout"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_config("scout-nano", overrides={"intermediate_size": 96}))
    with pytest.raises(ConfigError, match=r"students\.scout\.quantize: " + fault.replace("FILE", str(file))):
        check_export_plans("scout", student, model)


def test_an_allocation_of_this_very_model_is_accepted_by_the_plan_of_a_run(tmp_path: Path, capsys):
    (tmp_path / "bits.json").write_text('{"*": "int4-g32", "*.experts": "fp8"}')
    fits = configured(tmp_path, f"int4, {{allocation: {tmp_path}/bits.json, method: gptq}}")
    plan_run(fits, world_size=1)
    (tmp_path / "bits.json").write_text('{"*": "int4-g32", "model.layers.99.feed_forward.experts": "fp8"}')
    with pytest.raises(ConfigError, match=r"'model\.layers\.99\.feed_forward\.experts' matches no group of layers"):
        plan_run(fits, world_size=1)
