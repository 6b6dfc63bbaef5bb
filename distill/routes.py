"""The teachers of a run whose sources have one each (`teacher.routes`), opened and checked.

teacher = open_routes(config, run_folder, tokenizer, corpus, open_teacher)      # RoutedTeacher
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.target_cache import open_cached, open_writing
from herd.data.corpora import Corpus, MixedCorpus
from herd.run.errors import ConfigError, DataError
from herd.run.schema import Config
from teachers.cached import CachedTeacher
from teachers.frozen import FrozenTeacher
from teachers.routed import Route, RoutedTeacher

OpenTeacher = Callable[[Config, str], PreTrainedModel | None]
"""From a route in the single form (`Config.alone`) and what errors call it to its model; None for one only read."""


def open_routes(
    config: Config, run_folder: Path, tokenizer: PreTrainedTokenizerBase, corpus: MixedCorpus, open_teacher: OpenTeacher
) -> RoutedTeacher:
    """Open every route's teacher. Raises ConfigError or DataError that names the route."""
    models: dict[str, PreTrainedModel | None] = {}
    routes = {}
    for place, name in enumerate(config.data.sources):
        if name not in config.teacher.routes:
            continue
        alone, label = config.alone(name), f"teacher.routes.{name}"
        # Routes of one teacher share its weights; a cache that is not completed needs none.
        completes = alone.teacher.cache is not None and alone.teacher.cache.missing == "forward"
        same = f"{alone.teacher.source} {alone.teacher.overrides} {completes}"
        if same not in models:
            models[same] = open_teacher(alone, label)
        with naming(label):
            routes[place] = _open_route(alone, run_folder, name, tokenizer, corpus.corpora[name], models[same])
    _check_tails(routes)
    return RoutedTeacher(routes)


def _open_route(
    alone: Config,
    run_folder: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    model: PreTrainedModel | None,
) -> Route:
    if alone.teacher.mode == "cached":
        return Route(name, open_cached(alone, tokenizer, corpus, model))
    writing = None
    if alone.teacher.cache is not None:
        writing = open_writing(alone, run_folder, tokenizer, corpus, model.config.get_text_config().vocab_size)
    return Route(name, FrozenTeacher(model), writing)


def _check_tails(routes: dict[int, Route]) -> None:
    tails = {route.source: route.teacher.tail for route in routes.values() if isinstance(route.teacher, CachedTeacher)}
    if len(set(tails.values())) > 1:
        shown = ", ".join(f"{name} {tail}" for name, tail in tails.items())
        raise ConfigError(
            f"teacher.routes: the caches disagree on what classes they do not list mean ({shown}), and a batch has one "
            "meaning; make them with codecs of one kind (head_and_tail and rs_kd, or top_k)"
        )


@contextmanager
def naming(label: str) -> Iterator[None]:
    """Put the route in front of an error's line."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{label}: {error}") from error
