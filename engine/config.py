"""The settings of a run: one YAML page, read strictly into frozen dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from engine.errors import UserError
from engine.pair import Pair
from engine.rerank import Rerank

CONFIGS = Path(__file__).parent / "configs"
S = TypeVar("S")
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # such as a date without such a day, a thousand brackets


@dataclass(frozen=True)
class Source:
    """A data set and its protocols.

    Attributes:
        name: the layout: sysu, regdb, llcm, folder, or demo (generated at `root` when it is not there).
        root: the folder that holds it.
        split: "test" trains on train + val identities and scores the test ones; "val" trains on train and scores val.
        trial: RegDB's split, 1 to 10.
        gallery: SYSU-MM01's gallery draw: "agw" (every unsupervised paper) or "official" (rand_perm_cam.mat).
        query: modality of a folder's query/ images; its gallery/ has the other one.
    """

    name: Literal["sysu", "regdb", "llcm", "folder", "demo"]
    root: str
    split: Literal["test", "val"] = "test"
    trial: int = 1
    gallery: Literal["agw", "official"] = "agw"
    query: Literal["vis", "ir"] = "ir"


@dataclass(frozen=True)
class Data(Source):
    """Where the images are and how they are read.

    Attributes:
        also: more data sets, trained on together with this one and each scored by its own protocols.
        size: height and width in pixels that every image is resized to.
        max_pixels: of an image file; a larger one is refused before it is decoded.
        cache: folder for decoded images; empty = $XDG_CACHE_HOME/vireid-engine or ~/.cache/vireid-engine.
        workers: decoding processes and threads; 0 = one per core.
    """

    also: tuple[Source, ...] = ()
    size: tuple[int, int] = (288, 144)
    max_pixels: int = 2**26
    cache: str = ""
    workers: int = 0

    @property
    def sources(self) -> dict[str, Source]:
        """All data sets, by the place of their settings: "data", "data.also.0", ..."""
        return {"data": self} | {f"data.also.{i}": source for i, source in enumerate(self.also)}


@dataclass(frozen=True)
class Augment:
    """Random changes to training images; each number but `pad` is a probability or a jitter strength (SALCR, sec. 4).

    Attributes:
        pad: pixels of zero padding before the random crop.
        flip: probability of a horizontal flip.
        erase: probability of a random erased rectangle.
        jitter: strength of brightness, contrast, saturation and hue jitter.
        grey: probability of the grey mix, in the one of four infrared cases that allows it.
        ltg: probability of the linear transformation generator on visible images (stage 1 only).
        channels: visible images get a copy of one random channel, and infrared ones change theirs; if not, images of both
            modalities are augmented alike, there is no copy, and `grey` and `ltg` do nothing.
    """

    pad: int = 10
    flip: float = 0.5
    erase: float = 0.5
    jitter: float = 0.5
    grey: float = 0.5
    ltg: float = 0.5
    channels: bool = True


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        backbone: resnet50, resnet18, or small (width 16, one block a stage: the demo's, trains on a CPU); with captions
            vit_b16 (CLIP's) or vit_small (the demo's), each with a text encoder.
        weights: "imagenet" (torchvision's ResNet V1 state dict from the hub cache) or a file's path, of such a state dict or of
            a network that others released (docs/weights.md); for vit_b16 "clip" (from the hub's cache) or a folder's path;
            "none".
        download: whether "imagenet" or "clip" may be fetched when the cache does not hold it.
        bn_group: images that share one set of BatchNorm statistics in a training step, on however many processes; 0 = the
            whole batch.
        non_local: whether a ResNet has AGW's non-local blocks in its second and third layer.
    """

    backbone: Literal["resnet50", "resnet18", "small", "vit_b16", "vit_small"] = "resnet50"
    weights: str = "imagenet"
    download: bool = False
    bn_group: int = 0
    non_local: bool = False


@dataclass(frozen=True)
class Cluster:
    """k-reciprocal Jaccard distance and DBSCAN, per modality (a single value stands for both).

    Attributes:
        k1: neighbours of the reciprocal sets, the image itself included.
        k2: neighbours whose weights are averaged, the image itself included; 1 = none.
        eps: distance up to which images are neighbours; more merges clusters, less leaves more images out.
        min_samples: neighbours that make an image the core of a cluster, itself included.
    """

    k1: Pair[int] = field(default_factory=lambda: Pair(30, 30))
    k2: int = 6
    eps: Pair[float] = field(default_factory=lambda: Pair(0.6, 0.6))
    min_samples: int = 4


@dataclass(frozen=True)
class Memory:
    """Cluster memories.

    Attributes:
        temperature: of the softmax over prototypes.
        momentum: mu of `M <- normalize(mu M + (1 - mu) f)`.
        shard: of the memories with a row for every image, each of several processes holds a part: docs/distributed.md.
    """

    temperature: float = 0.05
    momentum: float = 0.1
    shard: bool = False


@dataclass(frozen=True)
class Optim:
    """The optimiser, started afresh in every stage.

    Attributes:
        kind: Adam, whose weight decay is part of the gradient, or AdamW, which shrinks the weights themselves.
        lr: learning rate.
        weight_decay: of all weights.
        schedule: "step" multiplies the learning rate by `factor` after each of `drops`, parts of a stage; "cosine" takes it
            down to 0 over the stage, epoch by epoch.
        drops: when the schedule "step" drops, as parts of the stage.
        factor: by which it drops.
        warm_up: iterations at the start of a stage in which the learning rate grows linearly.
        layer_decay: what a layer's learning rate is multiplied by for each layer above it.
        clip: largest norm of the gradient; 0 = any.
    """

    kind: Literal["adam", "adamw"] = "adam"
    lr: float = 3.5e-4
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine"] = "step"
    drops: tuple[float, ...] = (0.5,)
    factor: float = 0.1
    warm_up: int = 0
    layer_decay: float = 1.0
    clip: float = 0.0


@dataclass(frozen=True)
class WarmUp:
    """In-batch instance contrast before the first clustering, for networks without pretrained weights.

    Attributes:
        iterations: steps; 0 = none.
        temperature: of the softmax over the images of a batch.
        images: of each modality in a batch.
    """

    iterations: int = 0
    temperature: float = 0.1
    images: int = 64


@dataclass(frozen=True)
class Stage:
    """One stage of training: `epochs` x `iterations` batches of `labels` x `images` per modality.

    Attributes:
        epochs: each begins with new pseudo-labels.
        iterations: steps of an epoch.
        labels: different pseudo-labels in a batch.
        images: of each label, in each modality.
    """

    epochs: int
    iterations: int
    labels: int
    images: int


@dataclass(frozen=True)
class Train:
    """The loop.

    Attributes:
        start_from: a checkpoint whose network is taken over; training begins at the stage after the one it ended.
        precision: "fp32", "tf32" (matrix units' float32), or autocast to "bf16" / "fp16" (with loss scaling).
        channels_last: lay images out by pixel in memory, which convolutions on a GPU may prefer.
        compile: let `torch.compile` rewrite the network.
        accumulate: parts that a batch is computed in, to fit in memory, with the result of the whole; `model.bn_group` must
            then lie within a part.
        checkpoint_steps: also checkpoint within an epoch, every so many steps; 0 = at the end of an epoch only.
        features: where the features of all images lie, and what is as large: in the "memory" of the device, or on the "disk",
            in the cache's folder, from where the CPU makes the labels: docs/scale.md.
    """

    stages: tuple[Stage, ...]
    warm_up: WarmUp = WarmUp()
    start_from: str = ""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    checkpoint_steps: int = 0
    features: Literal["memory", "disk"] = "memory"


@dataclass(frozen=True)
class Evaluate:
    """Scoring.

    Attributes:
        every: epochs between scores; the end of a stage is always scored.
        batch: images per forward pass, here and when the training images' features are extracted.
        rerank: re-ranking at test time, in rows of its own; engine/rerank.py has its settings.
    """

    every: int = 1
    batch: int = 128
    rerank: Rerank = field(default_factory=Rerank)


@dataclass(frozen=True)
class MethodName:
    """What is trained.

    Attributes:
        name: dcl, salcr, firm, or the dotted path of a module that holds one `Method` subclass.
    """

    name: str = "salcr"


@dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
        seed: of everything that is drawn.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
        deterministic: refuse operations whose result may change from run to run on a GPU.
        tensorboard: write TensorBoard events to the run folder too.
        settings: the method's own section, which stands in the YAML under the method's name.
    """

    data: Data
    train: Train
    seed: int = 0
    device: str = "auto"
    deterministic: bool = False
    tensorboard: bool = False
    method: MethodName = MethodName()
    augment: Augment = Augment()
    model: Model = Model()
    cluster: Cluster = Cluster()
    memory: Memory = Memory()
    optim: Optim = Optim()
    evaluate: Evaluate = Evaluate()
    settings: Any = field(default=None)


class _Loader(yaml.SafeLoader):
    """Safe YAML with the numbers and booleans that people mean: 1e-4 is a number, `no` and `on` are words.

    Without aliases, by which a page of text can stand for more than fits in memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"alias *{event.anchor}: write it out", event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$", re.IGNORECASE),
    list("-+.0123456789"),
)


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name: path of a YAML file, or the name of one in engine/configs, with or without ".yaml".
        overrides: "a.b=c" each; c is read as YAML. List items are named by their position ("train.stages.0.epochs=1").

    Raises:
        UserError: no such file, bad YAML, an unknown setting, a wrong type or choice; a suggestion is given.
    """
    return parse(override(read_file(find(name)), overrides))


def read_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked; errors as for `load`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except _NOT_YAML as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected settings ('data:', 'train:', ...), got {type(content).__name__}")
    return content


def find(name: str) -> Path:
    """The file that a `--cfg` argument names."""
    known = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    close = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise UserError(f"--cfg {name}: no such file or configuration; {hint}known ones: {', '.join(known)}")


def parse(content: dict[str, Any]) -> Config:
    """Settings as read from YAML -> a checked `Config`."""
    from engine import methods

    content = dict(content)
    name = _section(content.get("method", {}), "method").get("name", MethodName.name)
    chosen = methods.find(str(name))
    sections: dict[str, Any] = {}
    for section in {*methods.BUILT_IN, methods.section(str(name))}:
        own = chosen if section == methods.section(str(name)) else methods.find(section)
        sections[section] = _build(own.Settings, content.pop(section, {}), section)
    if "settings" in content:
        raise UserError(f"settings: no such setting; a method's settings stand under its name ('{name}:')")
    config = _build(Config, content, "")
    config = dataclasses.replace(config, settings=sections[methods.section(str(name))])
    _check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The whole configuration as plain values; `parse` of it gives an equal `Config`."""
    from engine import methods

    content = _plain(config)
    settings = content.pop("settings")
    if settings:
        content[methods.section(config.method.name)] = settings
    return content


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines "a.b: old -> new" for every setting in which two `to_dict` results differ; list items by position."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = (dict(enumerate(items)) for items in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [differences(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
        return [line for part in parts for line in part]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def override(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of settings as read from YAML, with "a.b=c" overrides."""
    content = copy.deepcopy(content)
    for one in overrides:
        _override(content, one)
    return content


def _override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override}: expected name=value, for example --set optim.lr=1e-3")
    try:
        value = yaml.load(text, _Loader) if text else ""
    except _NOT_YAML as error:
        raise UserError(f"--set {override}: the value is not valid YAML: {error}") from error
    node: Any = content
    keys = path.split(".")
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise UserError(f"--set {override}: expected a position from 0 to {len(node) - 1}, got '{key}'")
            if last:
                node[int(key)] = value
            else:
                node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            whole = ".".join(keys[:depth])
            raise UserError(
                f"--set {override}: {whole} is a single value here, not settings; give the whole of {whole}"
            )


def _section(value: Any, path: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected settings (name: value), got {value!r}")
    return value


def _build(kind: type[S], value: Any, path: str) -> S:
    """One dataclass from one YAML mapping."""
    content = _section(value, path)
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    dot = f"{path}." if path else ""
    for key in content:
        if key not in fields:
            raise UserError(f"{dot}{key}: no such setting; {_hint(str(key), hints)}")
    for key, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and key not in content:
            raise UserError(f"{dot}{key}: missing; give it in the configuration or by --set {dot}{key}=...")
    values = {key: _convert(hints[key], item, f"{dot}{key}") for key, item in content.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{dot}{error}") from error


def _hint(key: str, kinds: dict[str, Any]) -> str:
    """What may be meant by a name that is none of `kinds`: the same one within a section, or one like it."""
    from engine import methods

    known = [name for name in kinds if name != "settings"] + list(methods.BUILT_IN if "settings" in kinds else ())
    within = []
    for name, kind in kinds.items():
        inner, place = (get_args(kind)[0], f"{name}.0") if get_origin(kind) is tuple else (kind, name)
        if dataclasses.is_dataclass(inner) and key in {item.name for item in dataclasses.fields(inner)}:
            within.append(f"{place}.{key}")
    found = within or difflib.get_close_matches(key.lower(), known, 1)
    if found:
        return f"did you mean {' or '.join(map(repr, found))}?"
    return f"known: {', '.join(known) or 'none'}"


def _convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`, or a `UserError` that names the setting."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(option for option in arguments if option is not type(None)), value, path)
    if origin is Literal:
        if value not in arguments:
            close = difflib.get_close_matches(str(value), map(str, arguments), 1, 0.5)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UserError(f"{path}: expected one of {', '.join(map(str, arguments))}, got {value!r}{hint}")
        return value
    if origin is Pair:
        if not isinstance(value, dict):
            value = {"vis": value, "ir": value}
        if set(value) != {"vis", "ir"}:
            raise UserError(f"{path}: expected one value, or both 'vis' and 'ir', got {value!r}")
        return Pair(*(_convert(arguments[0], value[key], f"{path}.{key}") for key in ("vis", "ir")))
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path}: expected a list, as in [1, 2], got {value!r}")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(value):
            raise UserError(f"{path}: expected {len(inner)} values, got {value!r}")
        return tuple(
            _convert(part, item, f"{path}.{i}") for i, (part, item) in enumerate(zip(inner, value, strict=True))
        )
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise UserError(f"{path}: expected {names.get(kind, kind.__name__)}, got {value!r}")
    return value


def _check(config: Config) -> None:
    """Ranges that types cannot say."""
    data, augment, memory, optim, train = config.data, config.augment, config.memory, config.optim, config.train
    stages, warm_up = train.stages, train.warm_up
    rules: list[tuple[str, Any, bool, str]] = [
        ("seed", config.seed, 0 <= config.seed < 2**63, "0 or more, below 2**63"),
        ("train.stages", len(stages), len(stages) > 0, "at least one stage"),
        ("data.size", list(data.size), min(data.size) >= 16, "a height and a width of at least 16"),
        ("data.max_pixels", data.max_pixels, data.max_pixels >= 1, "at least 1"),
        ("data.workers", data.workers, data.workers >= 0, "at least 0"),
        ("augment.pad", augment.pad, augment.pad >= 0, "at least 0"),
        ("augment.jitter", augment.jitter, augment.jitter >= 0, "at least 0"),
        ("memory.temperature", memory.temperature, memory.temperature > 0, "a number above 0"),
        ("memory.momentum", memory.momentum, 0 <= memory.momentum <= 1, "0 to 1"),
        ("optim.lr", optim.lr, optim.lr > 0, "a number above 0"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "at least 0"),
        ("optim.factor", optim.factor, optim.factor > 0, "a number above 0"),
        ("optim.warm_up", optim.warm_up, optim.warm_up >= 0, "at least 0"),
        ("optim.layer_decay", optim.layer_decay, 0 < optim.layer_decay <= 1, "above 0, at most 1"),
        ("optim.clip", optim.clip, optim.clip >= 0, "at least 0"),
        ("cluster.min_samples", config.cluster.min_samples, config.cluster.min_samples >= 1, "at least 1"),
        ("cluster.k2", config.cluster.k2, config.cluster.k2 >= 1, "at least 1"),
        ("train.accumulate", train.accumulate, train.accumulate >= 1, "at least 1"),
        ("train.checkpoint_steps", train.checkpoint_steps, train.checkpoint_steps >= 0, "at least 0"),
        ("train.warm_up.iterations", warm_up.iterations, warm_up.iterations >= 0, "at least 0"),
        ("train.warm_up.temperature", warm_up.temperature, warm_up.temperature > 0, "a number above 0"),
        ("train.warm_up.images", warm_up.images, warm_up.images >= 1, "at least 1"),
        ("evaluate.every", config.evaluate.every, config.evaluate.every >= 1, "at least 1"),
        ("evaluate.batch", config.evaluate.batch, config.evaluate.batch >= 1, "at least 1"),
        ("model.bn_group", config.model.bn_group, config.model.bn_group >= 0, "at least 0"),
    ]
    for name in ("flip", "erase", "grey", "ltg"):
        chance = getattr(augment, name)
        rules.append((f"augment.{name}", chance, 0 <= chance <= 1, "a probability, 0 to 1"))
    for i, drop in enumerate(optim.drops):
        rules.append((f"optim.drops.{i}", drop, 0 <= drop <= 1, "a part of the stage, 0 to 1"))
    for modality in ("vis", "ir"):
        k1, eps = config.cluster.k1[modality], config.cluster.eps[modality]
        rules.append((f"cluster.k1.{modality}", k1, k1 >= 1, "at least 1"))
        rules.append((f"cluster.eps.{modality}", eps, 0 < eps < 1, "above 0 and below 1"))
    for place, source in config.data.sources.items():
        rules.append((f"{place}.trial", source.trial, 1 <= source.trial <= 10, "1 to 10"))
    for i, stage in enumerate(stages):
        for name, value in dataclasses.asdict(stage).items():
            rules.append((f"train.stages.{i}.{name}", value, value >= 1, "at least 1"))
    check_ranges(rules)


def check_ranges(rules: Iterable[tuple[str, Any, bool, str]]) -> None:
    """Raise a `UserError` for the first (setting, value, whether it is good, what is expected) that is not good."""
    for name, value, good, expected in rules:
        if not good:
            raise UserError(f"{name}: expected {expected}, got {value}")
