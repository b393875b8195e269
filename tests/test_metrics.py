"""The metric: the field's own number, from features of any number of processes, never under another's name."""

from __future__ import annotations

import json
import shutil
import urllib.error
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hrgan.config import Config, DataConfig, EvalConfig, NetworkConfig
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.stream import read_range
from hrgan.errors import DataError, UserError
from hrgan.metrics import extractor as extractors
from hrgan.metrics.extractor import make_extractor, settle_weights
from hrgan.metrics.frechet import Moments, evaluate, frechet, real_moments
from hrgan.networks import make_generator
from hrgan.noise import latents
from hrgan.pictures import to_float, to_uint8
from tests.conftest import Children

CPU = torch.device("cpu")


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
        eval=EvalConfig(num_fake=70, **eval_fields),
    )


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def measured(shards: str, weights: str, out: str) -> int:
    """`evaluate` in the processes that this is called in; the first writes the row."""
    from hrgan.engine import Engine

    config = small(Path(shards))
    engine = Engine(config)
    generator = make_generator(config, 16, False, None)
    dataset = sets(shards)
    row = evaluate(config, dataset, generator, 1.0, make_extractor(Path(weights), CPU), engine.rank, engine.world, [])
    if engine.rank == 0:
        Path(out).write_text(json.dumps(row))
    engine.close()
    return 0


@pytest.mark.slow
def test_fid_equals_torch_fidelity_s_own_on_one_and_on_two_processes(
    inception: Path, shards: Path, tmp_path: Path, children: Children
) -> None:
    import torch_fidelity

    config = small(shards)
    z = latents(0, 70, 8, config.seed, "eval")
    with torch.no_grad():
        fakes = to_uint8(make_generator(config, 16, False, None)(z, None, 1.0))
    reals = torch.cat([batch.images for batch in read_range(sets(shards), 16, 0, 96)])

    class Pictures(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, images: torch.Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(fakes), input2=Pictures(reals.contiguous()), fid=True, cuda=False, cache=False, verbose=False,
        feature_extractor_weights_path=str(inception),
    )["frechet_inception_distance"]  # fmt: skip
    for world in (1, 2):
        out = tmp_path / f"{world}.json"
        code, output = children.run(tmp_path / "log", measured, str(shards), str(inception), str(out), world=world)
        assert code == 0, output
        row = json.loads(out.read_text())
        assert row["fid"] == pytest.approx(theirs, rel=1e-3)
        assert (row["num_fake"], row["num_real"], row["extractor"]) == (70, 96, "inception-v3-compat")


def test_moments_are_numpy_s_mean_and_covariance() -> None:
    features = torch.randn(50, 6, dtype=torch.float64)
    moments = Moments.zero(6, CPU)
    for part in features.split(7):
        moments.add(part)
    statistics = moments.statistics()
    np.testing.assert_allclose(statistics["mu"], features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics["sigma"], np.cov(features.numpy(), rowvar=False), rtol=1e-10)


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    torch.manual_seed(0)
    a = torch.randn(200_000, 2, dtype=torch.float64) * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, 3.0])
    b = torch.randn(200_000, 2, dtype=torch.float64) * torch.tensor([2.0, 1.0])
    sets = [Moments.zero(2, CPU) for _ in range(2)]
    for moments, features in zip(sets, (a, b), strict=True):
        moments.add(features)
    # |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2 for diagonal covariances
    assert frechet(*sets) == pytest.approx(9 + 1 + 1, rel=0.01)


def test_without_inception_the_number_is_never_called_fid(shards: Path) -> None:
    config = small(shards, extractor="random")
    generator = make_generator(config, 16, False, None)
    extractor = make_extractor(settle_weights(config.eval, print), CPU)
    row = evaluate(config, sets(shards), generator, 1.0, extractor, 0, 1, [])
    assert "fid" not in row
    assert row["fd_random"] > row["fd_random_floor"] > 0
    provenance = {"extractor", "extractor_sha256", "resize", "num_fake", "num_real", "real_set", "seconds"}
    assert set(row) == {"resolution", "fd_random", "fd_random_floor"} | provenance


def test_the_random_extractor_is_the_same_network_everywhere() -> None:
    extractor = make_extractor(None, CPU)
    assert extractor.sha256 == "29adc89956443a04ac1eed84e884c8fba8fa36a17f8f5712d28efbcca4ffd5e2"
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    torch.testing.assert_close(extractor.features(grey), extractor.features(grey.expand(-1, 3, -1, -1)))


def test_evaluation_leaves_the_training_mode_and_the_random_state(shards: Path) -> None:
    config = small(shards, extractor="random")
    generator = make_generator(config, 16, False, None).train()
    state = torch.get_rng_state()
    evaluate(config, sets(shards), generator, 1.0, make_extractor(None, CPU), 0, 1, [])
    assert generator.training
    assert torch.equal(state, torch.get_rng_state())


def test_a_broken_generator_gets_no_number(shards: Path) -> None:
    config = small(shards, extractor="random")
    generator = make_generator(config, 16, False, None)
    with torch.no_grad():
        generator.to_rgb["16"].bias.fill_(float("nan"))
    extractor = make_extractor(None, CPU)
    row = evaluate(config, sets(shards), generator, 1.0, extractor, 0, 1, [])
    assert row["fd_random"] is None
    assert row["fd_random_floor"] > 0


def test_real_statistics_are_cached_and_rebuilt_when_anything_differs(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments)
        return read_range(*arguments, **keywords)

    monkeypatch.setattr("hrgan.metrics.frechet.read_range", counting)
    dataset, extractor = sets(shards), make_extractor(None, CPU)

    def made(
        resolution: int = 16,
        count: int | None = None,
        real_set: str = dataset.real_set,
        sha256: str = extractor.sha256,
    ) -> bool:
        """Whether the statistics were made anew."""
        before = len(calls)
        config = small(shards, num_real=count)
        real_moments(
            config,
            named(dataset, real_set),
            resolution,
            replace(extractor, sha256=sha256),
            0,
            1,
            [tmp_path],
        )
        return len(calls) > before

    assert made()
    assert not made()
    assert made(resolution=32)
    assert made(count=50)
    assert made(real_set="other")
    assert made(sha256="other")
    assert not made(count=50)
    cached = real_moments(small(shards), dataset, 16, extractor, 0, 1, [tmp_path])
    fresh = real_moments(small(shards), dataset, 16, extractor, 0, 1, [])
    for half in ("even", "odd"):
        assert all(map(torch.equal, vars(getattr(cached, half)).values(), vars(getattr(fresh, half)).values()))
    assert (cached.even.count, cached.odd.count) == (48, 48)


def test_a_real_sample_that_cannot_be_read_is_left_out_counted_and_not_cached(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    tar = sorted((copy / "16").glob("*.tar"))[0]
    content = bytearray(tar.read_bytes())
    content[600] ^= 1  # In the first picture: the first header takes 512 bytes.
    tar.write_bytes(content)
    config, dataset = small(copy, extractor="random"), sets(copy)
    generator, extractor = make_generator(config, 16, False, None), make_extractor(None, CPU)
    row = evaluate(config, dataset, generator, 1.0, extractor, 0, 1, [tmp_path / "cache"])
    assert row["num_real"] == 95
    assert "sample 000000000: crc32 is" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    strict = replace(config, data=replace(config.data, max_bad=0.0))
    with pytest.raises(DataError, match=r"1 of 96 real samples at 16² cannot be read, more than data.max_bad 0"):
        evaluate(strict, dataset, generator, 1.0, extractor, 0, 1, [])


# Weights, settled at launch


def offline(*arguments: Any, **keywords: Any) -> None:
    raise urllib.error.URLError("Network is unreachable")


def test_inception_without_weights_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"fetch http.*pth elsewhere and put it at .*checkpoints/.*, or name it with --eval.weights FILE",
    ):
        settle_weights(EvalConfig(extractor="inception"), print)


def test_auto_without_weights_goes_on_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    said: list[str] = []
    assert settle_weights(EvalConfig(extractor="auto"), said.append) is None
    assert sum("fd_random" in line for line in said) == 1


def test_weights_that_are_there_are_used(inception: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settle_weights(EvalConfig(extractor="auto", weights=str(inception)), print) == inception
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    cached = extractors.cached_weights()
    cached.parent.mkdir()
    cached.write_bytes(inception.read_bytes())
    assert settle_weights(EvalConfig(extractor="inception"), print) == cached


@pytest.mark.parametrize("content", [b"not weights", None])
def test_a_file_that_is_no_weights_is_refused_at_launch(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save({"other.weight": torch.zeros(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"eval\.weights"):
        settle_weights(EvalConfig(weights=str(path)), print)


def test_pictures_round_to_the_nearest_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]
