"""The Hugging Face hub: what its ids look like, and a quick word when it does not answer.

    with hub.asked("tokenizer org/name", source="org/name"): AutoTokenizer.from_pretrained("org/name")

Its clients try again for half a minute whatever the reason; without a network that only hides the reason.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from herd.run.errors import DataError, EnvironmentFault
from herd.run.files import disk_faults

ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FILES = (".txt", ".json", ".jsonl", ".parquet")  # a name that ends so is a file's, though it could be an id
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
TWICE = ["consolidated*", "original/*"]  # second copies of the weights, in forms that transformers does not read
SECOND_TRY_S = 1.0


def is_id(name: str) -> bool:
    """True for what can be a repository's id on the hub: `name` or `owner/name`, and no path."""
    return ID.fullmatch(name) is not None and not name.endswith(FILES)


@contextmanager
def asked(what: str, *, source: str, hint: str = "") -> Iterator[None]:
    """Around a call that loads `source`, a folder or a hub id, called `what` in errors.

    When the hub does not answer, its cache alone is read, at once; what is not cached is an EnvironmentFault with the
    reason (`hint` behind it). A cache that finds no room is a DiskFull. Everything else passes.
    """
    if Path(source).exists():
        yield
        return
    from huggingface_hub import constants

    cause = silence()
    if cause is None:
        with disk_faults(Path(constants.HF_HOME), mend="set HF_HOME to a folder on another disk"):
            yield
        return
    set_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # what the environment variable of that name does, for this call
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"{what}: the hub ({constants.ENDPOINT}) does not answer ({cause}), and its cache does not hold this{hint};"
            " connect (HTTPS_PROXY and HF_ENDPOINT are respected), or name what is on this machine"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = set_offline


def local_folder(source: str, field: str) -> Path:
    """The folder of a saved model: `source` itself, or what the hub has under that id, downloaded where it is not yet.

    `field` is what errors call it. Raises DataError when the hub has none, EnvironmentFault when it does not answer.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        with asked(f"{field} {source}", source=source):
            return Path(snapshot_download(source, allow_patterns=WANTED, ignore_patterns=TWICE))
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"{field} {source}: no such folder, and the hub does not give it: {cause}") from error


def silence() -> str | None:
    """Why the hub does not answer; None when it does, whatever it says, or when offline mode is set anyway.

    Two tries where it cannot be reached at all, one where an answer does not come within HF_HUB_ETAG_TIMEOUT (10 s).
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return None
    answers: SimpleQueue[str | None] = SimpleQueue()
    # In a thread: a name server that is not there holds its caller beyond any time-out.
    threading.Thread(target=lambda: answers.put(_knock()), daemon=True).start()
    patience_s = constants.HF_HUB_ETAG_TIMEOUT + 2 * SECOND_TRY_S
    try:
        return answers.get(timeout=patience_s)
    except Empty:
        return f"no answer in {patience_s:g} s"


def _knock() -> str | None:
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import httpx

    cause = ""
    for pause_s in (0.0, SECOND_TRY_S):
        time.sleep(pause_s)
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return None
        except httpx.TimeoutException:
            return f"no answer in {constants.HF_HUB_ETAG_TIMEOUT} s"
        except Exception as error:  # of the client, a proxy, a store of certificates: each is the reason
            cause = str(error) or type(error).__name__
    return cause
