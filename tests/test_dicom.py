"""DICOM: values, windows and shapes as the files mean them, and no word about a patient in a set."""

from __future__ import annotations

import io
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from hrgan.data import dicom
from hrgan.data.build import build
from hrgan.data.dataset import Dataset as Sets
from hrgan.data.dataset import open_set
from hrgan.data.dicom import Unreadable, count_frames, read_frame
from hrgan.data.stream import read_range
from hrgan.errors import DataError

DICOM = Path(__file__).parents[2] / "shared" / "data" / "dicom"
MOST = 10**8
SECRETS = ("Doe^Jonathan", "ID-998877", "19611112", "Saint Elsewhere", "1.2.826.0.1.999.4242")


def file(pixels: np.ndarray, **tags: Any) -> Dataset:
    """A file of (H, W), (frames, H, W) or (H, W, 3) pixels, with things about a patient in it."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    dataset.file_meta.MediaStorageSOPInstanceUID = SECRETS[4]
    dataset.SOPInstanceUID = SECRETS[4]
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.InstitutionName = SECRETS[:4]
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour or pixels.ndim == 2 else pixels.shape[1:]
    if pixels.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = tags.pop("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def written(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def read(dataset: Dataset, frame: int = 0) -> dicom.Frame:
    return read_frame(written(dataset), frame, MOST)


def ramp(kind: type = np.uint16, step: int = 10) -> np.ndarray:
    return (np.arange(48 * 40).reshape(48, 40) * step).astype(kind)


def test_values_come_after_the_rescale() -> None:
    found = read(file(ramp(np.int16, 1) - np.int16(500), RescaleSlope=2, RescaleIntercept=-1024))
    assert (found.pixels == (ramp(np.int64, 1) - 500) * 2.0 - 1024).all()
    assert (found.window, found.spacing) == (None, (1.0, 1.0))
    assert (read(file(ramp())).pixels == ramp()).all()
    deep = read(file(ramp(np.uint32, 1000)))
    assert (deep.pixels == ramp(np.int64, 1000).astype(np.float32)).all()


def test_junk_above_the_stored_bits_is_no_value() -> None:
    values = (ramp(step=1) % 4096).astype(np.uint16)
    found = read(file(values | np.uint16(0xA000), BitsStored=12))
    assert (found.pixels == values).all()


def test_monochrome1_is_turned_with_its_window() -> None:
    found = read(file(ramp(step=1), BitsStored=12, PhotometricInterpretation="MONOCHROME1", WindowCenter=100,
                      WindowWidth=50, VOILUTFunction="LINEAR_EXACT"))  # fmt: skip
    assert (found.pixels == 4095 - ramp(np.int64, 1)).all()
    assert found.window == (4095 - 125, 4095 - 75)


def test_the_first_window_is_taken() -> None:
    assert read(file(ramp(), WindowCenter=["40", "400"], WindowWidth=["81", "10"])).window == (-0.5, 79.5)
    assert read(file(ramp(), WindowCenter=40, WindowWidth=0)).window is None


def test_spacing_comes_from_the_first_tag_that_makes_sense() -> None:
    assert read(file(ramp(), PixelSpacing=[0.5, 1.0])).spacing == (0.5, 1.0)
    assert read(file(ramp(), PixelSpacing=[0, 0], ImagerPixelSpacing=[2, 1])).spacing == (2.0, 1.0)
    assert read(file(ramp(), PixelAspectRatio=["4", "3"])).spacing == (4.0, 3.0)
    assert read(file(ramp(), PixelSpacing=[1e-9, 1e9])).spacing == (1.0, 1.0)


def test_enhanced_files_say_it_for_each_frame() -> None:
    def groups(slope: float, low: float) -> Dataset:
        group, rescale, window, measures = Dataset(), Dataset(), Dataset(), Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = slope, 1
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = low + 5, 10, "LINEAR_EXACT"
        measures.PixelSpacing = [1.0, slope]
        group.PixelValueTransformationSequence = Sequence([rescale])
        group.FrameVOILUTSequence = Sequence([window])
        group.PixelMeasuresSequence = Sequence([measures])
        return group

    frames = np.stack([ramp(step=1), ramp(step=2), ramp(step=3)])
    dataset = file(frames, PerFrameFunctionalGroupsSequence=Sequence([groups(2, 0), groups(3, 7), groups(4, 9)]))
    assert count_frames(io.BytesIO(written(dataset))) == 3
    second = read(dataset, 1)
    assert (second.pixels == ramp(np.int64, 2) * 3 + 1).all()
    assert (second.window, second.spacing) == ((7, 17), (1.0, 3.0))
    with pytest.raises(Unreadable, match="no frame 3"):
        read(dataset, 3)


def test_colour_and_palettes_become_rgb() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    assert (read(file(colour)).pixels == colour).all()
    index = np.array([[0, 1], [2, 1]], np.uint8)
    palette = file(index, PhotometricInterpretation="PALETTE COLOR")
    for name, values in (("Red", [0, 255, 10]), ("Green", [1, 0, 20]), ("Blue", [2, 0, 30])):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [3, 0, 16])
        setattr(palette, f"{name}PaletteColorLookupTableData", (np.array(values, np.uint16) * 257).tobytes())
    assert read(palette).pixels.tolist() == [[[0, 1, 2], [255, 0, 0]], [[10, 20, 30], [255, 0, 0]]]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_files_are_decoded_or_the_package_is_named(syntax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = file(ramp())
    dataset.compress(syntax, generate_instance_uid=False)
    data = written(dataset)
    assert (read_frame(data, 0, MOST).pixels == ramp()).all()
    monkeypatch.setattr(dicom, "decoder_is_there", lambda syntax: False)
    with pytest.raises(Unreadable) as error:
        read_frame(data, 0, MOST)
    assert error.value.args[0] == "decoder"
    if syntax is JPEG2000Lossless:
        assert "JPEG 2000" in error.value.args[1]
        assert error.value.args[1].endswith("needs the package pylibjpeg-openjpeg: pip install pylibjpeg-openjpeg")


def test_files_without_pictures_and_bombs_are_named(tmp_path: Path) -> None:
    report = file(ramp())
    del report.Rows, report.Columns, report.PixelData
    assert count_frames(io.BytesIO(written(report))) == 0
    with pytest.raises(Unreadable, match="limit 1000"):
        read_frame(written(file(ramp())), 0, 1000)
    (tmp_path / "a.dcm").write_bytes(written(file(ramp(), NumberOfFrames=2**31 - 1)))
    began = time.monotonic()
    with pytest.raises(DataError, match="1 of 1 images cannot be used"):
        build(str(tmp_path), tmp_path / "out", 16, workers=0)
    assert time.monotonic() - began < 5
    assert "it says 2147483647 frames" in (tmp_path / "out" / "skipped.csv").read_text()


def test_damaged_copies_raise_one_kind_with_one_line_that_quotes_nothing() -> None:
    whole = written(file(ramp(), WindowCenter=40, WindowWidth=400, RescaleSlope=1, RescaleIntercept=0))
    rng = np.random.default_rng(0)
    for number in range(300):
        data = bytearray(whole if number % 2 else whole[: int(rng.integers(132, len(whole)))])
        for place in rng.integers(132, len(data), 8) if number % 2 else []:
            data[place] ^= 1 << int(rng.integers(8))
        try:
            count_frames(io.BytesIO(bytes(data)))
            read_frame(bytes(data), 0, MOST)
        except Unreadable as error:
            text = error.args[1]
            assert "\n" not in text
            assert not [secret for secret in SECRETS if secret in text]


# Sets


def stored(out: Path, level: int) -> np.ndarray:
    dataset = Sets((open_set(str(out)),), (1.0,))
    return np.concatenate([batch.images.numpy() for batch in read_range(dataset, level, 0, dataset.num_samples)])


def test_no_word_about_a_patient_reaches_a_shard(tmp_path: Path) -> None:
    source = tmp_path / "source" / f"{SECRETS[0]} {SECRETS[1]}"
    source.mkdir(parents=True)
    frames = np.stack([ramp(step=i + 1) for i in range(3)])
    (source / f"{SECRETS[4]}.dcm").write_bytes(written(file(ramp(step=7), WindowCenter=40, WindowWidth=400)))
    (source / f"{SECRETS[2]}-many.dcm").write_bytes(written(file(frames)))
    (source / f"{SECRETS[2]}").write_bytes(written(file(np.zeros((20, 20, 3), np.uint8))))
    manifest = build(str(tmp_path / "source"), tmp_path / "out", 16, workers=0, image_format="png")
    assert manifest is not None
    assert manifest.num_samples == 5
    for path in [*(tmp_path / "out").rglob("*.tar"), tmp_path / "out" / "manifest.json"]:
        content = path.read_bytes()
        for secret in SECRETS:
            for encoding in ("utf-8", "utf-16-le"):
                assert secret.encode(encoding) not in content
    with tarfile.open(tmp_path / "out" / "16" / "source-00000.tar") as archive:
        for member in archive.getmembers():
            if member.name.endswith("png"):
                assert not Image.open(archive.extractfile(member)).info


def test_pixels_that_are_not_square_become_so(tmp_path: Path) -> None:
    down, across = np.mgrid[:160, :80]
    disc = ((down - 79.5) * 0.5) ** 2 + ((across - 39.5) * 1.0) ** 2 < 30**2  # round in millimetres
    (tmp_path / "disc.dcm").write_bytes(written(file((disc * 1000).astype(np.uint16), PixelSpacing=[0.5, 1.0])))
    build(str(tmp_path), tmp_path / "out", 64, bits=16, channels=1, workers=0)
    (picture,) = stored(tmp_path / "out", 64)[:, 0] > 500
    height, width = picture.any(1).sum(), picture.any(0).sum()
    assert abs(int(height) - int(width)) <= 1
    assert 46 <= width <= 50  # 60 of 80 mm


def test_windows_make_eight_bits(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(
        written(file(ramp(step=1)[:40], WindowCenter=500, WindowWidth=400, VOILUTFunction="LINEAR_EXACT"))
    )
    values = ramp(np.int64, 1)[:40].astype(np.float64)
    for window, low, high in (("auto", 300, 700), ("file", 300, 700), ("-100,900", -100, 900)):
        form = {"channels": 1, "workers": 0, "window": window, "fit": "crop", "overwrite": True}
        build(str(tmp_path), tmp_path / "out", 32, **form)
        found = stored(tmp_path / "out", 32)[0, 0].astype(float)
        levels = np.clip((values - low) / (high - low) * 255, 0, 255)
        image = Image.fromarray(np.floor(levels + 0.5).astype(np.uint8)).resize((32, 32), Image.Resampling.LANCZOS)
        assert (found == np.asarray(image)).all()
    (tmp_path / "a.dcm").write_bytes(written(file(ramp(np.int16, 1), RescaleSlope=1, RescaleIntercept=-1024)))
    with pytest.raises(DataError, match="1 out_of_range"):
        build(str(tmp_path), tmp_path / "ct", 32, bits=16, channels=1, workers=0)
    assert "give --window LOW,HIGH" in (tmp_path / "ct" / "skipped.csv").read_text()
    build(str(tmp_path), tmp_path / "ct", 32, bits=16, channels=1, window="-1024,3071", workers=0)


@pytest.mark.skipif(not DICOM.is_dir(), reason=f"{DICOM} is not here")
def test_the_real_slices_keep_their_greatest_values(tmp_path: Path) -> None:
    manifest = build(str(DICOM), tmp_path / "out", 64, channels=1, bits=16, max_skipped=0.0, workers=0)
    assert manifest is not None
    assert manifest.num_samples == 44
    maxima = sorted(int(pixel_array(path).max()) for path in DICOM.glob("nih_*"))
    pictures = stored(tmp_path / "out", 64)
    assert pictures.dtype == np.uint16
    assert sorted(pictures.max((1, 2, 3)).tolist())[-20:] == maxima
    assert manifest.values == (0, maxima[-1])
    by_hand = {pixel_array(path).astype(np.uint16).tobytes() for path in DICOM.glob("nih_*")}
    assert len(by_hand & {picture.tobytes() for picture in pictures}) == 20
