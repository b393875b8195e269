"""The metrics: the field's own numbers, from features of any number of processes, never under another's name."""

from __future__ import annotations

import json
import math
import os
import shutil
import urllib.error
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric

from hrgan.apps.evaluate import Settings, evaluate_pair
from hrgan.config import AugmentConfig, Config, DataConfig, EvalConfig, NetworkConfig
from hrgan.data.build import build
from hrgan.data.dataset import Dataset, open_dataset, open_set
from hrgan.data.stream import read_range
from hrgan.errors import DataError, UserError
from hrgan.metrics import evaluation
from hrgan.metrics import extractor as extractors
from hrgan.metrics.evaluation import Evaluated, evaluated
from hrgan.metrics.extractor import RANDOM, Extractor, Settled, make_extractor, settle_weights
from hrgan.metrics.features import Features, Ranks, of_reals
from hrgan.metrics.frechet import (
    GROUPS,
    Moments,
    Reference,
    at_infinity,
    by_count,
    frechet,
    frechet_error,
    frechet_rows,
    infinity_error,
)
from hrgan.metrics.neighbours import nearest
from hrgan.metrics.ppl import path_length
from hrgan.metrics.rows import best_row, provenance, values
from hrgan.metrics.source import (
    PLAIN,
    Part,
    Source,
    draw_labels,
    from_dataset,
    from_folder,
    from_generator,
    mirrored,
    reference,
)
from hrgan.networks import make_generator
from hrgan.pictures import to_float, to_uint8
from tests.conftest import Children, cli

CPU = torch.device("cpu")
RANDOM_CONV = Settled(RANDOM, None, False)


def sets(shards: Path | str) -> Dataset:
    return Dataset((open_set(str(shards)),), (1.0,))


def named(dataset: Dataset, real_set: str) -> Dataset:
    """The same pictures under another hash."""
    (member,) = dataset.members
    return Dataset((member._replace(manifest=replace(member.manifest, real_set=real_set)),), (1.0,))


def small(shards: Path, **eval_fields: Any) -> Config:
    return Config(
        data=DataConfig(path=str(shards), workers=0),
        network=NetworkConfig(resolution=16, latent=8, widths=[8, 8, 8]),
        eval=EvalConfig(**{"num_fake": 70, "kid_subset_size": 40, **eval_fields}),
    )


def random_conv() -> Extractor:
    return make_extractor(RANDOM_CONV, CPU)


def of(
    config: Config, shards: Path, generator: torch.nn.Module | None = None, folders: list[Path] | None = None
) -> Evaluated:
    """A small generator's evaluation."""
    generator = generator or make_generator(config, 16, False, None)
    real = reference(config, sets(shards), 16)
    return evaluated(config, generator, 1.0, real, random_conv(), False, Ranks(), folders or [])


def tensors(images: Tensor, labels: Tensor | None = None, classes: tuple[str, ...] = ()) -> Source:
    """Pictures in memory as a source."""

    def read(start: int, stop: int) -> Any:
        for first in range(start, stop, 10):
            places = torch.arange(first, min(first + 10, stop))
            yield Part(images[places], places, None if labels is None else labels[places])

    return Source("pictures", len(images), (16, 16), 16, read, "", classes)


# Parity with torch-fidelity


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """23 pictures of one kind and 29 of another, in files."""
    root = tmp_path_factory.mktemp("pair")
    random = np.random.default_rng(0)
    for name, count, level in (("a", 23, 90), ("b", 29, 160)):
        (root / name).mkdir()
        for number in range(count):
            coarse = random.integers(0, level, size=(4, 4, 3)).repeat(8, 0).repeat(8, 1)
            pixels = (coarse + random.integers(0, 90, size=(32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root / "a", root / "b"


def random_inception(path: Path) -> Path:
    """FID's Inception with seeded random weights, saved as its own weights are."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inception, "load_state_dict", lambda *arguments: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: None)
        network = Inception("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def random_vgg(path: Path) -> Path:
    import torchvision

    torch.manual_seed(0)
    torch.save(torchvision.models.vgg16().state_dict(), path)
    return path


def tiny_clip(path: Path) -> Path:
    """A CLIP of one layer with seeded random weights, as TorchScript, as its own weights are."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    torch.manual_seed(0)
    network = CLIPVisual(16, 64, 1, 64, 32)
    network.register_parameter("text_projection", torch.nn.Parameter(torch.randn(8, 16)))
    network.forward = lambda x: network.visual(x)  # type: ignore[method-assign]
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 64, 64), strict=False), str(path))  # type: ignore[no-untyped-call]
    return path


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def measured(a: str, b: str, extractor: str, weights: str, out: str) -> int:
    """`hrgan eval A B` in the processes that this is called in; the first writes the row."""
    settings = Settings(
        metrics=("kid", "isc", "prc"), extractor=extractor, weights=weights, kid_subset_size=15, workers=1, bootstrap=0
    )
    as_asked = Settings.of

    def in_small_batches(self: Settings, config: Config) -> Config:  # Several in each process, the last one not full.
        found = as_asked(self, config)
        return replace(found, eval=replace(found.eval, batch=8))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Settings, "of", in_small_batches)
        rows = evaluate_pair(a, b, settings)
    if rows:
        Path(out).write_text(json.dumps(rows[0]))
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "make", "suffix"),
    [
        ("inception", random_inception, {"precision": "_inception", "recall": "_inception"}),
        ("vgg16", random_vgg, {"fid": "_vgg16", "kid": "_vgg16", "isc": "_vgg16"}),
        ("clip-vit-b-32", tiny_clip, dict.fromkeys(("fid", "kid", "isc", "precision", "recall"), "_clip_vit_b_32")),
    ],
    ids=["inception", "vgg16", "clip"],
)
def test_every_metric_equals_torch_fidelity_s_own_on_one_and_on_two_processes(
    name: str,
    make: Callable[[Path], Path],
    suffix: dict[str, str],
    folders: tuple[Path, Path],
    tmp_path: Path,
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch_fidelity

    weights = make(tmp_path / "weights.pt")
    monkeypatch.setenv("HRGAN_CACHE", str(tmp_path / "cache"))
    full = {"inception": "inception-v3-compat"}.get(name, name)
    # Their distance takes the eigenvalues of a matrix without symmetry, of VGG16's 4096 x 4096 for minutes.
    large = name == "vgg16"
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=not large, kid=True, isc=True, prc=True, kid_subset_size=15,
        cuda=False, verbose=False, batch_size=8, feature_extractor=full, feature_extractor_weights_path=str(weights),
        cache_root=str(tmp_path), input1_cache_name="theirs-a", input2_cache_name="theirs-b",
    )  # fmt: skip
    if large:
        a, b = (torch.load(next(tmp_path.rglob(f"theirs-{side}-*features*relu*"))).double() for side in "ab")
        theirs["frechet_inception_distance"] = frechet_of_few(a.numpy(), b.numpy())
    cache = str(tmp_path / "cache")
    for world in (2, 1):  # The second finds what the first kept of the reals.
        out = tmp_path / f"{world}.json"
        words = (*map(str, folders), name, str(weights), str(out))
        code, output = children.run(tmp_path / "log", measured, *words, world=world, HRGAN_CACHE=cache)
        assert code == 0, output
        row = json.loads(out.read_text())
        plain = {"fid": "fd", "kid": "kd"}
        for ours, key in (
            ("fid", "frechet_inception_distance"),
            ("kid", "kernel_inception_distance_mean"),
            ("isc", "inception_score_mean"),
            ("precision", "precision"),
            ("recall", "recall"),
        ):
            found = row[f"{plain.get(ours, ours)}{suffix[ours]}" if ours in suffix else ours]
            assert found == pytest.approx(theirs[key], rel=1e-3), (ours, world)
        assert (row["num_fake"], row["num_real"], row["extractor"]) == (23, 29, full)


def frechet_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """The distance between few features (N, D) and (M, D): the trace of the root of the product of covariances, A^T A
    and B^T B, is the sum of the singular values of A B^T."""
    means = a.mean(0) - b.mean(0)
    a, b = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (a, b))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(means @ means + (a**2).sum() + (b**2).sum() - 2 * overlap)


def test_what_a_training_is_refused_for_does_not_keep_its_checkpoints_from_being_measured() -> None:
    trained = Config(augment=AugmentConfig(ops=["rotate90"]))  # Refused today: it does nothing.
    assert Settings(count=8).of(trained).eval.num_fake == 8
    with pytest.raises(UserError, match=r"eval\.kid_subset_size: 1 is below the least, 2"):
        Settings(kid_subset_size=1).of(trained)


def lengths(shards: str, out: str) -> int:
    """The path length of a small generator by LPIPS, in the processes that this is called in."""
    from hrgan.engine import join

    rank, world, _ = join()
    config = small(Path(shards), num_fake=19, batch=8, metrics=["ppl"])
    generator = make_generator(config, 16, False, torch.bfloat16).eval()
    settled = settle_weights(replace(config.eval, extractor="module:Class"), print)
    assert settled.lpips
    row = path_length(config, generator, 1.0, 16, random_conv(), settled.lpips, Ranks(rank, world))
    if rank == 0:
        Path(out).write_text(json.dumps(row))
    return 0


@pytest.mark.slow
def test_path_length_equals_torch_fidelity_s_own_on_one_and_on_two_processes(
    shards: Path, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_fidelity
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    home = tmp_path / "hub" / "checkpoints"
    home.mkdir(parents=True)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    random_vgg(home / extractors.URL_VGG16.rsplit("/", 1)[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleSimilarityLPIPS, "load_state_dict", lambda *arguments: None)
        patch.setattr("torch_fidelity.sample_similarity_lpips.load_state_dict_from_url", lambda *a, **k: None)
        lpips = SampleSimilarityLPIPS("lpips-vgg16")
    own = {key: value.abs() for key, value in lpips.state_dict().items() if not key.startswith("net.")}
    torch.save(own, home / extractors.URL_VGG16_LPIPS.rsplit("/", 1)[-1])

    config = small(shards)
    generator = make_generator(config, 16, False, None).eval()

    class Model(torch.nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            images: Tensor = generator(z, None, 1.0)
            return images.mul(127.5).add(127.5).clamp(0, 255)

    # torch-fidelity 0.4.0 calls numpy's percentile by a name that numpy 2.4 has dropped.
    percentile = np.percentile
    monkeypatch.setattr(np, "percentile", lambda a, q, interpolation: percentile(a, q, method=interpolation))
    theirs = torch_fidelity.calculate_metrics(
        input1=torch_fidelity.GenerativeModelModuleWrapper(Model(), 8, "normal", 0), input1_model_num_samples=19,
        ppl=True, ppl_sample_similarity_dtype="float32", cuda=False, verbose=False, batch_size=8,
    )["perceptual_path_length_mean"]  # fmt: skip
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        words = (str(shards), str(out))
        code, output = children.run(tmp_path / "log", lengths, *words, world=world, TORCH_HOME=str(tmp_path))
        assert code == 0, output
        row = json.loads(out.read_text())
        assert row["ppl"] == pytest.approx(theirs, rel=1e-3)
        assert (row["extractor"], row["num_fake"], row["num_real"]) == ("lpips-vgg16", 19, 0)


# Closed forms and brute force


def moments_of(features: Tensor) -> Moments:
    moments = Moments.zero(features.shape[1], CPU)
    for part in torch.split(features, 7):
        moments.add(part)
    return moments


def grouped(features: Tensor) -> list[Moments]:
    return [moments_of(features[number::GROUPS]) for number in range(GROUPS)]


def test_moments_are_numpy_s_mean_and_covariance() -> None:
    features = torch.randn(50, 6, dtype=torch.float64)
    moments = moments_of(features)
    np.testing.assert_allclose(moments.mean(), features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(features.numpy(), rowvar=False), rtol=1e-10)


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    torch.manual_seed(0)
    a = torch.randn(200_000, 2, dtype=torch.float64) * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, 3.0])
    b = torch.randn(200_000, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0])
    # |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2 for diagonal covariances
    assert frechet(moments_of(a), moments_of(b)) == pytest.approx(9 + 1 + 1, rel=0.01)


@pytest.mark.parametrize(("count", "other"), [(300, 400), (30, 400), (20, 25)])
def test_the_distances_are_torch_fidelity_s(count: int, other: int) -> None:
    """With more samples than features, with fewer on one side, and with fewer on both."""
    torch.manual_seed(0)
    mix = torch.randn(64, 64, dtype=torch.float64)
    a, b = torch.randn(count, 64, dtype=torch.float64) @ mix + 0.5, torch.randn(other, 64, dtype=torch.float64) @ mix
    sides = [{"mu": rows.mean(0).numpy(), "sigma": np.cov(rows.numpy(), rowvar=False)} for rows in (a, b)]
    expected = fid_statistics_to_metric(*sides, False)["frechet_inception_distance"]
    assert frechet(moments_of(a), moments_of(b)) == pytest.approx(expected, rel=1e-4)
    assert frechet_rows(a, b) == pytest.approx(expected, rel=1e-4)


def test_errors_are_the_spread_of_repeated_draws_and_infinity_is_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, dtype=torch.float64, generator=generator) / 5

    def draw(count: int) -> Tensor:
        return torch.randn(count, 24, dtype=torch.float64, generator=generator) @ mix

    reference = Reference(moments_of(draw(20_000)))
    found, errors, limits, limit_errors = [], [], [], []
    for seed in range(30):
        groups = [reference.project(group) for group in grouped(draw(600) + 0.1)]
        found.append(reference.distance(sum(groups[1:], groups[0])))
        errors.append(frechet_error(groups, reference, 16, seed))
        limits.append(at_infinity(by_count(groups, reference)))
        limit_errors.append(infinity_error(groups, reference))
    assert 0.7 < np.mean(errors) / np.std(found) < 1.5  # type: ignore[arg-type]
    assert 0.6 < np.mean(limit_errors) / np.std(limits) < 2
    truth = reference.distance(reference.project(moments_of(draw(400_000) + 0.1)))
    assert abs(np.mean(limits) - truth) < 0.15 * abs(np.mean(found) - truth)


def brute_kid(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate over all pairs."""
    kernel = lambda x, y: (x @ y / len(x) + 1) ** 3  # noqa: E731
    same = sum(np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b))
    return float(same - 2 * np.mean([kernel(x, y) for x in a for y in b]))


def brute_precision(fake: np.ndarray, real: np.ndarray) -> float:
    """Share of `fake` within the third-neighbour ball of any of `real`."""
    inside = 0
    for point in fake:
        for centre in real:
            radius = sorted(np.linalg.norm(centre - other) for other in real)[3]
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    return inside / len(fake)


class Passing(torch.nn.Module):
    """The first twelve values of a picture are its features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :12].float() / 255


def passing() -> Extractor:
    return Extractor("tests:Passing", "0", "none", 12, Passing(), CPU)


def test_kid_precision_recall_and_authenticity_are_those_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    fakes = torch.randint(0, 200, (23, 3, 16, 16), generator=generator, dtype=torch.uint8)
    reals = torch.randint(40, 256, (31, 3, 16, 16), generator=generator, dtype=torch.uint8)
    fakes[5] = reals[7]  # A copy.
    config = Config(eval=EvalConfig(metrics=["prc", "memorization"]))
    (row,) = evaluation.measure(config, tensors(fakes), tensors(reals), passing(), Ranks(), []).rows
    a, b = ((images.flatten(1)[:, :12].double() / 255).numpy() for images in (fakes, reals))
    # With subsets of all pictures KID is the estimate over all pairs.
    whole = Config(eval=EvalConfig(metrics=["kid"], kid_subset_size=23))
    (kid,) = evaluation.measure(whole, tensors(fakes), tensors(reals[:23]), passing(), Ranks(), []).rows
    assert kid["kd_passing"] == pytest.approx(brute_kid(a, b[:23]), rel=1e-3)
    assert row["precision_passing"] == pytest.approx(brute_precision(a, b), abs=1e-6)
    assert row["recall_passing"] == pytest.approx(brute_precision(b, a), abs=1e-6)
    new = 0
    for point in a:
        distances = [float(np.linalg.norm(point - other)) for other in b]
        near = int(np.argmin(distances))
        new += distances[near] > sorted(float(np.linalg.norm(b[near] - other)) for other in b)[1]
    assert row["authenticity_passing"] == pytest.approx(new / 23, abs=1e-6)
    share = row["precision_passing"]
    assert row["precision_passing_error"] == pytest.approx(math.sqrt(share * (1 - share) / 23), rel=0.1)


@pytest.mark.parametrize("subset", [50, 100])
def test_the_error_of_kid_is_the_spread_of_repeated_draws_also_for_subsets_of_everything(subset: int) -> None:
    found, errors = [], []
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)
        rows = [torch.randn(100, 16, generator=generator) + shift for shift in (0.0, 0.5)]
        sides = [Features([moments_of(side)], side) for side in rows]
        blank = tensors(torch.zeros(100, 3, 16, 16, dtype=torch.uint8))
        pair = evaluation.Pair(blank, blank, *sides, EvalConfig(kid_subset_size=subset), CPU)
        number = evaluation.kid(pair)["kd"]
        found.append(number.value)
        errors.append(number.error)
    assert 0.5 < np.mean(errors) / np.std(found) < 2  # type: ignore[arg-type]


def test_none_or_all_of_some_is_no_certainty() -> None:
    assert evaluation.share_error(0.0, 20) == pytest.approx(evaluation.share_error(1.0, 20))
    assert evaluation.share_error(0.0, 20) > 0.03
    assert evaluation.share_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)


def test_copies_are_not_authentic_and_new_pictures_of_the_kind_are_half_so() -> None:
    generator = torch.Generator().manual_seed(0)
    reals = torch.randn(400, 8, generator=generator)
    assert nearest(reals[:50], reals, CPU).authenticity == 0
    assert 0.4 < nearest(torch.randn(400, 8, generator=generator), reals, CPU).authenticity < 0.75
    # Also of a picture that the set has more often than others are looked for, or of nothing else.
    often = torch.cat([reals, reals[:1].expand(20, -1)])
    assert nearest(reals[:1] + 1e-4, often, CPU).authenticity == 0
    assert nearest(reals[:1] * 50, often[400:], CPU).authenticity == 1
    close = (reals[1:] - reals[0]).norm(dim=1).min()
    beyond = reals[:1] + 1.01 * close / 8**0.5
    lone = torch.cat([reals[:1].expand(20, -1), reals[0] + torch.full((1, 8), float(2 * close))])
    assert nearest(beyond, lone, CPU).ratio.item() == pytest.approx(1.01 / (2 * 8**0.5), rel=1e-3)
    # And of a picture that the set has several times.
    twice = torch.cat([reals, reals[:5], reals[:5]])
    assert nearest(reals[:5] + 1e-4, twice, CPU).authenticity == 0
    far = nearest(reals[3:4] + 1e-4, reals, CPU)
    assert (far.reals[0, 0], far.reals.shape) == (3, (1, 5))


def test_distances_by_class_are_those_of_each_class_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8) for _ in range(2)]
    # The two sides number the classes differently, and each has one of its own.
    names = [("hat", "shoe", "sock"), ("cap", "hat", "shoe")]
    labels = [torch.arange(60) % 3, torch.arange(60) % 3]
    sides = [tensors(*pair) for pair in zip(images, labels, names, strict=True)]
    config = Config(eval=EvalConfig(metrics=["class_fid"]))
    (row,) = evaluation.measure(config, sides[0], sides[1], passing(), Ranks(), []).rows
    features = [(side.flatten(1)[:, :12].double() / 255) for side in images]
    expected = {
        "hat": frechet(moments_of(features[0][labels[0] == 0]), moments_of(features[1][labels[1] == 1])),
        "shoe": frechet(moments_of(features[0][labels[0] == 1]), moments_of(features[1][labels[1] == 2])),
    }
    assert row["class_fd_passing_by_class"] == pytest.approx(expected, rel=1e-4)
    assert row["class_fd_passing"] == pytest.approx(sum(expected.values()) / 2, rel=1e-4)
    assert 0 < row["class_fd_passing_error"] < row["class_fd_passing"]


# What a row says


def test_without_inception_the_number_is_never_called_fid(shards: Path) -> None:
    (row,) = of(small(shards), shards).rows
    assert "fid" not in row
    assert row["fd_random"] > row["fd_random_floor"] > 0
    numbers = {"fd_random", "fd_random_error", "fd_random_floor"}
    assert set(row) == numbers | {
        "resolution", "extractor", "extractor_sha256", "resize", "num_fake", "num_real", "real_set", "mirror",
        "truncation", "seed", "labels", "seconds",
    }  # fmt: skip
    assert (row["num_fake"], row["num_real"], row["truncation"], row["labels"]) == (70, 96, 1.0, "none")


def test_every_metric_has_an_error_and_is_named_by_its_extractor(shards: Path) -> None:
    metrics = ["fid_infinity", "kid", "isc", "prc", "memorization", "ppl"]
    found = of(small(shards, metrics=metrics), shards)
    row, lengths = found.rows
    names = ("fd", "fd_infinity", "kd", "isc", "precision", "recall", "authenticity")
    for name in names:
        assert row[f"{name}_random_error"] is not None, name
    assert set(values(row)) == {f"{name}_random" for name in names}
    assert list(map(int, row["fd_random_at"]))[-1] == 70
    assert row["fd_infinity_random"] < row["fd_random"]
    assert lengths["ppl_random"] > 0
    assert found.neighbours is not None
    assert found.neighbours.shape == (3, 8 * 66 - 2, 6 * 66 - 2)


def test_numbers_of_another_provenance_are_never_best_or_comparable() -> None:
    def row(nimg: int, value: float | None, resolution: int = 32, **other: Any) -> dict[str, Any]:
        about = {"extractor": "a", "num_fake": 100, "num_real": 50, "mirror": False}
        return {"nimg": nimg, "resolution": resolution, "fid": value, "fid_floor": 1.0, **about, **other}

    assert best_row([]) is None
    assert best_row([row(1, 0.1, 16), row(2, 9.0), row(3, 8.0), row(4, None)]) == row(3, 8.0)
    fewer = [row(2, 9.0), row(3, 8.0), row(5, 1.0, num_fake=10)]
    assert best_row(fewer) == row(3, 8.0)  # Most rows have 100.
    assert best_row([*fewer, row(6, 2.0, num_fake=10)]) == row(5, 1.0, num_fake=10)  # As many: those measured last.
    for key in ("extractor", "num_fake", "num_real", "mirror", "resolution", "real_set", "truncation", "resize"):
        assert provenance(row(1, 1.0)) != provenance({**row(1, 1.0), key: "other"})
    assert provenance(row(1, 1.0)) == provenance({**row(2, 3.0), "seconds": 9, "seed": 8})


def test_a_broken_generator_gets_no_number(shards: Path) -> None:
    config = small(shards, metrics=["kid", "isc", "prc", "memorization", "fid_infinity", "ppl"])
    generator = make_generator(config, 16, False, None)
    with torch.no_grad():
        generator.to_rgb["16"].bias.fill_(float("nan"))
    found = of(config, shards, generator)
    row, lengths = found.rows
    assert found.problem is not None
    assert found.problem.startswith("the generator: features that are NaN or infinite, so there is no number")
    assert {value.value for value in values(row).values()} == {None}
    assert lengths["ppl_random"] is None
    assert row["fd_random_floor"] > 0
    json.dumps([row, lengths], allow_nan=False)


def test_evaluation_leaves_the_training_mode_and_the_random_state(shards: Path) -> None:
    config = small(shards)
    generator = make_generator(config, 16, False, None).train()
    state = torch.get_rng_state()
    of(config, shards, generator)
    assert generator.training
    assert torch.equal(state, torch.get_rng_state())


# Sources


def test_labels_are_drawn_as_often_as_in_the_reals_whatever_the_processes() -> None:
    labels = draw_labels([0.7, 0.0, 0.3], 0, 2000, 5)
    parts = [draw_labels([0.7, 0.0, 0.3], start, stop, 5) for start, stop in ((0, 3), (3, 2000))]
    assert torch.equal(labels, torch.cat(parts))
    counts = torch.bincount(labels, minlength=3)
    assert counts[1] == 0
    assert abs(int(counts[0]) - 1400) < 3 * math.sqrt(2000 * 0.7 * 0.3)


def test_a_conditional_generator_is_given_these_labels(shards: Path) -> None:
    seen = []

    class Conditional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, z: Tensor, labels: Tensor | None, alpha: float) -> Tensor:
            seen.append(labels)
            return torch.zeros(len(z), 3, 16, 16)

    source = from_generator(small(shards), Conditional(), 1.0, 16, "it", {"hat": 0.5, "shoe": 0.5})
    parts = list(source.read(0, 70))
    assert source.classes == ("hat", "shoe")
    assert source.labels == "drawn as often as in the reals"
    assert torch.equal(torch.cat([part.labels for part in parts]), torch.cat(seen))
    assert set(torch.cat(seen).tolist()) == {0, 1}


def test_a_mirrored_reference_has_each_picture_flipped_too_on_any_number_of_processes(shards: Path) -> None:
    config = small(shards)
    plain = from_dataset(config, sets(shards), 16)
    both = mirrored(plain)
    images = torch.cat([part.images for part in plain.read(0, 96)])
    parts = [*both.read(0, 65), *both.read(65, 192)]  # A border in the middle of a pair.
    assert torch.cat([part.places for part in parts]).tolist() == list(range(192))
    assert torch.equal(torch.cat([part.images for part in parts])[0::2], images)
    assert torch.equal(torch.cat([part.images for part in parts])[1::2], images.flip(3))
    reals = of_reals(both, random_conv(), Ranks(), [], rows=True)
    # A picture and its flipped copy are in the same half, or the floor would be that of copies.
    assert (reals.count, reals.half(0, both).count) == (192, 96)
    assert len(reals.half(0, both).rows) == 96  # type: ignore[arg-type]
    assert reals.rows is not None
    even = reals.rows[torch.arange(192) // 2 % 2 == 0].double()
    torch.testing.assert_close(reals.groups[0].total, even.sum(0))
    assert frechet(*reals.groups) > 0.1 * frechet(*of_reals(plain, random_conv(), Ranks(), []).groups)


def test_grey_and_transparent_pictures_look_to_extractors_as_they_do_to_people() -> None:
    extractor = random_conv()
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    torch.testing.assert_close(extractor.features(grey), extractor.features(grey.expand(-1, 3, -1, -1)))
    clear = torch.zeros(1, 4, 16, 16, dtype=torch.uint8)
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    torch.testing.assert_close(extractor.features(clear), extractor.features(white))


def test_pictures_round_to_the_nearest_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]
    deep = torch.tensor([100, 1100, 2100], dtype=torch.uint16).view(1, 1, 1, 3)
    assert to_uint8(to_float(deep, (100, 2100))).flatten().tolist() == [0, 128, 255]


def test_places_of_a_mix_are_those_that_it_is_read_by(shards: Path, tmp_path: Path) -> None:
    build("drawn:60", tmp_path / "other", 32, workers=1, seed=5)
    config = small(shards)
    path = {str(shards): 0.5, str(tmp_path / "other"): 0.5}
    dataset = open_dataset(replace(config.data, path=path))
    source = from_dataset(config, dataset, 16)
    parts = list(source.read(0, source.count))
    images = torch.cat([part.images for part in parts])
    assert torch.cat([part.places for part in parts]).tolist() == list(range(source.count))
    assert torch.cat([part.places for part in source.read(30, 50)]).tolist() == list(range(30, 50))
    assert all(torch.equal(source.picture(place), images[place]) for place in (0, 37, source.count - 1))
    twice = torch.cat([part.places for part in mirrored(source).read(0, 2 * source.count)])
    assert twice.tolist() == list(range(2 * source.count))


def test_a_folder_read_with_other_values_is_another_reference(tmp_path: Path) -> None:
    for name in "ab":
        Image.fromarray(np.full((16, 16), 3000, np.uint16)).save(tmp_path / f"{name}.png")
    form = replace(PLAIN, channels=1, bits=16)
    made = [from_folder(Config(), tmp_path, form, values) for values in ((0, 65535), (0, 4095))]
    assert made[0].identity != made[1].identity
    assert made[0].picture(0).float().mean() < made[1].picture(0).float().mean()


def test_an_evaluation_s_progress_only_grows_path_length_included(shards: Path) -> None:
    shares: list[float] = []
    config = small(shards, metrics=["ppl"], batch=8)
    generator = make_generator(config, 16, False, None)
    real = reference(config, sets(shards), 16)
    evaluated(config, generator, 1.0, real, random_conv(), False, Ranks(), [], shares.append)
    assert shares == sorted(shares)
    assert max(shares[:-9]) < 0.5 <= shares[-9]
    assert shares[-1] == pytest.approx((1 + 8 / 9) / 2)


def test_path_lengths_of_other_shapes_are_not_compared(shards: Path) -> None:
    rows = []
    for grid in ([4, 4], [4, 6]):
        config = small(shards, metrics=["ppl"], num_fake=4)
        config = replace(config, network=replace(config.network, grid=grid))
        generator = make_generator(config, 16, False, None).eval()
        rows.append(path_length(config, generator, 1.0, 16, random_conv(), False, Ranks()))
    assert [row["resize"] for row in rows] == ["bilinear-antialias-64", "bilinear-antialias-64 of 16x24"]
    assert provenance(rows[0]) != provenance(rows[1])


# Statistics of the reals


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls that read a set."""
    calls: list[Any] = []

    def counting(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return read_range(*arguments, **keywords)

    monkeypatch.setattr("hrgan.metrics.source.read_range", counting)
    return calls


def test_real_statistics_are_kept_and_made_anew_when_anything_differs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, dataset, extractor = counted(monkeypatch), sets(shards), random_conv()

    def made(
        rows: bool = False, dataset: Dataset = dataset, resolution: int = 16, sha256: str = "", **fields: Any
    ) -> bool:
        """Whether the statistics were made anew."""
        before = len(calls)
        source = reference(small(shards, **fields), dataset, resolution)
        of_reals(source, replace(extractor, sha256=sha256), Ranks(), [tmp_path], rows=rows)
        return len(calls) > before

    assert made()
    assert not made()
    assert made(rows=True)
    assert not made(rows=True)
    assert not made()
    assert made(resolution=32)
    assert made(num_real=50)
    assert made(mirror=True)
    assert made(mirror=True, num_real=48)  # As many pictures as there are without.
    assert made(dataset=named(dataset, "other"))
    assert made(sha256="other")
    assert not made(num_real=50)
    source = reference(small(shards), dataset, 16)
    plain = replace(extractor, sha256="")
    kept, fresh = (of_reals(source, plain, Ranks(), folders, rows=True) for folders in ([tmp_path], []))
    for half, other in zip(kept.groups, fresh.groups, strict=True):
        assert all(map(torch.equal, vars(half).values(), vars(other).values()))
    assert kept.rows is not None
    assert torch.equal(kept.rows, fresh.rows)  # type: ignore[arg-type]
    assert [int(group.count) for group in kept.groups] == [48, 48]


def test_a_second_evaluation_pays_nothing_for_the_reals(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(shards, metrics=["kid", "prc"])
    first = of(config, shards, folders=[tmp_path]).rows[0]
    calls, distances = counted(monkeypatch), []
    fid = evaluation.METRICS["fid"]
    monkeypatch.setitem(evaluation.METRICS, "fid", (lambda pair: distances.append(1) or fid[0](pair), fid[1]))
    second = of(config, shards, folders=[tmp_path]).rows[0]
    assert calls == []
    assert len(distances) == 1  # The distance itself; the floor was kept.
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_damaged_statistics_are_made_anew_and_said(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, extractor = reference(small(shards), sets(shards), 16), random_conv()
    good = of_reals(source, extractor, Ranks(), [tmp_path])
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    again = of_reals(source, extractor, Ranks(), [tmp_path])
    assert "is damaged" in capsys.readouterr().err
    assert torch.equal(good.groups[0].outer, again.groups[0].outer)
    assert len(path.read_bytes()) > 1000


def test_a_real_sample_that_cannot_be_read_is_left_out_counted_and_not_kept(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy, ignore=shutil.ignore_patterns("stats"))
    tar = sorted((copy / "16").glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[600] ^= 1  # In the first picture: the first header takes 512 bytes.
    tar.write_bytes(content)
    config = small(copy, metrics=["kid"])
    (row,) = of(config, copy, folders=[tmp_path / "cache"]).rows
    assert row["num_real"] == 95
    assert "sample 000000000: crc32 is" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    strict = replace(config, data=replace(config.data, max_bad=0.0))
    with pytest.raises(DataError, match=r"1 of 96 pictures cannot be read, more than 0 of them"):
        of(strict, copy)


@pytest.mark.slow
def test_fid_of_50_000_pictures_stays_under_a_gigabyte(tmp_path: Path, children: Children) -> None:
    code, output = children.run(tmp_path / "log", many_features, str(tmp_path / "peak"))
    assert code == 0, output
    assert int((tmp_path / "peak").read_text()) < 1000, output


def many_features(out: str) -> int:
    """50,000 features of 2,048 through `measure`; the most memory that this took beyond the imports, in MB."""

    def resident() -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
        sizes = {line[0].rstrip(":"): line[1] for line in lines if line[-1] == "kB"}
        return {name: int(sizes[name]) * 1024 // 10**6 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}

    before = resident()

    class Wide(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).float().repeat(1, 3)[:, :2048]

    blank = torch.randint(0, 256, (100, 3, 16, 16), dtype=torch.uint8)

    def read(start: int, stop: int) -> Any:
        for first in range(start, stop, 100):
            yield Part(blank, torch.arange(first, first + 100), None)

    sides = [Source("pictures", count, (16, 16), 16, read, "") for count in (50_000, 2000)]
    config = Config(eval=EvalConfig(bootstrap=2))
    evaluation.measure(config, sides[0], sides[1], Extractor("t:Wide", "", "", 2048, Wide(), CPU), Ranks(), [])
    after = resident()
    print(before, after)
    # Code of the libraries counts where it is first used: how much comes in with it is the page cache's affair.
    code = after["RssFile"] - before["RssFile"]
    Path(out).write_text(str(after["VmHWM"] - before["VmRSS"] - code))
    return 0


# Two sides at the command line


def run_cli(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli("eval", *map(str, words), "--workers", "0") == 0
    row: dict[str, Any] = json.loads(capsys.readouterr().out)
    return row


def test_any_two_sides_are_compared(
    shards: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HRGAN_CACHE", str(tmp_path / "cache"))
    own = ("--extractor", "random")
    row = run_cli(capsys, *folders, *own)
    assert (row["num_fake"], row["num_real"], row["resolution"]) == (23, 29, 32)
    assert row["fd_random"] > 1.5 * row["fd_random_floor"]
    assert run_cli(capsys, folders[1], folders[1], *own)["fd_random"] == pytest.approx(0, abs=1e-3)
    row = run_cli(capsys, shards, shards, *own, "--resolution", "16", "--count", "50")
    assert (row["resolution"], row["num_fake"], row["num_real"]) == (16, 50, 96)
    row = run_cli(capsys, folders[0], shards, *own)  # Brought to the set's largest tier.
    assert (row["resolution"], row["real_set"]) == (32, sets(shards).real_set)
    assert run_cli(capsys, folders[0], folders[1], *own, "--resolution", "16")["resolution"] == 16
    assert run_cli(capsys, folders[0], shards, *own, "--mirror")["num_real"] == 192
    assert run_cli(capsys, shards, folders[0], *own)["num_real"] == 23


def test_bad_sides_get_one_line(
    shards: Path, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--extractor", "random", "--workers", "0")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "one" / "a.png")
    (tmp_path / "mixed").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "mixed" / "a.png")
    Image.new("RGB", (48, 32)).save(tmp_path / "mixed" / "b.png")
    (tmp_path / "large").mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(tmp_path / "large" / f"{name}.png")
    (tmp_path / "broken").mkdir()
    for name in "ab":
        (tmp_path / "broken" / f"{name}.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in "ab":
        Image.new("RGB", (32, 32)).save(tmp_path / "two" / f"{name}.png")
    a, b = folders
    for words, code, line in (
        ((a,), 2, "--data: needed to measure"),
        ((tmp_path / "one", b), 4, f"{tmp_path / 'one'}: 1 picture, expected at least 2"),
        ((tmp_path / "empty", b), 2, "neither a run, a checkpoint, shards nor a folder with pictures"),
        ((tmp_path / "mixed", b), 2, f"{tmp_path / 'mixed' / 'b.png'}: 48x32 pixels, but"),
        ((tmp_path / "large", b), 2, "sizes that differ: 64x64 of"),
        ((tmp_path / "broken", b), 4, "the first picture of the folder must be readable"),
        ((a, shards, "--resolution", "64"), 2, "sizes that differ: 64² is asked for"),
        ((a, b, "--metrics", "kid"), 2, "kid needs at least 1000 pictures, but there are 23 of"),
        ((a, b, "--metrics", "isc", "--count", "5"), 2, "isc needs at least 10 pictures, but there are 5 of"),
        ((a, b, "--metrics", "ppl"), 2, "ppl needs a generator"),
        ((a, b, "--metrics", "class_fid"), 2, "class_fid needs classes that both sides have"),
        ((a, b, "--metrics", "fod"), 2, "eval.metrics: fod is none of"),
        ((a, b, "--extractor", "incepton"), 2, "nearest: inception"),
        ((a, b, "--data", shards), 2, "--data: says nothing where the reference is named"),
        ((a, "--watch"), 2, "holds no run"),
        ((a, b, "--watch"), 2, "a run that is watched is compared with the set that it was trained on"),
        ((a, b, "--count", "1"), 2, "--count: 1 is below the least, 2"),
        ((a, b, "--metrics", "all,kit"), 2, "eval.metrics: kit is none of"),
        ((a, tmp_path / "two"), 2, "fid needs at least 4 pictures, but there are 2 of"),
        ((a, b, "--picture", tmp_path / "no" / "x.png"), 2, f"--picture: there is no folder {tmp_path / 'no'}"),
        ((a, b, "--weights", tmp_path / "w.pth"), 2, "says nothing to the random extractor; leave it out"),
    ):
        assert cli("eval", *map(str, words), *(own if "--extractor" not in words else own[2:])) == code, words
        error = capsys.readouterr().err
        assert line in error, words
        assert "Traceback" not in error


# Extractors and their weights, settled at launch


def offline(*arguments: Any, **keywords: Any) -> None:
    raise urllib.error.URLError("Network is unreachable")


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch's cache is, empty and not to be filled."""
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["inception", "vgg16", "clip-vit-b-32"])
def test_an_extractor_without_weights_is_refused_with_the_remedy(name: str, no_network: Path) -> None:
    with pytest.raises(
        UserError, match=r"fetch http.* elsewhere and put it at .*checkpoints/.*, or name it with --eval.weights FILE"
    ):
        settle_weights(EvalConfig(extractor=name), print)


def test_ppl_without_lpips_is_refused_with_the_remedy(no_network: Path) -> None:
    with pytest.raises(UserError, match=r"eval.metrics: ppl needs LPIPS's weights.*vgg16-397923af.pth"):
        settle_weights(EvalConfig(extractor="module:Class", metrics=["ppl"]), print)
    assert settle_weights(EvalConfig(extractor="random", metrics=["ppl"]), print) == Settled(RANDOM, None, False)


def test_dinov2_is_taken_from_torch_s_cache_alone(no_network: Path) -> None:
    with pytest.raises(UserError, match=r"facebookresearch_dinov2_main is missing.*torch.hub.load"):
        settle_weights(EvalConfig(extractor="dinov2-vit-s-14"), print)
    code = no_network / "facebookresearch_dinov2_main"
    code.mkdir()
    weights = no_network / "checkpoints" / "dinov2_vits14_pretrain.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    assert settle_weights(EvalConfig(extractor="dinov2-vit-s-14"), print) == Settled("dinov2-vit-s-14", weights, False)


def test_dinov2_in_torch_s_cache_is_used(no_network: Path) -> None:
    """Its code there is of a small network, as its own cannot be had without a network."""
    code = no_network / "facebookresearch_dinov2_main"
    code.mkdir()
    (code / "hubconf.py").write_text(
        "import torch\n"
        "def dinov2_vits14(**keywords):\n"
        "    return torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten())\n"
    )
    weights = no_network / "checkpoints" / "dinov2_vits14_pretrain.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    extractor = make_extractor(settle_weights(EvalConfig(extractor="dinov2-vit-s-14"), print), CPU)
    assert (extractor.size, extractor.called("fd"), extractor.resize) == (48, "fd_dinov2_vit_s_14", "tf1-bilinear-224")


def test_auto_without_weights_goes_on_and_says_so_once(no_network: Path) -> None:
    said: list[str] = []
    assert settle_weights(EvalConfig(extractor="auto"), said.append) == RANDOM_CONV
    assert sum("fd_random" in line for line in said) == 1


def test_weights_that_are_there_are_used(inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled = Settled("inception-v3-compat", inception, False)
    assert settle_weights(EvalConfig(extractor="auto", weights=str(inception)), print) == settled
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    cached = extractors.cached_weights()
    cached.parent.mkdir()
    cached.write_bytes(inception.read_bytes())
    assert settle_weights(EvalConfig(extractor="inception"), print).weights == cached


@pytest.mark.parametrize("content", [b"not weights", None])
@pytest.mark.parametrize("name", ["auto", "vgg16"])
def test_a_file_that_is_no_weights_is_refused_at_launch(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save({"other.weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"eval\.weights"):
        settle_weights(EvalConfig(extractor=name, weights=str(path)), print)


def test_weights_of_the_wrong_shapes_are_refused_at_launch(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": torch.zeros(1), "classifier.6.weight": torch.zeros(1)}, path)
    settled = settle_weights(EvalConfig(extractor="vgg16", weights=str(path)), print)
    with pytest.raises(UserError, match=r"eval.weights: .*weights.pth is not vgg16's"):
        make_extractor(settled, CPU)


def test_the_random_extractor_is_the_same_network_everywhere() -> None:
    assert random_conv().sha256 == "29adc89956443a04ac1eed84e884c8fba8fa36a17f8f5712d28efbcca4ffd5e2"


class Means(torch.nn.Module):
    """A user's own extractor: the mean of each channel and of its square."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() / 255 * self.scale
        return torch.cat([x.mean((2, 3)), x.square().mean((2, 3))], 1)


class Coarse(torch.nn.Module):
    """Takes pictures of 100 pixels and more, and has weights that numpy has no type for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x.float(), 100).flatten(1)


class Unseeded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.mix(x.float().mean((2, 3)))
        return found


def with_unseeded(a: str, b: str) -> int:
    torch.manual_seed(int(os.environ["RANK"]))
    return cli("eval", a, b, "--extractor", "tests.test_metrics:Unseeded", "--workers", "0")


def test_processes_with_different_extractors_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, children: Children
) -> None:
    code, output = children.run(tmp_path / "log", with_unseeded, *map(str, folders), world=2)
    assert (children.codes, code) == ([2, 2], 2), output
    assert "has other weights" in output
    assert "Traceback" not in output


class Wrong(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_a_user_s_own_extractor_is_a_class_or_a_torchscript(tmp_path: Path, shards: Path) -> None:
    path = tmp_path / "means.pt"
    torch.jit.save(torch.jit.script(Means()), str(path))  # type: ignore[no-untyped-call]
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    found = {}
    for name in ("tests.test_metrics:Means", str(path)):
        extractor = make_extractor(settle_weights(EvalConfig(extractor=name), print), CPU)
        assert (extractor.size, extractor.called("fd"), len(extractor.sha256)) == (6, "fd_means", 64)
        assert extractor.name == name
        found[name] = extractor.features(images)
    torch.testing.assert_close(*found.values())
    # Other weights are another extractor.
    torch.save({"scale": torch.tensor(3.0)}, tmp_path / "weights.pth")
    config = EvalConfig(extractor="tests.test_metrics:Means", weights=str(tmp_path / "weights.pth"))
    other = make_extractor(settle_weights(config, print), CPU)
    assert other.sha256 != make_extractor(settle_weights(replace(config, weights=None), print), CPU).sha256
    assert not torch.allclose(other.features(images), found[str(path)])


def test_a_class_whose_code_changes_is_another_extractor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = set()
    for name, scale in (("one_means", 1), ("other_means", 100)):
        (tmp_path / f"{name}.py").write_text(
            "import torch\n\nclass Net(torch.nn.Module):\n"
            f"    def forward(self, x):\n        return {scale} * x.float().mean((2, 3))\n"
        )
        digests.add(make_extractor(settle_weights(EvalConfig(extractor=f"{name}:Net"), print), CPU).sha256)
    assert len(digests) == 2


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_few_pictures_have_numbers_where_they_can_and_a_line_where_not(
    count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    many, few = (torch.randint(0, 256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8) for n in (20, count))
    config = Config(eval=EvalConfig())
    (row,) = evaluation.measure(config, tensors(few), tensors(many), passing(), Ranks(), []).rows
    assert row["fd_passing"] > 0
    assert (row["fd_passing_error"] is None) == (count < 4)
    config = Config(eval=EvalConfig(metrics=["prc"]))
    least = "fid needs at least 4" if count < 4 else "prc needs at least 8"
    with pytest.raises(UserError, match=f"{least} pictures, but there are {count} of pictures"):
        evaluation.measure(config, tensors(many), tensors(few), passing(), Ranks(), [])
    assert capsys.readouterr().err == ""


def test_too_few_readable_reals_leave_the_other_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    fakes, reals = (torch.randint(0, 256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8) for n in (20, 9))

    def read(start: int, stop: int) -> Any:  # Every second one is damaged, as are all odd ones.
        places = torch.arange(start, stop)[::2]
        yield Part(reals[places], places, None, tuple(f"{place}: damaged" for place in range(start + 1, stop, 2)))

    damaged = replace(tensors(reals), read=read, max_bad=0.5)
    config = Config(eval=EvalConfig(metrics=["prc"]))
    (row,) = evaluation.measure(config, tensors(fakes), damaged, passing(), Ranks(), []).rows
    assert (row["num_real"], row["lost_reals"]) == (5, 4)
    assert row["fd_passing"] > 0
    assert row["fd_passing_floor"] is None
    assert (row["precision_passing"], row["recall_passing_floor"]) == (None, None)
    assert "no prc needs at least 8 pictures, but there are 5 of pictures" in capsys.readouterr().err
    assert next(name for name in row if f"{name}_floor" in row) == "fd_passing"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tests.test_metrics:Nothing", "cannot be made"),
        ("no_such_module:Means", "cannot be made"),
        ("tests.test_metrics:Wrong", r"makes \(2, 3, 64, 64\) of 2 pictures, expected finite features \(2, D\)"),
        ("torch.nn:Linear", "cannot be made"),
        ("pathlib:Path", "is no torch.nn.Module"),
        ("tests.test_metrics:Coarse", r"cannot take \(2, 3, 64, 64\)"),
        ("missing.pt", "cannot be read as TorchScript"),
    ],
)
def test_an_extractor_that_does_not_fit_is_refused_at_launch(name: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        make_extractor(settle_weights(EvalConfig(extractor=name), print), CPU)
