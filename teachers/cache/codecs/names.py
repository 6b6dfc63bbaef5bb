"""Codecs by name, as the command line and cache.json write them: `head_and_tail=16`.

codec = parse("rs_kd=50"); name_of(codec) == "rs_kd=50"
"""

from herd.run.errors import ConfigError
from teachers.cache.codecs.encoding import Codec
from teachers.cache.codecs.head_and_tail import HeadAndTail
from teachers.cache.codecs.random_sampling import RandomSampling
from teachers.cache.codecs.top_k import TopK

CODECS = {codec.name: codec for codec in (HeadAndTail, RandomSampling, TopK)}


def parse(text: str, *, said: str = "--codec") -> Codec:
    """Raises ConfigError for a name that is none, or a size that is no whole number of 1 or more.

    `said`: the option or field that the text was given in.
    """
    name, _, size = text.partition("=")
    if name not in CODECS or not size.isdecimal() or int(size) < 1:
        allowed = ", ".join(f"{name}=N" for name in CODECS)
        raise ConfigError(f"{said} {text}: must be one of {allowed}, with a whole number N of 1 or more")
    return CODECS[name](int(size))


def name_of(codec: Codec) -> str:
    """What `parse` reads."""
    return f"{codec.name}={codec.size}"
