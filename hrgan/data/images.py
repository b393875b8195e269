"""Image files to square 8-bit tiers, and stored bytes back to arrays. The only place that says how a picture is read.

Reading, in this order: the first frame; EXIF orientation applied; 16-bit grey divided by 257 and rounded (16-bit colour
is reduced to 8 bits by Pillow, which keeps the high byte); transparency, of whatever kind, laid over white; CMYK and
other colour spaces through Pillow's plain conversion (colour profiles are not applied); grey repeated into three
channels. Then the central square, and from it each tier directly with one antialiased filter.
"""

import io
import re
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from hrgan.data.manifest import BadSample

FILTER = "lanczos"
ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF")
MAX_PIXELS = 2 * 89_478_485  # Pillow raises a decompression bomb above twice its MAX_IMAGE_PIXELS; this is that number


class Unusable(Exception):
    """A picture that cannot go into a set. args: (reason, detail); reason is "unreadable", "too_small" or "bomb"."""


def read_image(data: bytes, min_size: int = 0) -> Image.Image:
    """File bytes to an 8-bit RGB picture of any size, as the module says.

    Raises Unusable for broken files, for more than MAX_PIXELS pixels, and for a shorter side below min_size (0: no
    limit).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # between one and two times the limit Pillow only warns
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Unusable("bomb", f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            if min(image.size) < min_size:
                raise Unusable("too_small", f"{image.width}x{image.height}, expected a shorter side of {min_size}")
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; alpha over white. Raises ValueError for grey of more than 16 bits, whose range is unknown."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _grey16(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey16(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey mode {image.mode} with values {values.min()} to {values.max()}, expected 0 to 65535")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def make_tiers(image: Image.Image, tiers: Sequence[int], channels: int) -> list[Image.Image]:
    """An RGB picture to one square per tier: centre crop, then the filter straight from the crop; grey ("L") last if
    channels is 1.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)) if image.width != image.height else image
    resized = [square if tier == side else square.resize((tier, tier), Image.Resampling.LANCZOS) for tier in tiers]
    return [tier.convert("L") for tier in resized] if channels == 1 else resized


def encode(image: Image.Image, image_format: str, quality: int) -> bytes:
    """A tier to its stored bytes. "webp" and "png" are lossless; quality (1 to 100) is jpeg's."""
    buffer = io.BytesIO()
    if image_format == "webp":
        # Measured on photos: method 0, quality 0 encodes 7 (256 px) to 9 (512 px) times faster than method 1 for files
        # 7 % to 13 % larger, still a quarter smaller than PNG, and decodes as fast.
        image.save(buffer, "WEBP", lossless=True, method=0, quality=0)
    elif image_format == "png":
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, "JPEG", quality=quality, subsampling=0)  # 4:4:4, a generator would learn the blocks of 4:2:0
    return buffer.getvalue()


def decode(data: bytes, image_format: str, channels: int, tier: int) -> NDArray[np.uint8]:
    """Stored bytes to (tier, tier, channels) uint8. Raises BadSample when they do not decode to that size."""
    try:
        image = Image.open(io.BytesIO(data), formats=(image_format.upper(),))
        if image.size != (tier, tier):
            raise BadSample(f"{image.width}x{image.height} pixels, expected {tier}x{tier}")
        mode = "L" if channels == 1 else "RGB"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    except BadSample:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many kinds for broken bytes; the sample is replaced, counted and named
        raise BadSample(f"does not decode ({type(error).__name__}: {error})") from None
    return pixels.reshape(tier, tier, channels)


def box_mean(pixels: NDArray[np.uint8], resolution: int) -> NDArray[np.uint8]:
    """(n, T, T, C) uint8 to (n, R, R, C) uint8: the mean of each T/R x T/R box, rounded to nearest (halves up)."""
    n, tier, _, channels = pixels.shape
    f = tier // resolution
    sums = pixels.reshape(n, resolution, f, resolution, f, channels).sum(axis=(2, 4), dtype=np.uint32)
    means: NDArray[np.uint8] = ((sums + f * f // 2) // (f * f)).astype(np.uint8)
    return means
