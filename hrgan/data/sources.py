"""Where pictures come from: one small function for each kind of source, which notes what it finds in the index.

| SRC | what is taken |
|---|---|
| folder | image and DICOM files, nested or not; where there are none, the zip, tar and parquet files in it |
| .zip, .tar (or .tar.gz, .tgz, .tar.bz2, .tar.xz) | the images in it, with the fields of their WebDataset sample |
| .parquet | the image column (bytes, or a struct of bytes and path) of each row |
| .csv, .tsv, .jsonl | a path or URL a row, relative to the file's folder |
| drawn:COUNT | the built-in drawn set |

A `dataset.json` as StyleGAN's tools write it, in a folder or a zip, gives its pictures the field `label`.
"""

import contextlib
import csv
import errno
import itertools
import json
import os
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from hrgan.data.fetch import MOST, plain_url
from hrgan.data.index import Crop, Entry, Index, Place
from hrgan.errors import DataError, UserError, one_line

ENDINGS = frozenset(
    f".{kind}"
    for kind in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif", "ppm", "pgm", "pbm", "pnm"),
        *("jp2", "j2k", "avif", "heic", "heif", "hif", "jxl"),
    )
)
DICOM = frozenset({".dcm", ".dicom", ".ima", ""})
"""Looked into: a file without an ending is DICOM where it begins as one."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".parquet")
TABLES = (".csv", ".tsv", ".jsonl")
PATHS = ("path", "file_name", "file", "filename", "image", "image_path", "url", "image_url")
"""Columns that name the picture, the first that is there."""
JSON_MOST = 2**26
"""Bytes of a json beside a picture: more is no label."""

Fields = dict[str, str]
"""What a source says of a picture, by name."""


@dataclass(frozen=True)
class Wanted:
    """What is kept of it. labels: "none", "folder", or the name of a field; attributes: names of fields; crop: those
    that hold x, y, width and height, or ()."""

    labels: str = "none"
    attributes: tuple[str, ...] = ()
    crop: tuple[str, ...] = ()


@dataclass
class Found:
    """Notes pictures in the index."""

    index: Index
    wanted: Wanted
    others: Counter[str]
    """Files that are no pictures, by ending."""

    def picture(self, path: str, place: Place, fields: Fields, where: str) -> None:
        """where: for messages, the file or the row."""
        wanted, where, group = self.wanted, one_line(where), ""
        if wanted.labels == "folder":
            group, slash, _ = path.partition("/")
            if not slash:
                raise UserError(f"{where} is in no class folder; move it into one or build without labels")
        elif wanted.labels != "none":
            group = fields.get(wanted.labels, "")
            if not group:
                known = one_line(", ".join(sorted(fields))) or "none"
                raise UserError(f"{where}: nothing in {wanted.labels!r}, the field of --labels; it has: {known}")
        attributes = {name: fields.get(name, "") for name in wanted.attributes}
        crop = _crop(fields, wanted.crop, where) if wanted.crop else None
        self.index.add(Entry(path, place, group, attributes, crop))

    def file(self, path: str, place: Place, fields: Fields, where: str, head: Callable[[], IO[bytes]]) -> bool:
        """A file or member by its name: one image, or the frames of a DICOM. head: opens it. Whether it was either."""
        ending = os.path.splitext(place.member or place.where)[1].lower()
        if ending in ENDINGS:
            self.picture(path, place, fields, where)
            return True
        frames = _frames(head) if ending in DICOM else None
        if frames is None and ending in DICOM - {""}:
            frames = "it does not begin as DICOM does"
        if frames is None:
            self.others[one_line(ending, 20) or "no ending"] += 1
            return False
        if isinstance(frames, str):
            self.index.drop(path, "unreadable", frames)
        for frame in range(frames if isinstance(frames, int) else 0):
            name = path if frames == 1 else f"{path}#{frame:05d}"
            self.picture(name, place._replace(frame=frame), fields, where)
        return True


def list_source(index: Index, source: str, wanted: Wanted, out: Path) -> None:
    """Note all pictures of SRC. UserError for a SRC or a field that is not there; DataError for an archive that is
    damaged, or where there is no picture."""
    path = Path(source)
    found = Found(index, wanted, Counter())
    kind = next((ending for ending in (*ARCHIVES, *TABLES) if path.name.lower().endswith(ending)), None)
    if path.is_dir():
        list_folder(found, path, out)
    elif kind in TABLES:
        list_table(found, path)
    elif kind is not None:
        list_archive(found, path, "")
    kinds = ", ".join(f"{ending} {count}" for ending, count in found.others.most_common(5))
    other = f"{found.others.total()} other files ({kinds})" if found.others else "no files"
    if sum(index.count()) and found.others:
        print(f"{source}: {other} are no pictures by their names", file=sys.stderr)
    if not sum(index.count()):
        raise DataError(f"{source}: found {other}, expected images ({', '.join(sorted(ENDINGS))}), DICOM or archives")


# Folders


def _open(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise OSError(errno.EINVAL, "no regular file")  # A pipe would be waited for, for ever.
    return open(path, "rb")


def list_folder(found: Found, source: Path, out: Path) -> None:
    """Images and DICOM; where there are none, archives."""
    labels = _dataset_json(source / "dataset.json")
    archives = []
    for path in _walk(source, "", out.stat(), ()):
        if path.lower().endswith(ARCHIVES):
            archives.append(path)
        file = source / path
        found.file(path, Place("file", str(file)), labels.get(path, {}), str(file), partial(_open, file))
    if sum(found.index.count()):
        return
    if (source / "manifest.json").is_file():  # A set of hrgan's: the same pictures are in each tier.
        archives = _largest_tier(archives)
    for path in sorted(archives):
        list_archive(found, source / path, f"{path}/")


def _largest_tier(shards: list[str]) -> list[str]:
    tiers = {path: int(path.partition("/")[0]) for path in shards if path.partition("/")[0].isdecimal()}
    return [path for path, tier in tiers.items() if tier == max(tiers.values())]


def _walk(root: Path, folder: str, out: os.stat_result, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Relative paths of all files, through links, but not into OUT and not round a loop of links."""
    path = root / folder
    try:
        status = path.stat()
        here = (status.st_dev, status.st_ino)
        if here in above or os.path.samestat(status, out):
            return
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.is_dir():
                    yield from _walk(root, name + "/", out, (*above, here))
                else:
                    yield name
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}; make the folder readable or move it out of {root}") from None


def _frames(head: Callable[[], IO[bytes]]) -> int | str | None:
    """Frames of a DICOM; why they cannot be counted; None for a file that is none."""
    try:
        with head() as stream:
            if not _begins_as_dicom(stream):
                return None
            from hrgan.data.dicom import Unreadable, count_frames  # pydicom takes a while to import

            stream.seek(0)
            try:
                return count_frames(stream) or "no picture in it"  # type: ignore[arg-type]  # IO[bytes] has what it needs
            except Unreadable as error:
                return str(error.args[1])
    except OSError as error:
        return error.strerror or type(error).__name__
    except ValueError:  # a NUL in the name
        return "no name of a file"


def _begins_as_dicom(stream: IO[bytes]) -> bool:
    return stream.read(132)[128:] == b"DICM"


def _dataset_json(path: Path) -> dict[str, Fields]:
    try:
        return dataset_labels(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}


def dataset_labels(content: bytes, where: str) -> dict[str, Fields]:
    """file -> {"label": class number} of StyleGAN's `{"labels": [[file, number or one-hot list], ...]}`; {} for any
    other json. UserError for labels that are neither."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({one_line(error)}); mend it or move it away") from None
    pairs = tree.get("labels") if isinstance(tree, dict) else None
    labels = {}
    for number, pair in enumerate(pairs if isinstance(pairs, list) else []):
        label = pair[1] if isinstance(pair, list) and len(pair) == 2 else None
        if isinstance(label, list) and sorted(map(str, label)) == ["0"] * (len(label) - 1) + ["1"]:
            label = label.index(1)
        if not isinstance(label, int) or not isinstance(pair[0], str):
            raise UserError(f"{where}: labels[{number}] is {one_line(pair, 60)}, expected [file, class number]")
        labels[pair[0]] = {"label": str(label)}
    return labels


# Archives


def list_archive(found: Found, path: Path, prefix: str) -> None:
    """Of a zip, tar or parquet file. prefix: of its pictures' names."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a folder, an archive, a table or drawn:COUNT")
    listing: Callable[[Found, Path, str], None] = list_tar
    if path.name.lower().endswith(".zip"):
        listing = list_zip
    elif path.name.lower().endswith(".parquet"):
        listing = list_parquet
    with damage_named(path):
        listing(found, path, prefix)


@contextlib.contextmanager
def damage_named(path: Path | str) -> Iterator[None]:
    """What reading an archive raises, as a DataError that names it."""
    try:
        yield
    except (UserError, DataError, MemoryError):
        raise
    except OSError as error:
        # zipfile, tarfile and pyarrow raise OSErrors without a number for what they find in a file.
        problem = error.strerror if error.errno is not None else f"damaged ({_named_error(error)})"
        raise DataError(f"{path}: {problem}; expected an archive that can be read: copy it again") from None
    except Exception as error:  # zipfile, tarfile, zlib, lzma and pyarrow each raise kinds of their own
        raise DataError(f"{path}: damaged ({_named_error(error)}); copy it again") from None


def _named_error(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def list_zip(found: Found, path: Path, prefix: str) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (count := _announced(path)) is not None and count != len(members) % 2**16:
            raise DataError(f"{path}: damaged, its directory lists {len(members)} of {count} members; copy it again")
        labels: dict[str, Fields] = {}
        for member in members:
            if member.filename == "dataset.json":
                if member.file_size > 16 * JSON_MOST:
                    raise UserError(f"{path}/dataset.json: {member.file_size} bytes, at most {16 * JSON_MOST}")
                labels = dataset_labels(archive.read(member), f"{path}/dataset.json")
        for member in members:
            if member.is_dir() or member.filename == "dataset.json":
                continue
            if member.flag_bits & 1:
                found.index.drop(prefix + member.filename, "unreadable", "encrypted")
                continue
            packed = member.compress_type, member.CRC, member.file_size
            place = Place("zip", str(path), member.filename, member.header_offset, member.compress_size, None, packed)
            fields, where = labels.get(member.filename, {}), f"{path}/{member.filename}"
            found.file(prefix + member.filename, place, fields, where, partial(archive.open, member))


def _announced(path: Path) -> int | None:
    """Members of a zip by its last record, modulo 65536; None where it has no such record at its end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 22))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    record = tail[place : place + 22] if place >= 0 else b""
    count = int.from_bytes(record[10:12], "little")
    return count if len(record) == 22 and count != 0xFFFF else None  # 0xFFFF: of a zip64, which has another.


def list_tar(found: Found, path: Path, prefix: str) -> None:
    """The fields of a WebDataset sample (members of one key that follow each other) belong to its images."""
    compressed = not path.name.lower().endswith(".tar")
    number = itertools.count()
    with tarfile.open(path, "r:*" if compressed else "r:") as archive:
        members = ((next(number), member) for member in _files(found, archive, prefix))
        for _, group in itertools.groupby(members, key=lambda item: _key(item[1].name)):
            pictures: list[tuple[int, tarfile.TarInfo]] = []
            fields: Fields = {}
            for row, member in group:
                if os.path.splitext(member.name)[1].lower() in (".json", ".cls", ".txt", ".caption"):
                    fields |= _sample_fields(archive, member)
                else:
                    pictures.append((row, member))
            for row, member in pictures:
                if member.issparse() or member.size > MOST:
                    found.index.drop(prefix + member.name, "unreadable", f"{member.size} bytes, sparse or too large")
                    continue
                place = Place("span", str(path), member.name, member.offset_data, member.size)
                if compressed:
                    place = Place("bulk", str(path), member.name, 0, row)
                where = f"{path}/{member.name}"
                found.file(prefix + member.name, place, fields, where, partial(_member, archive, member))
        _check_end(archive, path)


def _files(found: Found, archive: tarfile.TarFile, prefix: str) -> Iterator[tarfile.TarInfo]:
    """The archive's files; links that are named as pictures are dropped."""
    for member in archive:
        if member.size < 0:  # tarfile would go round on it for ever.
            raise tarfile.ReadError(f"a member of {member.size} bytes")
        if member.isfile():
            yield member
        elif not member.isdir() and os.path.splitext(member.name)[1].lower() in ENDINGS:
            found.index.drop(prefix + member.name, "unreadable", "a link or no file")


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    assert stream is not None  # It is a file.
    return stream


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _check_end(archive: tarfile.TarFile, path: Path) -> None:
    """tarfile takes a cut for the end where it falls between two members or in a header."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    rest = archive.fileobj.read(tarfile.BLOCKSIZE)
    whole = len(rest) == tarfile.BLOCKSIZE
    while rest and not any(rest):  # To the file's end: a compressed one has its own check there.
        rest = archive.fileobj.read(2**20)
    if not whole or rest:
        raise DataError(f"{path}: cut or damaged at byte {archive.offset}, expected the archive's end; copy it again")


def _sample_fields(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Fields:
    """What the json, class or text of a sample says; nothing where it cannot be read as such."""
    if member.size > JSON_MOST:
        return {}
    stream = archive.extractfile(member)
    content = stream.read() if stream is not None else b""
    ending = os.path.splitext(member.name)[1].lower()
    if ending != ".json":
        name = {".cls": "cls"}.get(ending, "text")
        return {name: content.decode(errors="replace").strip()}
    try:
        return plain_fields(json.loads(content))
    except (ValueError, RecursionError):
        return {}


def plain_fields(tree: Any) -> Fields:
    """The fields of a JSON object that are text, numbers or truth values, and those of its "attributes", as text."""
    if not isinstance(tree, dict):
        return {}
    inner = plain_fields(tree["attributes"]) if isinstance(tree.get("attributes"), dict) else {}
    own = {str(key): _text(value) for key, value in tree.items() if isinstance(value, (str, int, float))}
    return {name.encode(errors="replace").decode(): value for name, value in (inner | own).items()}


def _text(value: str | int | float) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.encode(errors="replace").decode().strip()  # Half a surrogate pair cannot be stored.


def list_parquet(found: Found, path: Path, prefix: str) -> None:
    """Hugging Face's layout: an image column of bytes, or of a struct of bytes and path; class names in its schema."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        column = image_column(file.schema_arrow)
        if column is None:
            names = ", ".join(file.schema_arrow.names)
            raise DataError(f"{path}: no column of images (bytes, or a struct of bytes and path) among: {names}")
        classes = _class_names(file.schema_arrow)
        others = [name for name in file.schema_arrow.names if name != column]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=others) if others else None
            for row in range(file.metadata.row_group(group).num_rows):
                values = {name: rows.column(name)[row].as_py() for name in others} if rows is not None else {}
                fields = plain_fields(values | {name: _named(values[name], names) for name, names in classes.items()})
                place = Place("bulk", str(path), column, group, row)
                found.picture(f"{prefix}{group:05d}-{row:07d}", place, fields, f"{path}, row {row} of group {group}")


def _named(value: Any, names: list[str]) -> Any:
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def image_column(schema: Any) -> str | None:
    """The first column of bytes, or of structs that hold bytes; one called image or img before others."""
    import pyarrow.types as kinds

    def is_bytes(kind: Any) -> bool:
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))

    fitting = []
    for field in schema:
        struct = kinds.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        if is_bytes(field.type.field("bytes").type if struct else field.type):
            fitting.append(str(field.name))
    return next((name for name in ("image", "img") if name in fitting), fitting[0] if fitting else None)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Column -> names, of Hugging Face's ClassLabel columns."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        found = {}
        for name, feature in features.items():
            if feature.get("_type") == "ClassLabel":
                names = feature.get("names") or feature["names_file"]
                found[name] = [str(item) for item in names]
        return found
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


# Tables


def list_table(found: Found, path: Path) -> None:
    """A row a picture."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a folder, an archive, a table or drawn:COUNT")
    for number, fields in _rows(path):
        where = f"{path}, row {number}"
        column = next((name for name in PATHS if name in fields), None)
        if column is None:
            raise UserError(f"{where}: no column {', '.join(PATHS)}; its columns are: {one_line(', '.join(fields))}")
        name = fields[column]
        if not name:
            found.index.drop(f"row {number}", "unreadable", f"nothing in column {column}")
            continue
        known, numbered = plain_url(name) if "://" in name else name, f"#{number:09d}"
        # The same file may be there with several crops; a URL's query, which can hold secrets, is not in its name.
        unique = known + numbered if found.wanted.crop or known != name else known
        if "://" in name:
            if name.partition("://")[0].lower() not in ("http", "https", "s3", "gs", "hf"):
                shown = one_line(plain_url(name))
                raise UserError(f"{where}: {shown}, expected a path, http(s)://, s3://, gs:// or hf://")
            found.picture(unique, Place("url", name), fields, where)
            continue
        file = path.parent / name
        if not found.file(unique, Place("file", str(file)), fields, where, partial(_open, file)):
            found.index.drop(unique, "unreadable", "no image by its ending")


def _rows(path: Path) -> Iterator[tuple[int, Fields]]:
    """(number from 1, fields) of each row. UserError for a row that is none."""
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _json_row(line, f"{path}, row {number}")
        return
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise UserError(f"{path}, row {number}: not as many fields as columns; quote what has a separator")
                yield number, {(name or "").strip(): (value or "").strip() for name, value in row.items() if name}
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}; expected comma-separated values") from None


def _json_row(line: bytes, where: str) -> Fields:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({one_line(error)})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: holds {type(tree).__name__}, expected an object such as {{\"path\": ...}}")
    return plain_fields(tree)


def _crop(fields: Fields, names: tuple[str, ...], where: str) -> Crop | None:
    """None where all four are empty."""
    missing = [name for name in names if name not in fields]
    if missing:
        known = one_line(", ".join(fields))
        raise UserError(f"{where}: no column {', '.join(missing)} of --crop; its columns are: {known}")
    texts = [fields[name] for name in names]
    if not any(texts):
        return None
    try:
        x, y, width, height = (round(float(text)) for text in texts)
    except (ValueError, OverflowError):
        shown = one_line(",".join(texts), 60)
        raise UserError(f"{where}: crop is {shown}, expected four numbers of pixels x,y,w,h") from None
    return x, y, width, height


def list_drawn(index: Index, count: int, seed: int, labelled: bool) -> None:
    """The drawn set: its classes are the shapes."""
    from hrgan.data.drawn import factors

    for i in range(count):
        group = factors(i, seed).shape if labelled else ""
        index.add(Entry(f"drawn/{i:06d}", Place("drawn", "", "", i), group))


# Sources that are only read from start to end


def spool(index: Index, first: int, last: int, path: Path) -> None:
    """Copy the bytes of pictures first to last - 1 that are in such sources to the file `path`, in the sources' own
    order, so that they can be read in any."""
    with open(path, "ab") as out:
        reader: Iterator[tuple[int, int, bytes | None]] = iter(())
        current: str | None = None
        at: tuple[int, int, bytes | None] = (-1, -1, None)
        for place, key in index.bulks(first, last):
            if place.where != current:
                current, at = place.where, (-1, -1, None)
                reader = _bulk_rows(place.where, place.member)
            while at[:2] < (place.offset, place.size):
                with damage_named(place.where):
                    following = next(reader, None)
                if following is None:
                    raise DataError(f"{place.where}: changed since it was listed; build again")
                at = following
            start = out.tell()
            size = out.write(at[2]) if at[2] else 0
            index.spooled(key, Place("span", str(path), "", start, size, place.frame))


def _bulk_rows(path: str, column: str) -> Iterator[tuple[int, int, bytes | None]]:
    """(group, row, bytes) of all rows in their order."""
    if path.lower().endswith(".parquet"):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                row = 0
                # A row group may be larger than memory; a batch of rows is not.
                for batch in file.iter_batches(16, row_groups=[group], columns=[column]):
                    for value in batch.column(0):
                        yield group, row, _cell(value.as_py(), Path(path).parent)
                        row += 1
        return
    with tarfile.open(path, "r|*") as archive:
        files = (member for member in archive if member.isfile())
        for row, member in enumerate(files):
            stream = archive.extractfile(member)
            yield 0, row, stream.read(MOST) if stream is not None else None


def _cell(value: Any, folder: Path) -> bytes | None:
    """The bytes in an image cell, or of the file it names."""
    if isinstance(value, dict):
        content, name = value.get("bytes"), value.get("path")
        if content is None and isinstance(name, str) and "://" not in name and (folder / name).is_file():
            return (folder / name).read_bytes()
        return content if isinstance(content, bytes) else None
    return value if isinstance(value, bytes) else None
