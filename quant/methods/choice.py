"""A method by its name.

method = make_method("gptq")
"""

from quant.methods.awq import Awq
from quant.methods.gated import GatedGptq
from quant.methods.gptq import Gptq
from quant.methods.hqq import Hqq
from quant.methods.method import Method
from quant.methods.rtn import Rtn
from quant.methods.signround import SignRound

_CLASSES: dict[str, type[Method]] = {
    "rtn": Rtn,
    "hqq": Hqq,
    "gptq": Gptq,
    "gptq-gated": GatedGptq,
    "awq": Awq,
    "signround": SignRound,
}


def make_method(name: str) -> Method:
    """The method of that name (`quant.methods.names`), with its usual settings."""
    return _CLASSES[name]()
