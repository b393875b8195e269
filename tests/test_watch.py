"""hrgan eval --watch beside a training: every checkpoint once, two writers of one file, and its end."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hrgan import checkpoint
from hrgan.apps import follow
from hrgan.monitor.log import add_row, append, drop_after, read_rows, summary
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
    if not (run / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_each_checkpoint_gets_one_row_the_newest_first(run: Path) -> None:
    assert cli("eval", run, "--watch") == 0
    assert [row["nimg"] for row in rows(run)] == MEASURED + [nimg for nimg in reversed(ALL) if nimg not in MEASURED]
    assert {tuple(row) for row in rows(run)} == {tuple(rows(run)[0])}  # The keys of the training's own rows.
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


def test_it_points_best_at_the_best_of_the_largest_resolution_and_the_training_keeps_it(
    run: Path, children: Children, tmp_path: Path
) -> None:
    assert (run / "best").read_text() == "160\n"  # The only one at 16² that the training measured.
    assert cli("eval", run, "--watch") == 0
    last = {row["nimg"]: row["fd_random"] for row in rows(run) if row["resolution"] == 16}
    best = min(last, key=lambda nimg: last[nimg])
    assert set(last) == {112, 128, 144, 160}
    assert best != 160
    assert (run / "best").read_text() == f"{best}\n"
    # Going on with fewer checkpoints kept: the best one stays.
    (run / "FINISHED").unlink()
    config = run.parent / "longer.yaml"
    text = (run / "config.yaml").read_text()
    config.write_text(text.replace("total_kimg: 0.16", "total_kimg: 0.192").replace("keep: 12", "keep: 2"))
    code, output = children.run(tmp_path / "log", train, str(config), str(run))
    assert code == 0, output
    kept = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    assert kept == sorted({best, 176, 192} | {int((run / "best").read_text())})
    measured = {row["nimg"]: row["fd_random"] for row in rows(run) if row["resolution"] == 16}
    assert int((run / "best").read_text()) == min(measured, key=lambda nimg: measured[nimg])


def test_none_is_measured_twice_where_reals_cannot_be_read(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(shards, tmp_path / "damaged", ignore=shutil.ignore_patterns("stats")))
    tar = sorted((damaged / "16").glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[600] ^= 1  # In the first picture: the first header takes 512 bytes.
    tar.write_bytes(content)
    (run / "metrics.jsonl").unlink()
    assert cli("eval", run, "--watch", "--data", damaged) == 0
    assert [row["nimg"] for row in rows(run)] == list(reversed(ALL))
    assert {(row["num_real"], row["lost_reals"]) for row in rows(run)} == {(31, 1)}  # Of tiny's 32.
    capsys.readouterr()
    assert cli("eval", run, "--watch", "--data", damaged) == 0  # Another watcher finds nothing left.
    assert capsys.readouterr().out == f"{run} is finished and measured; checkpoints passed over: 0\n"


def test_a_line_that_is_no_row_is_passed_over(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("[1, 2]\n")
    assert cli("eval", run, "--watch") == 0


def test_pruned_and_damaged_checkpoints_are_passed_over_and_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = follow.load_generator

    def pruned_meanwhile(folder: Path, *arguments: Any, **keywords: Any) -> Any:
        if folder.name == "112":
            shutil.rmtree(folder)
        return original(folder, *arguments, **keywords)

    monkeypatch.setattr(follow, "load_generator", pruned_meanwhile)
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


# Several at once


def watched(run: str, log: str) -> None:
    """`hrgan eval RUN --watch` in a process of its own."""
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(cli("eval", run, "--watch", "--every", "0.2"))


def start(children: Children, *arguments: str) -> Any:
    process = children.context.Process(target=watched, args=arguments)
    process.start()
    return process


def watching(run: str) -> int:
    return cli("eval", run, "--watch")


def test_a_watcher_of_two_processes_finds_what_one_does(run: Path, tmp_path: Path, children: Children) -> None:
    own = {row["nimg"]: row["fd_random"] for row in rows(run)}
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints" / "144" / "ema.safetensors").write_bytes(b"x")
    code, output = children.run(tmp_path / "log", watching, str(run), world=2)
    assert (code, children.codes) == (0, [0, 0]), output
    found = {row["nimg"]: row["fd_random"] for row in rows(run)}
    assert sorted(found) == [nimg for nimg in ALL if nimg != 144] == sorted(row["nimg"] for row in rows(run))
    assert {nimg: found[nimg] for nimg in own} == pytest.approx(own, rel=1e-5)
    assert output.count("144 passed over") == 1


def test_a_checkpoint_that_the_run_went_back_from_gets_no_row(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one may have taken its place, or none yet; one that was only pruned keeps its row."""
    original, calls = follow.evaluated, []
    first, last = (run / "checkpoints" / name for name in ("112", "160"))
    (run / "metrics.jsonl").unlink()
    for path in set(checkpoint.numbered(run)) - {first, last}:
        shutil.rmtree(path)

    def meanwhile(*arguments: Any) -> Any:
        found = original(*arguments)
        calls.append(found)
        if len(calls) == 1:  # The newest is measured, and made anew.
            (last / "manifest.json").write_text((last / "manifest.json").read_text() + " ")
        if len(calls) == 3:
            shutil.rmtree(first)
        return found

    monkeypatch.setattr(follow, "evaluated", meanwhile)
    assert cli("eval", run, "--watch") == 0
    assert len(calls) == 3
    assert [row["nimg"] for row in rows(run)] == [160, 112]
    (run / "latest").write_text("96\n")
    assert follow.rolled_back(run / "checkpoints" / "128", ("128", b""))  # Gone, and the run stands before it.
    assert not follow.rolled_back(run / "checkpoints" / "80", ("80", b""))


def test_two_watchers_share_the_work(run: Path, tmp_path: Path, children: Children) -> None:
    both = [start(children, str(run), str(tmp_path / f"log{number}")) for number in range(2)]
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert sorted(row["nimg"] for row in rows(run)) == ALL
    logs = [(tmp_path / f"log{number}").read_text() for number in range(2)]
    assert [log.count("fd_random") for log in logs] != [7, 0]
    assert sum(log.count("fd_random") for log in logs) == 7
    assert all("measured by another process" not in log for log in logs)


def test_a_checkpoint_that_another_watcher_is_at_is_left_to_it(run: Path, tmp_path: Path, children: Children) -> None:
    with follow.claimed(run, 144) as mine:
        assert mine
        process = start(children, str(run), str(tmp_path / "log"))
        until = time.monotonic() + 60
        while len(rows(run)) < 9:
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(2)
        assert 144 not in {row["nimg"] for row in rows(run)}
        assert process.is_alive()  # It waits: the other may die.
    process.join(60)
    assert process.exitcode == 0
    assert sorted(row["nimg"] for row in rows(run)) == ALL


def test_rows_of_the_same_measurement_are_there_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"nimg": 1, "resolution": 16, "fid": 1.0, "extractor": "a", "num_fake": 10}
    assert add_row(path, row)
    assert not add_row(path, {**row, "fid": 1.0001, "seconds": 3})
    assert add_row(path, {**row, "nimg": 2})
    assert add_row(path, {**row, "num_fake": 20})
    assert add_row(path, {**row, "kid": 0.1})  # More metrics of the same.
    assert not add_row(path, {**row, "nimg": 1})
    assert [line["nimg"] for line in read_rows(path)] == [1, 2, 1, 1]


@pytest.mark.slow
def test_killed_at_any_point_no_evaluation_is_lost_or_doubled(
    tiny: Path, tmp_path: Path, children: Children
) -> None:
    """A training and two watchers beside it, killed again and again."""
    run, random, kills = tmp_path / "run", Random(0), 0
    # The training itself measures at the end of each stable part, the watchers all that is saved.
    while not (run / "FINISHED").exists() or len({row["nimg"] for row in rows(run)}) < 10:
        assert kills < 60
        training = children.context.Process(target=trained_quietly, args=(str(tiny), str(run), str(tmp_path / "log")))
        training.start()
        everyone = [training, *(start(children, str(run), str(tmp_path / "log")) for _ in range(2))]
        if not run.exists():
            time.sleep(3)
        time.sleep(random.uniform(0.3, 5 + kills / 4))
        for process in random.sample(everyone, 3):
            process.kill()
            process.join()
            kills += 1
            assert rows(run) is not None  # Each line is whole at each moment.
    found = [row["nimg"] for row in rows(run)]
    assert sorted(found) == ALL
    assert len({row["extractor"] for row in rows(run)}) == 1
    best = {row["nimg"]: row["fd_random"] for row in rows(run) if row["resolution"] == 16}
    assert cli("eval", run, "--watch") == 0
    assert int((run / "best").read_text()) == min(best, key=lambda nimg: best[nimg])


def trained_quietly(config: str, run: str, log: str) -> None:
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    sys.exit(train(config, run))


# Two writers of metrics.jsonl


def write_rows(path: Path, first: int, write: Any) -> None:
    for nimg in range(first, first + 200):
        write(path, {"nimg": nimg})


@pytest.mark.parametrize("write", [append, add_row])
def test_writers_at_the_same_time_lose_no_row(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    fork = get_context("fork")
    writers = [fork.Process(target=write_rows, args=(path, 1000 * number, write)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        drop_after(path, 10**6)  # As a training that goes on rewrites the file.
    expected = [1000 * number + count for number in range(3) for count in range(200)]
    assert sorted(json.loads(line)["nimg"] for line in path.read_text().splitlines()) == expected


@pytest.mark.parametrize("write", [append, add_row])
def test_a_line_that_a_killed_writer_cut_does_not_spoil_the_next(tmp_path: Path, write: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"nimg": 1}\n{"nimg": 2, "fi')
    write(path, {"nimg": 3})
    assert read_rows(path) == [{"nimg": 1}, {"nimg": 3}]


def test_a_damaged_line_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"nimg": 1}\n{"nimg": 2, "fi\n{"nimg": 3}\n')
    add_row(path, {"nimg": 4})
    assert [row["nimg"] for row in read_rows(path)] == [1, 3, 4]


def killed_in_a_row(path: Path) -> None:
    os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    add_row(path, {"nimg": 2})


def test_a_writer_killed_before_its_row_is_there_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    add_row(path, {"nimg": 1})
    process = get_context("fork").Process(target=killed_in_a_row, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == '{"nimg": 1}\n'
    add_row(path, {"nimg": 3})
    assert path.read_text() == '{"nimg": 1}\n{"nimg": 3}\n'


@pytest.mark.parametrize("write", [append, add_row])
def test_rows_are_written_also_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)
    write(tmp_path / "metrics.jsonl", {"nimg": 1})
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


def test_pictures_that_are_not_finite_get_no_number_and_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "160"
    weights = load_file(folder / "ema.safetensors")
    weights["to_rgb.16.bias"].fill_(float("nan"))
    save_file(weights, folder / "ema.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["ema.safetensors"] = hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert cli("eval", folder) == 4
    error = capsys.readouterr().err
    assert "features that are NaN or infinite, so there is no number" in error
    assert "Traceback" not in error
    assert cli("eval", run, "--watch", "--count", "20") == 0
    assert f"warning: {folder}: the generator: features that are NaN or infinite" in capsys.readouterr().out
    assert [row["nimg"] for row in rows(run) if row["fd_random"] is None] == [160]
    assert (run / "best").read_text() != "160\n"
