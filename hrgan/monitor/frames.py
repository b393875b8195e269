"""Pictures of a run over time, on a slider: scaled and thinned so that the page stays one that can be sent."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from hrgan.monitor.curves import short
from hrgan.page import data_url, plural, text

LONGEST_SIDE = 1024
"""Of a picture in the page, in pixels."""
QUALITY = 86
BAND = 16
"""White columns between generated and real pictures in a sample grid."""


class Shot(NamedTuple):
    """A picture in the page."""

    kind: str
    """Such as jpeg."""
    content: bytes
    size: tuple[int, int]


class Frame(NamedTuple):
    """A picture file of a run."""

    path: Path
    kimg: float
    resolution: int


@dataclass
class Strip:
    """The frames that a page shows."""

    frames: list[Frame] = field(default_factory=list)
    shots: list[tuple[Shot, Shot | None]] = field(default_factory=list)
    """Of each frame the generated pictures, and the real ones beside them where the file has them."""
    found: int = 0
    """Files in the folder."""
    damaged: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """In the page; the same real pictures count once."""
        reals = {real.content for _, real in self.shots if real}
        return sum(_in_page(shot.content) for shot, _ in self.shots) + sum(map(_in_page, reals))


def _in_page(content: bytes) -> int:
    return (len(content) + 2) // 3 * 4 + 300  # As base64, in its element.


def frames_in(folder: Path) -> list[Frame]:
    """The pictures of `samples/` or `neighbours/`, in order of kimg."""
    found = []
    for path in folder.glob("*px.png") if folder.is_dir() else ():
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)kimg-(\d+)px\.png", path.name):
            found.append(Frame(path, float(match[1]), int(match[2])))
    return sorted(found, key=lambda frame: (frame.kimg, frame.resolution))


def strip_of(folder: Path, budget: float, split: bool) -> Strip:
    """The pictures of a folder for a page, within `budget` bytes of it: where that takes leaving some out, the first,
    the last and an even choice. split: part generated from real ones, so that reals stand in the page once."""
    found, strip = frames_in(folder), Strip()
    shots: dict[Frame, tuple[Shot, Shot | None] | None] = {}
    reals: dict[bytes, Shot] = {}

    def load(frame: Frame) -> tuple[Shot, Shot | None] | None:
        if frame not in shots:
            try:
                shots[frame] = _shots(frame.path, split, reals)
            # Pillow raises all of these for files that are cut or no pictures.
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                shots[frame] = None
        return shots[frame]

    # By the size of a few, most of those that will be left out need not be opened.
    probes = [_in_page(made[0].content) for frame in even(found, 5) if (made := load(frame))]
    most = max(2, min(len(found), int(1.05 * budget * len(probes) / sum(probes)))) if probes else len(found)
    while True:
        strip = Strip(found=len(found))
        for frame in even(found, most):
            made = load(frame)
            if made:
                strip.frames.append(frame)
                strip.shots.append(made)
        if strip.bytes <= budget or most <= 2:
            break
        most = max(2, min(most - 1, int(most * budget / strip.bytes)))
    strip.damaged = [frame.path.name for frame in found if frame in shots and shots[frame] is None]
    return strip


def even(frames: list[Frame], most: int) -> list[Frame]:
    """At most so many of them, with the first and the last, equally far apart in number."""
    if len(frames) <= most:
        return frames
    return [frames[round(number * (len(frames) - 1) / (most - 1))] for number in range(most)]


def _shots(path: Path, split: bool, reals: dict[bytes, Shot]) -> tuple[Shot, Shot | None]:
    """reals: those made already, by what they are made of: a run shows the same ones hundreds of times."""
    with Image.open(path) as file:
        picture = _rgb(file)
    half = (picture.width - BAND) // 2
    pixels = np.asarray(picture)
    if split and half >= BAND and picture.width == 2 * half + BAND and (pixels[:, half : half + BAND] == 255).all():
        left, right = (picture.crop((x, 0, x + half, picture.height)) for x in (0, half + BAND))
        digest = hashlib.sha256(right.tobytes()).digest()
        if digest not in reals:
            reals[digest] = _shot(right)
        return _shot(left), reals[digest]
    return _shot(picture), None


def _rgb(file: Image.Image) -> Image.Image:
    """As people see it: transparency over white, 16 bits as 8."""
    if file.mode.startswith("I"):
        return Image.fromarray((np.asarray(file, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if file.mode in ("RGBA", "LA", "PA"):
        return Image.alpha_composite(Image.new("RGBA", file.size, "white"), file.convert("RGBA")).convert("RGB")
    return file.convert("RGB")


def _shot(picture: Image.Image) -> Shot:
    """JPEG, or PNG where that is smaller, as for a few large pixels."""
    longest, kinds = max(picture.size), ["JPEG", "PNG"]
    if longest > LONGEST_SIDE:
        kinds = ["JPEG"]  # Too large for large pixels.
        width, height = (max(1, round(side * LONGEST_SIDE / longest)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)
    made = []
    for kind in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **({"quality": QUALITY, "subsampling": 0} if kind == "JPEG" else {}))
        made.append(Shot(kind.lower(), buffer.getvalue(), picture.size))
    return min(made, key=lambda shot: len(shot.content))


# In the page


def show(strip: Strip, name: str, about: str, size: Callable[[int], str]) -> str:
    """HTML of a slider. Without the script all frames stand in a row to scroll. name: of its element; about: what a
    picture is, for those who do not see it; size: a resolution for people."""
    reals = {real.content: real for _, real in strip.shots if real}
    number = {content: place for place, content in enumerate(reals)}
    of: dict[int, str] = {}
    figures = []
    for frame, (shot, real) in zip(strip.frames, strip.shots, strict=True):
        words = f"{short(frame.kimg, 7)} kimg, {size(frame.resolution)}"
        beside = f' data-real="{number[real.content]}"' if real else ""
        if real:
            of.setdefault(number[real.content], size(frame.resolution))
        figures.append(
            f'<figure class="frame" data-kimg="{frame.kimg:g}" data-words="{text(words)}"{beside}>'
            f"{_img(shot, f'{about} at {words}')}<figcaption>{text(words)}</figcaption></figure>"
        )
    beside = "".join(
        f'<figure class="frame">{_img(real, f"Real pictures, {of[place]}")}<figcaption>real, {text(of[place])}'
        "</figcaption></figure>"
        for place, real in enumerate(reals.values())
    )
    stages = f'<div class="stage made">{"".join(figures)}</div>'
    if beside:
        stages = f'<div class="pair">{stages}<div class="stage real">{beside}</div></div>'
    last = len(figures) - 1
    return (
        f'<div class="frames" id="{name}"><div class="control" hidden><button type="button">Play</button>'
        f"<output></output>"
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{text(about)} over time"></div>'
        f"{stages}</div>{left_out(strip)}"
    )


def _img(shot: Shot, about: str) -> str:
    width, height = shot.size
    source = data_url(shot.content, shot.kind)
    return f'<img src="{source}" width="{width}" height="{height}" alt="{text(about)}">'


def left_out(strip: Strip) -> str:
    """What of a folder the page does not show."""
    notes = []
    if len(strip.frames) + len(strip.damaged) < strip.found:
        notes.append(
            f"{len(strip.frames):,} of {plural(strip.found, 'picture')}, the first, the last and an even choice, so "
            "that this page stays small."
        )
    if strip.damaged:
        names = ", ".join(f"<code>{text(name)}</code>" for name in strip.damaged[:5])
        notes.append(f"{plural(len(strip.damaged), 'picture')} cannot be read: {names}.")
    return f"<p>{' '.join(notes)}</p>" if notes else ""


STYLE = """\
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .8rem 1.5rem; }
.stage { display: flex; gap: .5rem; overflow-x: auto; scroll-snap-type: x mandatory; min-width: 0; }
.stage .frame { flex: 0 0 100%; scroll-snap-align: start; margin: 0; }
.live .frame { display: none; }
.live .frame.now { display: block; }
.live .stage { overflow: visible; }
.frame img { width: 100%; background: var(--panel); }
.frame figcaption { text-align: center; margin-top: .3rem; }
.alone .stage { max-width: 48rem; }
.control:not([hidden]) { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .8rem; margin: .4rem 0 .6rem; }
.control input { flex: 1 1 14rem; min-width: 0; height: 2rem; margin: 0; accent-color: var(--plain); }
.control output { min-width: 9rem; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { .control input { order: 3; flex-basis: 100%; } }
.live .made figcaption { display: none; }
.control button { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: .3rem .9rem; min-width: 5rem; cursor: pointer; }
"""

SCRIPT = """\
const strips = [...document.querySelectorAll(".frames")].map(box => {
  const made = [...box.querySelectorAll(".made .frame")], reals = [...box.querySelectorAll(".real .frame")];
  const slider = box.querySelector("input"), button = box.querySelector("button"), output = box.querySelector("output");
  let timer = 0;
  const strip = {made, at: made.length - 1};
  strip.show = number => {
    strip.at = Math.min(Math.max(number, 0), made.length - 1);
    const frame = made[strip.at];
    made.forEach(other => other.classList.toggle("now", other === frame));
    reals.forEach((real, place) => real.classList.toggle("now", String(place) === frame.dataset.real));
    slider.value = strip.at;
    output.value = frame.dataset.words;
    slider.setAttribute("aria-valuetext", frame.dataset.words);
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  strip.go = number => {
    strip.show(number);
    if (box.id !== "samples") return;
    const kimg = +made[strip.at].dataset.kimg;
    for (const other of strips) if (other !== strip) {
      let best = 0;
      other.made.forEach((frame, place) => {
        const away = frame => Math.abs(+frame.dataset.kimg - kimg);
        if (away(frame) < away(other.made[best])) best = place;
      });
      other.show(best);
    }
  };
  slider.addEventListener("input", () => { stop(); strip.go(+slider.value); });
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (strip.at === made.length - 1) strip.go(0);
    button.textContent = "Pause";
    timer = setInterval(() => { strip.go(strip.at + 1); if (strip.at === made.length - 1) stop(); },
      Math.max(120, Math.min(600, 12000 / made.length)));
  });
  for (const stage of box.querySelectorAll(".stage")) {
    stage.tabIndex = 0;
    stage.addEventListener("keydown", event => {
      const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (by) { stop(); strip.go(strip.at + by); event.preventDefault(); }
    });
  }
  box.classList.add("live");
  box.querySelector(".control").hidden = made.length < 2;
  strip.show(made.length - 1);
  return strip;
});
"""
"""The slider, its play button and the arrow keys; moving the samples takes the neighbours along."""
