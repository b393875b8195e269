"""Pictures from a trained generator, and checkpoints as people name them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hrgan import checkpoint
from hrgan.checkpoint import Progress
from hrgan.config import Config
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.stream import read_range
from hrgan.engine import PARTS, State, Tensors
from hrgan.monitor.log import append
from hrgan.pictures import save_png, to_array
from tests.conftest import TINY, Children, cli
from tests.test_metrics import offline
from tests.test_train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path, children: Children) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    (folder / "tiny.yaml").write_text(TINY.format(shards=shards))
    code, output = children.run(folder / "log", train, str(folder / "tiny.yaml"), str(folder / "run"))
    assert code == 0, output
    return folder / "run"


def pictures(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_a_picture_depends_on_seed_and_number_alone(run: Path, tmp_path: Path) -> None:
    for name, count, seed in (("a", 21, 3), ("b", 21, 3), ("c", 5, 3), ("d", 21, 4)):
        assert cli("generate", run, "--out", tmp_path / name, "--count", count, "--seed", seed) == 0
    a, b, c, d = (pictures(tmp_path / name) for name in "abcd")
    assert len(a) == len(set(a)) == 21
    assert a == b
    assert a[:5] == c
    assert not set(a) & set(d)
    image = Image.open(tmp_path / "a" / "000000.png")
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.asarray(image).std() > 5
    assert (tmp_path / "a" / "grid.png").exists()


def test_the_moving_average_is_the_default_and_the_raw_weights_differ(run: Path, tmp_path: Path) -> None:
    assert cli("generate", run, "--out", tmp_path / "ema", "--count", 4) == 0
    assert cli("generate", run, "--out", tmp_path / "raw", "--count", 4, "--weights", "raw") == 0
    assert pictures(tmp_path / "ema") != pictures(tmp_path / "raw")


def test_a_checkpoint_folder_can_be_named_also_in_a_fade(run: Path, tmp_path: Path) -> None:
    folder = run / "checkpoints" / "128"
    assert checkpoint.load(folder).state.fading
    assert cli("generate", folder, "--out", tmp_path / "out", "--count", 2) == 0
    assert len(pictures(tmp_path / "out")) == 2


def test_eval_of_a_run_gives_the_number_that_training_logged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("eval", run / "checkpoints" / "160") == 0
    row = json.loads(capsys.readouterr().out)
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["nimg"] == logged["nimg"] == 160
    assert row["fd_random"] == pytest.approx(logged["fd_random"], rel=1e-6)


def test_eval_of_a_folder_of_images(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set's own pictures, written as PNGs, are at no distance from the set; generated ones are far from it."""
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "own").mkdir()
    for batch in read_range(Dataset((open_set(str(shards)),), (1.0,)), 32, 0, 96):
        for number, image in zip(batch.samples.tolist(), batch.images, strict=True):
            save_png(to_array(image), tmp_path / "own" / f"{number:04d}.png")
    assert cli("generate", run, "--out", tmp_path / "fakes", "--count", 24) == 0
    capsys.readouterr()
    rows = []
    for folder in ("own", "fakes"):
        assert cli("eval", tmp_path / folder, "--data", shards) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert [row["num_fake"] for row in rows] == [96, 24]
    assert abs(rows[0]["fd_random"]) < 0.1 < 5 < rows[1]["fd_random"]
    assert cli("eval", tmp_path / "own") == 2
    assert "--data: needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"), [("nothing", "neither a run directory nor a checkpoint"), ("altered", "altered (sha256")]
)
def test_a_target_that_cannot_be_used_is_named(
    name: str, expected: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "nothing"
    if name == "altered":
        target = tmp_path / "7"
        shutil.copytree(run / "checkpoints" / "160", target)
        (target / "ema.safetensors").write_bytes(b"x")
    assert cli("generate", target, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.splitlines()) == 1


def test_pruning_keeps_the_newest_the_best_and_one_for_each_interval(tmp_path: Path) -> None:
    for nimg in range(1000, 10001, 1000):
        (tmp_path / "checkpoints" / str(nimg)).mkdir(parents=True)
    for nimg, value in ((5000, None), (6000, 1.0), (7000, 2.0), (20000, 0.5)):  # The last has no checkpoint.
        about = {"resolution": 16, "fid_floor": 0.1, "extractor": "a"}
        append(tmp_path / "metrics.jsonl", {"nimg": nimg, "fid": value, **about})
    checkpoint.prune(tmp_path, newest=9000, keep=2, keep_every_kimg=4)
    assert (tmp_path / "best").read_text() == "6000\n"
    names = [path.name for path in checkpoint.numbered(tmp_path)]
    assert names == ["10000", "9000", "8000", "6000", "4000", "1000"]


def test_a_run_means_its_best_until_it_has_grown_on_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short run may end at a resolution that was never measured."""
    nothing: dict[str, Tensors] = {part: {} for part in PARTS}
    meant = []
    for nimg, resolution, fading in ((1000, 8, False), (2000, 8, False), (3000, 16, True), (4000, 16, False)):
        checkpoint.save(tmp_path, State(resolution, fading, nothing), Progress(nimg=nimg), Config(), "set")
        checkpoint.point(tmp_path, "best", 1000)
        meant.append(int(checkpoint.find(tmp_path).name))
    assert meant == [1000, 1000, 1000, 4000]
    assert capsys.readouterr().err.count("its best checkpoint is of a smaller size than 4000, taken here") == 1
    checkpoint.point(tmp_path, "best", 4000)
    checkpoint.save(tmp_path, State(32, True, nothing), Progress(nimg=5000), Config(), "set")
    assert checkpoint.find(tmp_path).name == "4000"
