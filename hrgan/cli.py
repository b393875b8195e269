"""The command line: each subcommand parses and calls one function. Exit codes are in hrgan/errors.py."""

from __future__ import annotations

import difflib
import json
import os
import platform
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from hrgan.checks import problems
from hrgan.config import Config, Precision, leaves, read_yaml, refuse, to_yaml, topics, unknown_key, wrong_type
from hrgan.errors import DataError, HrganError, Stopped, UserError, refused_by_system, to_nowhere

# Commands


def data_build(args: Namespace) -> None:
    from hrgan.data.build import build

    build(
        args.src,
        Path(args.out),
        args.resolution,
        name=args.name,
        labels=args.labels,
        attributes=names(args.attributes),
        crop=names(args.crop),
        image_format=args.format,
        quality=args.quality,
        channels=args.channels,
        bits=args.bits,
        fit=args.fit,
        image_filter=args.filter,
        alpha=args.alpha,
        window=args.window,
        min_size=args.min_size,
        near=args.near,
        share=args.share,
        max_skipped=args.max_skipped,
        workers=args.workers,
        seed=args.seed,
        shard_samples=args.shard_samples,
        overwrite=args.overwrite,
        part=args.part,
    )
    if args.report and args.part is None:
        data_report(args)


def names(text: str | None) -> tuple[str, ...]:
    """The words of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip()) if text else ()


def data_report(args: Namespace) -> None:
    from hrgan.data.report import write_report

    print(write_report(Path(args.out)))


def data_merge(args: Namespace) -> None:
    from hrgan.data.parts import merge

    merge(Path(args.out), args.max_skipped)


def data_info(args: Namespace) -> None:
    from hrgan.data.dataset import open_set
    from hrgan.data.manifest import info

    facts = info(open_set(args.out).manifest)
    print(
        json.dumps(facts, indent=1) if args.json else yaml.safe_dump(facts, sort_keys=False),
        end="\n" if args.json else "",
    )


def data_check(args: Namespace) -> None:
    from hrgan.data.check import check
    from hrgan.data.dataset import open_set

    found = check(*open_set(args.out))
    if found:
        raise DataError(
            "\n".join([f"{args.out}: {len(found)} problem{'s' * (len(found) > 1)}", *(f"  {line}" for line in found)])
        )
    print(f"{args.out}: every shard and sample is as the manifest says")


def schedule(args: Namespace) -> None:
    from hrgan.checks import cautions
    from hrgan.schedule import make_schedule, rows, table

    config = args.configuration
    plan = make_schedule(config)
    print(json.dumps(rows(plan, config), indent=1) if args.json else table(plan, config))
    for line in cautions(config):
        print(f"warning: {line}", file=sys.stderr)


def train(args: Namespace) -> None:
    from hrgan.train import train as run

    run(args.configuration, Path(args.run or f"runs/{Path(args.config_file).stem if args.config_file else 'default'}"))


def evaluate(args: Namespace) -> None:
    from hrgan.apps.evaluate import Settings, evaluate_pair
    from hrgan.apps.follow import watch
    from hrgan.metrics.rows import describe

    settings = Settings(
        data=args.data,
        count=args.count,
        num_real=args.num_real,
        metrics=metric_names(args.metrics),
        extractor=args.extractor,
        weights=args.weights,
        mirror=args.mirror or None,
        kid_subset_size=args.kid_subset_size,
        bootstrap=args.bootstrap,
        resolution=args.resolution,
        workers=args.workers,
        picture=Path(args.picture) if args.picture else None,
    )
    if args.watch:
        if args.reference is not None:
            raise UserError(
                f"{args.reference}: a run that is watched is compared with the set that it was trained on; "
                "name other shards with --data"
            )
        watch(Path(args.target), settings, args.every)
        return
    for row in evaluate_pair(args.target, args.reference, settings):
        print(describe(row), file=sys.stderr)
        print(json.dumps(row, allow_nan=False))


def metric_names(text: str | None) -> tuple[str, ...] | None:
    """The words of --metrics; `all` is every one that any two sides have."""
    from hrgan.config import EVAL_METRICS

    if text is None:
        return None
    every = [name for name in EVAL_METRICS if name not in ("ppl", "class_fid")]
    return tuple(dict.fromkeys(name for word in names(text) for name in (every if word == "all" else [word])))


def generate(args: Namespace) -> None:
    from hrgan.apps.generate import Wanted
    from hrgan.apps.generate import generate as make

    wanted = Wanted(args.count, args.seed, args.weights == "ema", args.class_name, args.truncation)
    make(Path(args.target), Path(args.out), wanted)


def judge(args: Namespace) -> None:
    from hrgan.apps.judge import judge as make

    make(Path(args.target), Path(args.out) if args.out else None, args.pairs, args.seed, args.data, args.seconds)


def judge_pool(args: Namespace) -> None:
    from hrgan.apps.judge_pool import pool, print_table

    found = pool([Path(path) for path in args.results])
    print(json.dumps(found, indent=1)) if args.json else print_table(found)


def report(args: Namespace) -> None:
    from hrgan.monitor.report import write_report

    print(write_report(Path(args.run), Path(args.out) if args.out else None))


def compare(args: Namespace) -> None:
    from hrgan.monitor.compare import compare as of

    of([Path(run) for run in args.runs], Path(args.out) if args.out else None, args.metric, args.json)


def bench_data(args: Namespace) -> None:
    from hrgan.apps.bench_data import bench_data as bench
    from hrgan.apps.bench_data import print_table

    rows = bench(args.out, Path(args.originals) if args.originals else None, args.seconds)
    print(json.dumps(rows, indent=1)) if args.json else print_table(rows)


def bench_size(args: Namespace) -> None:
    from hrgan.apps.bench_data import bench_size as bench
    from hrgan.apps.bench_data import print_size

    row = bench(args.samples, args.shards, Path(args.folder) if args.folder else None)
    print(json.dumps(row, indent=1)) if args.json else print_size(row)


def bench_eval(args: Namespace) -> None:
    from hrgan.apps.bench_eval import bench_eval as bench
    from hrgan.apps.bench_eval import print_table

    rows = bench(Path(args.a), Path(args.b), Path(args.weights))
    print(json.dumps(rows, indent=1)) if args.json else print_table(rows)


def bench_step(args: Namespace) -> None:
    from hrgan.apps.bench_step import bench_peer, print_table
    from hrgan.apps.bench_step import bench_step as bench

    if args.peer:
        rows = bench_peer(args.configuration.data, args.seconds, args.resolutions, args.precisions)
    else:
        rows = bench(args.configuration, args.seconds, args.with_saves, args.resolutions, args.precisions)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(rows, indent=1)) if args.json else print_table(rows)


def bench_switches(args: Namespace) -> None:
    from hrgan.apps.bench_switches import bench_switches as bench
    from hrgan.apps.bench_switches import print_table

    rows = bench(args.configuration, args.seconds)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(rows, indent=1)) if args.json else print_table(rows)


def bench_world(args: Namespace) -> None:
    from hrgan.apps.bench_world import bench_world as bench
    from hrgan.apps.bench_world import print_table

    rows = bench(args.configuration, args.processes, args.seconds)
    print(json.dumps(rows, indent=1)) if args.json else print_table(rows, args.processes)


def bench_modes(args: Namespace) -> None:
    from hrgan.apps.bench_modes import bench_modes as bench
    from hrgan.apps.bench_modes import print_table

    rows = bench(Path(args.target), args.count, args.seed)
    print(json.dumps(rows, indent=1)) if args.json else print_table(rows)


# Their arguments


def data_build_arguments(parser: Parser) -> None:
    parser.add_argument(
        "src",
        type=str,
        help="folder of images, DICOM or archives; a zip, tar or parquet file; a CSV or JSONL of paths or URLs; or "
        "drawn:COUNT for the built-in drawn set",
    )
    parser.add_argument("out", type=str, help="folder to make")
    parser.add_argument(
        "--resolution",
        type=str,
        required=True,
        help="of the largest tier in pixels: a power of two from 16, or HEIGHTxWIDTH such as 512x768",
    )
    parser.add_argument("--name", type=str, default=None, help="name of the set (default: the name of SRC)")
    parser.add_argument(
        "--labels",
        type=str,
        default="none",
        help="what the classes are: none; folder (the first sub-folders of SRC); or a column, a key of the json beside "
        "a picture, `label` of a dataset.json, `cls` of a WebDataset",
    )
    parser.add_argument(
        "--attributes", type=str, default=None, help="NAME,NAME: columns or keys to store with each sample"
    )
    parser.add_argument(
        "--crop", type=str, default=None, help="X,Y,W,H: names of the columns with the part of each picture to take"
    )
    form_arguments(parser)
    parser.add_argument(
        "--near",
        type=int,
        default=None,
        help="leave out pictures that look like an earlier one: their perceptual hashes differ in at most so many of "
        "64 bits (4 is careful)",
    )
    parser.add_argument(
        "--share",
        type=str,
        default="0:1",
        help="LOW:HIGH: only files whose sha256, as a share of 2^256, lies in [LOW, HIGH); 0:0.9 and 0.9:1 are two "
        "sets without a common file",
    )
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=0.01,
        help="largest share of images that may be skipped",
    )
    parser.add_argument("--report", action="store_true", help="also make OUT/report.html (hrgan data report OUT)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="decides the stored order")
    parser.add_argument("--shard-samples", type=int, default=None, help="images in a shard (default: by resolution)")
    parser.add_argument("--overwrite", action="store_true", help="replace a set that is there")
    parser.add_argument(
        "--part", type=str, default=None, help="I/N: make only part I of N, for `hrgan data merge OUT` to join"
    )


def form_arguments(parser: Parser) -> None:
    """How pictures are made and stored."""
    parser.add_argument(
        "--format",
        type=str,
        choices=("webp", "png", "jpeg"),
        default=None,
        help="webp (the default of 8 bits) and png (of 16) are lossless",
    )
    parser.add_argument("--quality", type=int, default=95, help="of jpeg, 1 to 100")
    parser.add_argument(
        "--channels", type=int, choices=(1, 3, 4), default=None, help="3: RGB; 1: grey; 4: RGBA, with --alpha keep"
    )
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8, help="16: grey, never reduced to 8")
    parser.add_argument(
        "--fit",
        type=str,
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="how a picture of another shape is fitted",
    )
    parser.add_argument(
        "--filter",
        type=str,
        choices=("lanczos", "box", "bicubic"),
        default="lanczos",
        help="for resizing, antialiased; it moves FID",
    )
    parser.add_argument(
        "--alpha", type=str, choices=("white", "black", "keep"), default="white", help="what transparency is laid over"
    )
    parser.add_argument(
        "--window",
        type=str,
        default="auto",
        help="grey values that become black and white: raw (kept; of 16 bits the default), file (DICOM's own window; "
        "of 8 bits the default), LOW,HIGH, or percentiles LOW%%,HIGH%% of each picture",
    )
    parser.add_argument("--min-size", type=int, default=0, help="skip images whose shorter side is less, in pixels")


def data_merge_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=str, help="folder of parts")
    parser.add_argument(
        "--max-skipped", type=float, default=None, help="largest share of images that may be skipped (default: theirs)"
    )


def data_info_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=str, help="folder of shards, or its URL")
    parser.add_argument("--json", action="store_true", help="as JSON")


def data_check_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=str, help="folder of shards, or its URL")


def data_report_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=str, help="folder of shards")


def schedule_arguments(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    config_arguments(parser)


def train_arguments(parser: Parser) -> None:
    parser.add_argument("--run", type=str, default=None, help="run directory (default runs/<config name>)")
    config_arguments(parser)


def eval_arguments(parser: Parser) -> None:
    parser.add_argument(
        "target",
        type=str,
        help="what is measured: a run directory (its best, else its newest checkpoint), a checkpoint folder, a folder "
        "of pictures, or shards",
    )
    parser.add_argument(
        "reference", type=str, nargs="?", default=None, help="what it is compared with, any of these (default: --data)"
    )
    parser.add_argument("--data", type=str, default=None, help="shards (default: those that the run was trained on)")
    parser.add_argument("--count", type=int, default=None, help="pictures of the target (eval.num_fake, or all)")
    parser.add_argument("--num-real", type=int, default=None, help="pictures of the reference (default: all)")
    parser.add_argument(
        "--metrics",
        type=str,
        default=None,
        help="NAME,NAME of fid, fid_infinity, kid, isc, prc, class_fid, memorization, ppl; all: those that need "
        "neither a generator nor classes (default: eval.metrics of the run, or fid)",
    )
    parser.add_argument("--extractor", type=str, default=None, help="as eval.extractor of a configuration")
    parser.add_argument("--weights", type=str, default=None, help="file of the extractor's weights")
    parser.add_argument("--mirror", action="store_true", help="compare with each real and its flipped copy")
    parser.add_argument("--kid-subset-size", type=int, default=None, help="pictures in each of KID's subsets (1000)")
    parser.add_argument("--bootstrap", type=int, default=None, help="replicates for the error of the distance (12)")
    parser.add_argument(
        "--resolution", type=str, default=None, help="bring folders and shards to it: a side, or HEIGHTxWIDTH"
    )
    parser.add_argument("--workers", type=int, default=None, help="loader processes of each process (2)")
    parser.add_argument("--picture", type=str, default=None, help="file for memorization's picture of nearest reals")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="follow a run: add a row to its metrics.jsonl for each checkpoint that has none, until it is finished",
    )
    parser.add_argument("--every", type=float, default=30.0, help="with --watch: seconds between looks")


def generate_arguments(parser: Parser) -> None:
    parser.add_argument(
        "target", type=str, help="run directory (its best, else its newest checkpoint) or checkpoint folder"
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the pictures and grid.png")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--seed", type=int, default=0, help="picture i depends on the seed and i alone")
    parser.add_argument(
        "--weights", type=str, choices=("ema", "raw"), default="ema", help="ema: the moving average of the generator"
    )
    parser.add_argument("--class", dest="class_name", type=str, help="of this class only; default: of each as often")
    parser.add_argument(
        "--truncation", type=float, default=1.0, help="of style's w: below 1 more alike and cleaner, 0 all the same"
    )


def judge_arguments(parser: Parser) -> None:
    parser.add_argument(
        "target", type=str, help="run directory (its best, else its newest checkpoint) or checkpoint folder"
    )
    parser.add_argument("--out", type=str, default=None, help="the page (default: judge.html in the run directory)")
    parser.add_argument("--pairs", type=int, default=50, help="of a real and a generated picture")
    parser.add_argument("--seed", type=int, default=0, help="decides the pictures")
    parser.add_argument("--data", type=str, default=None, help="folder of shards (default: the one it was trained on)")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long a pair is shown; 0: until it is answered")


def judge_pool_arguments(parser: Parser) -> None:
    parser.add_argument("results", type=str, nargs="+", help="files that the page saved, one a person")
    parser.add_argument("--json", action="store_true", help="as JSON")


def report_arguments(parser: Parser) -> None:
    parser.add_argument("run", type=str, help="run directory, finished or not")
    parser.add_argument("--out", type=str, default=None, help="file to write (default: RUN/report.html)")


def compare_arguments(parser: Parser) -> None:
    parser.add_argument("runs", type=str, nargs="+", metavar="RUN", help="run directories, two or more")
    parser.add_argument(
        "--out", type=str, default=None, help="page to write (default: compare.html; with --json none unless named)"
    )
    parser.add_argument("--metric", type=str, default=None, help="of metrics.jsonl (default: that of most runs)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def bench_data_arguments(parser: Parser) -> None:
    parser.add_argument("out", type=str, help="folder of shards")
    parser.add_argument("--originals", type=str, default=None, help="the folder that the set was built from, as a peer")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each figure")
    parser.add_argument("--json", action="store_true", help="as JSON")


def bench_size_arguments(parser: Parser) -> None:
    parser.add_argument("--samples", type=int, default=1_000_000, help="pictures of the simulated set")
    parser.add_argument("--shards", type=int, default=1000, help="shards they are in")
    parser.add_argument("--folder", type=str, default=None, help="where to write it (2.6 GB for a million)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def bench_eval_arguments(parser: Parser) -> None:
    parser.add_argument("a", type=str, help="folder of pictures")
    parser.add_argument("b", type=str, help="folder of as large ones to compare them with")
    parser.add_argument("--weights", type=str, required=True, help="file of FID's Inception weights")
    parser.add_argument("--json", action="store_true", help="as JSON")


def bench_modes_arguments(parser: Parser) -> None:
    parser.add_argument("target", type=str, help="run directory or checkpoint folder, trained on a drawn set")
    parser.add_argument("--count", type=int, default=4800, help="pictures generated, and as many reals")
    parser.add_argument("--seed", type=int, default=0, help="decides the pictures")
    parser.add_argument("--json", action="store_true", help="as JSON")


def bench_step_arguments(parser: Parser) -> None:
    parser.add_argument("--seconds", type=float, default=8.0, help="time for each figure")
    parser.add_argument(
        "--peer", action="store_true", help="the networks, batches and loss of a measured peer, with the ratio"
    )
    parser.add_argument(
        "--with-saves", action="store_true", help="also what checkpoints and looks for a stop take of a run's time"
    )
    parser.add_argument("--resolutions", type=list[int], default=[], help="only these, e.g. [256,512]; default: all")
    parser.add_argument(
        "--precisions", type=list[Precision], default=[], help="e.g. [bf16]; default: float32, and bf16 if native"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    config_arguments(parser)


def bench_switches_arguments(parser: Parser) -> None:
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each figure")
    parser.add_argument("--json", action="store_true", help="as JSON")
    config_arguments(parser)


def bench_world_arguments(parser: Parser) -> None:
    parser.add_argument("--processes", type=int, default=2, help="how many train together")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each figure")
    parser.add_argument("--json", action="store_true", help="as JSON")
    config_arguments(parser)


def config_arguments(parser: Parser) -> None:
    """Every field of the configuration as --topic.field, with its docstring as help."""
    parser.add_argument("--config", action="config", help="YAML file, for example configs/demo.yaml")
    parser.add_class_arguments(Config, None)


COMMANDS: dict[str, tuple[Callable[[Namespace], None], Callable[[Parser], None], str]] = {
    "data build": (data_build, data_build_arguments, "turn a folder of images into shards"),
    "data merge": (data_merge, data_merge_arguments, "join the parts of a set that was built with --part"),
    "data report": (data_report, data_report_arguments, "make OUT/report.html: counts, sizes, statistics, pictures"),
    "data info": (data_info, data_info_arguments, "say what a set of shards holds"),
    "data check": (
        data_check,
        data_check_arguments,
        "read every byte and sample of a set; exit 4 if anything is wrong",
    ),
    "schedule": (schedule, schedule_arguments, "print the phases of a configuration"),
    "train": (train, train_arguments, "train, or go on where the run directory stands"),
    "eval": (evaluate, eval_arguments, "measure a run, checkpoint, folder or shards against another"),
    "generate": (generate, generate_arguments, "write pictures from a run or a checkpoint"),
    "judge pool": (judge_pool, judge_pool_arguments, "join the results of a quiz: error rates of each person and all"),
    "judge": (judge, judge_arguments, "make a page on which people tell generated pictures from real ones"),
    "report": (report, report_arguments, "make RUN/report.html: curves, samples, metrics, warnings, configuration"),
    "compare": (compare, compare_arguments, "runs beside each other: only numbers that may be compared"),
    "bench data": (bench_data, bench_data_arguments, "images per second of reading a set, beside its limits"),
    "bench size": (bench_size, bench_size_arguments, "what a set of a million images takes to open, seek and hold"),
    "bench eval": (bench_eval, bench_eval_arguments, "seconds of FID of two folders, beside torch-fidelity's command"),
    "bench modes": (bench_modes, bench_modes_arguments, "how many of the drawn set's 48 modes a generator covers"),
    "bench step": (
        bench_step,
        bench_step_arguments,
        "images per second of training, and what a step spends its time on",
    ),
    "bench switches": (
        bench_switches,
        bench_switches_arguments,
        "images per second with channels_last, fused Adam, compile and CUDA graphs on and off",
    ),
    "bench world": (bench_world, bench_world_arguments, "how much faster several processes train than one"),
}
CONFIGURED = ("schedule", "train", "bench step", "bench switches", "bench world")
"""Commands that take a configuration."""


# From words to a call


class Parser(ArgumentParser):
    """Wrong arguments are a UserError: one line, exit code 2, as for all bad input."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(f"{self.prog}: {' '.join(message.split())}")


def split_config(words: list[str]) -> tuple[list[str], str | None, list[tuple[str, str]]]:
    """A command's words as: its own words, the configuration file, and the overrides (key, value) of configuration
    fields."""
    own, file, overrides = [], None, []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--") or name in ("--json", "--peer", "--with-saves", "--print_config"):
            own.append(word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name}: a value is missing after it")
            value = rest.pop(0)
        if name == "--config":
            file = value
        elif name in ("--run", "--seconds", "--processes", "--resolutions", "--precisions"):
            own += [name, value]
        else:
            overrides.append((name[2:], value))
    return own, file, overrides


def read_config(parser: Parser, file: str | None, overrides: list[tuple[str, str]]) -> Config:
    """The configuration of a file and overrides. UserError that lists every problem of both: unknown keys, wrong
    types, wrong values."""
    written = list(leaves(read_yaml(Path(file)))) if file else []
    given = [*written, *overrides]
    found = {index: line for index, (key, _) in enumerate(given) if (line := unknown_key(key)) is not None}
    known = [(index, leaf) for index, leaf in enumerate(given) if index not in found]
    # The parser takes as long for one leaf as for all: each by itself only where one is wrong, to tell which.
    halves = ([leaf for index, leaf in known if (index < len(written)) == of_file] for of_file in (True, False))
    if not all(parses(parser, half) for half in halves):
        found |= {index: wrong_type(*leaf) for index, leaf in known if not parses(parser, [leaf])}
    right = [leaf for index, leaf in known if index not in found]
    namespace = parser.instantiate_classes(parser.parse_object(tree_of(right)))
    config = Config(**{name: namespace[name] for name in topics()})
    mistyped = {key for index, (key, _) in known if index in found}  # What stands in their place is not the user's.
    others = [line for line in problems(config) if line.split(":")[0] not in mistyped]
    refuse([*(found[index] for index in sorted(found)), *others], file or "configuration")
    return config


Leaf = tuple[str, Any]
"""A key such as loss.kind, and its value."""


def parses(parser: Parser, given: list[Leaf]) -> bool:
    """Whether all have the types that the configuration wants."""
    try:
        parser.parse_object(tree_of(given))
    except (UserError, ArgumentError):
        return False
    return True


def tree_of(given: list[Leaf]) -> dict[str, Any]:
    """The tree of these leaves; of the same key the last one stays."""
    tree: dict[str, Any] = {}
    for key, value in dict(given).items():
        merge(tree, nested(key, value))
    return tree


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    result: dict[str, Any] = value
    return result


def merge(tree: dict[str, Any], branch: dict[str, Any]) -> None:
    """Add a branch to a tree of topics, its leaf replacing the one that is there."""
    for key, value in branch.items():
        if key in topics() and isinstance(value, dict) and isinstance(tree.get(key), dict):
            tree[key].update(value)
        else:
            tree[key] = value


def run_command(words: list[str]) -> None:
    """Find the command, parse the rest of the words, call its function."""
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        listing = "\n".join(f"  hrgan {name:12} {text}" for name, (_, _, text) in COMMANDS.items())
        if words and words[0] in ("--help", "-h"):
            print(f"Train high-resolution GANs by progressive growing.\n\n{listing}\n\nhrgan COMMAND --help says more.")
            return
        near = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, 1)
        raise UserError(
            f"no such command: {' '.join(words[:2])!r}"
            + (f"; did you mean {near[0]}?" if near else f"; the commands are\n{listing}")
        )
    act, add_arguments, text = COMMANDS[name]
    parser = Parser(prog=f"hrgan {name}", description=text)
    add_arguments(parser)
    rest = words[len(name.split()) :]
    if name not in CONFIGURED or {"--help", "-h"} & set(rest):
        act(parser.parse_args(rest))
        return
    own, file, overrides = split_config(rest)
    config = read_config(parser, file, overrides)
    if "--print_config" in own:
        print(to_yaml(config), end="")
        return
    args = parser.parse_args(own)
    args.configuration, args.config_file = config, file
    act(args)


def main(argv: list[str] | None = None) -> int:
    """Run a command; its exit code, which also goes to the file that HRGAN_EXIT_FILE names: a launcher hides it."""
    code = exit_code(argv)
    if file := os.environ.get("HRGAN_EXIT_FILE"):
        partial = Path(f"{file}.{os.getpid()}-{platform.node()}")  # All processes of a training write the same.
        partial.write_text(f"{code}\n")
        os.replace(partial, file)
    if nobody_reads():
        to_nowhere(sys.stdout)
    return code


def nobody_reads() -> bool:
    """Whether the output goes into a pipe whose other end is closed, as `| head` does."""
    try:
        output = select.poll()
        output.register(sys.stdout, 0)
    except (ValueError, OSError, TypeError):  # There is none, or one without a file.
        return False
    return any(event & select.POLLERR for _, event in output.poll(0))


def exit_code(argv: list[str] | None) -> int:
    """Run a command, and say what ended it."""
    try:
        run_command(sys.argv[1:] if argv is None else argv)
        return 0
    except HrganError as error:
        complain(str(error) if isinstance(error, Stopped) else f"hrgan: {error}")
        return error.exit_code
    except BrokenPipeError:
        if not nobody_reads():
            raise
        return 141
    except OSError as error:
        refusal = refused_by_system(error)
        complain(f"hrgan: {refusal}")
        return refusal.exit_code
    except KeyboardInterrupt:
        complain("hrgan: interrupted")
        return 130


def complain(line: str) -> None:
    """Say it, if somebody still listens."""
    with suppress(BrokenPipeError):
        print(line, file=sys.stderr)
