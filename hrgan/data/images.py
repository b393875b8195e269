"""Image files to the tiers of a set, and stored bytes back to arrays. The only place that says how a picture is read.

Reading, in this order: the first frame (of DICOM: the asked one); EXIF orientation applied; transparency, of whatever
kind, laid over white or black, or kept; CMYK and other colour spaces through Pillow's plain conversion (colour profiles
are not applied); grey repeated into three channels, or colour weighed into one. Grey of more than 8 bits goes through
the window (below). Then the fit, and from it each tier directly with one antialiased filter. DICOM pixels that are not
square become so in that same step.

A set of 16 bits keeps grey as numbers from 0 to 65535 all the way; what the filter makes up beyond a picture's own
least and greatest value is clipped to those. A set of 8 bits takes 16-bit grey divided by 257 and rounded (16-bit
colour is reduced to 8 bits by Pillow, which keeps the high byte).
"""

import importlib.util
import io
import math
import re
import warnings
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hrgan.data.dicom import Frame, Unreadable, read_frame
from hrgan.data.manifest import Form
from hrgan.data.shards import BadSample
from hrgan.errors import UserError

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels."""

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 2 * 89_478_485  # Pillow raises a decompression bomb above twice its MAX_IMAGE_PIXELS; this is that number
PLUGINS = {"heic": ("pillow_heif", "pillow-heif"), "jxl": ("pillow_jxl", "pillow-jxl-plugin")}
"""Kinds that Pillow reads with a package of its own: module, name to install."""


class Unusable(Exception):
    """A picture that cannot go into a set. args: (reason, detail); reason is "unreadable", "decoder" (one is missing),
    "too_small", "bomb", "crop" or "out_of_range"."""


class Picture(NamedTuple):
    """A picture before it is fitted."""

    image: Image.Image
    """RGB, RGBA or L; of 16-bit sets F, grey from 0 to 65535."""
    spacing: tuple[float, float] = (1.0, 1.0)
    """Distance of the pixels' centres down and across; only the ratio matters."""


class Window(NamedTuple):
    """Which grey values become black and white.

    kind "auto" is "raw" for sets of 16 bits and "file" for 8. "raw": the values themselves (after DICOM's rescale);
    those that do not fit are refused. "file": the window that a DICOM file names, without one its least to greatest;
    the full range of other files. "values": from low to high. "percent": from the low-th to the high-th percentile of
    each picture. Values beyond are clipped.
    """

    kind: str
    low: float = 0.0
    high: float = 0.0


@lru_cache
def parse_window(text: str) -> Window:
    """ "auto", "raw", "file", "LOW,HIGH" or "LOW%,HIGH%". UserError for anything else."""
    if text in ("auto", "raw", "file"):
        return Window(text)
    match = re.fullmatch(r"\s*(-?[\d.]+(?:e[+-]?\d+)?)(%?)\s*,\s*(-?[\d.]+(?:e[+-]?\d+)?)(%?)\s*", text)
    try:
        if match and match[2] == match[4]:
            low, high = float(match[1]), float(match[3])
            if low < high and (not match[2] or (low >= 0 and high <= 100)):
                return Window("percent" if match[2] else "values", low, high)
    except ValueError:  # 1.2.3
        pass
    raise UserError(
        f"window is {text!r}, expected auto, raw, file, LOW,HIGH such as -1024,3071, or percentiles such as 0.5%,99.5%"
    )


# Reading


def read_picture(data: bytes, form: Form, frame: int | None = None, min_size: int = 0) -> Picture:
    """File bytes to a picture of any size, as the module says. frame: of DICOM, from 0; None for any other image.

    Raises Unusable for broken files, for more than MAX_PIXELS pixels, for values that do not fit, and for a shorter
    side below min_size (0: no limit).
    """
    try:
        if frame is not None:
            picture = _from_dicom(read_frame(data, frame, MAX_PIXELS), form)
        else:
            picture = Picture(_from_image(data, form, min_size))
    except Unreadable as error:
        raise Unusable({"no_pixels": "unreadable"}.get(error.args[0], error.args[0]), error.args[1]) from None
    _check_size(picture.image.size, min_size)
    return picture


def _check_size(size: tuple[int, int], least: int) -> None:
    if min(size) < least:
        raise Unusable("too_small", f"{size[0]}x{size[1]}, expected a shorter side of {least}")


def _from_image(data: bytes, form: Form, min_size: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # between one and two times the limit Pillow only warns
            _check_decoder(data)
            image = Image.open(io.BytesIO(data), formats=(*FORMATS, *_plugins()))
            if image.width * image.height > MAX_PIXELS:
                raise Unusable("bomb", f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            _check_size(image.size, min_size)
            image.load()
            return converted(ImageOps.exif_transpose(image), form)
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable("bomb", str(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds for broken files; each is counted and listed by the build
        # Without an object's address, which would make two builds differ.
        text = re.sub(r"<[^>]* object at 0x[0-9a-f]+>", "its bytes", str(error)).replace("\n", " ")
        raise Unusable("unreadable", f"{type(error).__name__}: {text}") from None


def _check_decoder(data: bytes) -> None:
    """Unusable, naming what to install, for a kind of file whose decoder is not there."""
    kind = _kind(data)
    if kind and importlib.util.find_spec(PLUGINS[kind][0]) is None:
        package = PLUGINS[kind][1]
        raise Unusable("decoder", f"{kind.upper()} needs the package {package}: pip install {package}")


def _kind(data: bytes) -> str | None:
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis"):
        return "heic"
    if data[:2] == b"\xff\x0a" or data[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
        return "jxl"
    return None


@lru_cache
def _plugins() -> tuple[str, ...]:
    """Pillow's names for the further formats that packages are there for."""
    found = []
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        found.append("HEIF")
    if importlib.util.find_spec("pillow_jxl"):
        importlib.import_module("pillow_jxl")
        found.append("JXL")
    return tuple(found)


def converted(image: Image.Image, form: Form) -> Image.Image:
    """Any mode of Pillow's to the set's: F for 16 bits, else L, RGB or RGBA."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # 32 bits and fractions fill no known range: their values are taken as they are.
        full = 65535 if image.mode.startswith("I") and image.getextrema()[1] <= 65535 else None  # type: ignore[operator]
        return _from_levels(_windowed(np.asarray(image).astype(np.float32), None, full, form), form)
    rgb = _over_background(image, form.alpha)
    if form.bits == 16:
        grey = np.asarray(rgb, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as Pillow's L
        return _from_levels(_windowed(grey, None, 255, form), form)
    return rgb.convert("L") if form.channels == 1 else rgb


def _over_background(image: Image.Image, alpha: str) -> Image.Image:
    """RGB with transparency laid over white or black, or RGBA."""
    if image.mode == "La":
        image = image.convert("LA")
    if alpha == "keep":
        return image.convert("RGBA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255) if alpha == "white" else (0, 0, 0, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_dicom(frame: Frame, form: Form) -> Picture:
    if frame.pixels.ndim == 3:
        return Picture(converted(Image.fromarray(frame.pixels.astype(np.uint8)), form), frame.spacing)
    levels = _windowed(frame.pixels.astype(np.float32), frame.window or _range(frame.pixels), None, form)
    return Picture(_from_levels(levels, form), frame.spacing)


def _range(values: NDArray[np.float32] | NDArray[np.uint8]) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _windowed(
    values: NDArray[np.float32], own: tuple[float, float] | None, full: int | None, form: Form
) -> NDArray[np.float32]:
    """Grey values (H, W) to levels 0 to 65535 or 0 to 255 of the set, not rounded.

    own: the window that the file names, or its range; full: the greatest number that its kind can hold, None where
    values have units (DICOM, fractions) and are kept as they are by "raw".
    """
    white, window = 2**form.bits - 1, parse_window(form.window)
    if not np.isfinite(values).all():
        raise Unusable("out_of_range", "values that are not finite numbers")
    kind = ("raw" if form.bits == 16 else "file") if window.kind == "auto" else window.kind
    if kind == "values":
        low, high = window.low, window.high
    elif kind == "percent":
        low, high = (float(x) for x in np.percentile(values, [window.low, window.high]))
    elif kind == "file" and own is not None:
        low, high = own
    else:
        # A file of 8 or 16 bits fills the range of a set of 16 or 8; DICOM's "raw" values stay themselves.
        low, high = 0.0, float(white if full is None else full)
        if values.min() < low or values.max() > high or (full is None and (values != np.rint(values)).any()):
            raise Unusable(
                "out_of_range",
                f"grey values {values.min():g} to {values.max():g}, expected whole numbers from 0 to {high:g}; give "
                "--window LOW,HIGH or percentiles",
            )
    if high <= low:  # One flat grey.
        return np.zeros_like(values)
    levels: NDArray[np.float32] = np.clip((values - np.float32(low)) * np.float32(white / (high - low)), 0, white)
    return levels


def _from_levels(levels: NDArray[np.float32], form: Form) -> Image.Image:
    rounded = np.floor(levels + 0.5)  # halves up
    if form.bits == 16:
        return Image.fromarray(rounded)
    grey = Image.fromarray(rounded.astype(np.uint8))
    return {1: grey, 3: grey.convert("RGB"), 4: grey.convert("RGBA")}[form.channels]


# Tiers


class Tiers(NamedTuple):
    """A picture as it is stored."""

    images: list[Pixels]
    """One a tier, (h, w, C)."""
    size: tuple[int, int]
    """Width and height in pixels of the source."""
    values: tuple[int, int]
    """Its least and greatest value; of 8-bit sets 0 and 255."""


def make_tiers(picture: Picture, form: Form, crop: tuple[int, int, int, int] | None = None, min_size: int = 0) -> Tiers:
    """A picture to one array a tier: the crop (x, y, width, height), then the fit, then the filter straight from it."""
    image = picture.image
    source = image.size
    if crop is not None:
        x, y, width, height = crop
        if x < 0 or y < 0 or width < 1 or height < 1 or x + width > image.width or y + height > image.height:
            raise Unusable("crop", f"{x},{y},{width},{height} (x,y,w,h) is not within {image.width}x{image.height}")
        image = image.crop((x, y, x + width, y + height))
        _check_size(image.size, min_size)
    box = _box(image.size, picture.spacing, form)
    values = _values(image, box) if form.bits == 16 else (0, 255)
    arrays = []
    for tier in form.tiers:
        pixels = np.asarray(_resized(image, box, picture.spacing, form, tier, values[0]))
        if form.bits == 16:
            pixels = np.floor(np.clip(pixels, *values) + 0.5).astype(np.uint16)
        arrays.append(pixels.reshape(*form.size(tier), form.channels))
    return Tiers(arrays, source, values)


def _values(image: Image.Image, box: Box) -> tuple[int, int]:
    inside = np.asarray(image.crop((int(box[0]), int(box[1]), math.ceil(box[2]), math.ceil(box[3]))))
    return int(inside.min()), int(inside.max())


def _box(size: tuple[int, int], spacing: tuple[float, float], form: Form) -> Box:
    """What of the picture is stored: all of it, or for "crop" the largest central part of the set's shape."""
    width, height = size
    if form.fit != "crop":
        return 0, 0, width, height
    rows, columns = form.grid
    if spacing[0] == spacing[1]:  # Whole pixels, so that a picture of the very size is stored as it is.
        if width * rows >= height * columns:
            kept = max(1, height * columns // rows)
            left = (width - kept) // 2
            return left, 0, left + kept, height
        kept = max(1, width * rows // columns)
        top = (height - kept) // 2
        return 0, top, width, top + kept
    down, across = height * spacing[0], width * spacing[1]  # In units of length.
    if across * rows >= down * columns:
        kept_across = down * columns / rows / spacing[1]
        return (width - kept_across) / 2, 0, (width + kept_across) / 2, height
    kept_down = across * rows / columns / spacing[0]
    return 0, (height - kept_down) / 2, width, (height + kept_down) / 2


def _resized(
    image: Image.Image, box: Box, spacing: tuple[float, float], form: Form, tier: int, lowest: int
) -> Image.Image:
    height, width = form.size(tier)
    if form.fit != "pad":
        return _resample(image, (width, height), box, form)
    down, across = image.height * spacing[0], image.width * spacing[1]
    scale = min(height / down, width / across)
    inner = max(1, min(width, round(across * scale))), max(1, min(height, round(down * scale)))
    white = form.alpha == "white" and form.channels > 1
    colours: dict[str, float | tuple[int, ...]] = {"F": float(lowest), "L": 0, "RGBA": (0, 0, 0, 0)}
    colour = colours.get(image.mode, (255, 255, 255) if white else (0, 0, 0))
    canvas = Image.new(image.mode, (width, height), colour)
    canvas.paste(_resample(image, inner, box, form), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def _resample(image: Image.Image, size: tuple[int, int], box: Box, form: Form) -> Image.Image:
    # Cropped first: with a box alone the filter would look at what is beyond it.
    left, top, right, bottom = int(box[0]), int(box[1]), math.ceil(box[2]), math.ceil(box[3])
    inside = image.crop((left, top, right, bottom))
    if inside.size == size and (left, top, right, bottom) == box:
        return inside
    part = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return inside.resize(size, FILTERS[form.filter], part)  # Colours weigh by their alpha: Pillow sees to that.


# Stored bytes


def encode(pixels: Pixels, form: Form) -> bytes:
    """A tier (h, w, C) to its stored bytes."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if form.channels == 1 else pixels)
    if form.format == "webp":
        # Measured on photos: method 0, quality 0 encodes 7 (256 px) to 9 (512 px) times faster than method 1 for files
        # 7 % to 13 % larger, still a quarter smaller than PNG, and decodes as fast. exact: the colours below full
        # transparency, too.
        image.save(buffer, "WEBP", lossless=True, method=0, quality=0, exact=True)
    elif form.format == "png":
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, "JPEG", quality=form.quality, subsampling=0)  # A generator would learn the blocks of 4:2:0.
    return buffer.getvalue()


_FLAGS = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR_RGB, 4: cv2.IMREAD_UNCHANGED}


def decode(data: bytes | memoryview, form: Form, tier: int) -> Pixels:
    """Stored bytes to (h, w, C) uint8 or uint16. Raises BadSample when they do not decode to that size and kind.

    OpenCV, because it decodes lossless WebP 1.1 to 1.9, PNG 1.1 to 2.7 and JPEG 1.3 to 10 times as fast as Pillow, to
    the same pixels (docs/results; `hrgan bench data` measures both).
    """
    flags = _FLAGS[form.channels] | (cv2.IMREAD_ANYDEPTH if form.bits == 16 else 0)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise BadSample(f"does not decode ({error.err or error})") from None
    if pixels is None:
        raise BadSample(f"does not decode as {form.format} ({len(data)} bytes)")
    if pixels.dtype != (np.uint16 if form.bits == 16 else np.uint8):
        raise BadSample(f"{pixels.dtype.name} pixels, expected {form.bits} bits")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif form.channels == 4 and pixels.shape[2] == 3:  # WebP leaves the alpha of an opaque picture out.
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2BGRA)
    if pixels.shape != (*form.size(tier), form.channels):
        found, expected = ("x".join(map(str, shape)) for shape in (pixels.shape, (*form.size(tier), form.channels)))
        raise BadSample(f"{found} (height, width, channels), expected {expected}")
    if form.channels == 4:
        cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA, pixels)
    return pixels  # type: ignore[return-value]  # its dtype was checked


def perceptual_hash(tiers: list[Pixels], form: Form) -> int:
    """64 bits of the signs of the picture's lowest frequencies (imagehash's phash), from the smallest tier that holds
    the 32 x 32 pixels that it looks at."""
    import imagehash

    pixels = next((tier for tier in tiers if min(tier.shape[:2]) >= 32), tiers[-1])
    if form.bits == 16:
        low, high = int(pixels.min()), max(int(pixels.max()), 1)
        pixels = ((pixels - np.uint16(low)) * (255.0 / max(1, high - low))).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if form.channels == 1 else pixels)
    bits = imagehash.phash(image).hash.flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "little")


def box_mean(pixels: Pixels, factor: int) -> Pixels:
    """(n, H, W, C) to (n, H/factor, W/factor, C) of the same type: the mean of each box, rounded to nearest (halves
    up)."""
    n, height, width, channels = pixels.shape
    boxes = pixels.reshape(n, height // factor, factor, width // factor, factor, channels)
    means = (boxes.sum(axis=(2, 4), dtype=np.uint32) + factor**2 // 2) // factor**2
    return means.astype(pixels.dtype)  # type: ignore[no-any-return]
