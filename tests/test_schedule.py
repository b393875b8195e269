"""nimg -> Phase against ProGAN's published tables (Karras et al. 2018 and its authors' 8-GPU setting)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hrgan.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    EvalConfig,
    LogConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    RampConfig,
    ScheduleConfig,
)
from hrgan.monitor.log import eta
from hrgan.schedule import gammas, make_schedule, rates, table, what_is_due
from tests.conftest import cli

PAPER = {  # resolution: (fade-in kimg, stable kimg, steps of both, batch, learning rate)
    4: (None, (0, 600), 1172, 512, 0.001),
    8: ((600, 1200), (1200, 1800), 4688, 256, 0.001),
    16: ((1800, 2400), (2400, 3000), 9375, 128, 0.001),
    32: ((3000, 3600), (3600, 4200), 18750, 64, 0.001),
    64: ((4200, 4800), (4800, 5400), 37500, 32, 0.001),
    128: ((5400, 6000), (6000, 6600), 37500, 32, 0.0015),
    256: ((6600, 7200), (7200, 7800), 37500, 32, 0.002),
    512: ((7800, 8400), (8400, 9000), 37500, 32, 0.003),
    1024: ((9000, 9600), (9600, 12000), 93750, 32, 0.003),
}


def test_the_1024_preset_prints_the_paper_s_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("schedule", "--config", "configs/progan-1024.yaml", "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table[0]) == [
        "kimg_from",
        "kimg_to",
        "resolution",
        "fading",
        "batch",
        "steps",
        "resets_adam",
        *(f"{name}{end}" for name in ("lr_g", "lr_d", "r1_gamma", "r2_gamma") for end in ("", "_end")),
    ]
    for resolution, (fade, stable, steps, batch, lr) in PAPER.items():
        mine = [row for row in table if row["resolution"] == resolution]
        spans = {row["fading"]: (row["kimg_from"], row["kimg_to"]) for row in mine}
        assert spans == {False: stable} | ({True: fade} if fade else {})
        # A phase begins with a whole step, so a border may move a step from one part to the next.
        assert sum(row["steps"] for row in mine) == pytest.approx(steps, abs=2)
        assert {(row["batch"], row["lr_g"], row["lr_d"], row["lr_d_end"]) for row in mine} == {(batch, lr, lr, lr)}
    assert sum(row["steps"] for row in table) == pytest.approx(277_735, abs=5)
    assert sum(row["resets_adam"] for row in table) == 17
    assert [row["fading"] for row in table] == [False, *[True, False] * 8]


def test_phases_tile_the_run_and_at_finds_each_step_s_phase() -> None:
    schedule = make_schedule(Config())
    nimg = 0
    for index, phase in enumerate(schedule.phases):
        assert (phase.index, phase.nimg_from) == (index, nimg)
        last = phase.nimg_to - phase.batch
        assert schedule.at(nimg) is schedule.at(last) is phase
        assert schedule.step(last) + 1 == schedule.step(last + phase.batch)
        # The border is the first whole step at or after the planned one.
        assert 0 <= phase.nimg_to - 1000 * phase.kimg_to < phase.batch
        nimg = phase.nimg_to
    assert schedule.nimg_total == nimg == 12_000_000


def test_alpha_rises_linearly_over_a_fade() -> None:
    schedule = make_schedule(Config())
    assert [schedule.at(n).alpha(n) for n in (0, 599_999)] == [1.0, 1.0]
    fade = schedule.phases[1]
    assert fade.alpha(600_000) == 0.0
    assert fade.alpha(900_000) == 0.5
    assert fade.alpha(1_200_000) == 1.0
    assert schedule.phases[2].alpha(1_200_001) == 1.0


def test_a_total_that_cuts_a_fade_does_not_make_it_faster() -> None:
    long = make_schedule(Config(schedule=ScheduleConfig()))
    short = make_schedule(Config(schedule=ScheduleConfig(total_kimg=900)))
    assert short.nimg_total == long.at(900_000).nimg_from + -(-(900_000 - long.at(900_000).nimg_from) // 256) * 256
    for nimg in range(0, 900_000, 10_000):
        assert short.at(nimg).alpha(nimg) == long.at(nimg).alpha(nimg)
        assert short.at(nimg).nimg_from == long.at(nimg).nimg_from


def test_other_policies() -> None:
    flat = make_schedule(Config(network=NetworkConfig(resolution=64, grow=False)))
    assert [(p.resolution, p.fading, p.kimg_to) for p in flat.phases] == [(64, False, 12000)]
    from16 = make_schedule(Config(network=NetworkConfig(resolution=64), schedule=ScheduleConfig(start_resolution=16)))
    assert [(p.resolution, p.fading) for p in from16.phases] == [
        (16, False),
        (32, True),
        (32, False),
        (64, True),
        (64, False),
    ]
    late = make_schedule(Config(schedule=ScheduleConfig(order="fade_first")))
    assert [(p.resolution, p.fading, p.kimg_from) for p in late.phases[:3]] == [
        (4, False, 0),
        (8, True, 1200),
        (8, False, 1800),
    ]
    keep = make_schedule(Config(schedule=ScheduleConfig(reset_adam="never")))
    assert [p.resets_adam for p in keep.phases] == [True] + [False] * 16
    once = make_schedule(Config(schedule=ScheduleConfig(reset_adam="fade_start")))
    assert sum(p.resets_adam for p in once.phases) == 9
    cut = make_schedule(Config(schedule=ScheduleConfig(fade_kimg=0)))
    assert not any(p.fading for p in cut.phases)
    assert len(cut.phases) == 9


def test_what_is_due_after_each_step_of_a_small_run() -> None:
    config = Config(
        network=NetworkConfig(resolution=8),
        schedule=ScheduleConfig(total_kimg=4, stable_kimg=1, fade_kimg=1, batch=100),
        eval=EvalConfig(every_kimg=1.5),
        checkpoint=CheckpointConfig(every_kimg=1.2),
        log=LogConfig(tick_kimg=0.5, samples_kimg=3),
    )
    schedule = make_schedule(config)
    found: dict[str, list[int]] = {name: [] for name in ("tick", "samples", "evaluate", "save", "finish")}
    for before in range(0, schedule.nimg_total, 100):
        due = what_is_due(config, schedule, schedule.at(before), before, before + 100)
        for name, nimgs in found.items():
            if getattr(due, name):
                nimgs.append(before + 100)
    assert found["evaluate"] == [1000, 1500, 3000, 4000]  # the end of 4² stable, each 1.5 kimg, the end
    assert found["save"] == [1000, 1200, 1500, 2000, 2400, 3000, 3600, 4000]  # also at borders and with evaluations
    assert found["samples"] == [3000, 4000]
    assert found["finish"] == [4000]
    assert found["tick"] == sorted({*range(500, 4001, 500), *found["save"]})


RAMPED = Config(
    network=NetworkConfig(resolution=8),
    loss=LossConfig(kind="relativistic", r1_gamma={4: 1.0, 8: 4.0}, r2_gamma=None),
    augment=AugmentConfig(ops=["ada"]),
    optim=OptimConfig(lr=0.002, lr_d=0.004, beta2=0.9, ema_kimg=0.0),
    ramp=RampConfig(kimg=100, lr=0.25, gamma=0.1, beta2=0.99, ema_kimg=500.0, augment=0.3),
    schedule=ScheduleConfig(total_kimg=150, stable_kimg=10, fade_kimg=10, batch=16),
)
"""R3GAN's schedules (Huang et al. 2024)."""


def test_ramps_are_cosines_from_the_configured_values_to_the_ramp_s_and_flat_after() -> None:
    phase = make_schedule(RAMPED).phases[-1]
    start, middle, end, after = (rates(RAMPED, phase, nimg) for nimg in (0, 50_000, 100_000, 140_000))
    assert (start.lr_g, start.lr_d, start.r1_gamma, start.beta2, start.ema_kimg, start.augment) == (
        0.002, 0.004, 4.0, 0.9, 0.0, 0.0,
    )  # fmt: skip
    ends = (end.lr_g, end.lr_d, end.r1_gamma, end.r2_gamma, end.beta2, end.ema_kimg, end.augment)
    assert ends == pytest.approx((0.0005, 0.001, 0.4, 0.4, 0.99, 500.0, 0.3))
    assert after == end
    assert (middle.lr_g, middle.beta2) == pytest.approx(((0.002 + 0.0005) / 2, (0.9 + 0.99) / 2))
    quarter = rates(RAMPED, phase, 25_000)
    assert quarter.augment == pytest.approx(0.3 * (1 - 0.5**0.5) / 2)  # cos(pi/4) = sqrt(1/2)


def test_gamma_follows_the_resolution_or_the_rule() -> None:
    assert gammas(RAMPED, 4) == (1.0, 1.0)
    assert gammas(RAMPED, 8) == (4.0, 4.0)
    ruled = Config(loss=LossConfig(kind="logistic", r1_gamma=None), schedule=ScheduleConfig(batch={4: 64, 64: 16}))
    # 0.0002 x pixels / batch, SG2-ADA's rule; R2 is off by default.
    assert gammas(ruled, 64) == pytest.approx((0.0002 * 64 * 64 / 16, 0.0))
    assert gammas(ruled, 8) == pytest.approx((0.0002 * 8 * 8 / 64, 0.0))
    assert gammas(Config(), 64) == (0.0, 0.0)  # WGAN-GP has its own.


def test_the_table_shows_gamma_its_rule_with_the_reason_and_the_ramp() -> None:
    ruled = Config(loss=LossConfig(kind="logistic", r1_gamma=None), network=NetworkConfig(resolution=8))
    text = table(make_schedule(ruled), ruled)
    assert "R1 is by the rule 0.0002 x pixels / batch (5e-05 in the last phase; made for the logistic loss): a" in text
    text = table(make_schedule(RAMPED), RAMPED)
    assert "R1 is given: no rule is known for the relativistic loss" in text
    given = replace(ruled, loss=LossConfig(kind="logistic", r1_gamma=10.0))
    assert "R1 is given; it would be by the rule" in table(make_schedule(given), given)
    assert "ramp: lr x 0.25, gamma x 0.1, beta2 0.9 to 0.99, ema_kimg 0 to 500" in text
    assert "4 - 0.4" not in text.splitlines()[1]
    assert text.splitlines()[1].split()[7:10] == ["0.002", "-", "0.00196"]
    assert "R1" not in table(make_schedule(Config()), Config())
    none = replace(ruled, loss=LossConfig(kind="logistic", r1_gamma=0.0))
    assert "rule" not in table(make_schedule(none), none)


def test_the_time_left_is_measured_and_beyond_that_grows_with_what_a_picture_costs() -> None:
    schedule = make_schedule(Config(network=NetworkConfig(resolution=32), schedule=ScheduleConfig(total_kimg=6000)))
    phase = schedule.phases[2]
    assert (phase.resolution, phase.fading) == (8, False)
    left = dict.fromkeys((8, 16, 32), 0)
    for later in schedule.phases[2:]:
        left[later.resolution] += later.nimg_to - later.nimg_from
    cost = {8: 10.0, 16: 20.0, 32: 200.0}.__getitem__
    found = eta(schedule, phase, phase.nimg_from, {4: 0.1, 8: 0.5}, cost)
    assert found == pytest.approx(0.5 * left[8] + 1.0 * left[16] + 4.0 * left[32])  # At most four times.
    halfway = phase.nimg_from + 1000
    assert eta(schedule, phase, halfway, {8: 0.5, 16: 0.7, 32: 0.9}, cost) == pytest.approx(
        0.5 * (left[8] - 1000) + 0.7 * left[16] + 0.9 * left[32]
    )
    assert eta(schedule, phase, halfway, {}, cost) == 0
