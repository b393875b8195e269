"""Killed again and again: whatever SIGKILL interrupts, what is lost is at most the steps since the last checkpoint.

`HRGAN_CHAOS=300 HRGAN_CHAOS_RESULT=chaos.json ./launch/test tests/test_chaos.py` kills 300 times and writes what
happened to chaos.json; HRGAN_CHAOS_SEED decides the kinds and moments of the kills. By default each kind of kill
comes once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

import hrgan.run as rooms
import hrgan.train as loop
from hrgan import checkpoint
from hrgan.config import from_dict
from hrgan.engine import Engine, State
from hrgan.monitor import log
from hrgan.rundir import environment
from hrgan.schedule import Phase
from tests.conftest import TINY, Children, free_port
from tests.test_train import assert_same_bits, initial_tensors, records, relative_error, train

ROOT = Path(__file__).parents[1]
STEP, SAVE = 16, 32
"""Images a step and between checkpoints."""
WORDS = (
    *("--schedule.total_kimg", "0.48", "--schedule.stable_kimg", "0.096", "--schedule.fade_kimg", "0.096"),
    *("--checkpoint.every_kimg", str(SAVE / 1000), "--checkpoint.keep", "2", "--eval.every_kimg", "0.064"),
    *("--loss.kind", "logistic", "--loss.r1_every", "2", "--data.mirror", "true", "--limits.timeout_minutes", "1"),
)
"""30 steps in five phases of six, a checkpoint every second step, an evaluation every fourth."""
ROUNDING = ("--optim.eps", "1e-3", "--optim.lr", "0.003")
"""A larger epsilon keeps rounding as small as it is where the engine changes; at three times the rate the run itself
makes it large."""
FORMS: dict[str, list[tuple[int, int | None]]] = {
    "one process": [(1, None)],
    "two processes": [(2, None)],
    "any world and engine": [(1, None), (2, None), (2, 0), (2, 1), (2, 2)],
}
"""(processes, DeepSpeed's stage or None) that a start may have."""


# Kills from within: in a child that trains


@dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    kind: str
    rank: int
    """Process that it kills."""
    after: int
    """Times that the place is passed before."""
    part: float
    """How far into the place, in [0, 1)."""
    marker: str
    """File that says that it happened."""


def die(kill: Kill, where: str) -> NoReturn:
    Path(kill.marker).write_text(where)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("outlived SIGKILL")


def soon(kill: Kill, place: str, calls: int) -> None:
    """Die at one of the next `calls` calls that hrgan's code makes."""
    hrgan = str(ROOT / "hrgan") + os.sep
    left = iter(range(int(kill.part * calls)))

    def called(frame: Any, event: str, argument: Any) -> None:
        at = frame.f_code
        if event in ("call", "c_call") and at.co_filename.startswith(hrgan) and next(left, None) is None:
            die(kill, f"{place}, at {getattr(argument, '__name__', at.co_name)} in {at.co_name}")

    sys.setprofile(called)


def within(kill: Kill, room: Any, name: str, calls: int, applies: Callable[..., bool] = lambda *_: True) -> None:
    """Die at one of the first `calls` calls that hrgan's code makes inside a function, at the latest at its end."""
    original, count = getattr(room, name), iter(range(10**6))

    def function(*arguments: Any, **keywords: Any) -> Any:
        if not applies(*arguments) or next(count) < kill.after:
            return original(*arguments, **keywords)
        soon(kill, name, calls)
        original(*arguments, **keywords)
        die(kill, f"the end of {name}")

    setattr(room, name, function)


def once_met(act: Callable[[], None]) -> None:
    """Call `act` when the processes have met. Before, it is a launcher that ends the others."""
    original = Engine.__init__

    def meet(engine: Engine, *arguments: Any) -> None:
        original(engine, *arguments)
        act()

    Engine.__init__ = meet  # type: ignore[method-assign]


def in_a_write(kill: Kill) -> None:
    """Die with part of a checkpoint's file written."""
    original, count = checkpoint.write_durably, iter(range(10**6))

    def write_durably(path: Path, content: bytes) -> str:
        if next(count) == kill.after:
            size = round(kill.part * len(content))
            path.write_bytes(content[:size])
            die(kill, f"byte {size} of {len(content)} of {path.name}")
        return original(path, content)

    checkpoint.write_durably = write_durably


def before_latest(kill: Kill) -> None:
    """Die with a new checkpoint in place that `latest` does not name yet."""
    original, count = checkpoint.point, iter(range(10**6))

    def point(run: Path, name: str, nimg: int) -> None:
        moves = name == "latest" and not ((run / name).exists() and (run / name).read_text() == f"{nimg}\n")
        if moves and next(count) == kill.after:
            die(kill, f"checkpoint {nimg} there, latest not at it yet")
        original(run, name, nimg)

    checkpoint.point = point


def in_a_line(kill: Kill) -> None:
    """Die with part of a line of log.jsonl or metrics.jsonl written."""
    original, count = log.append, iter(range(10**6))

    def append(path: Path, row: dict[str, Any]) -> None:
        if next(count) == kill.after:
            line = json.dumps(row)
            with path.open("a") as file:
                file.write(line[: 1 + int(kill.part * len(line))])
            die(kill, f"a line of {path.name}")
        original(path, row)

    log.append = append


def in_pruning(kill: Kill) -> None:
    """Die with some files of an old checkpoint deleted."""
    original = shutil.rmtree

    def rmtree(path: Path, *arguments: Any, **keywords: Any) -> None:
        if Path(path).name.startswith(".writing-") and Path(path).exists():
            files = sorted(Path(path).iterdir())
            for file in files[: int(kill.part * len(files))]:
                file.unlink()
            die(kill, f"deleting {Path(path).name}")
        original(path, *arguments, **keywords)

    shutil.rmtree = rmtree  # type: ignore[assignment]


def at_any_time(kill: Kill) -> None:
    """Die up to three seconds after the processes have met."""
    timer = threading.Timer(3 * kill.part, die, (kill, f"{3 * kill.part:.1f} s after the start"))
    timer.daemon = True
    once_met(timer.start)


def grows(engine: Engine, phase: Phase, state: State | None) -> bool:
    return state is not None and (state.resolution, state.fading) != (phase.resolution, phase.fading)


FROM_WITHIN: dict[str, Callable[[Kill], None]] = {
    "at the start": lambda kill: once_met(lambda: soon(kill, "start", 1400)),
    "in a step": lambda kill: within(kill, loop, "d_step", 200),
    "in growth": lambda kill: within(kill, Engine, "enter", 450, grows),
    "in an evaluation": lambda kill: within(kill, rooms, "measure", 2500),
    "in a save": lambda kill: within(kill, rooms, "save", 600),
    "in the write of a file": in_a_write,
    "between rename and latest": before_latest,
    "in a line of a log": in_a_line,
    "in pruning": in_pruning,
    "at any time": at_any_time,
}
"""What each kind of kill prepares in the process that it kills."""
ON_RANK_0 = ("in the write of a file", "between rename and latest", "in a line of a log", "in pruning")
REACH = {"in the write of a file": 16, "in a step": 4, "in an evaluation": 1, "at the start": 1, "in growth": 1}
"""How often a place may be passed before the kill, plus one; 2 where not named."""
FROM_OUTSIDE = ("the launcher", "a worker of the launcher")
KINDS = (*FROM_WITHIN, *FROM_OUTSIDE)


def killed(kill: Kill, config: str, run: str, *words: str) -> int:
    """In a child: train until the kill."""
    if int(os.environ.get("RANK", "0")) == kill.rank:
        FROM_WITHIN[kill.kind](kill)
    return train(config, run, *words)


# Kills from outside: of what `accelerate launch` started


def kill_a_launch(kind: str, run: Path, output: Path, words: tuple[str, ...], luck: random.Random) -> bool:
    """Start two processes as a user does; kill the launcher or one of them, in three of ten cases while they start.
    False where they finished before."""
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes=2"]
    line += [f"--main_process_port={free_port()}", "-m", "hrgan", "train", *words, "--run", str(run)]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "HRGAN_CHAOS_RUN": str(run)}
    before, early = progress(run), luck.random() < 0.3
    with output.open("a") as stream:
        launcher = subprocess.Popen(line, cwd=ROOT, env=variables, stdout=stream, stderr=stream, start_new_session=True)
    give_up = time.monotonic() + 180
    while launcher.poll() is None and not (children_of(launcher.pid) if early else progress(run) > before):
        assert time.monotonic() < give_up, output.read_text()
        time.sleep(0.01)
    time.sleep(luck.uniform(0, 10 if early else 1.5))
    workers = children_of(launcher.pid)
    if launcher.poll() is not None or not workers:
        assert launcher.wait(120) == 0, output.read_text()
        return False
    os.kill(launcher.pid if kind == "the launcher" else luck.choice(workers), signal.SIGKILL)
    launcher.wait(120)
    return True


def progress(run: Path) -> int:
    """Images seen according to log.jsonl."""
    rows = log.read_rows(run / "log.jsonl")
    return rows[-1]["nimg"] if rows else 0


def children_of(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def left_over(run: Path) -> list[int]:
    """Processes of a launch of this run that still live."""
    mark, found = f"HRGAN_CHAOS_RUN={run}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # It ended meanwhile.
            continue
    return found


# The storm


@dataclass
class Tally:
    """What happened to one form."""

    kills: Counter[str] = field(default_factory=Counter)
    where: list[str] = field(default_factory=list)
    """One line a kill: how it was started, what it hit."""
    runs_finished: int = 0
    steps_lost: int = 0
    """Steps done again over all kills."""
    most_steps_lost: int = 0
    seconds: float = 0.0
    largest_relative_error: float | None = None
    """Of finished runs from one process's, where the engine changed."""


def look_after(run: Path, tally: Tally) -> None:
    """Whatever was killed: each checkpoint is whole, `latest` names one, and no more than the steps since the last
    one are lost."""
    logged = progress(run)  # First: a launcher's workers may still be running.
    folders = [int(folder.name) for folder in checkpoint.numbered(run)]
    if (run / "latest").exists():
        latest = run / "checkpoints" / (run / "latest").read_text().strip()
        assert checkpoint.fault(latest) is None, checkpoint.fault(latest)
    if not left_over(run):
        for folder in checkpoint.numbered(run):
            assert checkpoint.fault(folder) is None, f"{folder}: {checkpoint.fault(folder)}"
    lost = (logged - max(folders, default=0)) // STEP
    assert lost <= SAVE // STEP, f"{lost} steps lost"
    tally.steps_lost += max(0, lost)
    tally.most_steps_lost = max(tally.most_steps_lost, lost)


@dataclass
class Storm:
    """Kills one run after the other."""

    form: str
    folder: Path
    config: Path
    words: tuple[str, ...]
    luck: random.Random
    children: Children
    compare: Callable[[Path], None]
    tally: Tally = field(default_factory=Tally)

    @property
    def run(self) -> Path:
        return self.folder / f"run-{self.tally.runs_finished}"

    @property
    def output(self) -> Path:
        return self.folder / f"run-{self.tally.runs_finished}.log"

    def kill(self, kind: str) -> None:
        """Start what was killed before again and kill that; a run that finishes first is compared and another
        begun."""
        began = time.monotonic()
        while True:
            start = self.luck.choice(FORMS[self.form]) if kind in FROM_WITHIN else (2, None)
            marker = self.folder / "killed"
            marker.unlink(missing_ok=True)
            if kind in FROM_WITHIN:
                self.start(start, marker, kind)
            elif kill_a_launch(kind, self.run, self.output, (f"--config={self.config}", *self.words), self.luck):
                marker.write_text(f"at {progress(self.run)} images")
            if marker.exists():
                break
            self.finished()
        self.tally.kills[kind] += 1
        processes, stage = start
        self.tally.where.append(
            f"{processes} x {'no DeepSpeed' if stage is None else f'ZeRO-{stage}'}: {kind}, {marker.read_text()} "
            f"({time.monotonic() - began:.0f} s)"
        )
        look_after(self.run, self.tally)

    def start(self, start: tuple[int, int | None], marker: Path, kind: str) -> None:
        """Processes that share one import of torch, one of which kills itself."""
        rank = 0 if kind in ON_RANK_0 else self.luck.randrange(start[0])
        kill = Kill(kind, rank, self.luck.randrange(REACH.get(kind, 2)), self.luck.random(), str(marker))
        arguments = (kill, str(self.config), str(self.run), *self.words)
        code, text = self.children.run(self.output, killed, *arguments, world=start[0], zero=start[1])
        expected = (-signal.SIGKILL if rank == 0 else 1) if marker.exists() else 0
        assert code == expected, text

    def finish(self) -> None:
        """Let the last run end in peace."""
        start = FORMS[self.form][0]
        code, text = self.children.run(
            self.output, train, str(self.config), str(self.run), *self.words, world=start[0], zero=start[1]
        )
        assert code == 0, text
        self.finished()

    def finished(self) -> None:
        assert (self.run / "FINISHED").exists(), self.output.read_text()
        self.compare(self.run)
        assert not list(self.run.glob("checkpoints/.writing-*"))
        self.tally.runs_finished += 1


SEED = int(os.environ.get("HRGAN_CHAOS_SEED", "1"))
KILLS = int(os.environ.get("HRGAN_CHAOS", len(KINDS)))


def dealt() -> dict[str, list[str]]:
    """Which form suffers which kills: every kind equally often, in random order, spread evenly over the forms."""
    luck = random.Random(SEED)
    kinds = [kind for _ in range(-(-KILLS // len(KINDS))) for kind in luck.sample(KINDS, len(KINDS))][:KILLS]
    hands: dict[str, list[str]] = {form: [] for form in FORMS}
    for kind in kinds:
        fit = [form for form in FORMS if kind in FROM_WITHIN or form != "one process"]
        hands[min(fit, key=lambda form: len(hands[form]))].append(kind)
    return hands


@pytest.fixture(scope="module")
def tallies() -> Iterator[dict[str, Tally]]:
    """Of the forms; written to the file that HRGAN_CHAOS_RESULT names."""
    found: dict[str, Tally] = {}
    yield found
    target = os.environ.get("HRGAN_CHAOS_RESULT")
    if target:
        model = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
        here = environment()
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores of {model[0] if model else 'an unnamed CPU'}, no GPU used",
            "versions": {"python": here["python"], **here["packages"]},
            "command": f"HRGAN_CHAOS={KILLS} HRGAN_CHAOS_SEED={SEED} ./launch/test tests/test_chaos.py",
            "seed": SEED,
            "kills": sum(tally.kills.total() for tally in found.values()),
            "kills_by_kind": sum((tally.kills for tally in found.values()), Counter()),
            "seconds": round(sum(tally.seconds for tally in found.values()), 1),
            "forms": {form: vars(tally) for form, tally in found.items()},
        }
        Path(target).write_text(json.dumps(result, indent=1) + "\n")


def kept(run: Path) -> dict[str, Any]:
    """What a run leaves besides tensors and records."""
    found: dict[str, Any] = {name: (run / name).read_text() for name in ("latest", "best")}
    return found | {name: sorted(os.listdir(run / name)) for name in ("checkpoints", "samples")}


@pytest.mark.parametrize(("kind", "after"), [("between rename and latest", 2), ("in pruning", 0)])
def test_what_a_kill_left_undone_after_the_last_checkpoint_is_made_up_for(
    kind: str, after: int, tmp_path: Path, tiny: Path, children: Children
) -> None:
    words = ("--schedule.total_kimg", "0.048", "--checkpoint.keep", "2", "--eval.every_kimg", "0.016")
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert children.run(tmp_path / "log", train, str(tiny), str(whole), *words)[0] == 0
    kill = Kill(kind, 0, after, 0.5, str(tmp_path / "killed"))
    code, text = children.run(tmp_path / "log", killed, kill, str(tiny), str(run), *words)
    assert code == -signal.SIGKILL, text
    assert kept(run) != kept(whole)
    code, text = children.run(tmp_path / "log", train, str(tiny), str(run), *words)
    assert code == 0, text
    assert kept(run) == kept(whole)
    assert_same_bits(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(900 + 90 * KILLS)
@pytest.mark.parametrize("form", FORMS)
def test_runs_killed_again_and_again_end_as_one_that_was_never_killed(
    form: str,
    tallies: dict[str, Tally],
    tmp_path: Path,
    shards: Path,
    children: Children,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, whole = tmp_path / "tiny.yaml", tmp_path / "whole"
    config.write_text(TINY.format(shards=shards))
    changing = len(FORMS[form]) > 1
    words = (*WORDS, *(ROUNDING if changing else ()))
    world, stage = FORMS[form][0]
    code, text = children.run(tmp_path / "whole.log", train, str(config), str(whole), *words, world=world, zero=stage)
    assert code == 0, text

    tally, began = tallies.setdefault(form, Tally()), time.monotonic()

    def compare(run: Path) -> None:
        assert (run / "latest").read_text() == (whole / "latest").read_text()
        if not changing:
            assert_same_bits(run, whole)
            assert kept(run) == kept(whole)
            return
        initial = initial_tensors(from_dict(yaml.safe_load((whole / "config.yaml").read_text())))
        error = relative_error(run, whole, initial)
        tally.largest_relative_error = max(tally.largest_relative_error or 0.0, error)
        assert error < 2e-5
        assert [row["nimg"] for row in records(run, "log.jsonl")] == [
            row["nimg"] for row in records(whole, "log.jsonl")
        ]

    storm = Storm(form, tmp_path, config, words, random.Random(f"{SEED} {form}"), children, compare, tally)
    try:
        for kind in dealt()[form]:
            storm.kill(kind)
        storm.finish()
    finally:
        tally.seconds = round(time.monotonic() - began, 1)
        lines = [f"\n{form}, seed {SEED}: {tally.kills.total()} kills in {tally.seconds:.0f} s, "
                 f"{tally.runs_finished} runs finished, {tally.steps_lost} steps done again, at most "
                 f"{tally.most_steps_lost} for one kill"]  # fmt: skip
        lines += [f"{count:5}  {kind}" for kind, count in sorted(tally.kills.items())]
        with capsys.disabled():
            print("\n".join(lines))
        for number in range(tally.runs_finished + 1):
            for process in left_over(tmp_path / f"run-{number}"):
                os.kill(process, signal.SIGKILL)
