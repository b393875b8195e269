"""The quiz page: nothing but what they show tells real pictures from generated ones, its numbers are right in Python
and in the browser, and people can go through it with a finger, a mouse or a keyboard."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from hrgan.apps import generate
from hrgan.apps.judge_pool import SIDES, fault, pool, pooled_interval, quiz_identity, wilson
from hrgan.data.build import build
from hrgan.data.dataset import Dataset, open_set
from hrgan.data.stream import read_range
from hrgan.noise import latents
from hrgan.pictures import to_array
from tests.conftest import TINY, Children, cli, show
from tests.test_train import train

PAIRS = 10
GREY = ["network: {resolution: 16,", "network: {bits: 16, channels: 1, resolution: 16,"]


def trained(folder: Path, shards: Path, children: Children, *changes: list[str]) -> Path:
    text = TINY.format(shards=shards)
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(text)
    code, output = children.run(folder / "log", train, str(folder / "tiny.yaml"), str(folder / "run"))
    assert code == 0, output
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path, children: Children) -> Path:
    return trained(tmp_path_factory.mktemp("judge"), shards, children)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(run, tmp_path_factory.mktemp("pages") / "quiz.html")


def made(target: Path, out: Path, *words: Any) -> Path:
    assert cli("judge", target, "--out", out, "--pairs", PAIRS, *words) == 0
    return out


def quiz_of(page: Path) -> dict[str, Any]:
    found = re.search('<script type="application/json" id="quiz">(.*?)</script>', page.read_text())
    assert found
    quiz: dict[str, Any] = json.loads(found[1])
    return quiz


def key_of(quiz: dict[str, Any]) -> list[int]:
    """Which of each pair is the real one, 0 or 1."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(quiz["key"]), np.uint8), bitorder="little")
    return [int(bit) for bit in bits[: quiz["about"]["pairs"]]]


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def sides_of(page: Path) -> tuple[list[bytes], list[bytes]]:
    """Pixels of the real pictures, and of the generated ones, pair after pair."""
    quiz = quiz_of(page)
    pictures = [[np.asarray(decoded(text)).tobytes() for text in pair] for pair in quiz["pictures"]]
    key = key_of(quiz)
    return [pair[k] for pair, k in zip(pictures, key, strict=True)], [
        pair[1 - k] for pair, k in zip(pictures, key, strict=True)
    ]


def stored(shards: Path, level: int) -> list[bytes]:
    dataset = Dataset((open_set(str(shards)),), (1.0,))
    batches = read_range(dataset, level, 0, dataset.num_samples)
    return [to_array(image).tobytes() for batch in batches for image in batch.images]


def result(person: str, wrong: int, about: dict[str, Any] | None = None, /, **changes: Any) -> dict[str, Any]:
    """As the page writes it."""
    quiz: dict[str, Any] = {
        "generator": "ab" * 32,
        "nimg": 160,
        "resolution": 16,
        "real_set": "cd" * 32,
        "seed": 0,
        "pairs": PAIRS,
        "seconds": 0,
        "target": "run",
        "format": "hrgan-judge-1",
    } | (about or {})
    pairs = quiz["pairs"]
    trials = [
        {
            "pair": (number * 3) % pairs,
            "real": SIDES[number % 2],
            "answer": SIDES[(number + (number < wrong)) % 2],
            "milliseconds": 900 + 100 * number,
            "correct": number >= wrong,
        }
        for number in range(pairs)
    ]
    made = quiz | {"quiz": quiz_identity(quiz), "person": person, "trials": trials, "error_rate": wrong / pairs}
    return made | changes


def write(path: Path, record: Any) -> Path:
    path.write_text(json.dumps(record))
    return path


# The pictures


def test_real_and_generated_pictures_are_of_the_same_kind(page: Path) -> None:
    kinds = set()
    for pair in quiz_of(page)["pictures"]:
        for text in pair:
            picture, content = decoded(text), base64.b64decode(text)
            chunks = content[12:16]  # VP8L is lossless WebP; VP8X would hold more than the picture.
            kinds.add((picture.format, picture.mode, picture.size, chunks))
    assert kinds == {("WEBP", "RGB", (16, 16), b"VP8L")}


def test_the_key_says_which_are_the_stored_pictures_bit_for_bit(page: Path, shards: Path) -> None:
    reals, fakes = sides_of(page)
    everything = set(stored(shards, 16))
    assert len(set(reals)) == PAIRS
    assert set(reals) <= everything
    assert len(set(fakes)) == PAIRS
    assert not set(fakes) & everything
    assert 0 < sum(key_of(quiz_of(page))) < PAIRS


def test_the_same_arguments_give_the_same_page_and_another_seed_other_pictures(
    run: Path, page: Path, tmp_path: Path
) -> None:
    assert made(run, tmp_path / "again.html").read_bytes() == page.read_bytes()
    other = made(run, tmp_path / "other.html", "--seed", 1)
    for some, others in zip(sides_of(page), sides_of(other), strict=True):
        assert some != others
    assert not set(sides_of(page)[1]) & set(sides_of(other)[1])
    assert quiz_of(page)["about"]["quiz"] != quiz_of(other)["about"]["quiz"]


@pytest.mark.parametrize("nimg", [128, 160])
def test_a_picture_is_generates_of_the_same_latent_also_in_a_fade(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nimg: int
) -> None:
    folder = run / "checkpoints" / str(nimg)
    page = made(folder, tmp_path / "page.html")
    monkeypatch.setattr(generate, "latents", lambda *key: latents(*key[:-1], "judge"))
    generate.generate(folder, tmp_path / "generated", generate.Wanted(PAIRS))
    files = sorted((tmp_path / "generated").glob("0*.png"))
    assert [np.asarray(Image.open(file)).tobytes() for file in files] == sides_of(page)[1]


def test_pictures_of_a_level_below_the_smallest_tier_are_shown_as_training_saw_them(
    run: Path, tmp_path: Path, shards: Path
) -> None:
    page = made(run / "checkpoints" / "32", tmp_path / "page.html")  # At the end of the 4² phase.
    assert quiz_of(page)["about"]["size"] == [4, 4]
    reals, _ = sides_of(page)
    assert set(reals) <= set(stored(shards, 4))


def test_in_a_fade_the_real_pictures_are_as_stored(run: Path, tmp_path: Path, shards: Path) -> None:
    page = made(run / "checkpoints" / "128", tmp_path / "page.html")
    reals, _ = sides_of(page)
    assert set(reals) <= set(stored(shards, 16))


def test_sixteen_bits_are_shown_in_the_range_of_training(tmp_path: Path, children: Children) -> None:
    (tmp_path / "source").mkdir()
    for seed in range(24):
        pixels = np.random.default_rng(seed).integers(1000, 3001, (16, 16), dtype=np.uint16)
        pixels[0, :2] = 1000, 3000
        Image.fromarray(pixels).save(tmp_path / "source" / f"{seed}.png")
    build(str(tmp_path / "source"), tmp_path / "set", 16, bits=16, workers=0)
    page = made(trained(tmp_path / "deep", tmp_path / "set", children, GREY), tmp_path / "page.html")
    low, high = open_set(str(tmp_path / "set")).manifest.values
    expected = set()
    for seed in range(24):
        numbers = np.asarray(Image.open(tmp_path / "source" / f"{seed}.png")).astype(np.float64)
        shown = np.floor((numbers - low) / (high - low) * 255 + 0.5).clip(0, 255).astype(np.uint8)
        expected.add(np.repeat(shown[..., None], 3, axis=2).tobytes())
    assert set(sides_of(page)[0]) <= expected


def test_transparency_is_shown_over_white(tmp_path: Path, children: Children) -> None:
    (tmp_path / "source").mkdir()
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 4), dtype=np.uint8)
        pixels[:, :8, 3] = 0
        Image.fromarray(pixels).save(tmp_path / "source" / f"{seed}.png")
    build(str(tmp_path / "source"), tmp_path / "set", 16, alpha="keep", workers=0)
    rgba = ["network: {resolution: 16,", "network: {channels: 4, resolution: 16,"]
    page = made(trained(tmp_path / "clear", tmp_path / "set", children, rgba), tmp_path / "page.html")
    for pixels in sides_of(page)[0]:
        picture = np.frombuffer(pixels, np.uint8).reshape(16, 16, 3)
        assert (picture[:, :8] == 255).all()
        assert (picture[:, 8:] < 255).any()


# The page


def test_the_page_allows_its_own_code_alone_and_gives_nothing_away(page: Path, run: Path) -> None:
    source = page.read_text()
    policy = re.search('Content-Security-Policy" content="(.*?)"', source, re.DOTALL)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (code,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy[1]
    assert "http" not in source.replace("http-equiv", "")
    assert str(run.parent) not in source
    for image in re.findall("<img.*?>", source, re.DOTALL):
        assert 'alt=""' in image
        assert "title" not in image


def test_names_cannot_break_the_page(run: Path, tmp_path: Path) -> None:
    hostile = Path(shutil.copytree(run, tmp_path / "<script>alert(1)<!-- $name"))
    source = made(hostile, tmp_path / "page.html").read_text()
    assert "alert(1)" in source
    assert "<script>alert" not in source
    assert "<!--" not in source
    assert quiz_of(tmp_path / "page.html")["about"]["target"] == hostile.name


def test_a_runs_page_is_put_into_it_and_a_checkpoints_is_to_be_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(run, tmp_path / "run"))
    assert cli("judge", own, "--pairs", 2) == 0
    assert quiz_of(own / "judge.html")["about"]["target"] == "run"
    assert cli("judge", own / "checkpoints" / "160") == 2
    assert "--out: needed for the checkpoint folder" in capsys.readouterr().err


# What cannot be used


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: Any) -> str:
    capsys.readouterr()
    assert cli(*words) == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--pairs", 0], "--pairs: 0 is below the least, 1"),
        (["--pairs", 97], "--pairs: 97, but {shards} has 96 pictures, the most possible"),
        (["--seconds", -1], "--seconds: -1, expected 0"),
        (["--seconds", "nan"], '"seconds": Expected'),
        (["--seconds", 3601], "--seconds: 3601, expected 0 (no limit) to 3600"),
        (["--seed", 2**53], "--seed: 9007199254740992, expected at most"),
    ],
)
def test_wrong_wishes_are_refused(
    run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[Any], expected: str
) -> None:
    error = refusal(capsys, 2, "judge", run, "--out", tmp_path / "page.html", *words)
    assert expected.format(shards=shards) in error
    assert not (tmp_path / "page.html").exists()


def test_a_set_with_as_many_pictures_as_pairs_is_enough(run: Path, shards: Path, tmp_path: Path) -> None:
    assert cli("judge", run, "--out", tmp_path / "page.html", "--pairs", 96) == 0
    reals, _ = sides_of(tmp_path / "page.html")
    assert sorted(reals) == sorted(stored(shards, 16))


def test_runs_and_shards_that_cannot_be_used_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", tmp_path / "page.html"]
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    assert "no checkpoint yet; train it first" in refusal(capsys, 2, "judge", tmp_path / "new", *out)
    assert "neither a run directory" in refusal(capsys, 2, "judge", tmp_path / "nothing", *out)
    gone = tmp_path / "gone"
    assert f"{gone}/manifest.json is missing" in refusal(capsys, 4, "judge", run, *out, "--data", gone)
    build("drawn:12", tmp_path / "grey", 16, channels=1, workers=0)
    error = refusal(capsys, 2, "judge", run, *out, "--data", tmp_path / "grey")
    assert "has channels 1, but the generator makes 3" in error
    assert not (tmp_path / "page.html").exists()


def test_shards_that_have_moved_are_to_be_named_with_data(
    children: Children, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("drawn:24", tmp_path / "set", 16, workers=0)
    run = trained(tmp_path / "run", tmp_path / "set", children)
    (tmp_path / "set").rename(tmp_path / "moved")
    error = refusal(capsys, 4, "judge", run, "--pairs", 4)
    assert f"{tmp_path / 'set' / 'manifest.json'} is missing" in error
    assert "--data" in error
    assert cli("judge", run, "--pairs", 4, "--data", tmp_path / "moved") == 0


def test_pictures_that_cannot_be_read_are_left_out_and_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("drawn:24", tmp_path / "set", 16, workers=0)
    shard = tmp_path / "set" / "16" / "drawn-00000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # In the first sample's picture.
    shard.write_bytes(content)
    words = ["judge", run, "--out", tmp_path / "page.html", "--data", tmp_path / "set"]
    assert cli(*words, "--pairs", 23) == 0
    assert "sample 000000000: crc32" in capsys.readouterr().err
    assert len(set(sides_of(tmp_path / "page.html")[0])) == 23
    assert cli(*words, "--pairs", 24) == 4
    assert "only 23 pictures can be read; --pairs 23 at most" in capsys.readouterr().err


def test_a_generator_of_non_finite_pictures_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(run / "checkpoints" / "160", tmp_path / "160"))
    tensors = safetensors.torch.load_file(broken / "ema.safetensors")
    tensors[next(name for name in tensors if name.startswith("to_rgb"))].fill_(torch.nan)
    content = safetensors.torch.save(tensors)
    (broken / "ema.safetensors").write_bytes(content)
    hashes = json.loads((broken / "manifest.json").read_text())
    write(broken / "manifest.json", hashes | {"ema.safetensors": hashlib.sha256(content).hexdigest()})
    error = refusal(capsys, 2, "judge", broken, "--out", tmp_path / "page.html")
    assert f"{broken}: the pictures of its generator hold non-finite numbers" in error


# Statistics


@pytest.mark.parametrize(
    ("wrong", "trials", "low", "high"),
    [  # The last four as printed by Newcombe 1998, table I, method 3.
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval(wrong: int, trials: int, low: float, high: float) -> None:
    assert wilson(wrong, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson(trials - wrong, trials) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_pooled_interval_is_wilsons_of_one_person_and_wider_where_persons_differ() -> None:
    assert pooled_interval([5], 10) == wilson(5, 10)
    # Half of the persons always right, half always wrong: of 8 drawn with replacement, the 2.5th percentile of the
    # share of wrong ones is 1/8 (the binomial's: P(0) = 0.4 %, P(<= 1) = 3.5 %), the 97.5th 7/8.
    assert pooled_interval([0, 10] * 4, 10) == (0.125, 0.875)
    low, high = wilson(40, 80)
    assert pytest.approx((low, high), abs=0.005) == (0.39, 0.61)
    # Persons who agree have no spread: then it is Wilson's of all trials, and never a point.
    assert pooled_interval([5] * 8, 10) == (low, high)
    # The normal approximation of the mean of many persons.
    wrongs = [number % 11 for number in range(220)]
    deviation = float(np.std(wrongs)) / 10 / 220**0.5
    assert pooled_interval(wrongs, 10) == pytest.approx((0.5 - 1.96 * deviation, 0.5 + 1.96 * deviation), abs=0.003)
    assert pooled_interval(wrongs[::-1], 10) == pooled_interval(wrongs, 10)


# Pooling files


def test_results_are_pooled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write(tmp_path / f"{name}.json", result(name, wrong)) for name, wrong in (("Ann", 2), ("Bo", 6))]
    assert cli("judge", "pool", *files, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["person"], row["wrong"], row["trials"]) for row in found["persons"]] == [("Ann", 2, 10), ("Bo", 6, 10)]
    assert found["persons"][0]["error_rate"] == 0.2
    assert found["persons"][0]["interval"] == list(wilson(2, 10))
    assert found["persons"][0]["median_milliseconds"] == 1350
    assert found["pooled"]["error_rate"] == 0.4
    assert found["pooled"]["interval"] == pytest.approx([0.2, 0.6134], abs=5e-5)  # The lesser rate; Wilson's 8 of 20.
    assert "bootstrap over persons" in found["pooled"]["interval_method"]
    assert cli("judge", "pool", *files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Ann +2 of 10 +20.0%  95 % interval +5.7% to +51.0%  median 1.4 s", lines[1])
    assert re.match(r"pooled, 2 persons +8 of 20 +40.0%  95 % interval", lines[3])


def test_a_file_twice_counts_once_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, copy = (write(tmp_path / f"{name}.json", result("Ann", 2)) for name in "ab")
    assert pool([first, copy])["pooled"]["trials"] == PAIRS
    assert f"{copy}: the same result as {first}; counted once" in capsys.readouterr().err


def test_one_person_with_two_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write(tmp_path / f"{wrong}.json", result("Ann", wrong)) for wrong in (2, 3))
    error = refusal(capsys, 2, "judge", "pool", first, second)
    assert f'{second}: person: "Ann" is in {first} with other answers' in error


@pytest.mark.parametrize(
    "about",
    [{"seed": 1}, {"nimg": 96}, {"generator": "ef" * 32}, {"real_set": "ef" * 32}, {"pairs": 8}, {"seconds": 1}],
)
def test_results_of_another_page_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], about: dict[str, Any]
) -> None:
    first = write(tmp_path / "a.json", result("Ann", 2))
    other = write(tmp_path / "b.json", result("Bo", 2, about))
    error = refusal(capsys, 2, "judge", "pool", first, other)
    assert f"{other}: quiz: of another page" in error


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    record = result("Ann", 2)
    change(record)
    return record


BROKEN = [
    ([], 'format: null, expected "hrgan-judge-1", as hrgan judge\'s pages write it'),
    ({}, 'format: null, expected "hrgan-judge-1", as hrgan judge\'s pages write it'),
    (result("Ann", 2, format="x" * 99), f'format: "{"x" * 59}..., expected "hrgan-judge-1", as hrgan judge\'s pages'),
    (result(" ", 2), 'person: " ", expected text'),
    (result("Ann", 2, person=7), "person: 7, expected text"),
    (result("Ann", 2, target=[1]), "target: a list, expected text"),
    (changed(lambda record: record.pop("quiz")), "quiz: null, expected text"),
    (result("Ann", 2, pairs=True), "pairs: true, expected a whole number from 1"),
    (result("Ann", 2, pairs=0), "pairs: 0, expected a whole number from 1"),
    (changed(lambda record: record["trials"].pop()), "trials: 9, expected 10"),
    (result("Ann", 2, trials={}), "trials: an object, expected 10"),
    (
        changed(lambda record: record["trials"].__setitem__(2, 5)),
        "trials[2].pair: null, expected each from 0 to 9 once",
    ),
    (changed(lambda record: record["trials"][4].update(pair=0)), "trials[4].pair: 0, expected each from 0 to 9 once"),
    (changed(lambda record: record["trials"][4].update(pair=-1)), "trials[4].pair: -1, expected each"),
    (changed(lambda record: record["trials"][3].update(answer="up")), 'trials[3].answer: "up", expected left or right'),
    (changed(lambda record: record["trials"][3].update(real=["left"])), "trials[3].real: a list, expected left or"),
    (
        changed(lambda record: record["trials"][3].update(milliseconds=-5)),
        "trials[3].milliseconds: -5, expected a whole",
    ),
    (
        changed(lambda record: record["trials"][0].update(correct=True)),
        "trials[0].correct: true, but the real one was left and the answer right",
    ),
    (result("Ann", 2, error_rate=0.3), "error_rate: 0.3, but its trials have 2 of 10 wrong"),
    (result("Ann", 2, error_rate=None), "error_rate: null, but its trials have 2 of 10 wrong"),
]


@pytest.mark.parametrize(("record", "expected"), BROKEN)
def test_broken_results_are_refused_by_file_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: Any, expected: str
) -> None:
    path = write(tmp_path / "broken.json", record)
    assert f"{path}: {expected}" in refusal(capsys, 2, "judge", "pool", path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no JSON, so no result of hrgan judge"),
        (b"\x89PNG\r\n\xff", "no JSON, so no result of hrgan judge"),
        (b"[" * 100_000, "no JSON, so no result of hrgan judge"),
        (json.dumps(result("Ann", 2) | {"error_rate": float("nan")}).encode(), "error_rate: NaN"),
        (json.dumps(result("Ann", 2) | {"nimg": 161}).encode(), "quiz: not that of its generator, nimg"),
        (json.dumps(result("Ann", 2) | {"seconds": "x"}).encode(), "quiz: not that of its generator, nimg"),
        (None, "no such file"),
    ],
)
def test_files_that_are_no_results_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, expected: str
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    assert f"{path}: {expected}" in refusal(capsys, 2, "judge", "pool", path)


# In a browser


class Person:
    """Someone at the page."""

    def __init__(self, driver: Any, page: Path, width: int) -> None:
        self.driver, self.page, self.width = driver, page, width
        show(driver, page, width)
        self.do("localStorage.clear(); history.replaceState({[SHELF]: '{}'}, '')")
        show(driver, page, width)
        assert not self.do("return current || results.length")
        driver.get_log("browser")

    def do(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, script: str) -> None:
        end = time.monotonic() + 60  # A busy machine draws its frames late.
        while not self.do(f"return {script}"):
            state = self.do("return [document.visibilityState, document.body.innerText.slice(0, 200), shownAt, turn]")
            assert time.monotonic() < end, f"{script}: {state}"
            time.sleep(0.01)

    def text(self, name: str) -> str:
        found: str = self.do("return document.getElementById(arguments[0]).innerText", name)
        return found

    def sees(self, name: str) -> bool:
        found: bool = self.do("return document.getElementById(arguments[0]).getClientRects().length > 0", name)
        return found

    def sees_pair(self) -> None:
        self.wait("shownAt !== null && performance.now() - shownAt > TOO_SOON")

    def click(self, name: str) -> None:
        """With a mouse, or on a phone with a finger, where it is on the screen."""
        box = self.do(
            "const element = document.getElementById(arguments[0]); element.scrollIntoView({block: 'nearest'});"
            "const box = element.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]",
            name,
        )
        point = dict(zip("xy", box, strict=True))
        if self.width < 600:
            for kind, points in (("touchStart", [point]), ("touchEnd", [])):
                touch = {"type": kind, "touchPoints": points}
                self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
        else:
            for kind in ("mousePressed", "mouseReleased"):
                mouse = {"type": kind, "button": "left", "clickCount": 1, **point}
                self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", mouse)

    def press(self, key: str, **more: Any) -> None:
        for kind in ("keyDown", "keyUp"):
            self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": key, **more})

    def begin(self, name: str) -> None:
        self.click("person")
        self.driver.execute_cdp_cmd("Input.insertText", {"text": name})
        if self.width < 600:
            self.do("document.querySelector('#form .main').id = 'go'")
            self.click("go")
        else:
            self.press("Enter", text="\r", windowsVirtualKeyCode=13)
        self.sees_pair()

    def answer(self, side: str) -> None:
        """By touch on a phone, else by the keyboard."""
        if self.width < 600:
            self.click(side)
        else:
            self.press(f"Arrow{side.title()}")

    def real_side(self) -> str:
        """By the pixels on the screen: the only way that does not ask the page's own script."""
        left, right = (
            np.asarray(
                decoded(self.do("return document.getElementById(arguments[0]).src", name).split(",")[1])
            ).tobytes()
            for name in SIDES
        )
        reals = set(sides_of(self.page)[0])
        assert (left in reals) != (right in reals)
        return "left" if left in reals else "right"

    def judge(self, right: list[bool]) -> None:
        """Answer a pair for each; right: whether the real one is chosen."""
        for is_right in right:
            self.sees_pair()
            number = self.do("return current.trials.length")
            side = self.real_side()
            self.answer(side if is_right else SIDES[1 - SIDES.index(side)])
            self.wait(f"!current || current.trials.length === {number + 1}")

    def results(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.do("return results")
        return found

    def add_file(self, *paths: Path) -> str:
        self.do("document.getElementById('problems').replaceChildren(document.createTextNode('waiting'))")
        self.driver.find_element("id", "files").send_keys("\n".join(map(str, paths)))
        self.wait("document.getElementById('problems').innerText !== 'waiting'")
        return self.text("problems")

    def check(self) -> None:
        """Nothing spills sideways, nothing was fetched, nothing is complained of."""
        assert self.do("return window.innerWidth") == self.width
        assert self.do("return document.documentElement.scrollWidth") <= self.width
        assert (
            self.do(
                "return [...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
                "e.clientWidth && e.type !== 'file' && getComputedStyle(e).display !== 'inline')"
                ".map(e => e.outerHTML.slice(0, 80))"
            )
            == []
        )
        requests = self.do("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [name for name in requests if not name.startswith(("data:", "blob:"))] == []
        assert [entry for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("wrong", [0, 4, 10])
def test_a_person_goes_through_the_quiz(chromium: Any, page: Path, width: int, wrong: int, tmp_path: Path) -> None:
    person = Person(chromium, page, width)
    assert "10 pairs" in person.text("start")
    person.check()
    person.begin("Ann")
    assert person.text("count") == "Pair 1 of 10"
    person.check()
    person.judge([number >= wrong for number in range(PAIRS)])
    low, high = wilson(wrong, PAIRS)
    assert person.text("rate") == f"{10 * wrong}.0 %"
    assert f"in {wrong} of 10 pairs" in person.text("detail")
    assert f"95 % interval: {100 * low:.1f} to {100 * high:.1f} % (Wilson score interval)" in person.text("detail")
    person.check()
    (found,) = person.results()
    assert fault(found) is None
    about = quiz_of(page)["about"]
    assert {name: found[name] for name in about} == about
    assert (found["person"], found["error_rate"], found["interval"]) == ("Ann", wrong / PAIRS, [low, high])
    assert [trial["correct"] for trial in found["trials"]] == [number >= wrong for number in range(PAIRS)]
    assert sorted(trial["pair"] for trial in found["trials"]) == list(range(PAIRS))
    assert {trial["real"] for trial in found["trials"]} == set(SIDES)
    assert all(200 <= trial["milliseconds"] < 20_000 for trial in found["trials"])
    assert found["date"].startswith("20")
    row = pool([write(tmp_path / "ann.json", found)])["persons"][0]
    assert row["error_rate"] == wrong / PAIRS
    assert row["median_milliseconds"] == found["median_milliseconds"]


@pytest.mark.slow
def test_the_saved_file_is_what_the_command_reads(chromium: Any, page: Path, tmp_path: Path) -> None:
    person = Person(chromium, page, 1400)
    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", folder)
    person.begin("Ann / the <1st>")
    person.judge([True] * 7 + [False] * 3)
    person.click("save")
    path, end = tmp_path / "judge-run-Ann-the-1st-.json", time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, list(tmp_path.iterdir())
        time.sleep(0.05)
    assert json.loads(path.read_text()) == person.results()[0]
    row = pool([path])["persons"][0]
    assert (row["person"], row["wrong"]) == ("Ann / the <1st>", 3)
    person.check()


@pytest.mark.slow
def test_a_reload_goes_on_and_a_persons_order_is_always_the_same(chromium: Any, page: Path) -> None:
    person = Person(chromium, page, 390)
    person.begin("Ann")
    plan = person.do("return current.plan")
    person.judge([True, False, True])
    source = person.do("return document.getElementById('left').src")
    person.do("localStorage.clear()")  # As Chromium 156 may do to a file by itself.
    chromium.refresh()
    person.sees_pair()
    assert person.text("count") == "Pair 4 of 10"
    assert person.do("return document.getElementById('left').src") == source
    person.judge([True] * 7)
    assert person.text("rate") == "10.0 %"
    person.check()
    chromium.refresh()  # Results stay, too.
    person.click("look")
    assert [row["person"] for row in person.results()] == ["Ann"]
    assert not person.sees("rate")
    person.click("next")
    person.begin("Bo")
    assert person.do("return current.plan") != plan
    again = Person(chromium, page, 390)
    again.begin("  Ann ")
    assert again.do("return current.plan") == plan


@pytest.mark.slow
def test_a_closed_tab_is_gone_on_with_in_another(chromium: Any, page: Path) -> None:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(page.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{page.name}"  # Of a file Chromium 156 may keep nothing.
        person = Person(chromium, page, 1400)
        chromium.get(url)
        person.begin("Ann")
        person.judge([True, False])
        first = chromium.current_window_handle
        chromium.switch_to.new_window("tab")
        try:
            chromium.get(url)
            person.sees_pair()
            assert person.text("count") == "Pair 3 of 10"
        finally:
            chromium.close()
            chromium.switch_to.window(first)
            server.shutdown()


@pytest.mark.slow
def test_a_browser_that_keeps_nothing_says_so_and_works(chromium: Any, page: Path) -> None:
    refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    added = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    try:
        show(chromium, page, 390)
        person = Person.__new__(Person)
        person.driver, person.page, person.width = chromium, page, 390
        assert "keeps nothing for this page" in person.text("forgets")
        person.begin("Ann")
        person.judge([False] * PAIRS)
        assert person.text("rate") == "100.0 %"
        person.check()
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.mark.slow
def test_persons_follow_each_other_and_are_pooled(chromium: Any, page: Path, tmp_path: Path) -> None:
    person = Person(chromium, page, 1400)
    assert not person.sees("forgets")
    person.begin("Ann")
    person.judge([True] * PAIRS)
    assert "Pooled (1)\t0 of 10\t0.0 %\t0.0 to 27.8 %" in person.text("all")
    person.click("next")
    person.click("person")
    chromium.execute_cdp_cmd("Input.insertText", {"text": "Ann"})
    person.press("Enter", text="\r", windowsVirtualKeyCode=13)
    assert person.sees("taken")
    chromium.execute_cdp_cmd("Input.insertText", {"text": "e"})
    person.press("Enter", text="\r", windowsVirtualKeyCode=13)
    person.judge([False] * PAIRS)
    low, high = pooled_interval([0, 10], PAIRS)
    assert f"Pooled (2)\t10 of 20\t50.0 %\t{100 * low:.1f} to {100 * high:.1f} %" in person.text("all")
    about = quiz_of(page)["about"]
    wrongs = [0, 10, 3, 7, 5]
    files = [write(tmp_path / f"{wrong}.json", result(f"P{wrong}", wrong, about)) for wrong in wrongs[2:]]
    assert person.add_file(*files) == ""
    low, high = pooled_interval(wrongs, PAIRS)
    assert f"Pooled (5)\t25 of 50\t50.0 %\t{100 * low:.1f} to {100 * high:.1f} %" in person.text("all")
    assert "because the trials of one person are not independent" in person.text("method")
    own = [write(tmp_path / f"own{number}.json", record) for number, record in enumerate(person.results()[:2])]
    assert pool([*own, *files])["pooled"]["interval"] == [low, high]
    # What cannot be pooled is named, and changes nothing.
    other = write(tmp_path / "other.json", result("Zoe", 1, {"seed": 5}))
    assert "other.json: quiz: of another page (run at 0.16 kimg, 10 pairs)" in person.add_file(other)
    twice = write(tmp_path / "twice.json", result("P3", 4, about))
    assert 'twice.json: person: "P3" is here with other answers' in person.add_file(twice)
    assert "3.json: the same result as one that is here; counted once" in person.add_file(files[0])
    (tmp_path / "no.json").write_text("no")
    assert "no.json: no JSON" in person.add_file(tmp_path / "no.json")
    hostile = write(tmp_path / "x.json", result("<img src=x onerror=alert(1)>" * 3, 4, about))
    assert person.add_file(hostile) == ""
    assert "<img src=x" in person.text("all")
    assert person.do("return document.images.length") == 2
    assert len(person.results()) == 6
    person.check()


@pytest.mark.slow
def test_browser_and_python_compute_and_refuse_alike(chromium: Any, page: Path) -> None:
    person = Person(chromium, page, 390)
    for trials in (1, 7, 50, 333):
        for wrong in {0, 1, trials // 3, trials // 2, trials}:
            assert person.do("return wilson(...arguments)", wrong, trials) == list(wilson(wrong, trials))
    generator = np.random.default_rng(0)
    for persons in (1, 2, 3, 10, 61):
        wrongs = generator.integers(0, 51, persons).tolist()
        assert person.do("return pooledInterval(...arguments)", wrongs, 50) == list(pooled_interval(wrongs, 50))
    records = [record for record, _ in BROKEN]
    assert person.do("return arguments[0].map(fault)", records) == [fault(record) for record in records]


@pytest.mark.slow
def test_with_a_time_limit_pictures_go_and_can_still_be_answered(chromium: Any, run: Path, tmp_path: Path) -> None:
    person = Person(chromium, made(run, tmp_path / "page.html", "--seconds", 0.5), 390)
    assert "disappears after 0.5 s" in person.text("start")
    person.begin("Ann")
    visible = "getComputedStyle(document.getElementById('left')).visibility === 'visible'"
    assert person.do(f"return {visible}")
    person.wait(f"!({visible})")
    gone = person.do("return performance.now() - shownAt")
    assert 500 <= gone < 1500
    person.judge([True] + [False] * 9)
    assert person.results()[0]["seconds"] == 0.5
    assert "each pair shown for 0.5 s" in person.results()[0]["protocol"]
    assert person.results()[0]["trials"][0]["milliseconds"] >= 500


@pytest.mark.slow
def test_a_double_click_or_a_held_key_answers_once(chromium: Any, page: Path) -> None:
    person = Person(chromium, page, 1400)
    person.begin("Ann")
    person.click("left")
    spent = chromium.execute_async_script(
        "const done = arguments[0], look = () => { if (current.trials.length < 1 || shownAt === null) {"
        "setTimeout(look); return; } document.getElementById('left').click(); done(performance.now() - shownAt); };"
        "look()"
    )
    assert spent < 200
    assert person.do("return current.trials.length") == 1
    person.sees_pair()
    person.press("ArrowLeft", autoRepeat=True)
    assert person.do("return current.trials.length") == 1
    person.press("ArrowLeft")
    person.wait("current.trials.length === 2")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_both_pictures_are_of_one_size_and_not_smoothed(chromium: Any, page: Path, width: int) -> None:
    person = Person(chromium, page, width)
    person.begin("Ann")
    shown = person.do(
        "return ['left', 'right'].map(name => { const image = document.getElementById(name); return ["
        "image.width, image.height, getComputedStyle(image).imageRendering, image.attributes.length] })"
    )
    assert shown[0] == shown[1]
    side = {390: 160, 1400: 384}[width]  # 10 and 24 times 16 pixels.
    assert shown[0][:3] == [side, side, "pixelated"]
    person.do("document.getElementById('stop').click()")  # Nothing judged, nothing to ask.
    assert person.sees("start")
