"""Sets at URLs: from servers that misbehave the same batches come as from disk, bit for bit, or the run stops with the
URL and the reason."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hrgan.config import DataConfig
from hrgan.data import store as stores
from hrgan.data import transfer
from hrgan.data.build import build
from hrgan.data.dataset import open_dataset
from hrgan.data.store import Access, Missing, Store
from hrgan.data.stream import batches
from hrgan.data.transfer import redacted
from hrgan.errors import DataError, UserError

Behaviour = Callable[[BaseHTTPRequestHandler, bytes, int], None]
"""What a server does with a request: (handler, the file's bytes, how often it was asked for before)."""


def send(handler: BaseHTTPRequestHandler, content: bytes, length: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)


def well(handler: BaseHTTPRequestHandler, content: bytes, before: int) -> None:
    send(handler, content)


def answers_500(handler: BaseHTTPRequestHandler, content: bytes, before: int, times: int = 2) -> None:
    if before < times:
        handler.send_error(500)
    else:
        send(handler, content)


def drops(handler: BaseHTTPRequestHandler, content: bytes, before: int, times: int = 2) -> None:
    """The connection ends in the middle of the file."""
    send(handler, content[: len(content) // 2] if before < times else content, len(content))


def resets(handler: BaseHTTPRequestHandler, content: bytes, before: int, times: int = 2) -> None:
    if before < times:
        send(handler, content[: len(content) // 2], len(content))
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        handler.connection.close()
    else:
        send(handler, content)


def stalls(handler: BaseHTTPRequestHandler, content: bytes, before: int, times: int = 1) -> None:
    """Nothing more comes after half of the file."""
    if before < times:
        send(handler, content[: len(content) // 2], len(content))
        handler.wfile.flush()
        time.sleep(1.5)
    else:
        send(handler, content)


def stalls_at_once(handler: BaseHTTPRequestHandler, content: bytes, before: int, times: int = 1) -> None:
    if before < times:
        time.sleep(1.5)
    else:
        send(handler, content)


def lies(handler: BaseHTTPRequestHandler, content: bytes, before: int, times: int = 2) -> None:
    """As many bytes, one of them another."""
    wrong = content[:-1] + bytes([content[-1] ^ 1])
    send(handler, wrong if before < times else content)


@dataclass
class Server:
    url: str
    behaviour: dict[str, Behaviour] = field(default_factory=dict)
    """By the file's ending."""
    asked: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The drawn set, served over HTTP."""
    monkeypatch.setattr(stores, "BACKOFF_SECONDS", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            before = serving.asked[path]
            serving.asked[path] += 1
            file = shards / path
            if not file.is_file():
                self.send_error(404)
                return
            serving.behaviour.get(file.suffix, well)(self, file.read_bytes(), before)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.handle_error = lambda *words: None  # type: ignore[method-assign]  # clients that went away
        serving = Server(f"http://127.0.0.1:{listening.server_port}")
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield serving
        listening.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> DataConfig:
    return DataConfig(cache=str(tmp_path / "cache"), timeout_seconds=0.5, retries=3)


def shown(config: DataConfig, count: int = 12, workers: int = 0) -> list[Any]:
    """Pixels and numbers of the samples of some batches, over an epoch and a half."""
    reader = batches(
        open_dataset(config), 16, seed=1, slots=2, window=8, nimg=0, batch=12, rank=0, world=1, workers=workers
    )
    return [(batch.images.numpy().tobytes(), batch.samples.tolist(), batch.bad) for batch in islice(reader, count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("behaviour", [well, answers_500, drops, resets, stalls, stalls_at_once, lies])
def test_batches_from_a_server_are_those_from_disk(
    behaviour: Behaviour, workers: int, server: Server, shards: Path, settings: DataConfig
) -> None:
    server.behaviour = {".tar": behaviour, ".json": behaviour if behaviour is not lies else well}
    found = shown(replace(settings, path=server.url), workers=workers)
    assert found == shown(replace(settings, path=str(shards)))
    assert all(not bad for _, _, bad in found)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (partial(answers_500, times=99), "HTTP 500"),
        (partial(drops, times=99), "the connection ended .* bytes early"),
        (partial(stalls, times=99), r"no answer in time \(stalled\)"),
        (partial(lies, times=99), "found sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"),
    ],
)
def test_a_server_that_stays_bad_stops_the_run_with_the_url_and_the_reason(
    behaviour: Behaviour, reason: str, server: Server, settings: DataConfig
) -> None:
    server.behaviour = {".tar": behaviour}
    with pytest.raises(DataError, match=rf"{server.url}/16/drawn-0000\d.tar cannot be fetched: {reason} \(3 att"):
        shown(replace(settings, path=server.url, retries=2))
    assert max(server.asked.values()) == 3
    assert not list(Path(settings.cache or "").glob("shards/*/*.ok"))
    assert not list(Path(settings.cache or "").glob("tmp/*"))


def test_what_is_not_there_and_what_is_refused_is_asked_for_once(
    server: Server, settings: DataConfig, shards: Path
) -> None:
    with pytest.raises(DataError, match=rf"{server.url}/none/manifest.json is missing, so no finished set is there"):
        open_dataset(replace(settings, path=f"{server.url}/none"))
    server.behaviour = {".json": lambda handler, content, before: handler.send_error(403)}
    with pytest.raises(DataError, match=r"manifest.json: access was refused; credentials are taken from ~/.netrc"):
        open_dataset(replace(settings, path=server.url))
    assert set(server.asked.values()) == {1}


def test_a_login_comes_from_netrc_and_appears_nowhere(
    server: Server, settings: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen = []

    def wants_login(handler: BaseHTTPRequestHandler, content: bytes, before: int) -> None:
        seen.append(handler.headers["Authorization"])
        handler.send_error(500) if before < 1 else send(handler, content)

    server.behaviour = {".json": wants_login}
    open_dataset(replace(settings, path=server.url))
    assert seen == ["Basic bWU6aHVudGVyMg=="] * 2
    assert "hunter2" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "url", ["https://me:hunter2@host/set", "https://host/set?X-Amz-Signature=hunter2", "s3://key:hunter2@bucket/set"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="would end up in logs; leave it out, credentials are taken from") as error:
        Store(url)
    assert "hunter2" not in str(error.value)
    assert "hunter2" not in redacted(f"GET {url} failed, token=hunter2, password: hunter2")


def test_other_schemes_missing_packages_and_pipes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ftp:// is not known, expected a folder, http://, .*s3://, gs://, hf:// or"):
        Store("ftp://host/set")
    monkeypatch.setitem(transfer.PACKAGES, "s3", "no_such_package")
    with pytest.raises(UserError, match=r"s3:// needs the package no_such_package: pip install no_such_package"):
        Store("s3://bucket/set")
    with pytest.raises(UserError, match=r"pipe: commands are off; --data.allow_pipe true lets them run"):
        Store("pipe:cat /set/{}")
    with pytest.raises(UserError, match=r"has no \{\}"):
        Store("pipe:cat /set", Access(allow_pipe=True))


def test_a_pipe_that_is_allowed_gives_the_same_batches(shards: Path, settings: DataConfig, tmp_path: Path) -> None:
    odd = tmp_path / "a set's folder"
    shutil.copytree(shards, odd)
    config = replace(settings, path=f"pipe:cat \"{odd}/\"{{}}", allow_pipe=True)
    assert shown(config) == shown(replace(settings, path=str(shards)))
    with pytest.raises(DataError, match=r"cannot be fetched: the command ended with code 1"):
        shown(replace(config, path="pipe:cat /nowhere/{}", retries=0))


# The cache


def files(count: int, size: int = 1000) -> dict[str, bytes]:
    return {f"{i}.tar": bytes([i]) * size for i in range(count)}


@pytest.fixture
def blobs(server: Server, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """Files of 1000 bytes beside the set."""
    contents = files(8)
    for name, content in contents.items():
        (shards / name).write_bytes(content)
    yield contents
    for name in contents:
        (shards / name).unlink()


def fetch(store: Store, name: str, content: bytes) -> Path:
    return store.local(name, len(content), hashlib.sha256(content).hexdigest())


def test_a_file_is_fetched_once_and_a_damaged_one_again(
    server: Server, settings: DataConfig, blobs: dict[str, bytes], capfd: Any
) -> None:
    store = Store(server.url, Access(settings.cache))
    for _ in range(3):
        assert fetch(store, "1.tar", blobs["1.tar"]).read_bytes() == blobs["1.tar"]
    assert server.asked["1.tar"] == 1
    path = fetch(store, "1.tar", blobs["1.tar"])
    path.write_bytes(b"x" + blobs["1.tar"][1:])
    assert fetch(store, "1.tar", blobs["1.tar"]).read_bytes() == blobs["1.tar"]
    assert server.asked["1.tar"] == 2
    assert "damaged in the cache; fetching it again" in capfd.readouterr().err
    os.utime(path)  # Touched, not changed: read again, not fetched again.
    fetch(store, "1.tar", blobs["1.tar"])
    assert server.asked["1.tar"] == 2


def together(url: str, cache: str, start: Any, names: dict[str, bytes]) -> None:
    store = Store(url, Access(cache))
    start.wait()
    for name, content in names.items():
        assert fetch(store, name, content).read_bytes() == content


def test_processes_share_the_cache_and_each_file_is_asked_for_once(
    server: Server, settings: DataConfig, blobs: dict[str, bytes]
) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    children = [
        context.Process(target=together, args=(server.url, settings.cache, start, blobs), daemon=True) for _ in range(4)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert {server.asked[name] for name in blobs} == {1}


def test_the_cache_stays_within_its_bound_and_drops_the_least_recently_used(
    server: Server, settings: DataConfig, blobs: dict[str, bytes]
) -> None:
    store = Store(server.url, Access(settings.cache, cache_gb=3500 / 1e9))
    paths = {}
    for name in ("0.tar", "1.tar", "2.tar", "0.tar", "3.tar"):
        paths[name] = fetch(store, name, blobs[name])
        time.sleep(0.02)
    assert sorted(name for name, path in paths.items() if path.exists()) == ["0.tar", "2.tar", "3.tar"]
    assert sum(path.stat().st_size for path in paths.values() if path.exists()) <= 3500


def test_a_cache_too_small_for_what_is_read_at_once_is_refused(server: Server, settings: DataConfig) -> None:
    with pytest.raises(UserError, match=r"data.cache_gb: 1e-05 GB do not hold the 4 shards of .* GB that are read at"):
        shown(replace(settings, path=server.url, cache_gb=1e-5))


def test_a_kill_in_the_middle_of_a_fetch_leaves_nothing_that_is_trusted(
    server: Server, settings: DataConfig, blobs: dict[str, bytes]
) -> None:
    server.behaviour = {".tar": stalls}
    context = multiprocessing.get_context("fork")
    start = context.Barrier(1)
    names = {"5.tar": blobs["5.tar"]}
    child = context.Process(target=together, args=(server.url, settings.cache, start, names), daemon=True)
    child.start()
    while server.asked["5.tar"] == 0:
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child.pid or 0, signal.SIGKILL)
    child.join()
    assert fetch(Store(server.url, Access(settings.cache)), "5.tar", blobs["5.tar"]).read_bytes() == blobs["5.tar"]


def test_fetching_ahead_makes_a_file_ready(server: Server, settings: DataConfig, blobs: dict[str, bytes]) -> None:
    store = Store(server.url, Access(settings.cache))
    digest = hashlib.sha256(blobs["6.tar"]).hexdigest()
    store.prefetch("6.tar", 1000, digest)
    deadline = time.monotonic() + 10
    while not list(Path(settings.cache or "").glob(f"shards/*/{digest}.ok")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.prefetch("6.tar", 1000, digest)
    fetch(store, "6.tar", blobs["6.tar"])
    assert server.asked["6.tar"] == 1


# S3


@pytest.fixture(scope="module")
def bucket(shards: Path) -> Iterator[str]:
    """The drawn set in a bucket of a real S3 server."""
    import boto3
    from moto.server import ThreadedMotoServer

    serving = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    serving.start()
    host, port = serving.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "hunter2",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="sets")
        for path in shards.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "sets", f"drawn/{path.relative_to(shards)}")
        yield "s3://sets/drawn"
    serving.stop()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_s3_are_those_from_disk(bucket: str, workers: int, shards: Path, settings: DataConfig) -> None:
    config = replace(settings, path=bucket, timeout_seconds=10)
    assert shown(config, workers=workers) == shown(replace(settings, path=str(shards)))


def test_a_missing_bucket_or_set_is_named(bucket: str, settings: DataConfig, capfd: Any) -> None:
    for path in ("s3://sets/other", "s3://nowhere/drawn"):
        with pytest.raises(DataError, match=rf"{path}/manifest.json is missing, so no finished set is there"):
            open_dataset(replace(settings, path=path, timeout_seconds=10))
    assert "hunter2" not in "".join(capfd.readouterr())


def test_a_store_that_is_gone_is_named(bucket: str, settings: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    transfer.filesystem.cache_clear()
    with pytest.raises(DataError, match=r"s3://sets/drawn/manifest.json cannot be fetched: .* \(2 attempts\)"):
        open_dataset(replace(settings, path=bucket, timeout_seconds=2, retries=1))
    transfer.filesystem.cache_clear()


# Mixes


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "other"
    build("drawn:40", out, 32, labels="folder", workers=0, seed=5, shard_samples=16)
    return out


def test_a_mix_has_its_shares_in_one_order_for_all_readers(other: Path, shards: Path, settings: DataConfig) -> None:
    config = replace(settings, path={str(shards): 0.75, str(other): 0.25})
    dataset = open_dataset(config)

    def numbers(rank: int, world: int, workers: int, nimg: int = 0) -> np.ndarray:
        reader = batches(
            dataset, 16, seed=3, slots=2, window=8, nimg=nimg, batch=64, rank=rank, world=world, workers=workers
        )
        return np.stack([next(reader).samples.numpy() for _ in range(64)])

    whole = numbers(0, 1, 0)
    assert (whole < 96).sum() == 3072  # of 4096: exactly its share in each period of 1024 chunks
    assert set(whole[whole >= 96]) == set(range(96, 136))
    assert (numbers(0, 1, 2) == whole).all()
    halves = [numbers(rank, 2, 1).reshape(64, 8, 4) for rank in (0, 1)]
    assert (np.stack(halves, 2).reshape(64, 64) == whole).all()
    assert (numbers(0, 1, 0, nimg=640)[:10] == whole[10:20]).all()
    assert dataset.num_samples == 4 * dataset.mix(0).chunks((24, 10))
    assert 90 <= dataset.num_samples <= 136


def test_sets_that_do_not_go_together_are_refused(
    other: Path, shards: Path, settings: DataConfig, tmp_path: Path
) -> None:
    build("drawn:8", tmp_path / "grey", 32, channels=1, workers=0)
    with pytest.raises(UserError, match=r"grey has channels 1, but .* has 3; only sets of the same channels can"):
        open_dataset(replace(settings, path={str(shards): 1, str(tmp_path / "grey"): 1}))
    with pytest.raises(UserError, match=r"weights are \[1.0, 0.0\], expected numbers above 0"):
        open_dataset(replace(settings, path={str(shards): 1, str(other): 0}))
    with pytest.raises(UserError, match=r"give a set less than 1/1024 of the images; leave it out"):
        open_dataset(replace(settings, path={str(shards): 1, str(other): 1e-5}))
    assert json.dumps(open_dataset(replace(settings, path={str(shards): 1, str(other): 2})).real_set)


def test_missing_is_a_data_error() -> None:
    assert issubclass(Missing, DataError)


# Around a fetch


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def in_a_fork(target: Callable[[], Any]) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=target, daemon=True)
    child.start()
    child.join(30)
    return child.exitcode


def test_fetching_works_in_a_fork_of_a_process_that_fetches(
    server: Server, bucket: str, settings: DataConfig, blobs: dict[str, bytes], shards: Path
) -> None:
    store, remote = Store(server.url, Access(settings.cache)), Store(bucket, Access(settings.cache))
    manifest = remote.read("manifest.json")
    server.behaviour = {".tar": partial(stalls, times=99)}
    for name in ("1.tar", "4.tar", "5.tar", "6.tar"):  # as many as may wait; the first holds its lock in the fork
        store.prefetch(name, 1000, digest(blobs[name]))
    while not server.asked["1.tar"]:
        time.sleep(0.01)
    server.behaviour = {}

    def child() -> None:
        assert remote.read("manifest.json") == manifest
        for name in ("1.tar", "2.tar"):
            assert fetch(store, name, blobs[name]).read_bytes() == blobs[name]
        store.prefetch("3.tar", 1000, digest(blobs["3.tar"]))
        deadline = time.monotonic() + 10
        while not store._cached(digest(blobs["3.tar"])).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    assert in_a_fork(child) == 0


def test_a_store_is_picklable_and_serves_several_threads(
    server: Server, settings: DataConfig, blobs: dict[str, bytes]
) -> None:
    store = pickle.loads(pickle.dumps(Store(server.url, Access(settings.cache))))
    wrong: list[str] = []

    def read() -> None:
        wrong.extend(name for name, content in blobs.items() if fetch(store, name, content).read_bytes() != content)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong
    assert {server.asked[name] for name in blobs} == {1}


def test_an_exit_waits_for_nothing_that_is_fetched_ahead(server: Server, settings: DataConfig) -> None:
    server.behaviour = {".tar": partial(stalls_at_once, times=99)}
    code = (
        "from hrgan.data.store import *; import time; "
        f"store = Store({server.url!r}, Access({settings.cache!r})); "
        "[store.prefetch('16/drawn-00000.tar', 1, str(i) * 64) for i in range(9)]; time.sleep(0.3)"
    )
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0
    assert time.monotonic() - begun < 25
    assert server.asked["16/drawn-00000.tar"] <= 2


def test_what_a_killed_process_left_is_removed_and_never_trusted(
    server: Server, settings: DataConfig, blobs: dict[str, bytes]
) -> None:
    server.behaviour = {".tar": stalls}
    store, cache = Store(server.url, Access(settings.cache)), Path(settings.cache or "")
    child = multiprocessing.get_context("fork").Process(target=fetch, args=(store, "5.tar", blobs["5.tar"]))
    child.start()
    while not list(cache.glob("tmp/*.partial")):
        time.sleep(0.01)
    child.kill()
    child.join()
    assert len(list(cache.glob("tmp/*"))) == 1
    assert not store._cached(digest(blobs["5.tar"])).exists()
    fetch(store, "4.tar", blobs["4.tar"])
    assert not list(cache.glob("tmp/*"))


def test_the_bound_counts_files_without_a_mark_and_those_being_fetched(
    server: Server, settings: DataConfig, blobs: dict[str, bytes]
) -> None:
    store, cache = Store(server.url, Access(settings.cache, cache_gb=3500 / 1e9)), Path(settings.cache or "")
    unmarked = fetch(store, "0.tar", blobs["0.tar"])
    unmarked.with_suffix(".ok").unlink()  # as a kill between the two leaves it
    marked = fetch(store, "1.tar", blobs["1.tar"])
    reserved = store._make_room(1000, "f" * 64)
    assert reserved.stat().st_size == 1000
    fetch(store, "2.tar", blobs["2.tar"])
    assert not unmarked.exists()
    assert marked.exists()
    held = [path.stat().st_size for path in [*cache.glob("shards/*/" + "?" * 64), reserved]]
    assert held == [1000] * 3
    with pytest.raises(UserError, match=r"data.cache_gb: 3.5e-06 GB do not hold a shard of 1 GB"):
        store._make_room(10**9, "e" * 64)


def test_what_was_just_used_goes_last(server: Server, settings: DataConfig, blobs: dict[str, bytes]) -> None:
    store = Store(server.url, Access(settings.cache, cache_gb=2500 / 1e9))
    fresh, stale = (fetch(store, name, blobs[name]) for name in ("0.tar", "1.tar"))
    os.utime(stale.with_suffix(".ok"), (time.time() - 100,) * 2)
    fetch(store, "2.tar", blobs["2.tar"])
    assert fresh.exists()
    assert not stale.exists()


def test_a_new_file_is_not_removed_by_who_saw_the_damaged_one(
    server: Server, settings: DataConfig, blobs: dict[str, bytes]
) -> None:
    """Four processes find the same damaged file; it is fetched once, and the path that each got stays good."""
    store = Store(server.url, Access(settings.cache))
    path = fetch(store, "1.tar", blobs["1.tar"])
    for round_ in range(5):
        path.write_bytes(b"x" * 1000)
        context = multiprocessing.get_context("fork")
        start = context.Barrier(4)
        names = {"1.tar": blobs["1.tar"]}
        children = [context.Process(target=together, args=(server.url, settings.cache, start, names)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(30)
        assert [child.exitcode for child in children] == [0] * 4
        assert server.asked["1.tar"] == 2 + round_


def test_waiting_for_another_process_is_said_once(
    server: Server, settings: DataConfig, blobs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(stores, "WAIT_SECONDS", 0.2)
    server.behaviour = {".tar": stalls_at_once}
    store = Store(server.url, Access(settings.cache))
    store.prefetch("1.tar", 1000, digest(blobs["1.tar"]))
    while not server.asked["1.tar"]:
        time.sleep(0.01)
    fetch(store, "1.tar", blobs["1.tar"])
    assert capfd.readouterr().err.count(f"waiting for another process that fetches {server.url}/1.tar") == 1


def test_a_cache_that_cannot_be_written_is_named_and_not_taken_for_the_server(
    server: Server, settings: DataConfig, blobs: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.cache: .*file/cache cannot be written \(Not a directory, .* GB free\)"):
        fetch(Store(server.url, Access(str(tmp_path / "file" / "cache"))), "1.tar", blobs["1.tar"])
    for number, text in ((28, "No space left on device"), (13, "Permission denied")):

        def fails(*_: Any, number: int = number, text: str = text) -> None:
            raise OSError(number, text)

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(
            UserError, match=rf"cannot be written \({text}, .* GB free\); make room, lower data.cache_gb"
        ):
            fetch(Store(server.url, Access(settings.cache)), "1.tar", blobs["1.tar"])
    assert server.asked["1.tar"] == 2
    assert not list(Path(settings.cache or "").glob("tmp/*"))


def test_a_login_that_fails_appears_nowhere(
    server: Server, settings: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.behaviour = {".json": lambda handler, content, before: handler.send_error(401)}
    with pytest.raises(DataError, match=r"access was refused; credentials are taken from ~/.netrc") as error:
        Store(server.url).read("manifest.json")
    assert server.asked["manifest.json"] == 1
    told = "".join([str(error.value), *capfd.readouterr()])
    assert "hunter2" not in told
    assert "bWU6aHVudGVyMg" not in told
    assert "hunter2" not in redacted("Authorization: Basic hunter2== http://me:a@hunter2@host/x hf_hunter2hunter2")
    shown = Store(
        "pipe:curl -H 'Authorization: Bearer hunter2' https://h/{}?sig=hunter2", Access(allow_pipe=True)
    ).where
    assert "{}" in shown
    assert "hunter2" not in shown


def test_a_command_that_hangs_or_prints_nothing_is_a_failed_attempt(settings: DataConfig) -> None:
    access = Access(settings.cache, timeout_seconds=0.5, retries=0, allow_pipe=True)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"no answer in time \(stalled\)"):
        Store("pipe:printf a; sleep 60; : {}", access).read("x")
    assert time.monotonic() - begun < 10
    with pytest.raises(DataError, match="the command printed nothing"):
        Store("pipe:true {}", access).read("x")
    with pytest.raises(DataError, match=r"code 1: cat: .*/nowhere/x.*: No such file"):
        Store("pipe:cat /nowhere/{}", access).read("x")


def test_an_s3_store_that_stalls_is_asked_as_often_as_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "BACKOFF_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        transfer.filesystem.cache_clear()
        begun = time.monotonic()
        with pytest.raises(DataError, match=r"cannot be fetched: ReadTimeoutError: .* \(2 attempts\)"):
            Store(bucket, Access(timeout_seconds=0.5, retries=1)).read("manifest.json")
        seconds = time.monotonic() - begun
    transfer.filesystem.cache_clear()
    assert 1.0 <= seconds < 3.0


def test_the_least_cache_that_is_named_is_enough(server: Server) -> None:
    for largest in (1_004_900_000, 2_344_900_000, 999_500_000):
        with pytest.raises(UserError, match="expected at least") as error:
            Store(server.url, Access(cache_gb=0.1)).check_room(1, largest)
        least = float(str(error.value).split("expected at least ")[1].split(",")[0])
        Store(server.url, Access(cache_gb=least)).check_room(1, largest)
        assert largest <= least * 1e9
