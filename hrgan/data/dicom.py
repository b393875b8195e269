"""DICOM frames to numbers, through pydicom and its pixel handlers.

Grey comes after the rescale slope and intercept (or the Modality LUT), with MONOCHROME1 turned so that more is
brighter. Padding values (PixelPaddingValue) stay as they are. Nothing but pixels, their spacing and the window leaves
this module, and no error text quotes a value of the file: there may be a patient's name in it.
"""

import math
import os
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # It takes a third of a second to import, which sets without DICOM need not.
    from pydicom import Dataset

PACKAGES = {
    "JPEG 2000": "pylibjpeg-openjpeg",
    "High-Throughput": "pylibjpeg-openjpeg",
    "JPEG-LS": "pylibjpeg-libjpeg",
    "JPEG": "pylibjpeg-libjpeg",
}
"""Part of a transfer syntax's name -> what decodes it; the first that fits."""


class Unreadable(Exception):
    """args: (reason, detail); reason is "unreadable", "decoder" (one is missing), "bomb" (too many pixels) or
    "no_pixels" (no picture in it)."""


class Frame(NamedTuple):
    """One picture."""

    pixels: NDArray[np.float32] | NDArray[np.uint8]
    """Grey (H, W) float32 in the file's units; colour (H, W, 3) uint8 RGB."""
    spacing: tuple[float, float]
    """Distance of the pixels' centres down and across; (1, 1) where the file does not say."""
    window: tuple[float, float] | None
    """(low, high) in the units of the pixels that the file's own first window shows."""


def count_frames(stream: BinaryIO) -> int:
    """How many pictures a file holds, from its header; 0 where it has none. Raises Unreadable."""
    import pydicom

    tags = ["Rows", "Columns", "NumberOfFrames", "SOPClassUID"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=tags)
            if "Rows" not in header or "Columns" not in header:
                return 0
            frames = max(1, int(header.get("NumberOfFrames") or 1))
            size = stream.seek(0, os.SEEK_END)
            if frames > size:
                raise Unreadable("unreadable", f"it says {frames} frames, but has {size} bytes")
            return frames
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # pydicom raises what the damage makes of it: any kind
        raise Unreadable("unreadable", f"its header cannot be read ({type(error).__name__})") from None


def read_frame(data: bytes, frame: int, max_pixels: int) -> Frame:
    """Frame number `frame`, from 0. Raises Unreadable for anything broken."""
    import io

    import pydicom

    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(io.BytesIO(data))
            _check(dataset, frame, max_pixels)
            groups = _groups(dataset, frame)
            if int(dataset.get("SamplesPerPixel", 1)) > 1 or "PALETTE" in str(dataset.PhotometricInterpretation):
                return Frame(_colour(dataset, frame), _spacing(dataset, groups), None)
            return _grey(dataset, groups, frame)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # as above; the text of the error may quote the file
        raise Unreadable("unreadable", f"its pixels cannot be read ({type(error).__name__})") from None


def _check(dataset: "Dataset", frame: int, max_pixels: int) -> None:
    """Before anything is decoded."""
    if "Rows" not in dataset or not any(
        name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
    ):
        raise Unreadable("no_pixels", "no picture in it")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if rows * columns > max_pixels:
        raise Unreadable("bomb", f"{columns}x{rows} pixels, limit {max_pixels}")
    if rows < 1 or columns < 1:
        raise Unreadable("unreadable", f"{columns}x{rows} pixels")
    if not 0 <= frame < max(1, int(dataset.get("NumberOfFrames") or 1)):
        raise Unreadable("unreadable", f"no frame {frame}")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax.is_encapsulated and not decoder_is_there(syntax):
        package = next((name for part, name in PACKAGES.items() if part in syntax.name), "gdcm")
        raise Unreadable("decoder", f"{syntax.name.split(' (')[0]} needs the package {package}: pip install {package}")


def decoder_is_there(syntax: Any) -> bool:
    """Whether pydicom has something that decodes a compressed transfer syntax."""
    from pydicom.pixels import get_decoder

    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _groups(dataset: "Dataset", frame: int) -> list["Dataset"]:
    """Where an enhanced file may keep what others keep at the top: what is said of this frame, then of all."""
    found = [dataset]
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        items = dataset.get(name) or []
        number = frame if name.startswith("Per") else 0
        if number < len(items):
            for macro in items[number]:
                if macro.VR == "SQ" and macro.value:
                    found.insert(0, macro.value[0])
    return found


def _first(groups: list["Dataset"], name: str) -> Any:
    return next((group[name].value for group in groups if name in group and group[name].value is not None), None)


def _raw(dataset: "Dataset", frame: int) -> NDArray[Any]:
    from pydicom.pixels import pixel_array

    array: NDArray[Any] = pixel_array(dataset, index=frame)
    return array


def _grey(dataset: "Dataset", groups: list["Dataset"], frame: int) -> Frame:
    values = _raw(dataset, frame)
    bits, signed = int(dataset.get("BitsStored", 16)), bool(dataset.get("PixelRepresentation", 0))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    lut = _first(groups, "ModalityLUTSequence")
    if lut:
        from pydicom.pixels import apply_modality_lut

        pixels = apply_modality_lut(values, dataset).astype(np.float32)
        white = (float(pixels.min()), float(pixels.max()))
    else:
        slope, intercept = (
            float(1 if name == "RescaleSlope" and found is None else found or 0)
            for name in ("RescaleSlope", "RescaleIntercept")
            for found in [_first(groups, name)]
        )
        pixels = (values.astype(np.float64) * slope + intercept).astype(np.float32)
        ends = sorted((low * slope + intercept, high * slope + intercept))
        white = ends[0], ends[1]
    window = _window(groups)
    if str(dataset.get("PhotometricInterpretation", "")) == "MONOCHROME1":
        total = white[0] + white[1]
        pixels = np.float32(total) - pixels
        window = (total - window[1], total - window[0]) if window else None
    return Frame(pixels, _spacing(dataset, groups), window)


def _window(groups: list["Dataset"]) -> tuple[float, float] | None:
    """The range that the first window shows (DICOM PS3.3 C.11.2.1.2: LINEAR counts pixels, so it is one shorter)."""
    centre, width = (_scalar(_first(groups, name)) for name in ("WindowCenter", "WindowWidth"))
    if centre is None or width is None:
        return None
    exact = str(_first(groups, "VOILUTFunction") or "LINEAR") != "LINEAR"
    low, high = (centre - width / 2, centre + width / 2) if exact else (centre - width / 2, centre + width / 2 - 1)
    return (low, high) if high > low else None


def _scalar(value: Any) -> float | None:
    """The first number of a value that may hold several."""
    if value is None or isinstance(value, str):
        return None
    values = value if hasattr(value, "__iter__") else [value]
    number = next((float(item) for item in values), None)
    return number if number is not None and math.isfinite(number) else None


def _spacing(dataset: "Dataset", groups: list["Dataset"]) -> tuple[float, float]:
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        value = _first(groups, name)
        if value is not None and not isinstance(value, str) and hasattr(value, "__len__") and len(value) == 2:
            down, across = float(value[0]), float(value[1])
            if 0 < down < math.inf and 0 < across < math.inf and 0.01 < down / across < 100:
                return down, across
    return 1.0, 1.0


def _colour(dataset: "Dataset", frame: int) -> NDArray[np.uint8]:
    """(H, W, 3) RGB; of 16 bits the high byte."""
    pixels = _raw(dataset, frame)  # pydicom turns YBR into RGB.
    bits = int(dataset.get("BitsStored", 8))
    if "PALETTE" in str(dataset.PhotometricInterpretation):
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, dataset)
        bits = pixels.dtype.itemsize * 8
    if bits > 8:
        pixels = pixels >> (bits - 8)
    colour: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    if colour.ndim != 3 or colour.shape[2] != 3:
        raise Unreadable("unreadable", f"{colour.ndim} dimensions, expected height, width and 3 colours")
    return colour
