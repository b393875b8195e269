"""Configuration and command line: every problem at once, one line each, exit code 2, no traceback."""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from hrgan.checks import problems, world_problems
from hrgan.config import (
    Config,
    OptimConfig,
    ScheduleConfig,
    at,
    differences,
    from_dict,
    known_keys,
    to_yaml,
)
from tests.conftest import cli

PRESETS = sorted(Path("configs").glob("*.yaml"))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """Lines of a command that must end with exit code 2 and no traceback."""
    assert cli(*map(str, words)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()


def test_all_problems_are_reported_together(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    lines = refused(
        capsys, "train", "--config", tiny, "--optim.lrr", "1", "--loss.kind=wgan", "--network.resolution", "100",
        "--schedule.batch", "30", "--data.workers", "many", "--checkpoint.keep", "1", "--seed", "-3",
    )  # fmt: skip
    assert lines[0].endswith("8 problems")
    for expected in (
        "optim.lrr: no such field; did you mean optim.lr?",
        "loss.kind: 'wgan' is none of wgan-gp, wasserstein, logistic, least-squares, hinge, relativistic; "
        "nearest: wgan-gp",
        "network.resolution: 100 is not a power of two from 4 up; nearest: 64 or 128",
        "schedule.batch: 30 is not a multiple of 4 (images that travel together); nearest: 28 or 32",
        "data.workers: 'many' is not a whole number",
        "checkpoint.keep: 1 is below the least, 2",
        "seed: -3 is below the least, 0",
    ):
        assert f"  {expected}" in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {pth: x}", "data.pth: no such field; did you mean data.path?"),
        ("lr: 1", "lr: no such field; did you mean optim.lr?"),
        ("optim: {lr: fast}", "optim.lr: 'fast' is not a number or a map {resolution: number}"),
        ("schedule: {batch: {8: 16}}", "schedule.batch: {8: 16} says nothing for 4 pixels; add 4: ..."),
        ("network: {widths: [8]}", "network.widths: [8] must be at least 9 positive numbers, for 4 to 1024 pixels"),
        ("network: {channels: 2}", "network.channels: 2 is none of 1 (grey), 3 (RGB), 4 (RGBA); nearest: 1"),
        ("network: {bits: 16}", "network.bits: 16 with 3 channels; nearest: 8, or 16 with 1 channel"),
        ("network: {grid: [4, 60]}", "network.grid: [4, 60] is not [height, width] of 3 to 16; nearest: [4, 4]"),
        ("data: {cache_gb: 0}", "data.cache_gb: 0.0 must be above 0"),
        ("data: {path: {a: x}}", "data.path: {'a': 'x'} is not a map {path: weight} or text"),
        ("optim: {lr: {}}", "optim.lr: {} says nothing for 4 pixels; add 4: ..."),
        ("schedule: {total_kimg: .inf}", "schedule.total_kimg: inf is not a finite number"),
        ("schedule: {start_resolution: 0}", "schedule.start_resolution: 0 is not a power of two from 4 up; nearest: 4"),
        ("eval: {num_real: 2}", "eval.num_real: 2 is below the least, 4"),
        ("data: {max_bad: 2}", "data.max_bad: 2.0 is above the most, 1"),
    ],
)
def test_a_file_s_problem_names_field_value_and_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert f"  {expected}" in refused(capsys, "train", "--config", path)


def test_what_stands_in_a_wrong_type_s_place_is_not_complained_of(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--config", "configs/clothing-64.yaml", "--augment.ops", "[1]", "--augment.strength", "1")
    assert refused(capsys, "schedule", *words)[1:] == ["  augment.ops: '[1]' is not a list of words"]


@pytest.mark.parametrize(("text", "part"), [("a: [", "not YAML"), ("- 1", "holds list"), (None, "cannot be read")])
def test_a_file_that_is_no_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, part: str
) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    (line,) = refused(capsys, "train", "--config", path)
    assert str(path) in line
    assert part in line


def test_a_resolution_without_a_step_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--schedule.fade_kimg", "0", "--schedule.stable_kimg", "{4: 1, 8: 0, 16: 1}", "--network.resolution", "16")
    (line,) = refused(capsys, "schedule", *words)
    assert "8² gets no step" in line


def test_a_wrong_type_in_the_file_is_named_also_where_an_override_replaces_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("optim: {lr: fast, lrr: 1}\nseed: [1]\n")
    lines = "\n".join(refused(capsys, "schedule", "--config", path, "--optim.lr", "0.1", "--log.grid", "many"))
    places = [lines.find(text) for text in ("optim.lr: 'fast'", "optim.lrr", "seed: [1]", "log.grid: 'many'")]
    assert places == sorted(places), lines
    assert places[0] > -1


def test_an_option_without_its_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config: a value is missing" in refused(capsys, "schedule", "--config")[0]


def test_unknown_commands_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean schedule?" in refused(capsys, "shcedule")[0]
    assert "--nonsense" in refused(capsys, "data", "info", "x", "--nonsense")[0]


def test_overrides_win_over_the_file_and_print_config_shows_the_whole(
    capsys: pytest.CaptureFixture[str], tiny: Path
) -> None:
    words = ("--optim.lr", "1e-3", "--schedule.batch", "{4: 64, 16: 32}", "--data.mirror=true", "--print_config")
    assert cli("train", "--config", tiny, *words) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    config = from_dict(tree)
    assert config.optim.lr == 0.001
    assert config.schedule.batch == {4: 64, 16: 32}
    assert config.data.mirror is True
    assert config.network.latent == 8
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_valid_and_open_with_what_a_user_asks_first(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("schedule", "--config", path) == 0
    assert capsys.readouterr().err == ""
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("hrgan train", "Hardware", "Metric"):
        assert word in header, f"{path}: the header lacks {word}"
    assert "measured here" in header.replace("\n# ", " "), f"{path}: was anything?"


def test_the_presets_are_there() -> None:
    assert {path.stem for path in PRESETS} >= {
        *("demo", "dcgan-64", "progan-256", "progan-1024", "style-256", "style-512", "style-1024"),
        *("r3-cifar10", "r3-64", "r3-256", "r3-1024"),
        *("fewshot-256", "medical-gray16-512", "emoji-rgba-128", "clothing-64", "clothing-128"),
    }


def test_every_field_says_what_it_is() -> None:
    """A docstring stands under each field (jsonargparse shows it as help)."""
    import ast
    import inspect

    import hrgan.config as module

    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(statement, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{ast.unparse(statement.target)} has no docstring"
    assert all(is_dataclass(getattr(Config(), f.name)) or f.name in known_keys() for f in fields(Config))


def test_values_by_resolution_take_the_next_lower_entry() -> None:
    assert [at({4: 1, 16: 2}, size) for size in (4, 8, 16, 1024)] == [1, 1, 2, 2]
    assert at(7, 64) == 7


def test_batches_must_divide_over_the_processes() -> None:
    config = Config(schedule=ScheduleConfig(batch={4: 24, 8: 32}))
    assert problems(config) == []
    assert world_problems(config, 2) == []
    assert world_problems(config, 4) == [
        "schedule.batch: 24 is not a multiple of 4 processes x 4 images; nearest: 16 or 32"
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"network": {"resolution": 2}}, ["network.resolution: 2 is not a power of two from 4 up; nearest: 4"]),
        (
            {"schedule": {"start_resolution": 128}},
            ["schedule.start_resolution: 128 is above network.resolution 64; nearest: 64"],
        ),
        ({"network": {"grow": False}, "schedule": {"start_resolution": 128}}, []),  # Then it starts at 64.
        (
            {"ramp": {"augment": 0.3}, "augment": {"ops": ["ada"]}},  # Without ramp.kimg.
            ["augment.strength: 0 does nothing; nearest: augment.target: 0.6"],
        ),
        ({"ramp": {"kimg": 0, "lr": 0.1}}, []),  # As a preset's ramps are turned off.
        ({"ramp": {"kimg": 5, "augment": 0.3}}, []),  # As its augmentation.
        ({"data": {"held_out": ""}}, ["data.held_out: '' names no set of shards; nearest: null"]),
    ],
)
def test_one_mistake_is_one_problem(words: dict[str, dict[str, object]], expected: list[str]) -> None:
    tree = yaml.safe_load(Path("configs/clothing-64.yaml").read_text())
    for topic, values in words.items():
        tree[topic] = tree.get(topic, {}) | values
    assert problems(from_dict(tree)) == expected


def test_what_is_hardly_meant_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert cli("schedule", "--config", "configs/clothing-64.yaml", *words) == 0
        return capsys.readouterr().err

    assert said() == said("--augment.ops", "[ada]", "--augment.strength", "0.8") == ""
    assert said("--augment.ops", "[diffaugment]", "--augment.strength", "1") == ""
    leak = "warning: augmentation gets a strength of 1: above 0.8 G draws what ADA does\n"
    assert said("--augment.ops", "[rotate90]", "--augment.strength", "1") == leak
    assert said("--augment.ops", "[ada]", "--ramp.kimg", "5", "--ramp.augment", "1") == leak
    idle = "warning: ramp.lr, ramp.beta2: nothing changes while ramp.kimg is 0\n"
    assert said("--ramp.lr", "0.1", "--ramp.beta2", "0.9") == idle
    unread = "warning: network.mapping_layers, network.noise: not read while network.family is r3, but under style\n"
    assert said("--network.mapping_layers", "4", "--network.noise", "false") == unread
    assert said("--network.family", "style", "--network.noise", "false", "--network.blocks", "2") == (
        "warning: network.group_size: not read while network.family is style, but under r3\n"
    )
    assert said("--loss.kind", "wgan-gp") == (
        "warning: loss.r1_gamma, loss.r2_gamma, loss.r1_every: not read while loss.kind is wgan-gp, but under "
        "wasserstein or logistic or least-squares or hinge or relativistic\n"
    )
    assert said("--loss.gp_lambda", "5", "--loss.drift", "0", "--loss.class_weight", "2", "--loss.fd_sigma", "1") == (
        "warning: loss.class_weight: not read while network.condition is none, but under acgan\n"
        "warning: loss.gp_lambda: not read while loss.kind is relativistic, but under wgan-gp\n"
        "warning: loss.drift: not read while loss.kind is relativistic, but under wgan-gp or wasserstein\n"
        "warning: loss.fd_sigma: not read while loss.penalty is exact, but under finite_difference\n"
    )


def test_only_fields_that_cannot_alter_the_learning_may_change() -> None:
    old = Config()
    tree = asdict(old)
    tree["schedule"]["total_kimg"], tree["eval"]["num_fake"], tree["log"]["grid"], tree["data"]["workers"] = (
        1.0,
        5,
        3,
        9,
    )
    assert differences(old, from_dict(tree)) == []
    tree["optim"] = asdict(OptimConfig(lr=0.5))
    tree["seed"] = 4
    assert [line.split(":")[0] for line in differences(old, from_dict(tree))] == ["optim.lr", "seed"]
