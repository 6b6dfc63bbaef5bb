"""In which order the linear layers of a decoder layer are quantised, and which of them read the same input. As data.

    for names in stages(layer_names): ...       # q, k, v; then o; then gate and up; then down
    input_key("a.mlp.up_proj") == input_key("a.mlp.gate_proj")

A stage is calibrated on what the stages before it, already quantised, put out.
"""

from collections.abc import Iterable

ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def stages(names: Iterable[str]) -> list[list[str]]:
    """Names in the order of their stages; leaves that are not in the table belong to the first."""
    split: dict[int, list[str]] = {}
    for name in names:
        split.setdefault(_place(name), []).append(name)
    return [split[place] for place in sorted(split)]


def input_key(name: str) -> str:
    """A name that layers with the same input have in common: that of the first of them."""
    parent, _, leaf = name.rpartition(".")
    shared = next((leaves for leaves in ORDER if leaf in leaves), (leaf,))
    return f"{parent}.{shared[0]}" if parent else shared[0]


def _place(name: str) -> int:
    leaf = name.rpartition(".")[2]
    return next((place for place, leaves in enumerate(ORDER) if leaf in leaves), 0)
