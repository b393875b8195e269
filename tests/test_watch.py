"""hrgan eval --watch beside a training: every checkpoint once, two writers of one file, and its end."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from hrgan.apps import evaluate
from hrgan.monitor.log import append, drop_after, read_rows, summary
from tests.conftest import TINY, Children, cli
from tests.test_train import train

ALL = list(range(16, 161, 16))
MEASURED = [32, 96, 160]
"""By the training itself: at the end of each stable part."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path, children: Children) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    (folder / "tiny.yaml").write_text(TINY.format(shards=shards))
    code, output = children.run(folder / "log", train, str(folder / "tiny.yaml"), str(folder / "run"))
    assert code == 0, output
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run of ten checkpoints and three rows."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def rows(run: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl; fails on one that is not whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_checkpoint_gets_one_row_the_newest_first(run: Path) -> None:
    best = (run / "best").read_text()
    assert cli("eval", run, "--watch") == 0
    assert [row["nimg"] for row in rows(run)] == MEASURED + [nimg for nimg in reversed(ALL) if nimg not in MEASURED]
    assert {tuple(row) for row in rows(run)} == {tuple(rows(run)[0])}  # The keys of the training's own rows.
    assert (run / "best").read_text() == best
    assert cli("eval", run, "--watch") == 0
    assert len(rows(run)) == 10
    assert cli("eval", run, "--watch", "--count", "20") == 0
    assert [row["num_fake"] for row in rows(run)] == [16] * 10 + [20] * 10


def test_its_number_is_the_one_that_the_training_would_have_written(run: Path) -> None:
    own = {row["nimg"]: row["fd_random"] for row in rows(run)}
    (run / "metrics.jsonl").unlink()
    assert cli("eval", run, "--watch") == 0
    measured = {row["nimg"]: row["fd_random"] for row in rows(run)}
    assert sorted(measured) == ALL
    assert {nimg: measured[nimg] for nimg in own} == pytest.approx(own, rel=1e-6)


def test_none_is_measured_twice_where_reals_cannot_be_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "count_real", lambda *arguments: 97)  # One more than the 96 that rows then say.
    assert cli("eval", run, "--watch") == 0
    assert [row["nimg"] for row in rows(run)] == [*MEASURED, *reversed(ALL)]


def test_pruned_and_damaged_checkpoints_are_passed_over_and_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = evaluate.load_generator

    def pruned_meanwhile(folder: Path, *arguments: Any, **keywords: Any) -> Any:
        if folder.name == "112":
            shutil.rmtree(folder)
        return original(folder, *arguments, **keywords)

    monkeypatch.setattr(evaluate, "load_generator", pruned_meanwhile)
    (run / "checkpoints" / "144" / "ema.safetensors").write_bytes(b"x")
    assert cli("eval", run, "--watch") == 0
    assert sorted(row["nimg"] for row in rows(run)) == [nimg for nimg in ALL if nimg not in (112, 144)]
    said = capsys.readouterr().out
    assert f"{run / 'checkpoints' / '112'} passed over: the training pruned it before it was measured" in said
    assert f"{run / 'checkpoints' / '144'} passed over: " in said
    assert "ema.safetensors is altered (sha256" in said
    assert "checkpoints passed over: 2" in said


def signalled(number: int, rows_first: int, run: str, *words: str) -> int:
    """Watch until a signal, some seconds after there are as many rows; it must end within five more."""
    sent = []

    def send() -> None:
        while len(rows(Path(run))) < rows_first:
            time.sleep(0.1)
        time.sleep(3)
        sent.append(time.monotonic())
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    code = cli("eval", run, "--watch", *words)
    assert time.monotonic() - sent[0] < 5
    return code


@pytest.mark.parametrize(
    ("number", "count", "expected"),
    [(signal.SIGTERM, "1000000", 3), (signal.SIGUSR1, "1000000", 3), (signal.SIGINT, "16", 10)],
    ids=["SIGTERM in an evaluation", "SIGUSR1 in an evaluation", "SIGINT while it waits"],
)
def test_a_signal_ends_it_at_once_with_whole_lines(
    number: signal.Signals, count: str, expected: int, run: Path, tmp_path: Path, children: Children
) -> None:
    (run / "FINISHED").unlink()
    words = ("--every", "100", "--count", count)
    code, output = children.run(tmp_path / "log", signalled, number, expected, str(run), *words)
    assert code == 3, output
    assert output.splitlines()[-1] == f"{number.name}: stopped following {run}; the same command goes on"
    assert len(rows(run)) == expected


def test_it_waits_for_a_training_to_begin(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "early").mkdir()
    threading.Timer(1, lambda: (run / "checkpoints").rename(tmp_path / "early" / "checkpoints")).start()
    for name in ("config.yaml", "metrics.jsonl", "FINISHED"):
        shutil.copy(run / name, tmp_path / "early")
    assert cli("eval", tmp_path / "early", "--watch", "--every", "0.2") == 0
    assert "no training has begun there yet" in capsys.readouterr().out
    assert sorted(row["nimg"] for row in rows(tmp_path / "early")) == ALL


def test_wrong_words_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, line in (
        ((tmp_path / "none",), f"{tmp_path / 'none'}: no such folder; --watch follows a run directory"),
        ((tmp_path, "--every", "0"), "--every: 0, expected more than 0 seconds"),
        ((tmp_path, "--count", "1"), "--count: 1 is below the least, 2"),
    ):
        assert cli("eval", *map(str, words), "--watch") == 2
        assert line in capsys.readouterr().err


# Two writers of metrics.jsonl


def write_rows(path: Path, first: int) -> None:
    for nimg in range(first, first + 200):
        append(path, {"nimg": nimg})


def test_writers_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writers = [get_context("fork").Process(target=write_rows, args=(path, 1000 * number)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        drop_after(path, 10**6)  # As a training that goes on rewrites the file.
    expected = [1000 * number + count for number in range(3) for count in range(200)]
    assert sorted(json.loads(line)["nimg"] for line in path.read_text().splitlines()) == expected


def test_a_line_that_a_killed_writer_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"nimg": 1}\n{"nimg": 2, "fi')
    append(path, {"nimg": 3})
    assert read_rows(path) == [{"nimg": 1}, {"nimg": 3}]


def test_rows_are_written_also_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    append(tmp_path / "metrics.jsonl", {"nimg": 1})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"nimg": 1}]


def test_the_summary_does_not_depend_on_the_order_of_rows(run: Path) -> None:
    before = summary(run, (4, 4))
    assert before[0].startswith("fd_random at 16²:")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(reversed(lines)))
    assert summary(run, (4, 4)) == before


def test_the_exit_code_goes_to_the_file_that_a_job_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HRGAN_EXIT_FILE", str(tmp_path / "exit"))
    assert cli("schedule", "--config", "configs/demo.yaml") == 0
    assert (tmp_path / "exit").read_text() == "0\n"
    assert cli("eval", tmp_path / "none") == 2
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("exit", "2\n")]
