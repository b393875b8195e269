"""The ways a person starts it: the scripts, `python -m hrgan`, and accelerate launch with two processes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

from hrgan.apps.bench_step import _operations
from hrgan.checks import world_problems
from hrgan.config import from_dict
from hrgan.engine import has_bf16
from hrgan.run import LOOK_SECONDS
from tests.conftest import cli

ROOT = Path(__file__).parent.parent


def test_scripts_refuse_a_missing_folder_from_any_directory(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "launch" / "demo", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "nowhere is not a folder" in done.stderr


@pytest.mark.slow
def test_the_readme_s_line_for_two_processes_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    line = "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0 -m hrgan train"
    assert line.replace("--main_process_port 0 ", "") in " ".join((ROOT / "README.md").read_text().split())
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        [*line.split(), "--config", str(tiny), "--run", str(tmp_path / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu" in done.stdout
    assert done.stdout.count("finished at 0.16 kimg") == 1
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 10
    assert (tmp_path / "run" / "FINISHED").exists()


LAUNCH_FILES = sorted((ROOT / "launch").glob("*.yaml"))


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_each_launch_file_says_when_to_use_it_and_accelerate_takes_it(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text = path.read_text()
    assert text.startswith("# ")
    start = rf"accelerate launch --config_file launch/{path.name} .*-m hrgan train --config configs/"
    assert any(re.search(start, line) for line in lines_of(path))
    assert f"`{path.stem}`" in (ROOT / "README.md").read_text()
    found = load_config_from_file(str(path))
    assert (found.num_machines > 1) == path.stem.startswith("nodes")
    stage = getattr(found, "deepspeed_config", {}).get("zero_stage")
    assert stage == (int(path.stem[-1]) if "zero" in path.stem else None)


def lines_of(path: Path) -> list[str]:
    """The lines of a page or of a YAML file, comments, too; what a backslash continues is one."""
    text = path.read_text()
    if path.suffix == ".yaml":
        text = re.sub(r"^# *", "", text, flags=re.MULTILINE)
    return text.replace("\\\n", " ").splitlines()


def trainings() -> Iterator[tuple[str, list[str], int]]:
    """Every training that the README, a launch file or a preset tells to start: the line, hrgan's words, processes."""
    for path in (ROOT / "README.md", *LAUNCH_FILES, *sorted((ROOT / "configs").glob("*.yaml"))):
        for line in lines_of(path):
            if not re.match(r"(\w+=\w+ )*(hrgan train|accelerate launch|slurm/submit train) .*--config configs/", line):
                continue
            words = shlex.split(line, comments=True)
            start = words.index("--") if "--" in words else words.index("train")
            before = dict(itertools.pairwise(words[:start]))
            if "--num_processes" in before:
                world = int(before["--num_processes"])
            elif "--config_file" in before:
                world = yaml.safe_load((ROOT / before["--config_file"]).read_text())["num_processes"]
            else:
                world = int(before.get("--nodes", 1)) * (8 if line.startswith("slurm") else 1)  # slurm/site.sh's GPUs
            yield line, words[start + 1 :], world


def test_every_training_that_is_written_down_would_begin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = list(trainings())
    assert len(found) >= 30
    for line, words, world in found:
        assert cli("train", *words, "--print_config") == 0, f"{line}: {capsys.readouterr().err}"
        config = from_dict(yaml.safe_load(capsys.readouterr().out))
        assert config.data.path, f"{line}: without shards"
        assert world_problems(config, world) == [], line
        if "zero3" in line:
            assert config.loss.penalty == "finite_difference", line


@pytest.mark.slow
def test_the_readme_s_line_for_zero_2_on_a_cpu(tiny: Path, tmp_path: Path) -> None:
    line = "accelerate launch --config_file launch/cpu-2-zero2.yaml -m hrgan train"
    assert f"DS_ACCELERATOR=cpu {line}" in " ".join((ROOT / "README.md").read_text().split())
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    words = ["--config", str(tiny), "--run", str(tmp_path / "run"), "--schedule.total_kimg", "0.032"]
    done = subprocess.run(
        [*line.split()[:2], "--main_process_port", "0", *line.split()[2:], *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 x cpu (ZeRO-2)" in done.stdout


def native_precisions() -> list[str]:
    """What benches measure unless asked for others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ["float32", "bf16"] if has_bf16(device) else ["float32"]


def test_bench_step_says_what_saves_take(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "step", "--config", tiny, "--seconds", "0.01", "--with-saves", "--json", "--data.path", ""]
    assert cli(*words) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = [(size, precision) for size in (4, 8, 16) for precision in native_precisions()]
    assert [(row["resolution"], row["precision"]) for row in rows] == expected
    for row in rows:
        # Saves come every 16 images in this configuration, so they take most of its time.
        saves = row["save_seconds"] / (16 / row["img_per_sec"])
        assert row["save_seconds"] > 0.001
        assert 0 < row["matmul_share"] < 1
        assert (row["memory_gb"] is None) == (not torch.cuda.is_available())
        assert row["overhead"] == pytest.approx(saves + row["look_seconds"] / LOOK_SECONDS)


def test_bench_step_takes_the_sizes_and_precisions_that_are_asked_for(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "step", "--config", tiny, "--seconds", "0.01", "--json", "--data.path", ""]
    assert cli(*words, "--resolutions", "[8]", "--precisions", "[bf16]") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["resolution"], row["precision"]) for row in rows] == [(8, "bf16")]
    assert cli(*words, "--resolutions", "[8]", "--precisions", "[bf16]", "--loss.gp_every", "2") == 0
    lazy = json.loads(capsys.readouterr().out)
    more = rows[0]["penalty_operations"] - 1  # WGAN-GP takes one more pass of D, forward, backward and backward again.
    assert 0.3 < more < 0.7
    assert lazy[0]["penalty_operations"] - 1 == pytest.approx(more / 2)
    assert cli(*words, "--resolutions", "[300]") == 2
    assert "--resolutions: [300] are none of the run's, [4, 8, 16]" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_switches_tries_each(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: written(module, backend="eager"))
    words = ["bench", "switches", "--config", tiny, "--seconds", "0.01", "--data.path", ""]
    assert cli(*words, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    tried = [(row["compile"], row["cuda_graphs"], row["channels_last"]) for row in rows]
    one_gpu = torch.cuda.is_available()
    pairs = [(compiled, graphs) for compiled in (False, True) for graphs in ((False, True) if one_gpu else (False,))]
    assert tried == [*((*pair, True) for pair in pairs), (False, False, False)]
    for row in rows:
        assert row["resolution"] == 16
        assert row["img_per_sec"] > 0
        assert set(row["adam_ms"]) == {"fused", "foreach", "plain"}
    assert cli(*words) == 0
    assert "Adam, ms a step: fused" in capsys.readouterr().out


def test_operations_of_a_step_are_counted_also_through_a_double_backward() -> None:
    """Of y = W x, each product of 2 n m k operations: one forward, one for the gradient by x, and four backward from
    that gradient's square."""
    n, m, k = 8, 16, 32
    weight, x = torch.randn(m, k, requires_grad=True), torch.randn(n, k, requires_grad=True)

    def penalised() -> None:
        y = F.linear(x, weight).square().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.square().sum().backward()  # By W and by y, and through y by W and by x.

    assert _operations(lambda: F.linear(x.detach(), weight)) == 2 * n * m * k
    assert _operations(penalised) == 6 * 2 * n * m * k


@pytest.mark.slow
def test_bench_world_compares_one_process_with_two_and_with_the_limit(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    assert cli("bench", "world", "--config", tiny, "--network.grow", "false", "--seconds", "0.01", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["resolution"] for row in rows] == [16] * len(rows)
    assert [row["precision"] for row in rows] == native_precisions()
    for row in rows:
        assert row["ratio"] == pytest.approx(row["many"] / row["one"])
        assert 0 < row["one"] < row["limit"] * 5
    assert cli("bench", "world", "--config", tiny, "--processes", "1000") == 2


@pytest.mark.slow
def test_bench_data_compares_the_loader_with_the_decoder_and_with_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(80):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(pictures / f"{number}.png")
    assert cli("data", "build", pictures, tmp_path / "set", "--resolution", "32") == 0
    capsys.readouterr()
    words = ["bench", "data", tmp_path / "set", "--originals", pictures, "--seconds", "0.03", "--json"]
    assert cli(*words) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["tier"] for row in rows] == [16, 32]
    for row in rows:
        assert min(row[peer] for peer in ("pillow", "webdataset", "imagefolder", "loader1")) > 0
        assert min(row[name] for name in ("loader2", "loader2/limit", "start", "middle")) > 0
    assert cli(*words[:3], "--originals", tmp_path / "set" / "none") == 4
    assert "no images found" in capsys.readouterr().err


def test_bench_size_writes_a_set_and_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("bench", "size", "--samples", "64", "--shards", "4", "--folder", tmp_path, "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["manifest_load_s"] > 0
    assert row["forked_from_mb"] - 20 < row["worker_mb"] < row["forked_from_mb"] + 50
    assert list(tmp_path.iterdir()) == []
    assert cli("bench", "size", "--samples", "3", "--shards", "1") == 2


def test_python_m_hrgan_is_hrgan() -> None:
    words = [sys.executable, "-m", "hrgan", "schedule", "--config", "configs/demo.yaml", "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)[0]["resolution"] == 4


def test_building_shards_does_not_import_torch() -> None:
    code = (
        "import sys, hrgan.cli, hrgan.data.build, hrgan.data.images, hrgan.data.drawn; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_imports_point_down_only() -> None:
    """No module imports one of a floor above it (from errors up to the command line)."""
    import ast

    floors = [
        {"errors", "page"},
        {"config", "watch", "board", "sizes"},
        {"checks", "schedule", "losses", "augment", "networks", "noise", "pictures"},
        {"adam", "graphs"},
        {"zero"},
        {"engine", "data", "monitor", "metrics"},
        {"checkpoint"},
        {"rundir", "adopt", "checkup"},
        {"run"},
        {"train"},
        {"apps"},
        {"cli"},
        {"__main__"},
    ]
    floor = {name: number for number, names in enumerate(floors) for name in names}
    for path in (ROOT / "hrgan").rglob("*.py"):
        own = path.relative_to(ROOT / "hrgan").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hrgan"):
                parts = (node.module or "").split(".")
                for name in [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]:
                    assert floor[name] <= floor[own], f"{path}: imports {name}"


def unread(*words: str, **environment: str) -> tuple[int, str]:
    """Exit code and errors of `hrgan` whose output goes into a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "hrgan", *words],
        cwd=ROOT, env=os.environ | environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    os.close(write)
    return done.returncode, done.stderr


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    words = ("schedule", "--config", "configs/clothing-64.yaml")
    assert unread(*words, PYTHONUNBUFFERED="1") == (141, "")
    assert unread(*words, PYTHONUNBUFFERED="", HRGAN_EXIT_FILE=str(tmp_path / "exit")) == (0, "")
    assert (tmp_path / "exit").read_text() == "0\n"
    closed = ["bash", "-c", 'exec "$@" >&-', "bash", sys.executable, "-m", "hrgan", *words]
    done = subprocess.run(closed, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_training_goes_on_when_nobody_reads_it(tiny: Path, tmp_path: Path) -> None:
    code, errors = unread("train", "--config", str(tiny), "--run", str(tmp_path / "run"))
    assert code == 0, errors
    assert (tmp_path / "run" / "FINISHED").exists()
