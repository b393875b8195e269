"""The configuration: one frozen dataclass a topic, keys and types checked (values: checks.py), YAML in and out.

Fields that may differ by resolution take a number or a map {resolution: number}; a resolution that the map does not
name takes the entry of the next lower one (see `at`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from hrgan.errors import UserError

CHUNK = 4
"""Images that travel together: the unit of batches, ranks and workers, and the minibatch-stddev group."""

IntByRes = int | dict[int, int]
FloatByRes = float | dict[int, float]
Precision = Literal["auto", "float32", "bf16", "fp16"]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are read."""

    path: dict[str, float] | str = ""
    """Folder of shards as `hrgan data build` wrote it, or its URL (http, https, s3, gs, hf); or several of them with
    their weights: {PATH: 0.7, PATH: 0.3}."""
    label: str | None = None
    """The attribute that is the class; None takes what the set was built with as --labels."""
    held_out: str | None = None
    """Folder or URL of shards that are not trained on (--share of `hrgan data build` splits off some): the log compares
    what D says of them and of training pictures, which tells memorising. None: not compared."""
    values: list[int] | None = None
    """The stored numbers that become -1 and 1; None takes them from the set when the run starts."""
    mirror: bool = False
    """Flip half of the real images left to right."""
    workers: int = 2
    """Loader processes per training process; 0 decodes in the training process."""
    prefetch: int = 4
    """Batches that each loader process prepares ahead."""
    slots: int = 16
    """Equal parts an epoch is cut into, all read at once; a multiple of the number of loader processes reads best.
    Part of the order of images."""
    window: int = 256
    """Samples shuffled together within a slot (a multiple of 4), held undecoded in memory. Part of the order of
    images."""
    cache: str | None = None
    """Folder for shards from a URL, shared by the processes of a machine; None: $HRGAN_CACHE, else ~/.cache/hrgan."""
    cache_gb: float = 100.0
    """Most that the cache may hold, in GB (1e9 bytes); the least recently used go first."""
    timeout_seconds: float = 30.0
    """Time without a byte from a server after which an attempt counts as failed."""
    retries: int = 6
    """Further attempts at a file that a server did not give, with growing pauses."""
    allow_pipe: bool = False
    """Let data.path be a shell command, `pipe:ssh host cat /sets/mine/{}`."""
    max_bad: float = 0.01
    """Largest share of samples that may fail to decode (each is replaced and counted) before the run stops."""


@dataclass(frozen=True)
class NetworkConfig:
    """The two networks."""

    family: Literal["dcgan", "progan", "style", "r3"] = "progan"
    """Architecture: dcgan (Radford et al. 2016), progan (Karras et al. 2018), style (StyleGAN2, Karras et al. 2020), r3
    (R3GAN, Huang et al. 2024)."""
    resolution: int = 1024
    """Final width and height in pixels, a power of two; of another grid the level, so that 512x768 is 512 with the
    grid [4, 6]."""
    grid: list[int] = field(default_factory=lambda: [4, 4])
    """Height and width of the first layer's grid, which doubles with each level: [4, 4] is square."""
    channels: int = 3
    """Channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA)."""
    bits: int = 8
    """Bits of a channel of the images: 8, or 16 for grey."""
    latent: int = 512
    """Length of the latent vector z."""
    fmap_base: int = 8192
    """Feature maps at resolution R are fmap_base / (R / 2), at most fmap_max."""
    fmap_max: int = 512
    """Largest number of feature maps in any layer."""
    widths: list[int] | None = None
    """Feature maps at 4, 8, 16, ... pixels, in place of the rule above; None uses the rule."""
    grow: bool = True
    """Grow from schedule.start_resolution; false trains at the final resolution from the first image."""
    condition: Literal["none", "projection", "acgan"] = "none"
    """Whether pictures are made of a class: an embedding of the label joins z, and D scores how well a picture fits its
    label (projection: Miyato & Koyama 2018) or also classifies it (acgan: Odena et al. 2017, as in ProGAN's paper)."""
    classes: list[str] | None = None
    """Names of the classes; None takes them from the set when the run starts."""
    mapping_layers: int = 8
    """Layers of style's mapping network from z to w."""
    mixing: float = 0.9
    """Share of training pictures for which style takes the later layers' w from a second z (style mixing)."""
    noise: bool = True
    """Noise inputs of style, which draw what is random in a picture. Short runs on few images do without."""
    channels_last: bool = True
    """Keep the numbers of a pixel together in memory, which CPUs and tensor cores convolve fastest; false: those of a
    channel."""
    blocks: int = 2
    """Residual blocks per resolution of r3."""
    group_size: int = 16
    """Channels per group of r3's 3x3 convolutions, which have twice a block's width (its cardinality is
    2 width / group_size)."""

    @property
    def num_classes(self) -> int:
        """Classes that the networks are conditioned on; 0: unconditional."""
        return len(self.classes or ()) if self.condition != "none" else 0


@dataclass(frozen=True)
class LossConfig:
    """Adversarial loss and its penalties."""

    kind: Literal["wgan-gp", "wasserstein", "logistic", "least-squares", "hinge", "relativistic"] = "wgan-gp"
    """wgan-gp: Wasserstein with gradient penalty and drift (Karras et al. 2018); the others take R1 and R2: wasserstein
    (with drift), logistic (non-saturating, Goodfellow et al. 2014), least-squares (Mao et al. 2017), hinge (Miyato et
    al. 2018), relativistic (logistic of D(real) - D(fake), pair by pair, Huang et al. 2024)."""
    gp_lambda: float = 10.0
    """Weight of the WGAN-GP penalty, (gradient norm - gp_target)^2 / gp_target^2 between reals and fakes."""
    gp_target: float = 1.0
    """Gradient norm that the WGAN-GP penalty asks for."""
    gp_every: int = 1
    """Steps between two WGAN-GP penalties; they are weighted by this number."""
    drift: float = 0.001
    """Weight of D(real)^2 under wgan-gp and wasserstein."""
    r1_gamma: FloatByRes | None = 10.0
    """Weight of R1, gamma/2 * |grad D(real)|^2; None: 0.0002 x pixels / batch (Karras et al. 2020, arXiv 2006.06676),
    because a gradient's square is a sum over pixels and a larger batch needs less of it. 0: no R1."""
    r2_gamma: FloatByRes | None = 0.0
    """Weight of R2, the same on generated images; None: as R1."""
    r1_every: int = 16
    """Steps between two R1 and R2 penalties; they are weighted by this number."""
    penalty: Literal["exact", "finite_difference"] = "exact"
    """How a penalty's gradient is computed: exact (double backward), or from the difference of D a step ahead, with its
    kinks held, which ZeRO-3 needs (losses.finite_difference_penalty). Both are the same to rounding."""
    fd_sigma: float = 0.1
    """Root mean square of finite_difference's step, in units of pixels from -1 to 1: rounding is divided by it."""
    path_weight: float = 0.0
    """Weight of style's path-length regularisation (2 in Karras et al. 2020, arXiv 1912.04958); 0: none."""
    path_every: int = 4
    """Steps between two path-length penalties; they are weighted by this number."""
    path_decay: float = 0.01
    """Share with which a step's lengths enter their running mean."""
    class_weight: float = 1.0
    """Weight of the classification loss of network.condition acgan, for D and G."""


@dataclass(frozen=True)
class RampConfig:
    """Cosine schedules over images seen: from the values given elsewhere, at the start, to these at `kimg`; flat after
    it."""

    kimg: float = 0.0
    """Thousands of images until the values here are reached; 0: everything is constant."""
    lr: float = 1.0
    """What the learning rates are multiplied by in the end."""
    gamma: float = 1.0
    """What R1's and R2's weights are multiplied by in the end."""
    beta2: float | None = None
    """Adam's second-moment decay in the end; None: constant."""
    ema_kimg: float | None = None
    """Half-life of the generator's moving average in the end; None: constant."""
    augment: float | None = None
    """Strength of augmentation in the end, where augment.target does not adapt it; None: constant."""


DIFFAUGMENT = ("color", "translation", "cutout")
"""What "diffaugment" stands for in augment.ops (Zhao et al. 2020)."""
ADA = (
    *("flip", "rotate90", "translate"),
    *("scale", "rotate", "anisotropic", "shift"),
    *("brightness", "contrast", "luma_flip", "hue", "saturation"),
)
"""What "ada" stands for in augment.ops: the paper's bgc (Karras et al. 2020, figure 4)."""
AUGMENTATIONS = (*DIFFAUGMENT, *ADA)
"""Of augment.ops, besides the two shorthands."""


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of everything that D sees, for sets of few images."""

    ops: list[str] = field(default_factory=list)
    """What is done, any of: color, translation, cutout ("diffaugment" stands for these three, with strength 1); flip,
    rotate90, translate, scale, rotate, anisotropic, shift, brightness, contrast, luma_flip, hue, saturation ("ada"
    stands for these twelve, with target 0.6). augment.augment describes each; empty: no augmentation."""
    strength: float = 0.0
    """Probability from 0 to 1 with which each is done to an image; at the start, where a target adapts it."""
    target: float | None = None
    """Adapt the strength until the mean sign of D on reals is this (ADA: 0.6, Karras et al. 2020), or with loss.kind
    relativistic that of D on reals less D on the fakes that they are paired with; None: it stays."""
    adapt_kimg: float = 500.0
    """Thousands of images in which an adapting strength goes from 0 to 1 at the fastest."""
    most: float = 0.8
    """Largest strength that adapting reaches; from about there on ADA's augmentations leak into what G draws."""


@dataclass(frozen=True)
class OptimConfig:
    """Adam and the averaged generator."""

    lr: FloatByRes = field(default_factory=lambda: {4: 0.001, 128: 0.0015, 256: 0.002, 512: 0.003})
    """Learning rate of both networks. ProGAN's 8-GPU setting by default."""
    lr_d: FloatByRes | None = None
    """Learning rate of the discriminator where it differs; None takes lr."""
    beta1: float = 0.0
    """Adam's first-moment decay."""
    beta2: float = 0.99
    """Adam's second-moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    ema_kimg: float = 22.2
    """Half-life of the generator's moving average in thousands of images (22.2 is ProGAN's 0.999 a step at batch 32).
    """
    max_skipped: int = 20
    """Steps in a row that may be skipped for non-finite numbers before the run counts as diverged."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """stop: end with exit code 5; rollback: go back to the newest checkpoint and on from there with lower learning
    rates."""
    max_rollbacks: int = 3
    """Rollbacks of a run before it ends with exit code 5 after all."""
    rollback_lr: float = 0.5
    """What each rollback multiplies both learning rates by."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Length, growth and batch."""

    total_kimg: float = 12000.0
    """Length of the run in thousands of real images shown."""
    start_resolution: int = 4
    """Resolution of the first phase in pixels, a power of two from 4."""
    stable_kimg: FloatByRes = 600.0
    """Length of each resolution's stable part; the last resolution's lasts until total_kimg."""
    fade_kimg: FloatByRes = 600.0
    """Length of the fade into each resolution; 0 switches at once."""
    order: Literal["stable_first", "fade_first"] = "stable_first"
    """stable_first: the first resolution lasts stable_kimg (ProGAN); fade_first: it lasts stable_kimg + fade_kimg."""
    batch: IntByRes = field(default_factory=lambda: {4: 512, 8: 256, 16: 128, 32: 64, 64: 32})
    """Images per step over all processes: a multiple of 4 x processes. ProGAN's 8-GPU setting by default."""
    micro_batch: IntByRes | None = None
    """Most images that one process puts through the networks at once; more are accumulated. None: no limit."""
    reset_adam: Literal["both", "fade_start", "never"] = "both"
    """When Adam starts anew after the first phase: at both ends of a fade (ProGAN), where it starts, or never."""


@dataclass(frozen=True)
class EvalConfig:
    """The metric on a schedule."""

    every_kimg: float = 200.0
    """Thousands of images between evaluations, besides those at the end of each stable part and of the run; 0: only
    those."""
    num_fake: int = 10000
    """Generated images per evaluation."""
    num_real: int | None = None
    """Real images whose statistics are compared (the first in stored order); None: all of them."""
    metrics: list[str] = field(default_factory=lambda: ["fid"])
    """What is measured, any of: fid (always is), fid_infinity (at several counts, and extrapolated to endless ones),
    kid, isc, prc (precision and recall), class_fid, memorization (authenticity, and the nearest reals as a picture),
    ppl."""
    extractor: str = "auto"
    """inception: FID's own network, refused at launch without its weights; random: a seeded random convolutional
    network (fd_random; random-1 to random-4 of other seeds); auto: inception where its weights can be had, else random;
    vgg16, clip-..., dinov2-vit-...: torch-fidelity's; FILE.pt: your TorchScript, module:Class: your torch.nn.Module,
    (N, 3, H, W) uint8 -> (N, D)."""
    weights: str | None = None
    """File of the extractor's weights; None looks in torch's cache, then downloads."""
    batch: int = 64
    """Images per forward pass of the extractor and of the generator in an evaluation, per process."""
    mirror: bool = False
    """Compare with each real image and its flipped copy, as is the custom for sets that are trained on with
    data.mirror."""
    bootstrap: int = 12
    """Replicates for the error of the Frechet distance; 0: no error."""
    kid_subset_size: int = 1000
    """Images in each of KID's subsets; both sides must have as many."""
    max_share: float = 0.05
    """Largest share of a run's time that evaluations in training may take: one that would take more is left out, and
    said, except the last. Statistics of the reals, computed once, do not count. 1: no limit."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved."""

    every_kimg: float = 100.0
    """Thousands of images between checkpoints, besides those at evaluations, growth and the end."""
    keep: int = 3
    """Newest checkpoints kept (at least 2), besides the best."""
    keep_every_kimg: float | None = None
    """Also keep one checkpoint for each so many thousands of images; None: no others."""


@dataclass(frozen=True)
class LimitsConfig:
    """When a run stops by itself."""

    hours: float | None = None
    """Wall-clock hours from the launch after which it saves and exits with code 3; None: no limit. The environment
    variable HRGAN_DEADLINE (seconds since 1970) is another; SLURM's scripts set it."""
    margin_minutes: float = 10.0
    """Minutes before the limit at which it begins to save."""
    timeout_minutes: float = 10.0
    """Minutes without progress after which a process counts as hung: it prints its stack and ends, and all with it."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown."""

    tick_kimg: FloatByRes = 4.0
    """Thousands of images between log lines."""
    samples_kimg: FloatByRes = 40.0
    """Thousands of images between sample grids."""
    grid: int = 8
    """Rows and columns of generated images in a sample grid; as many real ones stand beside them."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    max_share: float = 0.02
    """Largest share of a run's time that the signs of health in the log may take (diversity, duplicates, detail, D's
    logits of held-out pictures): a tick whose would take more has none. 0: none at all; 1: no limit."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The networks."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss and penalty."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """What D's images are augmented with."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Adam and EMA."""
    ramp: RampConfig = field(default_factory=RampConfig)
    """What changes over the run."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Length, growth, batch."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """The metric."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """Stopping by itself."""
    log: LogConfig = field(default_factory=LogConfig)
    """Showing."""
    init_from: str | None = None
    """Checkpoint or run that a new run takes its first weights from, as far as names and shapes fit (classes by their
    names); what is taken and what is not is said. None: initial weights."""
    seed: int = 0
    """Decides initial weights, the order of images and all noise."""
    precision: Precision = "float32"
    """bf16 and fp16 compute the convolutions under autocast; weights, Adam and EMA stay float32. auto: bf16 where all
    devices of the launch have it, else float32; a run goes on in what it began with. fp16 scales the loss (for GPUs
    without bf16; not under DeepSpeed)."""
    deterministic: bool = False
    """On CUDA: only kernels that give the same bits each time (slower). The CPU always does."""
    cuda_graphs: bool = False
    """On one GPU: steps that do the same as three before are recorded once and replayed, which spares the CPU the
    launch of each kernel. Not in fades and ramps, where each step is another; not with several processes."""
    compile: bool = False
    """Compile the networks by torch.compile (a minute or more at each phase; not under DeepSpeed). D runs as written in
    steps with R1 or R2, G for path lengths: what is compiled has one derivative."""


CLIP = tuple(
    f"clip-{kind}"
    for kind in ("rn50", "rn101", "rn50x4", "rn50x16", "rn50x64", "vit-b-32", "vit-b-16", "vit-l-14", "vit-l-14-336px")
)
DINOV2 = tuple(f"dinov2-vit-{size}-14" for size in "sblg")
RANDOM_EXTRACTORS = ("random", *(f"random-{number}" for number in range(1, 5)))
"""Of eval.extractor: of five seeds, so that a number's dependence on the seed can be seen."""
EXTRACTORS = ("auto", "inception", "vgg16", *RANDOM_EXTRACTORS, *CLIP, *DINOV2)
"""Of eval.extractor, besides a user's own."""
EVAL_METRICS = ("fid", "fid_infinity", "kid", "isc", "prc", "class_fid", "memorization", "ppl")
"""Of eval.metrics."""
MAY_CHANGE = (
    "schedule.total_kimg",
    "schedule.micro_batch",
    "loss.fd_sigma",
    "eval.",
    "checkpoint.",
    "log.",
    "data.path",
    "data.held_out",
    "data.cache",
    "data.timeout_seconds",
    "data.retries",
    "data.allow_pipe",
    "data.workers",
    "data.prefetch",
    "data.max_bad",
    "optim.max_skipped",
    "optim.on_divergence",
    "optim.max_rollbacks",
    "optim.rollback_lr",
    "limits.",
    "deterministic",
    "network.channels_last",
    "cuda_graphs",
    "compile",
)
"""Fields that a resumed run may change: none of them alters which images are seen or how they are learnt from."""


def at(value: Number | dict[int, Number], resolution: int) -> Number:
    """The number for a resolution: of the largest key that is not above it."""
    if not isinstance(value, dict):
        return value
    return value[max(key for key in value if key <= resolution)]


def resolutions(config: Config) -> list[int]:
    """The resolutions that the run passes through, ascending: powers of two."""
    last = config.network.resolution
    size = config.schedule.start_resolution if config.network.grow else last
    sizes: list[int] = []
    while 0 < size <= last:
        sizes.append(size)
        size *= 2
    return sizes


# Keys


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping; a field that takes a map is one value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in _known():
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def known_keys(kind: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for name, hint in get_type_hints(kind).items():
        keys += known_keys(hint, f"{prefix}{name}.") if is_dataclass(hint) else [f"{prefix}{name}"]  # type: ignore[arg-type]
    return keys


@cache
def _known() -> frozenset[str]:
    return frozenset(known_keys())


def unknown_key(key: str) -> str | None:
    """The problem with a key that the configuration does not have, with the nearest one that it has."""
    known = known_keys()
    if key in known:
        return None
    # The last part alone also counts: `--lr` is near `optim.lr`.
    near = difflib.get_close_matches(key, known, 1, 0.6) or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    near = near or difflib.get_close_matches(key.split(".")[-1], [k.split(".")[-1] for k in known], 1, 0.6)
    return f"{key}: no such field" + (
        f"; did you mean {near[0]}?" if near else f"; the topics are {', '.join(topics())}"
    )


def wrong_type(key: str, value: Any) -> str:
    """The problem with a value that its field's type does not take, with what it takes and the nearest of a choice."""
    hint: Any = Config
    for part in key.split("."):
        hint = get_type_hints(hint)[part]
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
        dict[int, int]: "a map {resolution: whole number}",
        dict[int, float]: "a map {resolution: number}",
        dict[str, float]: "a map {path: weight}",
        list[int]: "a list of whole numbers",
        list[str]: "a list of words",
    }
    if get_origin(hint) is Literal:
        near = difflib.get_close_matches(str(value), get_args(hint), 1, 0)
        return f"{key}: {value!r} is none of {', '.join(get_args(hint))}; nearest: {near[0]}"
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return f"{key}: {value!r} is not {' or '.join(names[kind] for kind in kinds)}"


def topics() -> list[str]:
    """The topics, then the fields that stand alone."""
    return [f.name for f in fields(Config)]


def refuse(found: list[str], where: str) -> None:
    """Raise one UserError that lists all problems, a line each, if there are any."""
    if found:
        raise UserError(
            "\n".join([f"{where}: {len(found)} problem{'s' * (len(found) > 1)}", *(f"  {line}" for line in found)])
        )


# YAML


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a nested dict; UserError when it is missing, no YAML, or no mapping."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); name a configuration "
            "such as configs/demo.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, expected topics such as data: and network:")
    return tree


def from_dict(tree: Mapping[str, Any]) -> Config:
    """A Config from a nested dict whose leaves have the right types already (as `to_yaml` wrote them)."""
    refuse([line for key, _ in leaves(tree) if (line := unknown_key(key))], "config")
    hints = get_type_hints(Config)
    return Config(**{key: hints[key](**value) if is_dataclass(hints[key]) else value for key, value in tree.items()})


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, defaults included."""
    return yaml.safe_dump(asdict(config), sort_keys=False)


def differences(old: Config, new: Config) -> list[str]:
    """Fields that differ and that a resumed run may not change, a line each."""
    before, after = dict(leaves(asdict(old))), dict(leaves(asdict(new)))
    return [
        f"{key}: {before[key]} in the run, {after[key]} asked for"
        for key in before
        if before[key] != after[key] and not key.startswith(MAY_CHANGE)
    ]
