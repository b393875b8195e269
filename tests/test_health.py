"""What tells a sick run: signs of made pictures, and warnings by made histories."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hrgan.monitor.health import GRACE, PERSISTS, REACH, unsaid, vital_signs, warnings
from hrgan.networks.layers import downsample, upsample
from hrgan.pictures import to_uint8

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


def test_a_warning_is_raised_once_a_phase() -> None:
    said: set[tuple[int, str]] = set()
    history = rows(10) + rows(PERSISTS, **SICK["vanishing G"])
    found = warnings(history[:-1], history[-1])
    assert [unsaid(found, phase, said) for phase in (4, 4, 5, 4)] == [found, [], found, []]
    assert said == {(4, "vanishing G"), (5, "vanishing G")}
