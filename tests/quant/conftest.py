"""The tiny models, once as objects and once as folders, and one gate process for the whole session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from quant.gate_process import GateProcess
from tests.quant.tiny_models import BUILDERS


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def models() -> dict[str, PreTrainedModel]:
    torch.set_num_threads(1)
    return {name: build() for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def folders(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models as unquantised folders."""
    root = tmp_path_factory.mktemp("source")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(scope="session")
def gate() -> Iterator[GateProcess]:
    torch.set_num_threads(1)
    with GateProcess() as process:
        yield process


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(0, 128, (2, 40), generator=torch.Generator().manual_seed(7))
