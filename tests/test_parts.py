"""A set built in parts is the set that one build makes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hrgan.data import parts
from hrgan.data.build import build
from hrgan.errors import DataError, UserError
from tests.conftest import cli

OPTIONS = {"labels": "folder", "max_skipped": 0.5, "workers": 1, "seed": 3, "shard_samples": 4, "name": "set"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 files in two classes: 17 pictures, two of them copies of others, two unreadable."""
    folder = tmp_path_factory.mktemp("source")
    numbers = np.random.default_rng(0)
    for i in range(17):
        (folder / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = numbers.integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"class{i % 2}" / f"{i}.png")
    for i in (3, 8):
        shutil.copy(folder / f"class{i % 2}" / f"{i}.png", folder / "class0" / f"copy of {i}.png")
    for i in range(2):
        (folder / "class1" / f"broken{i}.png").write_bytes(b"no picture")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def single(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("single") / "set"
    build(str(source), out, 16, **OPTIONS)
    return contents(out)


def stored(out: Path) -> set[str]:
    """Which files the samples of a set are from."""
    found = set()
    for path in (out / "16").glob("*.tar"):
        with tarfile.open(path) as archive:
            about = [archive.extractfile(name) for name in archive.getnames() if name.endswith(".json")]
            found |= {json.load(file)["origin"] for file in about if file is not None}
    return found


def test_two_shares_hold_every_file_once(
    source: Path, single: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert build(str(source), one, 16, **OPTIONS, share="0:0.6") is not None
    said = capsys.readouterr().err
    build(str(source), two, 16, **OPTIONS, share="0.6:1")
    build(str(source), tmp_path / "all", 16, **OPTIONS)
    assert stored(one) | stored(two) == stored(tmp_path / "all")
    assert not stored(one) & stored(two)
    # By the contents: a copy is on its original's side, and a duplicate there.
    for out in (one, two):
        for name in stored(out):
            share = int(hashlib.sha256((source / name).read_bytes()).hexdigest(), 16) / 2**256
            assert (share < 0.6) == (out == one)
    listed = sum((out / "skipped.csv").read_text().count("duplicate") for out in (one, two))
    assert listed == 2
    other = len(list(source.rglob("*.*"))) - len(stored(one)) - (one / "skipped.csv").read_text().count("\n") + 1
    assert f"21 images found, {other} of another share, {len(stored(one))} stored" in said


def test_parts_of_a_share_are_byte_for_byte_one_build_of_it(source: Path, tmp_path: Path) -> None:
    build(str(source), tmp_path / "whole", 16, **OPTIONS, share="0:0.6")
    for number in (1, 2, 3):
        build(str(source), tmp_path / "set", 16, **OPTIONS, share="0:0.6", part=f"{number}/3")
    parts.merge(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    for number, share in ((1, "0:0.6"), (2, "0:0.7")):
        build(str(source), tmp_path / "mixed", 16, **OPTIONS, share=share, part=f"{number}/2")
    with pytest.raises(UserError, match=r"was built with other share"):
        parts.merge(tmp_path / "mixed")


def test_files_of_another_share_are_no_loss(source: Path, tmp_path: Path) -> None:
    broken = hashlib.sha256(b"no picture").digest()[0] / 256  # The share that both unreadable files are in.
    # With a copy 3: of all 21 no more than 0.15, but of the 6 in this share.
    with pytest.raises(DataError, match=r"3 of 6 images cannot be used"):
        build(str(source), tmp_path / "set", 16, **OPTIONS | {"max_skipped": 0.15}, share=f"{broken}:{broken + 0.3}")
    manifest = build(str(source), tmp_path / "rest", 16, **OPTIONS | {"max_skipped": 0.2}, share=f"0:{broken}")
    assert manifest is not None
    with pytest.raises(DataError, match="none of 21 images lies in this share"):
        build(str(source), tmp_path / "none", 16, **OPTIONS, share="0:1e-9")


@pytest.mark.parametrize("share", ["0.9", "0.9:0.1", "0:1.5", "-1:1", "0.5:0.5", "a:b", "0:nan", "0:0.5:1", ""])
def test_a_share_that_is_none_is_refused(
    share: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("data", "build", source, tmp_path / "set", "--resolution", 16, f"--share={share}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"share is {share!r}, expected LOW:HIGH with 0 <= LOW < HIGH <= 1, for example 0:0.9")


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_joined_parts_are_byte_for_byte_one_build(
    count: int, source: Path, single: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    for number in reversed(range(1, count + 1)):
        assert build(str(source), out, 16, **OPTIONS, part=f"{number}/{count}") is None
    parts.merge(out)
    assert contents(out) == single
    assert {"manifest.json", "skipped.csv", "16/set-00004.tar"} <= single.keys()
    assert single["skipped.csv"].count(b"duplicate") == 2
    assert single["skipped.csv"].count(b"unreadable") == 2


def part_words(source: Path, out: Path, part: str) -> list[str]:
    words = [sys.executable, "-m", "hrgan", "data", "build", str(source), str(out), "--resolution", "16"]
    words += ["--labels", "folder", "--max-skipped", "0.5", "--workers", "2", "--seed", "3", "--shard-samples", "4"]
    return [*words, "--name", "set", "--part", part]


def test_parts_of_processes_at_the_same_time(source: Path, single: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    running = [subprocess.Popen(part_words(source, out, f"{number}/3")) for number in (1, 2, 3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert cli("data", "merge", str(out)) == 0
    assert contents(out) == single


def killed_after(results: Iterator[object], count: int) -> Iterator[object]:
    for number, result in enumerate(results):
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        yield result


def test_a_killed_part_is_missing_and_goes_on(
    source: Path, single: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    build(str(source), out, 16, **OPTIONS, part="1/2")
    child = os.fork()
    if child == 0:
        parts.TOGETHER = 4  # type: ignore[misc]
        parts.shown = lambda results, *_: killed_after(results, 6)  # type: ignore[assignment]
        build(str(source), out, 16, **OPTIONS, part="2/2")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (out / "parts" / ".00002-of-00002.partial").exists()
    with pytest.raises(UserError, match="parts missing: 2/2"):
        parts.merge(out)
    build(str(source), out, 16, **OPTIONS, part="2/2")
    assert "part 2/2 goes on after 4 pictures" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "parts").iterdir()) == ["00001-of-00002.sqlite", "00002-of-00002.sqlite"]
    parts.merge(out)
    assert contents(out) == single


@pytest.mark.parametrize("moment", ["SetWriter", "rmtree"])
def test_a_killed_merge_is_run_again(moment: str, source: Path, single: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "set"
    for number in (1, 2):
        build(str(source), out, 16, **OPTIONS, part=f"{number}/2")
    child = os.fork()
    if child == 0:
        from hrgan.data.shards import SetWriter

        count = iter(range(100))
        write = SetWriter.write

        def killed(*words: object) -> bool:
            if moment == "rmtree" or next(count) == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*words)  # type: ignore[arg-type]

        if moment == "rmtree":
            shutil.rmtree = killed  # type: ignore[assignment]
        else:
            SetWriter.write = killed  # type: ignore[assignment]
        parts.merge(out)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (out / "manifest.json").exists() == (moment == "rmtree")
    parts.merge(out)
    assert contents(out) == single


def test_too_many_skipped_are_refused_when_the_parts_are_joined(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    for number in (1, 2):
        build(str(source), out, 16, **OPTIONS | {"max_skipped": 0.1}, part=f"{number}/2")
    with pytest.raises(DataError, match="4 of 21 images cannot be used"):
        parts.merge(out)
    assert not (out / "manifest.json").exists()
    assert parts.merge(out, max_skipped=0.2).num_samples == 17


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quality": 50}, r"part 2/2 was built with other quality \(50\) than part 1/2 \(95\)"),
        ({"seed": 4}, "part 2/2 was built with other seed"),
        ({"name": "other"}, "part 2/2 was built with other name"),
        ({"part": "2/3"}, r"was built with other parts \(3\)"),
    ],
)
def test_parts_of_different_builds_are_not_joined(
    change: dict[str, object], expected: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    build(str(source), out, 16, **OPTIONS, part="1/2")
    build(str(source), out, 16, **{**OPTIONS, "part": "2/2", **change})
    with pytest.raises(UserError, match=expected):
        parts.merge(out)


def test_a_source_that_changed_between_parts_is_seen(source: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "set", tmp_path / "copy"
    shutil.copytree(source, copy)
    build(str(copy), out, 16, **OPTIONS, part="1/2")
    (copy / "class0" / "0.png").rename(copy / "class0" / "renamed.png")
    build(str(copy), out, 16, **OPTIONS, part="2/2")
    with pytest.raises(UserError, match="built with other files in its source"):
        parts.merge(out)


def test_a_damaged_part_is_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    for number in (1, 2):
        build(str(source), out, 16, **OPTIONS, part=f"{number}/2")
    path = out / "parts" / "00001-of-00002.sqlite"
    content = path.read_bytes()
    place = content.index(b"WEBP") + 20
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DataError, match=r"00001-of-00002.sqlite: damaged \(the row of .* has another checksum\)"):
        parts.merge(out)
    path.write_bytes(content[:5000])
    with pytest.raises(DataError, match=r"00001-of-00002.sqlite: damaged"):
        parts.merge(out)


@pytest.mark.parametrize("part", ["0/4", "5/4", "x", "1/0", "1"])
def test_a_wrong_part_is_refused(part: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--part: '{part}', expected I/N with I from 1 to N"):
        build(str(source), tmp_path / "set", 16, **OPTIONS, part=part)


def test_parts_and_whole_builds_do_not_mix(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    build(str(source), out, 16, **OPTIONS, part="1/2")
    with pytest.raises(UserError, match="holds parts of a set; join them with `hrgan data merge"):
        build(str(source), out, 16, **OPTIONS)
    for words in (("data", "info", out), ("data", "check", out)):
        assert cli(*words) == 4
        assert f"its parts are not joined yet: run hrgan data merge {out}" in capsys.readouterr().err
    whole = tmp_path / "whole"
    build(str(source), whole, 16, **OPTIONS)
    with pytest.raises(UserError, match="holds a set"):
        build(str(source), whole, 16, **OPTIONS, part="1/2")
    with pytest.raises(UserError, match="is a finished set"):
        parts.merge(whole)
    with pytest.raises(UserError, match="holds no parts"):
        parts.merge(tmp_path / "nowhere")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("part", [(), ("--part", "1/2")], ids=["whole", "part"])
def test_a_stop_ends_a_build_with_nothing_half_done(
    part: tuple[str, ...], number: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    words = [sys.executable, "-m", "hrgan", "data", "build", "drawn:50000", str(out), "--resolution", "64", *part]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("*/set*")) + list(out.glob("64/*.tar")) + list(out.glob("parts/.*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    os.killpg(process.pid, number)  # As SLURM and terminals do: all processes get it.
    _, output = process.communicate(timeout=20)
    assert process.returncode == 3, output
    assert time.monotonic() - began < 10
    assert f"{number.name}: {out}: building was stopped; the same command goes on" in output
    assert "Traceback" not in output
    assert not (out / "manifest.json").exists()
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert left & {"build.sqlite", ".00001-of-00002.partial"}, left  # What it goes on from.
    assert not [name for name in left if name.endswith((".lock", ".index", "of-00002.sqlite"))], left


STOPPED_WHILE_FORKING = """
import os, signal, sys, threading
from hrgan.cli import main

os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
code = main(["data", "build", "drawn:400", sys.argv[1], "--resolution", "16", "--workers", "2"])
assert threading.enumerate() == [threading.main_thread()]  # The pool's own would end beside the interpreter.
sys.exit(code)
"""


def test_a_stop_while_the_workers_are_forked_is_not_lost(tmp_path: Path) -> None:
    words = [sys.executable, "-c", STOPPED_WHILE_FORKING, str(tmp_path / "set")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert "building was stopped" in done.stderr


STOPPED_IN_AN_EXEC = """
import sys
from hrgan.errors import Stopped
from hrgan.watch import stopped_by_signals

try:
    with stopped_by_signals("left"):
        exec("import os, signal; os.kill(os.getpid(), signal.SIGTERM); 1")
except Stopped:
    sys.exit(3)
"""


def test_a_stop_within_an_exec_leaves_the_exit_code_alone(tmp_path: Path) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED_IN_AN_EXEC)
    assert subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, timeout=60).returncode == 3
