"""The hub: ids told from paths, and a hub that does not answer told at once without losing what is cached."""

import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from herd.run import hub
from herd.run.errors import DataError, DiskFull, EnvironmentFault
from herd.run.ranks import free_port


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-4-Scout-17B-16E", "a.b_c/d-1.5"])
def test_ids_of_the_hub_are_ids(name: str) -> None:
    assert hub.is_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "/a",
        "/a/b",
        "./a",
        "../a",
        "~/a",
        "~",
        "a/b/c",
        "a/",
        "",
        "mine.jsonl",
        "texts/mine.txt",
        "a/b.parquet",
        "a b/c",
    ],
)
def test_paths_are_no_ids(name: str) -> None:
    assert not hub.is_id(name)


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers everything with what the server was told."""

    def do_HEAD(self) -> None:
        self.server.asked += 1
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests as such are offline; no proxy may come between."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, online: None) -> str:
    """An address where nothing listens."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    return endpoint


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, online: None) -> Iterator[http.server.HTTPServer]:
    listener = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    listener.asked = 0
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.server_port}")
    yield listener
    listener.shutdown()
    listener.server_close()


@pytest.mark.parametrize("status", [200, 302, 401, 404, 503])
def test_any_answer_is_an_answer(server: http.server.HTTPServer, status: int) -> None:
    server.status = status
    assert hub.silence() is None
    assert server.asked == 1


def test_a_hub_that_answers_is_left_to_its_own_client(server: http.server.HTTPServer) -> None:
    server.status = 404
    with pytest.raises(OSError, match="the client's own words"), hub.asked("model a/b", source="a/b"):
        assert not constants.is_offline_mode()
        raise OSError("the client's own words")


def test_a_hub_that_cannot_be_reached_is_named_with_the_reason(nobody: str) -> None:
    with (
        pytest.raises(EnvironmentFault) as caught,
        hub.asked("model a/b", source="a/b", hint="; on this machine: no such folder"),
    ):
        assert constants.is_offline_mode()
        raise OSError("not cached")
    assert not constants.is_offline_mode()
    line = str(caught.value)
    assert line.startswith(
        f"model a/b: the hub ({nobody}) does not answer ([Errno 111] Connection refused), and its cache"
    )
    assert "its cache does not hold this; on this machine: no such folder; connect (" in line


@pytest.mark.parametrize("endpoint", ["no-scheme", "http://[bad", "ftp://127.0.0.1"])
def test_an_address_that_is_none_is_a_reason_like_any_other(
    endpoint: str, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub, "SECOND_TRY_S", 0.1)
    reason = hub.silence()
    assert reason and "no answer in" not in reason


def test_what_is_cached_is_read_and_other_faults_pass_when_the_hub_is_away(nobody: str) -> None:
    with hub.asked("model a/b", source="a/b"):
        pass
    with pytest.raises(DataError), hub.asked("model a/b", source="a/b"):
        raise DataError("damaged")


def test_a_hub_that_takes_the_call_and_says_nothing_is_waited_for_once(
    online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert hub.silence() == "no answer in 0.3 s"
        listener.settimeout(0)
        listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_name_server_that_is_not_there_holds_nobody(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(hub, "SECOND_TRY_S", 0.1)
    over = threading.Event()
    monkeypatch.setattr(hub, "_knock", over.wait)
    assert hub.silence() == "no answer in 0.4 s"
    over.set()


def test_nobody_is_asked_for_what_is_on_this_machine_or_in_offline_mode(nobody: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="as it is"), hub.asked("model", source=str(tmp_path)):
        raise OSError("as it is")
    constants.HF_HUB_OFFLINE = True  # the fixture puts it back
    assert hub.silence() is None


def test_a_cache_without_room_is_a_full_disk_with_its_own_mend(server: http.server.HTTPServer) -> None:
    server.status = 200
    with pytest.raises(DiskFull, match=r"free some space there, or set HF_HOME"), hub.asked("model a/b", source="a/b"):
        raise OSError(28, "No space left on device", str(Path(constants.HF_HOME) / "hub" / "blob"))
