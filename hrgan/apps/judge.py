"""`hrgan judge`: one page on which people try to tell generated pictures from real ones, without a server or a network.

Two-alternative forced choice: each trial shows a generated and a real picture of the same size side by side, and the
person picks the one thought real. The measure is HYPE's (Zhou et al. 2019, arXiv 1904.01121), the error rate of people,
with its time limit as a choice; HYPE shows one picture at a time, which a person may answer by leaning to one of the
two words, and a pair leaves no room for that.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from hrgan.apps.generate import GROUP, load_generator, refuse_broken
from hrgan.apps.judge_page import page_of
from hrgan.apps.judge_pool import FORMAT, Record, quiz_identity
from hrgan.checkpoint import find
from hrgan.config import Config
from hrgan.data.dataset import Dataset, open_dataset
from hrgan.data.stream import read_range
from hrgan.engine import join
from hrgan.errors import DataError, UserError
from hrgan.metrics.source import draw_labels
from hrgan.noise import draw, keyed_seed, latents
from hrgan.page import write_page
from hrgan.pictures import to_array, to_float, to_rgb, to_uint8
from hrgan.sizes import size_at, size_text

MOST_SEED = 2**53 - 1  # The largest whole number that browsers write back exactly.
MOST_BYTES = 400_000_000  # Of a page: Chromium has no text beyond 512 MiB.


def judge(target: Path, out: Path | None, pairs: int, seed: int, data: str | None, seconds: float) -> Path:
    """Write the page of a run (its best, else its newest checkpoint) or of a checkpoint, and return its path.

    pairs: trials of a person. seed: decides the pictures. data: the shards with the real ones, by default those it was
    trained on. seconds: how long a pair is shown, 0 for until it is answered. The same arguments give the same bytes.
    Generated pictures are the moving average's, in float32, at the fade's alpha; real ones are as stored also in a
    fade, as for the metrics, so that the error rate stands beside theirs. UserError or DataError, one line, for what
    cannot be used.
    """
    _check_wishes(pairs, seed, seconds)
    folder = find(target)
    if out is None:
        if folder.resolve() == target.resolve():
            raise UserError(f"--out: needed for the checkpoint folder {target}; name the page, for example judge.html")
        out = target / "judge.html"
    *_, device = join()
    network, alpha, config, nimg = load_generator(folder, True, device, as_trained=False)
    level = int(network.resolution)  # type: ignore[arg-type]  # a plain int
    dataset = _open_reals(config, level, data, pairs)
    about = _about(folder, config, nimg, level, dataset, seed, pairs, seconds)
    reals = [_encoded(picture) for picture in islice(_reals(dataset, level, seed), pairs)]
    if len(reals) < pairs:
        raise DataError(f"{dataset.where}: only {len(reals)} pictures can be read; --pairs {len(reals)} at most")
    fakes = [_encoded(picture) for picture in islice(_fakes(network, alpha, config, seed, folder, dataset), pairs)]
    second = (draw(torch.rand, (pairs,), seed, "judge", "order") < 0.5).tolist()  # Whether the real one is.
    pictures = [(fake, real) if later else (real, fake) for real, fake, later in zip(reals, fakes, second, strict=True)]
    page = page_of(about, pictures, second)
    if len(page) > MOST_BYTES:
        most = pairs * MOST_BYTES // len(page)
        raise UserError(f"--pairs: {pairs} make a page of {len(page) / 1e6:.0f} MB, too much; at most about {most}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, page)
    print(
        f"{out}: {pairs} pairs of {size_text(config.network.grid, level)} at {nimg / 1000:g} kimg, "
        f"{len(page) / 1e6:.1f} MB; open it in a browser. hrgan judge pool FILES joins the results people save"
    )
    return out


def _about(
    folder: Path, config: Config, nimg: int, level: int, dataset: Dataset, seed: int, pairs: int, seconds: float
) -> Record:
    """What each result says of its quiz."""
    about: Record = {
        "format": FORMAT,
        "target": _name(folder),
        "generator": json.loads((folder / "manifest.json").read_text())["ema.safetensors"],  # sha256
        "nimg": nimg,
        "resolution": level,
        "size": list(size_at(config.network.grid, level)),  # Height and width in pixels.
        "real_set": dataset.real_set,
        "seed": seed,
        "pairs": pairs,
        "seconds": seconds,
        "protocol": "two-alternative forced choice, "
        + (f"each pair shown for {seconds:g} s" if seconds else "no time limit"),
    }
    return about | {"quiz": quiz_identity(about)}


def _check_wishes(pairs: int, seed: int, seconds: float) -> None:
    if pairs < 1:
        raise UserError(f"--pairs: {pairs} is below the least, 1")
    if abs(seed) > MOST_SEED:
        raise UserError(f"--seed: {seed}, expected at most {MOST_SEED}: browsers know no larger whole numbers")
    if not 0 <= seconds <= 3600:  # Also not a number.
        raise UserError(f"--seconds: {seconds:g}, expected 0 (no limit) to 3600")


def _name(checkpoint: Path) -> str:
    """Of the run that a checkpoint is in, as results show it: without the folders of this machine."""
    folder = checkpoint.resolve()
    return folder.parent.parent.name if folder.parent.name == "checkpoints" else folder.name


def _open_reals(config: Config, level: int, data: str | None, pairs: int) -> Dataset:
    """The shards, if they hold enough pictures like those the generator makes."""
    try:
        # The label may name an attribute that other shards lack; a quiz has no use for labels.
        dataset = open_dataset(replace(config.data, path=data or config.data.path, label=None))
        form, network = dataset.form, config.network
        for name, made, held in (
            ("channels", network.channels, form.channels),
            ("bits", network.bits, form.bits),
            ("a grid of", list(network.grid), list(form.grid)),
        ):
            if made != held:
                raise UserError(f"--data: {dataset.where} has {name} {held}, but the generator makes {made}")
        if dataset.resolution < level:
            sizes = size_text(form.grid, dataset.resolution), size_text(form.grid, level)
            raise UserError(f"--data: {dataset.where} holds at most {sizes[0]}, but the generator makes {sizes[1]}")
        dataset.check_tier(level)
    except DataError as error:
        raise error if data else DataError(f"{error}, with --data") from None
    if dataset.num_samples < pairs:
        raise UserError(f"--pairs: {pairs}, but {dataset.where} has {dataset.num_samples} pictures, the most possible")
    return dataset


def _reals(dataset: Dataset, level: int, seed: int) -> Iterator[Tensor]:
    """(3, H, W) uint8, as people see them: each of the set once, from a random place on. The set is
    stored in random order, so a stretch is a random sample, and of remote shards one or two are fetched instead of
    one for each picture."""
    start = keyed_seed(seed, "judge", "reals") % dataset.num_samples
    for first, stop in ((start, dataset.num_samples), (0, start)):
        for batch in read_range(dataset, level, first, stop, batch=GROUP):
            for line in batch.bad:
                print(line, file=sys.stderr)
            yield from to_rgb(to_uint8(to_float(batch.images, dataset.values)))


def _fakes(
    network: nn.Module, alpha: float, config: Config, seed: int, folder: Path, dataset: Dataset
) -> Iterator[Tensor]:
    """(3, H, W) uint8, as people see them, of classes as often as the set has them; picture i depends on (checkpoint,
    set, seed, i) alone."""
    device, first = next(network.parameters()).device, 0
    classes = config.network.classes or [] if config.network.num_classes else []
    shares = [dataset.class_shares.get(name, 0.0) for name in classes]
    if not any(shares):  # The set has other classes than the generator.
        shares = [1.0] * len(classes)
    while True:
        z = latents(first, first + GROUP, config.network.latent, seed, "judge").to(device)
        labels = draw_labels(shares, first, first + GROUP, seed).to(device) if classes else None
        made = network(z, labels, alpha)
        refuse_broken(made, folder)
        yield from to_rgb(to_uint8(made)).cpu()
        first += GROUP


def _encoded(picture: Tensor) -> str:
    """base64 of lossless WebP. Real and generated pictures go through here alike, so that nothing but what they show
    tells them apart; the settings are those of data/images.py."""
    buffer = io.BytesIO()
    Image.fromarray(to_array(picture)).save(buffer, "WEBP", lossless=True, method=0, quality=0)
    return base64.b64encode(buffer.getvalue()).decode()
