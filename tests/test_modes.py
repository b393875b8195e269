"""Counting the drawn set's modes: what is recognised, what is none, and a generator's count beside the reals'."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hrgan.apps.bench_modes import tally
from hrgan.data.drawn import BACKGROUND, COLOURS, SHAPES, draw, factors
from hrgan.errors import UserError
from hrgan.metrics.modes import MODES, Mode, recognise
from tests.conftest import TINY, Children, cli
from tests.test_train import train

COUNT, SEED = 480, 5


def reals(side: int, count: int = COUNT) -> Tensor:
    """(count, 3, side, side) uint8."""
    return torch.from_numpy(np.stack([np.array(draw(i, SEED, side)) for i in range(count)])).permute(0, 3, 1, 2)


TRUTH: list[Mode] = [factors(i, SEED)[:2] for i in range(COUNT)]


def right(images: Tensor) -> float:
    """Share of the first reals that are recognised."""
    found = recognise(images)
    return sum(a == b for a, b in zip(found, TRUTH[: len(images)], strict=True)) / len(images)


def noisy(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + 8 * torch.randn(images.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)


def blurred(images: Tensor, sigma: float) -> Tensor:
    weights = torch.exp(-torch.arange(-3, 4).square() / (2 * sigma**2))
    kernel = (weights.outer(weights) / weights.sum() ** 2).expand(3, 1, 7, 7)
    return F.conv2d(F.pad(images.float(), (3, 3, 3, 3), mode="replicate"), kernel, groups=3).round().to(torch.uint8)


def test_there_are_48_modes_and_the_reals_show_them_all() -> None:
    assert len(MODES) == len(set(MODES)) == len(SHAPES) * len(COLOURS) == 48
    assert set(TRUTH) == set(MODES)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_every_real_is_recognised(side: int) -> None:
    assert right(reals(side)) == 1
    assert right(noisy(reals(side))) >= (0.99 if side == 16 else 1)
    assert right(blurred(reals(side), 0.5)) >= (0.95 if side == 16 else 1)


def test_what_shows_no_mode_is_none() -> None:
    generator = torch.Generator().manual_seed(1)
    blank = torch.tensor(BACKGROUND, dtype=torch.uint8).view(1, 3, 1, 1).expand(8, 3, 32, 32)
    noise = torch.randint(0, 256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
    nothing = [blank, noisy(blank), noise, blurred(noise, 2), torch.zeros_like(blank), torch.full_like(blank, 255)]
    assert set(recognise(torch.cat(nothing))) == {None}


def test_two_shapes_in_one_picture_are_none() -> None:
    one, other = reals(32, 400), reals(32, 400).roll(1, 0)
    assert recognise(((one.float() + other.float()) / 2).to(torch.uint8)).count(None) >= 0.98 * 400
    ink = [(255 - images.float()).sum((1, 2, 3)) for images in (one, other)]
    paper = 32 * 32 * sum(255 - level for level in BACKGROUND)
    both = torch.minimum(one, other)
    total = (255 - both.float()).sum((1, 2, 3)) - paper
    # Where the second, seen beside the first, is a third of the ink.
    apart = torch.maximum(*ink) - paper < total * 2 / 3
    assert apart.sum() > 100
    assert recognise(both[apart]).count(None) >= 0.98 * int(apart.sum())


def test_a_shape_of_another_colour_or_size_is_none() -> None:
    image = np.full((4, 32, 32, 3), BACKGROUND, dtype=np.uint8)
    image[0, 10:22, 10:22] = COLOURS["red"]
    image[1, 10:22, 10:22] = (150, 0, 200)
    image[2, 10:22, 10:22] = (186, 112, 38)  # Between brown and orange.
    image[3, 2:30, 2:30] = COLOURS["red"]
    found = recognise(torch.from_numpy(image).permute(0, 3, 1, 2))
    assert found == [("square", "red"), None, None, None]


def test_a_picture_is_recognised_alone_as_among_others() -> None:
    images = reals(32, 12)
    assert [recognise(image[None])[0] for image in images] == recognise(images)
    assert recognise(images[:0]) == []


def test_pictures_of_another_form_are_refused() -> None:
    for shape in ((2, 1, 32, 32), (2, 3, 32, 48)):
        with pytest.raises(UserError, match="its pictures are square and have 3"):
            recognise(torch.zeros(shape, dtype=torch.uint8))


# A generator's modes


def test_a_mode_is_covered_by_a_tenth_of_its_even_share() -> None:
    # 480 pictures: 10 of each mode are even, 1 is a tenth. 4,800: 10 are.
    found: list[Mode | None] = [*MODES[:3] * 10, *[None] * 450]
    row = tally(found)
    assert (row["covered"], row["met"], row["recognised"]) == (3, 3, 30 / 480)
    row = tally([*[MODES[0]] * 10, *[MODES[1]] * 9, *[None] * 4781])
    assert (row["covered"], row["met"]) == (1, 2)
    assert len(row["missed"]) == 47
    assert "black cross" not in row["missed"]
    assert "blue cross" in row["missed"]
    assert tally([None])["covered"] == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path, children: Children) -> Path:
    folder = tmp_path_factory.mktemp("modes")
    (folder / "tiny.yaml").write_text(TINY.format(shards=shards))
    code, output = children.run(folder / "log", train, str(folder / "tiny.yaml"), str(folder / "run"))
    assert code == 0, output
    return folder / "run"


def test_bench_modes_counts_a_run_s_modes_beside_those_of_the_reals(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "modes", run, "--count", "300"]
    assert cli(*words, "--json") == 0
    generated, real = json.loads(capsys.readouterr().out)
    assert (generated["what"], real["what"]) == ("generated", "reals")
    assert (real["recognised"], real["covered"], real["met"], real["missed"]) == (1, 48, 48, [])
    assert (real["count"], real["resolution"], real["nimg"]) == (300, 16, 160)
    assert generated["recognised"] < 0.1  # After 160 pictures it draws nothing.
    assert generated["count"] == 300
    assert cli(*words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "modes of the drawn set in 300 pictures of 16² at 0.16 kimg"
    assert said[3].split() == ["reals", "48", "of", "48", "48", "of", "48", "100.0%"]


def test_bench_modes_refuses_what_has_no_modes_in_one_line(
    run: Path, tmp_path: Path, shards: Path, children: Children, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("bench", "modes", run, "--count", "0") == 2
    assert "--count: 0 is below the least" in capsys.readouterr().err
    assert cli("bench", "modes", tmp_path) == 2
    capsys.readouterr()
    assert cli("data", "build", "drawn:96", tmp_path / "grey", "--resolution", "16", "--channels", "1") == 0
    text = TINY.format(shards=tmp_path / "grey").replace("network: {", "network: {channels: 1, ")
    (tmp_path / "grey.yaml").write_text(text.replace("total_kimg: 0.16", "total_kimg: 0.016"))
    code, output = children.run(tmp_path / "log", train, str(tmp_path / "grey.yaml"), str(tmp_path / "run"))
    assert code == 0, output
    capsys.readouterr()
    assert cli("bench", "modes", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "with 1 channels, expected square ones with 3" in error
    assert error.count("\n") == 1
