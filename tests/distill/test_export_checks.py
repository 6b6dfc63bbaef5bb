"""The configuration's names are those of the package."""

from pathlib import Path
from typing import get_args

import pytest

from distill.export_checks import check_exports
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
    assert set(get_args(fields["scheme"].annotation)) == set(SCHEMES)
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
