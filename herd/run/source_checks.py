"""Rules of `data.sources` and `teacher.routes`: several sources of text, and a teacher for each.

for line in faults(config): ...        for section, by, fields in replaced(config): ...
"""

import difflib
from collections.abc import Iterator

from herd.run.schema import Config, DataSource

ROUTABLE = ("frozen", "cached")


def replaced(config: Config) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(section, what replaces, fields that say nothing): the single form beside several sources or routes."""
    if config.data.sources:
        yield "data", "sources", tuple(DataSource.model_fields)
    if config.teacher.routes:
        yield "teacher", "routes", ("source", "overrides", "cache")


def faults(config: Config) -> Iterator[str]:
    """One line for each rule this configuration breaks."""
    for section, by, fields in replaced(config):
        for field in fields:
            if field in getattr(config, section).model_fields_set:
                yield f"{section}.{field}: {section}.{by} takes its place; remove one of them"
    if len(config.data.sources) > config.data.heldout_rows:
        yield (
            f"data.heldout_rows = {config.data.heldout_rows}: less than one row of each of "
            f"{len(config.data.sources)} data.sources; raise it"
        )
    if config.teacher.routes:
        yield from _route_faults(config)


def _route_faults(config: Config) -> Iterator[str]:
    mode, sources = config.teacher.mode, list(config.data.sources)
    if mode not in ROUTABLE:
        cause = "there is no teacher to route" if mode == "none" else "a teacher that trains reads every source"
        yield f"teacher.routes: {cause} (teacher.mode = {mode}); set teacher.mode to frozen or cached, or remove them"
    if not sources:
        yield "teacher.routes: routes go by the names of data.sources, and there are none; name the sources there"
    for name, route in config.teacher.routes.items():
        if sources and name not in sources:
            near = difflib.get_close_matches(name, sources, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(sources)}"
            yield f"teacher.routes.{name}: no source of data.sources is called so; {mend}"
        if mode == "cached" and route.cache is None:
            yield f"teacher.routes.{name}: teacher.mode = cached needs teacher.routes.{name}.cache.path"
        if mode == "frozen" and route.cache is not None and route.cache.missing != "refuse":
            yield f"teacher.routes.{name}.cache.missing = {route.cache.missing}: only teacher.mode = cached reads"
    paths = [
        route.cache.path
        for route in config.teacher.routes.values()
        if route.cache is not None and (mode == "frozen" or route.cache.missing == "forward")
    ]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield f"teacher.routes: several routes write the cache {path}; give each its own cache.path"
    if config.objective.kind == "on_policy":
        yield "objective.kind = on_policy: one teacher scores what is written; remove teacher.routes or the objective"
    for field in ("features", "cross_tokenizer"):
        if getattr(config.loss, field):
            yield f"loss.{field}: compares with one teacher; remove it or teacher.routes"
