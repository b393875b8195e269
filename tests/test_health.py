"""What tells a sick run: signs of made pictures, warnings by made histories, and runs that are made sick."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from hrgan.apps.bench_modes import bench_modes
from hrgan.checks import cautions
from hrgan.checkup import SIGNS, Checkup
from hrgan.config import Config, LogConfig, LossConfig, from_dict, read_yaml
from hrgan.data.build import build
from hrgan.data.drawn import draw
from hrgan.monitor.health import GRACE, PERSISTS, REACH, REMEDIES, remedy, unsaid, vital_signs, warnings
from hrgan.monitor.log import RunLog
from hrgan.networks.layers import downsample, upsample
from hrgan.pictures import to_uint8
from hrgan.run import warn_of_sickness
from hrgan.schedule import make_schedule, rates
from tests.conftest import Children, cli
from tests.test_train import TIMES, final_tensors, records, train

# Signs


def flat(images: Tensor) -> Tensor:
    """Pixels as features."""
    return images.flatten(1).float()


def noise(count: int, seed: int = 0, side: int = 8) -> Tensor:
    """(count, 3, side, side) float32 in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_pictures_like_the_reals_have_signs_of_one_and_no_duplicates() -> None:
    signs = vital_signs(noise(64), noise(64, 1), flat)
    assert list(signs) == ["diversity_pixel", "diversity_feature", "duplicates", "detail"]
    assert signs["duplicates"] == 0
    assert [signs[name] for name in ("diversity_pixel", "diversity_feature", "detail")] == pytest.approx(
        [1, 1, 1], rel=0.02
    )


def test_diversity_is_the_mean_distance_over_that_of_the_reals() -> None:
    fakes, reals = torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4)
    fakes[1] += 0.2
    reals[1] += 0.8
    # Of three pairs two differ on both sides, by 0.2 and 0.8 in each pixel.
    signs = vital_signs(fakes, reals, flat)
    assert signs["diversity_pixel"] == pytest.approx(0.25)
    assert signs["diversity_feature"] == pytest.approx(0.25, rel=0.03)  # Rounded to 8 bits.
    assert signs["detail"] is None


def test_a_half_of_repeated_pictures_is_half_duplicates() -> None:
    fakes = torch.cat([noise(16), noise(1, 2).expand(16, -1, -1, -1) + 0.01 * noise(16, 3)]).clamp(-1, 1)
    assert vital_signs(fakes, noise(32, 1), flat)["duplicates"] == 0.5
    # As far from each other as half of what reals are: no duplicates.
    spread = noise(1, 2) * 0.2 + 0.5 * noise(32, 3)
    assert vital_signs(spread, noise(32, 1), flat)["duplicates"] == 0


def test_detail_is_the_highest_octave_s_energy_whatever_the_fade() -> None:
    made, real = noise(32), noise(32, 1)
    for alpha in (1, 0.5, 0.01):
        fakes, reals = (torch.lerp(upsample(downsample(x)), x, alpha) for x in (made / 2, real))
        assert vital_signs(fakes, reals, flat)["detail"] == pytest.approx(0.25, rel=0.03)
    assert vital_signs(upsample(downsample(made)), real, flat)["detail"] == pytest.approx(0, abs=1e-10)


def test_uint8_and_float_pictures_have_the_same_signs() -> None:
    fakes, reals = noise(16), noise(16, 1)
    signs = vital_signs(to_uint8(fakes), to_uint8(reals), flat)
    assert signs == pytest.approx(vital_signs(fakes, reals, flat), rel=0.01)


def test_what_cannot_be_computed_is_none() -> None:
    broken = noise(8)
    broken[3, 0, 0, 0] = torch.nan
    assert set(vital_signs(broken, noise(8, 1), flat).values()) == {None}
    assert set(vital_signs(noise(8, 1), broken, flat).values()) == {None}
    assert set(vital_signs(noise(1), noise(8, 1), flat).values()) == {None}
    alike = vital_signs(noise(8), noise(1, 1).expand(8, -1, -1, -1), flat)
    assert alike.pop("detail") == pytest.approx(1, rel=0.3)  # Needs no two different reals.
    assert set(alike.values()) == {None}


# Warnings

HEALTHY = {
    "phase": 4,
    "resolution": 16,
    "alpha": 1.0,
    "logit_real": 0.4,
    "logit_fake": -0.4,
    "logit_seen": 0.3,
    "logit_held_out": 0.28,
    "sign_real": 0.5,
    "sign_fake": -0.5,
    "grad_norm_g": 5.0,
    "grad_norm_d": 3.0,
    "diversity_pixel": 0.8,
    "diversity_feature": 0.9,
    "duplicates": 0.05,
    "detail": 0.6,
}
"""As measured in a healthy run of the drawn set."""
SICK: dict[str, dict[str, Any]] = {
    "mode collapse": {"diversity_feature": 0.21},
    "D overpowering": {"sign_real": 1.0, "sign_fake": -0.99, "logit_real": 6.0, "logit_fake": -8.0,
                       "logit_seen": 6.0, "logit_held_out": 5.9},
    "D memorising": {"logit_seen": 0.9, "logit_held_out": -0.1},
    "vanishing G": {"grad_norm_g": 0.02, "grad_norm_d": 900.0},
    "dead fade": {"detail": 0.001, "alpha": 0.7},
}  # fmt: skip
Rows = list[dict[str, Any]]


def rows(count: int, **other: Any) -> Rows:
    return [{**HEALTHY, **other, "nimg": 1000 * n} for n in range(count)]


def names(history: Rows, loss: str = "logistic") -> list[str]:
    return [warning.name for warning in warnings(history[:-1], history[-1], loss)]


def test_a_healthy_history_has_no_warning() -> None:
    assert names(rows(30)) == []
    assert names(rows(30, alpha=0.7)) == []
    assert names(rows(1)) == []


@pytest.mark.parametrize("name", SICK)
def test_each_sickness_has_its_own_warning_and_no_other(name: str) -> None:
    history = rows(10) + rows(PERSISTS, **SICK[name])
    assert names(history) == [name]
    (found,) = warnings(history[:-1], history[-1])
    assert found.says
    assert found.remedy
    # REACH rows are enough.
    assert names(history[-REACH:]) == [name]


@pytest.mark.parametrize("name", SICK)
def test_a_warning_needs_ticks_in_a_row_in_one_phase(name: str) -> None:
    sick = rows(PERSISTS, **SICK[name])
    assert names(rows(10) + sick[1:]) == []
    assert names(rows(10) + sick[:1] + rows(1) + sick[2:]) == []
    assert names([*rows(10), {**sick[0], "phase": 3}, *sick[1:]]) == []


@pytest.mark.parametrize("name", SICK)
def test_a_run_s_first_ticks_count_for_nothing(name: str) -> None:
    sick = rows(GRACE + PERSISTS, **SICK[name])
    assert [names(sick[:count]) for count in range(1, len(sick))] == [[]] * (len(sick) - 1)
    assert names(sick) == [name]


@pytest.mark.parametrize("name", SICK)
def test_what_rows_lack_is_not_judged(name: str) -> None:
    history = rows(10) + rows(PERSISTS, **SICK[name])
    keys = ("phase", "resolution", "alpha", "nimg")
    assert names([{key: row[key] for key in keys} for row in history]) == []
    assert names([{key: value if key in keys else None for key, value in row.items()} for row in history]) == []


def test_near_duplicates_are_a_collapse_however_far_the_clusters() -> None:
    history = rows(10) + rows(PERSISTS, duplicates=0.9)
    assert names(history) == ["mode collapse"]
    assert names([*rows(10), *history[-2:-1], *rows(1), *history[-1:]]) == []
    assert "90% of generated pictures have a near duplicate" in warnings(history[:-1], history[-1])[0].says


def test_a_d_that_says_yes_or_no_to_all_has_not_won() -> None:
    for sign in (1.0, -1.0):
        assert names(rows(10) + rows(PERSISTS, sign_real=sign, sign_fake=sign)) == []


def test_where_d_prefers_fakes_nothing_is_memorised() -> None:
    assert names(rows(10) + rows(PERSISTS, logit_real=-1.0, logit_fake=1.0, logit_seen=-2.0, logit_held_out=1.0)) == []


def test_a_wasserstein_critic_may_tell_all_of_them() -> None:
    assert names(rows(10) + rows(PERSISTS, **SICK["D overpowering"]), "wgan-gp") == []


def test_layers_that_begin_at_zero_may_draw_nothing_in_the_first_half_of_a_fade() -> None:
    assert names(rows(10) + rows(PERSISTS, detail=0.001, alpha=0.4)) == []
    assert names(rows(10) + rows(PERSISTS, detail=0.001)) == []  # No fade.
    # Its last tick has alpha 1.
    last = rows(PERSISTS, detail=0.001, alpha=1.0, fading=True)
    assert names(rows(10) + last) == ["dead fade"]


def test_augmentation_that_is_on_should_be_stronger() -> None:
    off = rows(10) + rows(PERSISTS, **SICK["D memorising"])
    on = rows(10) + rows(PERSISTS, **SICK["D memorising"], augment_strength=0.1)
    assert "stronger" not in warnings(off[:-1], off[-1])[0].remedy
    assert "stronger augmentation" in warnings(on[:-1], on[-1])[0].remedy


@pytest.mark.parametrize("loss", get_args(get_type_hints(LossConfig)["kind"]))
def test_a_remedy_names_fields_that_the_loss_reads(loss: str) -> None:
    said = " ".join(remedy(name, {}, loss) for name in REMEDIES)
    assert ("loss.gp_lambda" in said) == (loss == "wgan-gp")
    for topic, name in set(re.findall(r"\b(loss|optim|schedule|data)\.(\w+)", said)):
        assert hasattr(getattr(Config(), topic), name)
        if topic == "loss" and name != "kind":
            given = replace(LossConfig(kind=loss), **{name: 0.7})  # type: ignore[arg-type]
            assert cautions(replace(Config(), loss=given)) == []
    assert loss != "wgan-gp" or "loss.kind wgan-gp" not in said


def test_a_warning_is_raised_once_a_phase() -> None:
    said: set[tuple[int, str]] = set()
    history = rows(10) + rows(PERSISTS, **SICK["vanishing G"])
    found = warnings(history[:-1], history[-1])
    assert [unsaid(found, phase, said) for phase in (4, 4, 5, 4)] == [found, [], found, []]
    assert said == {(4, "vanishing G"), (5, "vanishing G")}


# Runs

FEW = """
data: {{path: {shards}, held_out: {held_out}, workers: 0, slots: 2, window: 64}}
network: {{resolution: 16, grow: false, latent: 8, widths: [64, 32, 16]}}
loss: {{kind: logistic, r1_gamma: 0.3}}
optim: {{lr: 0.004, ema_kimg: 0.3}}
schedule: {{total_kimg: 7, batch: 8}}
eval: {{every_kimg: 0, num_fake: 8, num_real: 8, extractor: random, bootstrap: 0}}
checkpoint: {{every_kimg: 100}}
log: {{tick_kimg: 0.5, samples_kimg: 100, grid: 2, tensorboard: false, max_share: 1}}
"""
"""Of eight pictures. It takes 20 s on one core."""
MANY = (
    FEW.replace("num_fake: 8, num_real: 8", "num_fake: 64, num_real: 64")
    .replace("batch: 8", "batch: 16")
    .replace("latent: 8, widths: [64, 32, 16]", "latent: 32, widths: [32, 32, 16]")
    .replace("r1_gamma: 0.3", "r1_gamma: 1.0")
    .replace("lr: 0.004, ema_kimg: 0.3", "lr: 0.003, ema_kimg: 0.5")
)
"""Of 425."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of sets of the drawn set up to 16²: few (8 pictures), many (425 of 500) and held-out (the rest)."""
    folder = tmp_path_factory.mktemp("sets")
    build("drawn:8", folder / "few", 16, workers=1)
    build("drawn:500", folder / "many", 16, workers=1, share="0:0.85")
    build("drawn:500", folder / "held-out", 16, workers=1, share="0.85:1")
    return folder


def trained(
    children: Children, text: str, data: Path, folder: Path, *words: str, program: Callable[..., int] = train
) -> tuple[Path, list[str], Rows]:
    """A run in `folder`: its directory, the names of its warnings, its log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text.format(shards=data, held_out=data.parent / "held-out"))
    code, output = children.run(folder / "out", program, str(folder / "config.yaml"), str(folder / "run"), *words)
    assert code == 0, output
    log = records(folder / "run", "log.jsonl")
    found = [name for row in log for name in row.get("warnings", ())]
    assert [line.split(": ")[1] for line in output.splitlines() if line.startswith("warning: ") and ";" in line
            and line.split(": ")[1] in REMEDIES] == found  # fmt: skip
    return folder / "run", found, log


def modes(run: Path) -> int:
    """How many modes of the drawn set its generator covers, by exact recognition of 480 pictures."""
    return int(bench_modes(run, 480, seed=0)[0]["covered"])


@pytest.fixture(scope="module")
def memorised(sets: Path, children: Children, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Rows]:
    """A run whose D sees eight pictures over and over."""
    return trained(children, FEW, sets / "few", tmp_path_factory.mktemp("memorised"))


@pytest.mark.slow
def test_a_d_that_sees_few_pictures_over_and_over_memorises_them(memorised: tuple[Path, list[str], Rows]) -> None:
    run, found, log = memorised
    assert "D memorising" in found
    assert not {"vanishing G", "D overpowering", "dead fade"} & set(found)
    assert log[-1]["logit_seen"] - log[-1]["logit_held_out"] > 2
    assert modes(run) >= 2


@pytest.mark.slow
def test_a_g_that_learns_too_fast_draws_one_picture_and_no_mode(
    memorised: tuple[Path, list[str], Rows], sets: Path, children: Children, tmp_path: Path
) -> None:
    words = ("--optim.lr", "0.03", "--optim.lr_d", "0.0007", "--schedule.total_kimg", "2.5", "--log.tick_kimg", "0.25")
    run, found, log = trained(children, FEW, sets / "few", tmp_path, *words)
    assert "mode collapse" in found
    assert min(row["diversity_feature"] for row in log) < 0.25 or max(row["duplicates"] for row in log) > 0.4
    assert modes(run) == 0 < modes(memorised[0])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["logistic", "relativistic"])
def test_a_healthy_run_has_no_warning(loss: str, sets: Path, children: Children, tmp_path: Path) -> None:
    _, found, log = trained(children, MANY, sets / "many", tmp_path, "--loss.kind", loss)
    assert found == []
    # All signs were there to be judged.
    keys = ("diversity_feature", "duplicates", "detail", "logit_seen", "logit_held_out", "sign_real", "grad_norm_g")
    assert not [key for key in keys for row in log if row[key] is None]
    assert log[-1]["diversity_feature"] > 0.7


SHORT = ("--schedule.total_kimg", "2.5", "--log.tick_kimg", "0.256")


@pytest.mark.slow
def test_a_g_that_hardly_learns_leaves_d_to_win(sets: Path, children: Children, tmp_path: Path) -> None:
    words = ("--optim.lr", "0.000002", "--optim.lr_d", "0.002", "--loss.r1_gamma", "0.1")
    for loss in ("logistic", "relativistic"):
        folder = tmp_path / loss
        run, found, _ = trained(children, MANY, sets / "many", folder, *words, *SHORT, "--loss.kind", loss)
        assert found == ["D overpowering"], loss
        assert modes(run) == 0, loss


@pytest.mark.slow
def test_a_d_that_is_held_flat_gives_g_nothing(sets: Path, children: Children, tmp_path: Path) -> None:
    run, found, _ = trained(children, MANY, sets / "many", tmp_path, "--loss.r1_gamma", "100000", *SHORT)
    assert found == ["vanishing G"]
    assert modes(run) == 0


def train_with_a_dead_layer(config: str, run: str, *words: str) -> int:
    """Train a G whose pictures of 16² begin black, at a rate at which they stay so."""
    from hrgan.networks.progan import Generator

    original = Generator.initial

    def initial(self: Generator, name: str, parameter: torch.nn.Parameter) -> tuple[float, float]:
        return (0.0, 0.0) if name.startswith("to_rgb.16.") else original(self, name, parameter)

    Generator.initial = initial  # type: ignore[method-assign]
    return train(config, run, *words)


@pytest.mark.slow
def test_new_layers_that_draw_nothing_are_a_dead_fade(sets: Path, children: Children, tmp_path: Path) -> None:
    words = (
        *("--network.grow", "true", "--schedule.start_resolution", "8", "--log.tick_kimg", "0.256"),
        *("--schedule.stable_kimg", "1.28", "--schedule.fade_kimg", "2.56", "--schedule.total_kimg", "3.08"),
        *("--optim.lr", "{4: 0.003, 16: 1.0e-9}"),
    )
    run, found, log = trained(children, MANY, sets / "many", tmp_path, *words, program=train_with_a_dead_layer)
    # In the end all of its pictures are as grey.
    assert set(found) in ({"dead fade"}, {"dead fade", "mode collapse"})
    row = next(row for row in log if row.get("warnings"))
    assert row["alpha"] == pytest.approx(0.7)  # The third tick from the middle on.
    assert modes(run) == 0


# The log


@pytest.mark.parametrize(
    "words",
    [(), ("--network.family", "dcgan", "--schedule.start_resolution", "8", "--loss.kind", "logistic")],
    ids=["progan", "dcgan with batch statistics"],
)
def test_training_does_not_notice_the_signs(
    words: tuple[str, ...], tiny: Path, labelled: Path, children: Children, tmp_path: Path
) -> None:
    more = {"with": ("--log.max_share", "1", "--data.held_out", str(labelled)), "without": ()}
    for name, extra in more.items():
        code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / name), *words, *extra)
        assert code == 0, output
    a, b = final_tensors(tmp_path / "with"), final_tensors(tmp_path / "without")
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    with_signs, without = (records(tmp_path / name, "log.jsonl", (*TIMES, "warnings")) for name in more)
    assert [{**row, **dict.fromkeys(SIGNS)} for row in with_signs] == without
    assert not [key for row in with_signs for key in SIGNS if row[key] is None]


def test_the_log_has_the_values_that_decided_a_step(tiny: Path, children: Children, tmp_path: Path) -> None:
    words = (
        *("--ramp.kimg", "0.16", "--ramp.lr", "0.1", "--ramp.gamma", "0.5", "--ramp.beta2", "0.9"),
        *("--ramp.ema_kimg", "5", "--ramp.augment", "0.5", "--augment.ops", "[flip]", "--loss.kind", "logistic"),
    )
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "run"), *words)
    assert code == 0, output
    log = records(tmp_path / "run", "log.jsonl")
    config = from_dict(read_yaml(tmp_path / "run" / "config.yaml"))
    for row in log:
        expected = rates(config, make_schedule(config).at(row["nimg"] - 16), row["nimg"] - 16)
        for key in ("lr_g", "lr_d", "r1_gamma", "r2_gamma", "beta2", "ema_kimg"):
            assert row[key] == getattr(expected, key)
        assert row["augment_strength"] == pytest.approx(expected.augment)
    assert log[0]["lr_g"] == 0.001
    assert log[-1]["lr_g"] < 0.0002
    # No signs were asked for (TINY), none are there.
    assert all(row[key] is None for row in log for key in SIGNS)


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_log_of_one_that_was_not_stopped(
    tiny: Path, labelled: Path, children: Children, tmp_path: Path
) -> None:
    words = ("--log.max_share", "1", "--data.held_out", str(labelled))
    for name, totals in (("whole", ("0.16",)), ("halves", ("0.096", "0.16"))):
        for total in totals:
            more = (*words, "--schedule.total_kimg", total)
            code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / name), *more)
            assert code == 0, output
    assert records(tmp_path / "halves", "log.jsonl", TIMES) == records(tmp_path / "whole", "log.jsonl", TIMES)


@pytest.mark.slow
def test_two_processes_log_the_signs_of_one(tiny: Path, labelled: Path, children: Children, tmp_path: Path) -> None:
    words = ("--log.max_share", "1", "--data.held_out", str(labelled))
    for world in (1, 2):
        run = str(tmp_path / str(world))
        code, output = children.run(tmp_path / "log", train, str(tiny), run, *words, world=world)
        assert code == 0, output
    for one, two in zip(*(records(tmp_path / name, "log.jsonl") for name in ("1", "2")), strict=True):
        assert [two[key] for key in SIGNS] == pytest.approx([one[key] for key in SIGNS], rel=1e-3, abs=1e-4)


def test_signs_that_would_take_more_than_their_share_are_left_out() -> None:
    checkup = Checkup(Config(), None, None, None, spent=1.0, took=0.5)  # type: ignore[arg-type]  # It measures nothing.
    assert [checkup.affordable(seconds, hurried=False) for seconds in (74.9, 75.1)] == [False, True]  # Of 2 %.
    checkup.since = 1000.0  # A run that goes on has saved no time up.
    assert [checkup.affordable(1000 + seconds, hurried=False) for seconds in (74.9, 75.1)] == [False, True]
    checkup.config = Config(log=LogConfig(max_share=0))
    assert not checkup.affordable(1e9, hurried=False)
    checkup.config = Config(log=LogConfig(max_share=1))
    assert checkup.affordable(0.1, hurried=False)
    assert checkup.affordable(0.1, hurried=True)
    checkup.took = 1.5
    assert not checkup.affordable(0.1, hurried=True)


def test_a_run_goes_on_without_saying_again_what_it_said(tmp_path: Path) -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(config=Config(loss=LossConfig(kind="logistic")), say=said.append)

    def tick(log: RunLog, n: int, row: dict[str, Any]) -> None:
        row |= {"nimg": n, "kimg": n / 1000, "img_per_sec": 1.0, "data_wait": 0.0, "loss_d": 1.0, "loss_g": 1.0}
        log.tick(row | warn_of_sickness(run, log, row), False, 1.0, 0.0)

    log = RunLog(tmp_path, 0, tensorboard=False)
    for n, row in enumerate(rows(5) + rows(PERSISTS + 4, **SICK["vanishing G"])):
        tick(log, n, row)
        if n in (8, 9):
            log = RunLog(tmp_path, n, tensorboard=False)
    assert [before.get("warnings") for before in log.rows] == [None] * 7 + [["vanishing G"]] + [None] * 4
    (line,) = said
    assert line.startswith("warning: vanishing G: G's gradient norm is 0.02, ")
    assert line.endswith("; a lower loss.r1_gamma (its scale grows with the number of pixels), or loss.kind wgan-gp")
    # Where it goes back to before the warning, it is given again.
    log = RunLog(tmp_path, 5, tensorboard=False)
    for n, row in enumerate(rows(PERSISTS, **SICK["vanishing G"]), 6):
        tick(log, n, row)
    assert said == [line, line]


# Held-out pictures


@pytest.mark.parametrize(
    ("built", "words", "expected"),
    [
        ({}, (), "is what the run is trained on; split the source: hrgan data build SRC OUT --share 0:0.9"),
        ({"channels": 1}, (), "has channels 1, but"),
        ({"resolution": 16}, ("--network.resolution", "32"), "was built up to 16; build it with --resolution 32"),
        ({"labels": "folder"}, ("--network.condition", "projection"), "has classes ['0', '1'], but"),
    ],
    ids=["the same", "grey", "small", "classes"],
)
def test_held_out_pictures_that_do_not_fit_are_refused(
    built: dict[str, Any],
    words: tuple[str, ...],
    expected: str,
    tiny: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out, source = tmp_path / "held-out", "drawn:96"
    if "labels" in built:
        for number in range(8):
            (tmp_path / "source" / str(number % 2)).mkdir(parents=True, exist_ok=True)
            draw(number, 0, 32).save(tmp_path / "source" / str(number % 2) / f"{number}.png")
        source = str(tmp_path / "source")
    build(source, held_out, **{"resolution": 32, "workers": 1, "shard_samples": 40, "name": "drawn"} | built)
    capsys.readouterr()
    data = ("--data.path", str(labelled)) if "labels" in built else ()
    run = ("--run", str(tmp_path / "run"), "--data.held_out", str(held_out), "--network.widths", "[8, 8, 8, 8]")
    assert cli("train", "--config", str(tiny), *data, *run, *words) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hrgan: "))
    assert line.startswith(f"hrgan: data.held_out: {held_out} ")
    assert expected in line


def test_held_out_pictures_that_are_not_there_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, found in ((tmp_path / "none", "is missing"), (tiny, "is a file, expected the folder of a set")):
        assert cli("train", "--config", str(tiny), "--data.held_out", str(path)) == 4
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"hrgan: data.held_out: {path}")
        assert found in line


@pytest.mark.parametrize("kind", ["logistic", "hinge", "relativistic"])
def test_the_losses_that_tell_right_from_wrong_know_a_d_that_has_won(kind: str) -> None:
    assert names(rows(10) + rows(PERSISTS, **SICK["D overpowering"]), kind) == ["D overpowering"]


def test_ticks_without_the_signs_are_passed_over() -> None:
    sick = rows(PERSISTS, **SICK["mode collapse"])
    unknown = rows(4, diversity_feature=None, duplicates=None)
    assert names([*rows(10), sick[0], *unknown, sick[1], *unknown, sick[2]]) == ["mode collapse"]
    assert names([*rows(10), sick[0], *unknown, sick[1], *unknown, sick[2], *unknown]) == []  # It was judged before.
    assert names([*rows(10), sick[0], *unknown, *rows(1), sick[1], sick[2]]) == []
