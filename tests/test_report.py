"""The report of a set: its numbers are those of the stored pixels, what it shows it shows safely, and browsers draw it
without a network and without scrolling sideways."""

import base64
import csv
import html
import io
import os
import re
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hrgan.data import manifest as manifests
from hrgan.data.build import build
from hrgan.data.report import write_report
from hrgan.errors import DataError
from tests.conftest import show

HOSTILE = (
    "<script>alert(1)<",
    "\"><img src=x onerror=alert('1')>",
    "two\nlines & more",
    "$name ${name} {0}",
    "\u202egnp",
    "wide" * 50,
)
"""Names of files and classes; a slash cannot be in one."""


class Page(HTMLParser):
    """What a browser finds: elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def row(self, name: str) -> list[str]:
        """The cells of the table row of this name."""
        found = re.search(f'<tr><th scope="row">{name}</th>(.*?)</tr>', self.source)
        assert found, f"no row {name}"
        return re.findall("<td>(.*?)</td>", found[1])

    def bars(self) -> dict[str, int]:
        """Of the classes, then the attributes."""
        found = re.findall('<span class="name">(.*?)</span>.*?<span class="count">(.*?)</span>', self.source)
        return {html.unescape(name): int(count.replace(",", "")) for name, count in found}

    def histogram(self, kind: str) -> list[int]:
        """The counts of a histogram's bars."""
        found = re.search(f'<svg class="{kind}".*?</svg>', self.source)
        assert found, f"no histogram {kind}"
        return [int(count.replace(",", "")) for count in re.findall(r"<title>[^<]*: ([\d,]+)</title>", found[0])]

    def sheets(self) -> list[tuple[str, Image.Image]]:
        """(alt text, picture) of each contact sheet."""
        images = [attributes for tag, attributes in self.elements if tag == "img"]
        data = [base64.b64decode(str(image["src"]).removeprefix("data:image/jpeg;base64,")) for image in images]
        return [(str(image["alt"]), Image.open(io.BytesIO(one))) for image, one in zip(images, data, strict=True)]


def stored_pixels(out: Path, tier: int) -> np.ndarray[Any, Any]:
    """(n, h, w, C) of all samples, read without hrgan."""
    arrays = []
    for path in sorted((out / str(tier)).glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if not member.name.endswith(".json"):
                    arrays.append(np.asarray(Image.open(shard.extractfile(member))))
    stacked = np.stack(arrays)
    return stacked if stacked.ndim == 4 else stacked[..., None]


def expected_row(values: np.ndarray[Any, Any]) -> list[str]:
    numbers = values.astype(np.float64)
    return [f"{numbers.mean():,.2f}", f"{numbers.std():,.2f}", f"{values.min():,}", f"{values.max():,}"]


def numbers(cells: list[str]) -> list[float]:
    return [float(cell.replace(",", "")) for cell in cells]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 drawn pictures of six classes, tiers 16, 32 and 64, in shards of 16, 16 and 8."""
    out = tmp_path_factory.mktemp("report") / "drawn"
    build("drawn:40", out, 64, labels="folder", workers=0, shard_samples=16)
    return out


@pytest.fixture(scope="module")
def transparent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 RGBA pictures, clear in their left half; unlabelled, tiers 16 to 64."""
    root = tmp_path_factory.mktemp("report")
    (root / "source").mkdir()
    for seed in range(12):
        pixels = np.random.default_rng(seed).integers(1, 256, (64, 64, 4), dtype=np.uint8)
        pixels[:, :32] = 0
        Image.fromarray(pixels).save(root / "source" / f"{seed}.png")
    build(str(root / "source"), root / "set", 64, alpha="keep", workers=0)
    return root / "set"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 grey pictures of 16 bits, values 1000 to 3000, sources of 20x40 to 100x120 pixels; 64 x 96."""
    root = tmp_path_factory.mktemp("report")
    (root / "source").mkdir()
    for seed in range(9):
        size = 20 + 10 * seed, 40 + 10 * seed
        pixels = np.random.default_rng(seed).integers(1000, 3001, size, dtype=np.uint16)
        pixels[0], pixels[1] = 1000, 3000
        Image.fromarray(pixels).save(root / "source" / f"{seed}.png")
    build(str(root / "source"), root / "set", "64x96", bits=16, workers=0)
    return root / "set"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set whose classes, attributes and skipped files have names that could break a page."""
    root = tmp_path_factory.mktemp("report")
    table = root / "table.csv"
    with open(table, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", *HOSTILE))
        for seed, name in enumerate(HOSTILE):
            good, bad = root / f"{name}.png", root / f"{name} broken.png"
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(good)
            bad.write_bytes(b"no picture")
            rows.writerows([(path.name, *[name] * len(HOSTILE)) for path in (good, bad)])
    build(str(table), root / "set", 16, labels=HOSTILE[0], attributes=HOSTILE[1:], max_skipped=1.0, workers=0)
    with open(root / "set" / "skipped.csv", "a", newline="") as rows_too:
        csv.writer(rows_too).writerows([(f"{name} unknown.png", name, name) for name in HOSTILE])
    with open(root / "set" / "skipped.csv", "ab") as skipped:
        skipped.write(b"\xff\x00\xfe.png,unreadable," + b"long " * 20000 + b"\r\nalone\r\n")
    return root / "set"


def test_channel_statistics_are_those_of_the_stored_pixels(drawn: Path) -> None:
    page = Page(write_report(drawn))
    pixels = stored_pixels(drawn, 32)  # The smallest tier of at least 32.
    for channel, name in enumerate(("red", "green", "blue")):
        assert page.row(name) == expected_row(pixels[..., channel])
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256).reshape(64, 4).sum(axis=1)
        assert page.histogram(name) == [count for count in counts if count]


def test_sixteen_bit_statistics_are_in_stored_numbers(deep: Path) -> None:
    page = Page(write_report(deep))
    assert page.row("grey") == expected_row(stored_pixels(deep, 32))  # 32 x 48 pixels
    assert sum(page.histogram("grey")) == 9 * 32 * 48
    manifest = manifests.load(deep)
    assert f"{manifest.values[0]} and {manifest.values[1]} are −1 and 1 in training" in page.text


def test_the_share_of_clear_pixels_is_said(transparent: Path) -> None:
    page = Page(write_report(transparent))
    pixels = stored_pixels(transparent, 32)
    assert page.row("alpha") == expected_row(pixels[..., 3])
    assert f"{(pixels[..., 3] == 0).mean():.2%} of the pixels are fully transparent" in page.text


def test_source_sizes_are_those_of_the_files(deep: Path) -> None:
    page = Page(write_report(deep))
    sides = np.array([(20 + 10 * seed, 40 + 10 * seed) for seed in range(9)])  # height, width
    for name, values in (("width", sides[:, 1]), ("height", sides[:, 0]), ("shorter side", sides.min(axis=1))):
        assert numbers(page.row(name)) == [values.min(), np.median(values), values.max()]
    smaller = int(((sides[:, 0] < 64) | (sides[:, 1] < 96)).sum())
    assert f"{smaller} of 9 ({smaller / 9:.1%}) were smaller than the set's 64 × 96" in page.text
    assert sum(page.histogram("plain")) == 9


def test_the_median_of_an_even_number_of_sizes_lies_between_two(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for side in (20, 30, 35, 90):
        Image.new("RGB", (side, side), (side, 0, 0)).save(tmp_path / "source" / f"{side}.png")
    build(str(tmp_path / "source"), tmp_path / "set", 32, fit="pad", workers=0)
    page = Page(write_report(tmp_path / "set"))
    assert page.row("width") == ["20", "32.5", "90"]
    assert "2 of 4 (50.0%) were smaller" in page.text


def test_facts_are_those_of_the_manifest(drawn: Path) -> None:
    page = Page(write_report(drawn))
    manifest = manifests.load(drawn)
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page.source))
    assert facts["samples"] == "40"
    assert facts["height × width"] == "64 × 64 pixels"
    assert facts["channels"] == "3 (red, green, blue)"
    assert facts["format"] == "webp (lossless)"
    assert facts["values"] == "0 and 255 are −1 and 1 in training"
    assert facts["real_set"] == manifest.real_set
    assert [facts[name] for name in ("bits", "fit", "filter", "alpha", "window", "seed", "label")] == [
        *("8", "crop", "lanczos", "white", "auto", "0", "folder")
    ]
    for tier, side in ((16, "16 × 16"), (32, "32 × 32"), (64, "64 × 64")):
        size = sum(path.stat().st_size for path in (drawn / str(tier)).glob("*.tar"))
        shown, shards, total, _ = page.row(str(tier))
        assert (shown, shards) == (side, "3")
        assert float(total.removesuffix(" kB")) == pytest.approx(size / 1000, rel=0.01)


def test_classes_are_counted_and_each_has_a_sheet(drawn: Path) -> None:
    page = Page(write_report(drawn))
    manifest = manifests.load(drawn)
    expected = dict(zip(manifest.classes, manifest.class_counts, strict=True))
    assert page.bars() == expected
    sheets = page.sheets()
    assert [alt for alt, _ in sheets] == [f"{count} pictures of class {name}" for name, count in expected.items()]
    for (_, image), count in zip(sheets, expected.values(), strict=True):
        assert image.size == (66 * min(count, 8) - 2, 66 * -(-count // 8) - 2)  # Rows of 8, 2 pixels between.


def test_a_sheet_shows_the_first_pictures_of_its_class(drawn: Path) -> None:
    labels = [int(re.findall(r'"label": (\d+)', line)[0]) for line in _jsons(drawn, 64)]
    pixels = stored_pixels(drawn, 64)
    for label, (_, image) in enumerate(Page(write_report(drawn)).sheets()):
        first = pixels[labels.index(label)].astype(int)
        assert np.abs(np.asarray(image)[:64, :64] - first).mean() < 3  # It is JPEG.


def _jsons(out: Path, tier: int) -> Iterator[str]:
    for path in sorted((out / str(tier)).glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith(".json"):
                    stream = shard.extractfile(member)
                    assert stream is not None
                    yield stream.read().decode()


def test_clear_pixels_are_shown_over_a_light_checkerboard(transparent: Path) -> None:
    [(alt, image)] = Page(write_report(transparent)).sheets()
    assert alt == "12 pictures of the set"
    clear = np.asarray(image).astype(int)[:64, 2:30]
    assert abs(clear[3, 1] - 250).max() < 10
    assert abs(clear[11, 1] - 222).max() < 10


def test_sixteen_bits_are_shown_between_the_sets_least_and_greatest_value(deep: Path) -> None:
    [(_, image)] = Page(write_report(deep)).sheets()
    low, high = manifests.load(deep).values
    first = (stored_pixels(deep, 64)[0, ..., 0].astype(float) - low) * 255 / (high - low)
    assert np.abs(np.asarray(image)[:64, :96, 0] - first).mean() < 4


def test_small_pictures_are_enlarged_on_the_sheet(tmp_path: Path) -> None:
    build("drawn:3", tmp_path / "set", 16, workers=0)
    [(_, image)] = Page(write_report(tmp_path / "set")).sheets()
    assert image.size == (3 * 66 - 2, 64)


def test_many_classes_and_values_are_cut_to_the_largest(tmp_path: Path) -> None:
    for number in range(104):
        folder = tmp_path / "source" / f"class{number:03d}"
        folder.mkdir(parents=True)
        for copy in range(2 if number >= 50 else 1):
            Image.new("RGB", (16, 16), (number, copy, 0)).save(folder / f"{copy}.png")
    build(str(tmp_path / "source"), tmp_path / "set", 16, labels="folder", workers=0)
    page = Page(write_report(tmp_path / "set"))
    assert list(page.bars()) == [f"class{number:03d}" for number in (*range(50, 104), *range(46))]
    assert "and 4 more classes, together 4 samples" in page.text
    assert [alt for alt, _ in page.sheets()] == [f"2 pictures of class class{number:03d}" for number in range(50, 90)]
    assert "64 classes more without a sheet" in page.text


def test_attributes_are_counted(tmp_path: Path) -> None:
    rows = ["path,tone,number"]
    for number in range(35):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'dark' if number < 12 else 'light'},{number}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    build(str(tmp_path / "table.csv"), tmp_path / "set", 16, attributes=("tone", "number"), workers=0)
    page = Page(write_report(tmp_path / "set"))
    bars = page.bars()
    assert (bars["light"], bars["dark"]) == (23, 12)
    assert len(bars) == 2 + 30
    assert "and 5 more values, together 5 samples" in page.text


def test_hostile_names_are_text(hostile: Path) -> None:
    page = Page(write_report(hostile))
    tags = Counter(tag for tag, _ in page.elements)
    assert not tags["script"]
    assert tags["img"] == len(HOSTILE)
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for name in HOSTILE:
        seen = name.replace("\n", "\\n").replace("\u202e", "\\u202e")
        assert f"1 picture of class {seen}" in [alt for alt, _ in page.sheets()]
        assert page.bars()[seen] == 1
        assert f"1 {seen}{seen} unknown.png {seen}" in re.sub(r"\s+", " ", page.text)
    assert len(page.source) < 200_000  # The long detail is cut.


def test_skipped_files_are_counted_by_reason_and_the_first_are_shown(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (number % 2, 0, 0)).save(tmp_path / "source" / f"good{number}.png")
    for number in range(7):
        (tmp_path / "source" / f"bad{number}.png").write_bytes(b"no picture")
    build(str(tmp_path / "source"), tmp_path / "set", 16, max_skipped=1.0, workers=0)
    page = Page(write_report(tmp_path / "set"))
    assert "7 unreadable" in page.text
    assert "2 duplicate" in page.text
    assert len(re.findall(r"<code>bad\d.png</code>", page.source)) == 5
    assert "and 2 more in skipped.csv" in page.text
    without = Page(write_report(tmp_path / "set", skipped=False))
    assert "7 unreadable" in without.text
    assert not re.search(r"(bad|good)\d", without.source)


def test_without_skipped_csv_the_page_says_so(tmp_path: Path) -> None:
    build("drawn:3", tmp_path / "set", 16, workers=0)
    assert "Nothing." in Page(write_report(tmp_path / "set")).text
    (tmp_path / "set" / "skipped.csv").unlink()
    assert "there is no skipped.csv" in Page(write_report(tmp_path / "set")).text
    (tmp_path / "set" / "skipped.csv").write_bytes(b"file,reason,detail\r\na.png,unreadable," + b"x" * 200_000)
    assert "cannot be read to its end: field larger" in Page(write_report(tmp_path / "set")).text


def test_damaged_samples_are_counted_and_left_out(tmp_path: Path) -> None:
    out = tmp_path / "set"
    build("drawn:40", out, 32, workers=0, shard_samples=16)
    first, last = out / "32" / "drawn-00000.tar", out / "32" / "drawn-00002.tar"
    content = bytearray(first.read_bytes())
    content[600] ^= 1  # In the first sample's picture.
    first.write_bytes(content)
    last.write_bytes(last.read_bytes()[:1000])  # The last 8 samples are gone.
    page = Page(write_report(out))
    assert "cannot be read: 9 of 40 samples" in page.text
    assert "32/drawn-00000.tar: sample 000000000: crc32 is" in page.text
    assert "32/drawn-00002.tar: found the end of the shard" in page.text
    assert "Of all pixels of the 31 samples" in page.text
    last.unlink()
    page = Page(write_report(out))
    assert "cannot be read: 9 of 40 samples" in page.text
    assert str(tmp_path) not in page.source


def test_a_set_of_which_nothing_can_be_read_still_has_a_page(tmp_path: Path) -> None:
    out = tmp_path / "set"
    build("drawn:3", out, 16, workers=0)
    (out / "16" / "drawn-00000.tar").unlink()
    page = Page(write_report(out))
    assert "cannot be read: 3 of 3 samples" in page.text
    assert "No sample can be read." in page.text


def test_the_page_refers_to_nothing_outside(drawn: Path, hostile: Path) -> None:
    for out in (drawn, hostile):
        page = Page(write_report(out))
        for _, attributes in page.elements:
            for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
                assert (attributes.get(name) or "data:").startswith("data:")
            assert "url(" not in (attributes.get("style") or "")
        style = page.source[page.source.index("<style>") : page.source.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style


def test_the_page_appears_whole_or_not_at_all(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(drawn).read_bytes()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(drawn)
    assert (drawn / "report.html").read_bytes() == before
    assert not list(drawn.glob("*.tmp"))


def test_the_page_is_the_same_each_time(drawn: Path) -> None:
    assert write_report(drawn).read_bytes() == write_report(drawn).read_bytes()


def test_no_set_is_named_as_the_other_commands_name_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is missing, so .* is no finished set"):
        write_report(tmp_path)


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    peaks = []
    for count in (80, 640):
        out = tmp_path / str(count)
        build(f"drawn:{count}", out, 16, workers=0, shard_samples=64)
        write_report(out)
        tracemalloc.start()
        write_report(out)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.02 * peaks[0]


# In a browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["drawn", "transparent", "deep", "hostile"])
def test_a_browser_shows_the_page_without_scrolling_sideways(
    chromium: Any, request: pytest.FixtureRequest, name: str, width: int
) -> None:
    show(chromium, write_report(request.getfixturevalue(name)), width)
    assert chromium.execute_script("return window.innerWidth") == width
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
    images = chromium.execute_script("return [...document.images].map(image => [image.complete, image.naturalWidth])")
    assert images
    assert all(complete and wide > 0 for complete, wide in images)
    # No element but a table's box is wider than what it is in.
    spilling = chromium.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "e.clientWidth && !e.closest('.wide, svg')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert spilling == []
    requests = chromium.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requests if not name.startswith("data:")] == []
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


@pytest.mark.slow
def test_the_page_follows_the_readers_choice_of_light_and_dark(chromium: Any, drawn: Path) -> None:
    path = write_report(drawn)
    shades = []
    for scheme in ("light", "dark"):
        show(chromium, path, 1400, scheme)
        for of in ("backgroundColor", "color"):
            colour = chromium.execute_script(f"return getComputedStyle(document.body).{of}")
            shades.append(sum(map(int, re.findall(r"\d+", colour)[:3])))
    light, on_light, dark, on_dark = shades
    assert light > on_light + 300
    assert dark < on_dark - 300
