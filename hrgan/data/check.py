"""`hrgan data check`: reads every byte and sample of a set."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

from hrgan.data.manifest import FILE, Manifest, set_hash
from hrgan.data.shards import BadSample, ShardReader, parse_meta
from hrgan.data.store import Store
from hrgan.errors import DataError


def check(store: Store, manifest: Manifest) -> list[str]:
    """Verify a whole set: sizes, sha256, keys, crc32, and that every sample decodes to its tier's size.

    Returns one line a problem, naming shard and sample; empty for a sound set.
    """
    problems = []
    if set_hash(manifest) != manifest.real_set:
        problems.append(f"{store.describe(FILE)}: real_set does not match its fields; it was edited after the build")
    tiers = sorted(manifest.tiers)
    labels: Counter[int] = Counter()
    for shard in range(len(manifest.shard_samples)):
        found = {tier: list(_shard_problems(store, manifest, tier, shard, problems)) for tier in tiers}
        problems += _differences(store, manifest, shard, found)
        labels.update(json.loads(sample)[0] for sample in found[manifest.resolution] if sample)
    counts = tuple(labels[label] for label in range(len(manifest.classes)))
    if counts != manifest.class_counts and not problems:
        listed = list(manifest.class_counts)
        problems.append(f"{store.describe(FILE)}: class_counts are {listed}, found {list(counts)}")
    return problems


def _shard_problems(
    store: Store, manifest: Manifest, tier: int, number: int, problems: list[str]
) -> Iterator[bytes]:
    """Append one shard's problems; yields each sample's json without the crc32, for comparison between tiers."""
    from hrgan.data.images import decode  # OpenCV only where pictures are decoded

    shard = manifest.tiers[tier][number]
    name = store.describe(shard.file)
    problem = store.size_problem(shard.file, shard.bytes)
    if problem:
        problems.append(problem)
    try:
        path = store.local(shard.file, shard.bytes, shard.sha256)
    except DataError as error:
        problems.append(str(error))
        return
    if not path.is_file():
        return
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != shard.sha256:
            problems.append(f"{name}: sha256 is {digest}, expected {shard.sha256}")
        stream.seek(0)
        reader = ShardReader(stream, name, sum(manifest.shard_samples[:number]), shard.samples, manifest.extension)
        try:
            for _ in range(shard.samples):
                sample = reader.read()
                try:
                    meta = parse_meta(sample, len(manifest.classes))
                    decode(sample.image, manifest.form, tier)
                    yield json.dumps(meta).encode()
                except BadSample as error:
                    problems.append(f"{name}: sample {sample.key}: {error}")
                    yield b""
            reader.finish()
        except DataError as error:
            problems.append(str(error))


def _differences(store: Store, manifest: Manifest, shard: int, found: dict[int, list[bytes]]) -> list[str]:
    """Samples whose json is not the largest tier's; those already reported are b"" or missing."""
    first = sum(manifest.shard_samples[:shard])
    reference = found[manifest.resolution]
    lines = []
    for tier, samples in found.items():
        for i, (sample, expected) in enumerate(zip(samples, reference, strict=False)):
            if sample and expected and sample != expected:
                path = store.describe(manifest.tiers[tier][shard].file)
                lines.append(f"{path}: sample {first + i:09d}: label and origin are {sample!r}, expected {expected!r}")
    return lines
