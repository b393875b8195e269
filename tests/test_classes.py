"""Networks with classes from the shards to the pictures, and weights from another run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hrgan import checkpoint
from hrgan.adopt import NETWORKS, adopted, class_rows, fitted, source_of
from hrgan.apps.generate import load_generator, truncated
from hrgan.checkpoint import Progress
from hrgan.config import Config, NetworkConfig, ScheduleConfig
from hrgan.engine import PARTS, State
from hrgan.errors import UserError
from hrgan.networks import make_discriminator, make_generator
from hrgan.noise import latents
from hrgan.schedule import make_schedule
from tests.conftest import Children, cli
from tests.test_train import records, train

SHAPES = ["cross", "disc", "ring", "square", "star", "triangle"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, labelled: Path, children: Children) -> Path:
    """A run of style with the drawn set's six shapes as classes."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("classes")
    (folder / "tiny.yaml").write_text(TINY.format(shards=labelled))
    words = ("--network.family", "style", "--network.mapping_layers", "2", "--network.condition", "projection")
    words += ("--eval.metrics", "[fid, class_fid]", "--eval.num_fake", "96")
    code, output = children.run(folder / "log", train, str(folder / "tiny.yaml"), str(folder / "run"), *words)
    assert code == 0, output
    return folder / "run"


def test_a_run_keeps_its_classes_names_and_is_measured_with_them(trained: Path) -> None:
    config = checkpoint.load(checkpoint.find(trained), parts=()).config
    assert config.network.classes == SHAPES
    rows = records(trained, "metrics.jsonl")
    assert {row["labels"] for row in rows} == {"drawn as often as in the reals"}
    per_class = [row for row in rows if "class_fd_random" in json.dumps(row)]
    assert per_class


def test_pictures_of_a_class(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def made(name: str, *words: str) -> list[bytes]:
        assert cli("generate", str(trained), "--out", str(tmp_path / name), "--count", "8", *words) == 0
        return [path.read_bytes() for path in sorted((tmp_path / name).glob("0*.png"))]

    stars, discs, mixed = made("stars", "--class", "star"), made("discs", "--class", "disc"), made("mixed")
    assert all(a != b for a, b in zip(stars, discs, strict=True))
    assert made("again", "--class", "star") == stars
    assert mixed not in (stars, discs)
    assert all(a != b for a, b in zip(made("cut", "--class", "star", "--truncation", "0.5"), stars, strict=True))
    assert made("no cut", "--class", "star", "--truncation", "1") == stars
    capsys.readouterr()
    assert cli("generate", str(trained), "--out", str(tmp_path / "x"), "--class", "str") == 2
    assert "--class: str, but the generator knows cross, disc" in (error := capsys.readouterr().err)
    assert "nearest: star" in error


def test_truncation_draws_w_towards_the_class_s_mean(trained: Path) -> None:
    network, alpha, config, _ = load_generator(trained, True, torch.device("cpu"), as_trained=False)
    z, labels = torch.randn(8, 8), torch.arange(8) % 6
    with torch.no_grad():
        whole = network(z, labels, alpha)
        torch.testing.assert_close(truncated(network, 0.999999, config)(z, labels, alpha), whole, atol=1e-3, rtol=1e-3)
        many = latents(0, 4096, 8, 0, "mean w")
        means = torch.stack([network.mapped(many, torch.full((4096,), label)).mean(0) for label in range(6)])[labels]
        half = network.drawn((means + network.mapped(z, labels)) / 2, z, alpha)
        torch.testing.assert_close(truncated(network, 0.5, config)(z, labels, alpha), half, atol=1e-4, rtol=1e-4)
        none = truncated(network, 0.0, config)
        # Without noise inputs a class would have one picture.
        for name, parameter in network.named_parameters():
            if "strength" in name:
                parameter.zero_()
        pictures = none(z, labels, alpha)
    torch.testing.assert_close(pictures[0], pictures[6])
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--class", "star"), "--class: star, but the generator was trained without classes"),
        (("--truncation", "0.7"), "--truncation: 0.7, but progan has no w to truncate"),
    ],
)
def test_what_a_generator_cannot_do_is_one_line(
    words: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved(tmp_path / "run", network(8, family="progan"), 8)
    assert cli("generate", str(run), "--out", str(tmp_path / "out"), *words) == 2
    assert says in capsys.readouterr().err


def test_pictures_that_are_no_numbers_are_not_written(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli("generate", str(trained), "--out", str(tmp_path / "out"), "--truncation", "1e40") == 2
    assert "hold non-finite numbers; name another checkpoint, or a --truncation" in capsys.readouterr().err
    assert list((tmp_path / "out").glob("*.png")) == []


def test_classes_that_the_set_lacks_are_one_line(tmp_path: Path, tiny: Path, children: Children) -> None:
    words = ("--network.condition", "projection")
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "run"), *words)
    assert code == 2
    assert "has no classes; set --network.condition none, or build the set with --labels" in output
    assert "Traceback" not in output


# Weights from another run


def made(network: NetworkConfig, resolution: int) -> tuple[Config, dict[str, dict[str, torch.Tensor]]]:
    """A configuration, and its networks with weights that no other run has."""
    config = Config(network=network, seed=7, schedule=ScheduleConfig(start_resolution=resolution))
    parts = {
        name: {key: value.clone() for key, value in make(config, resolution, False, None).state_dict().items()}
        for name, make in zip(NETWORKS, (make_generator, make_generator, make_discriminator), strict=True)
    }
    return config, parts


def saved(folder: Path, network: NetworkConfig, resolution: int) -> Path:
    config, parts = made(network, resolution)
    parts |= {name: {} for name in PARTS if name not in parts}
    checkpoint.save(folder, State(resolution, False, parts), Progress(nimg=1000), config, "set")
    return folder


def network(resolution: int = 16, **words: object) -> NetworkConfig:
    return NetworkConfig(**{"resolution": resolution, "latent": 8, "widths": [8] * 4, "family": "style"} | words)  # type: ignore[arg-type]


def taken(config: Config, source: Path, say: Callable[[str], None]) -> State:
    """What a run begins with."""
    folder = source_of(replace(config, init_from=str(source)))
    return adopted(config, make_schedule(config).phases[0], folder, checkpoint.load(folder, NETWORKS), say)


def test_a_run_takes_the_weights_of_a_smaller_one_and_says_so(tmp_path: Path) -> None:
    source = saved(tmp_path / "old", network(8), 8)
    config = Config(network=network(16), schedule=ScheduleConfig(start_resolution=16))
    lines: list[str] = []
    state = taken(config, source, lines.append)
    old = checkpoint.load(checkpoint.find(source)).state.parts
    for part in ("generator", "ema", "discriminator"):
        for name, tensor in state.parts[part].items():
            if name in old[part]:
                assert torch.equal(tensor, old[part][name]), name
            else:
                assert ".16." in name
    initial = make_generator(config, 16, False, None).state_dict()
    assert torch.equal(state.parts["generator"]["to_rgb.16.weight"], initial["to_rgb.16.weight"])
    assert "generator: " in lines[0]
    assert "begin anew: blocks.16.0" in lines[0]
    assert "(8², 1 kimg) into 16²" in lines[-1]


def test_a_run_takes_what_it_needs_of_a_larger_one(tmp_path: Path) -> None:
    source = saved(tmp_path / "old", network(16), 16)
    config = Config(network=network(16), schedule=ScheduleConfig(start_resolution=8))
    lines: list[str] = []
    state = taken(config, source, lines.append)
    old = checkpoint.load(checkpoint.find(source)).state.parts["generator"]
    assert all(torch.equal(tensor, old[name]) for name, tensor in state.parts["generator"].items())
    assert "of the checkpoint not used: blocks.16.0.affine.bias" in lines[0]
    assert lines[-1] == (
        "warning: init_from: the checkpoint's blocks above 8² are not used, as this run grows them anew; "
        "--schedule.start_resolution 16 begins with them"
    )
    whole = replace(config, schedule=ScheduleConfig(start_resolution=16))
    lines.clear()
    taken(whole, source, lines.append)
    assert not any("warning" in line for line in lines)


def test_classes_keep_their_rows_by_name(tmp_path: Path) -> None:
    classes = ["cat", "dog", "owl"]
    source = saved(tmp_path / "old", network(8, condition="projection", classes=classes), 8)
    config = Config(
        network=network(8, condition="projection", classes=["owl", "bee", "cat", "fox"]),
        schedule=ScheduleConfig(start_resolution=8),
    )
    lines: list[str] = []
    state = taken(config, source, lines.append)
    assert lines[0] == (
        "init_from: generator: 40 of 41 tensors taken; in part, without classes that the checkpoint lacks: "
        "embedding.weight"
    )
    old = checkpoint.load(checkpoint.find(source)).state.parts
    for part in ("generator", "discriminator"):
        found, before = state.parts[part]["embedding.weight"], old[part]["embedding.weight"]
        assert torch.equal(found[0], before[2])
        assert torch.equal(found[2], before[0])
        assert not any(torch.equal(found[1], row) for row in before)
    assert class_rows(classes, ["owl", "bee"]) == [(2, 0)]


def test_rows_of_a_classifier_go_by_name_after_the_logit() -> None:
    own = {"logit.weight": torch.zeros(3, 4)}
    theirs = {"logit.weight": torch.arange(12.0).view(3, 4)}  # logit, cat, dog
    made_of, fit = fitted(own, theirs, class_rows(["cat", "dog"], ["dog", "bee"]), [(0, 0), (2, 1)])
    assert made_of["logit.weight"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [0, 0, 0, 0]]
    assert (fit.taken, fit.in_part) == ([], ["logit.weight"])
    made_of, fit = fitted(own, theirs, [], [(0, 0), (2, 1), (1, 2)])
    assert made_of["logit.weight"].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7]]
    assert (fit.taken, fit.in_part) == (["logit.weight"], [])


@pytest.mark.parametrize("family", ["progan", "style", "r3", "dcgan"])
@pytest.mark.parametrize(("before", "after"), itertools.product(("none", "acgan", "projection"), repeat=2))
def test_every_family_s_networks_are_taken_with_other_classes_of_a_larger_resolution(
    family: str, before: str, after: str, tmp_path: Path
) -> None:
    """All of the smaller resolution but what belongs to classes, and of a classifier's rows the first, which is none's,
    and those of classes that stay. Under projection r3's last layer makes features, which are no logits."""

    def conditioned(condition: str, resolution: int, classes: list[str]) -> NetworkConfig:
        names = None if condition == "none" else classes
        return network(resolution, family=family, condition=condition, classes=names, group_size=4)

    source = saved(tmp_path / "old", conditioned(before, 32, ["cat", "dog"]), 32)
    config = Config(network=conditioned(after, 16, ["dog", "bee"]), schedule=ScheduleConfig(start_resolution=16))
    lines: list[str] = []
    state = taken(config, source, lines.append)
    old = checkpoint.load(checkpoint.find(source)).state.parts
    of_classes = ("embedding", "logit") if after == "acgan" else ("embedding",)
    for part in NETWORKS:
        for name, tensor in state.parts[part].items():
            if name in old[part] and tensor.shape == old[part][name].shape and not name.startswith(of_classes):
                assert torch.equal(tensor, old[part][name]), name
    head, was = state.parts["discriminator"]["logit.weight"], old["discriminator"]["logit.weight"]
    if family != "r3" or before == after or "projection" not in (before, after):
        assert torch.equal(head[0], was[0])
    else:
        assert not torch.equal(head[0], was[0])
    if before == after == "acgan":  # The dog.
        assert torch.equal(head[1], was[2])
        assert not torch.equal(head[2], was[1])
    if before == after == "projection":
        found, embedding = state.parts["discriminator"], old["discriminator"]["embedding.weight"]
        assert torch.equal(found["embedding.weight"][0], embedding[1])
    assert "(32², 1 kimg) into 16²" in lines[2]


def test_another_family_or_nothing_that_fits_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "old", network(8), 8)
    for words, says in (
        ({"family": "progan"}, "holds style networks, this run has progan"),
        ({"widths": [4] * 4, "latent": 4}, r"fits the .*\(network.latent 8 there, 4 here; network.widths"),
    ):
        config = Config(network=network(8, **words), schedule=ScheduleConfig(start_resolution=8))
        with pytest.raises(UserError, match=says):
            taken(config, source, lambda line: None)


def test_training_goes_on_from_another_run_s_weights(
    trained: Path, tmp_path: Path, labelled: Path, tiny: Path, children: Children
) -> None:
    words = ("--network.family", "style", "--network.mapping_layers", "2", "--init_from", str(trained))
    words += ("--data.path", str(labelled), "--schedule.start_resolution", "16")
    code, output = children.run(tmp_path / "log", train, str(tiny), str(tmp_path / "run"), *words)
    assert code == 0, output
    assert "init_from: generator: " in output
    assert f"init_from: {checkpoint.find(trained)}" in output


def test_a_wrong_init_from_leaves_the_run_directory_free(
    trained: Path, tmp_path: Path, tiny: Path, children: Children
) -> None:
    run, words = str(tmp_path / "run"), ("--schedule.total_kimg", "0.016", "--network.family", "style")
    for source, says in (
        (tmp_path / "nowhere", "init_from: {}: neither a run directory nor a checkpoint folder"),
        ("", "init_from: '' is no run directory"),
        (trained / "checkpoints" / "1", "init_from: {}: "),
    ):
        code, output = children.run(tmp_path / "log", train, str(tiny), run, *words, "--init_from", str(source))
        assert (code, "Traceback" in output) == (2, False)
        assert says.format(source) in output
    words = (*words, "--network.mapping_layers", "2", "--schedule.start_resolution", "16")
    code, output = children.run(tmp_path / "log2", train, str(tiny), run, *words, "--init_from", str(trained))
    assert code == 0, output
