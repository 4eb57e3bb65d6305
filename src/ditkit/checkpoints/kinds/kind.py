"""Kind: all that is known of one kind of network, in one row, and how it is spelled in each layout.

Files are recognised, opened, converted and held against each other by rows alone; whoever brings a row brings a kind.
Classes of higher rooms are named (``ditkit.models.wan:WanConfig``) and imported when they are needed.
Leaves out: loading itself (``ditkit.assembly.loaders``), and what is known of a task (``ditkit.assembly.tasks``)."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ditkit.checkpoints.kinds.configs import ConfigFormat, ConfigKeys, Rules
from ditkit.checkpoints.kinds.sizes import Fields, Sizes, Tensors
from ditkit.checkpoints.views.key_table import KeyTable, Side
from ditkit.errors import LoadError
from ditkit.registry import Registry, Row, resolve

BUILT_IN = ("wan:WAN", "wan:VACE_MODULE", "wan_vae:WAN_VAE", "wan_vae:WAN_VAE22", "umt5:UMT5", "clip:CLIP",
            "wan_vae:TAEHV", "umt5:TOKENIZER")  # fmt: skip
KINDS: Registry["Kind"] = Registry(
    "kind of network", "ditkit.kinds",
    {row.partition(":")[2].lower(): f"ditkit.checkpoints.kinds.{row}" for row in BUILT_IN},
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How one layout spells a kind of network.

    ``has``: sets of tensor names; one set that is there tells the kind, unless a name of ``lacks`` is there too.
    ``config``: its config.json; None where there is none. ``classes`` and ``model_types``: what a config says it is of,
    the first one usual; ``mine``: whether such a config is of this kind. ``file``: base name of the weights;
    ``pickle``: a ``.pth`` among others, without config. ``library``: of the class in an index. ``remark``: what is lost
    when it is written."""

    has: tuple[tuple[str, ...], ...] = ()
    config: ConfigFormat | None = None
    classes: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    mine: Callable[[Fields], bool] = lambda config: True
    lacks: tuple[str, ...] = ()
    file: str = "diffusion_pytorch_model"
    pickle: bool = False
    library: str = "diffusers"
    remark: str = ""

    def names(self, config: Fields) -> bool:
        """Whether the config says that it is of this layout's class."""
        named = config.get("_class_name") in self.classes or config.get("model_type") in self.model_types
        return named and self.mine(config)

    def fits(self, names: Container[str]) -> bool:
        whole = any(all(name in names for name in wanted) for wanted in self.has)
        return whole and not any(name in names for name in self.lacks)


class Port(NamedTuple):
    """A width at which parts have to fit each other, and what the config calls it."""

    width: int | None
    field: str


@dataclass(frozen=True)
class Published:
    """What layouts say of a whole model for one task: ``pipeline``, the class in an index; ``flow_shift`` of the
    scheduler there; ``boundary`` between two experts, where a layout has no place for it; ``expand_timesteps``: each
    token has a timestep of its own; ``optional``: components that an index names as null."""

    pipeline: str
    flow_shift: float = 3.0
    boundary: float | None = None
    expand_timesteps: bool = False
    optional: tuple[str, ...] = ("transformer_2",)


@dataclass(frozen=True)
class Claim:
    """A named rule: a config may claim ``fields`` of which the tensors have nothing. ``advice``: how to correct it."""

    fields: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class LoraTargets:
    """What a LoRA may change. ``names``: number of blocks -> the key table of the largest network with so many.
    ``blocks``: what block names begin with. ``group``: native name -> the part of the network, for reports."""

    names: Callable[[int], KeyTable]
    blocks: str = "blocks"
    group: Callable[[str], str] = lambda name: name.split(".")[0]


@dataclass(frozen=True)
class Kind(Row):
    """``family`` and ``noun``: for people ("Wan 2.1", "a Wan transformer"); ``get``: where to take one from.
    ``components``: what it may be in a model, the usual one first; none: it is known and cannot be used.

    ``layouts``: by name, ``native`` and one other. ``sizes``: tensors, layout -> sizes. ``keys``: fields -> the table
    between the two layouts; ``own``: the side whose names the module has; ``aliases``: its second names of tensors;
    ``reshaped``: tensors -> those that some programs store in another shape, and the shapes that are meant;
    ``optional_keys``: not every network has all names of its table; ``file_keys``: fields, layout -> the table for
    writing, where that is another one.
    ``config_class``, ``module``, ``load``: class of the config, what makes the module of it, and the loader.

    ``tell``: layout, tensors, sizes -> more for ``Detected``. ``check``: raises for fields that each are possible and
    together are not. ``unsaid``: fields that native files leave out because all have them. ``claims``: by rule.
    ``task`` of its fields, one of ``tasks``. ``needs``: fields -> the components beside it and their kinds.
    ``ports``, ``strides`` (pixels to latents: frames, height, width), ``patch`` (latents to tokens): of the config.
    ``preview``: latent channels -> colours. ``beside``: fields, task -> components without weights that an index has
    for it: (library, class, file, content). ``lora``: what a LoRA may change, if anything."""

    name: str
    family: str
    noun: str
    components: tuple[str, ...]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    sizes: Callable[[Tensors, str], Sizes] = lambda tensors, layout: Sizes({}, {})
    keys: Callable[[Fields], KeyTable] | None = None
    own: Side = "native"
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional_keys: bool = False
    reshaped: Callable[[Tensors], Mapping[str, tuple[int, ...]]] = lambda tensors: {}
    file_keys: Callable[[Fields, str], KeyTable] | None = None
    config_class: str = ""
    module: str = ""
    load: str = ""
    get: str = ""
    tell: Callable[[str, Tensors, Sizes], Mapping[str, Any]] = lambda layout, tensors, sizes: {}
    check: Callable[[ConfigKeys, Fields], None] = lambda keys, fields: None
    unsaid: Fields = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    task: Callable[[Fields], str | None] = lambda fields: None
    tasks: Mapping[str, Published] = field(default_factory=dict)
    needs: Callable[[Fields], Mapping[str, str]] = lambda fields: {}
    ports: Callable[[Any], Mapping[str, Port]] = lambda config: {}
    strides: Callable[[Any], tuple[int, int, int]] | None = None
    patch: Callable[[Any], tuple[int, int, int]] | None = None
    preview: str = ""
    beside: Callable[[Fields, str], Mapping[str, tuple[str, str, str, Fields]]] = lambda fields, task: {}
    lora: LoraTargets | None = None

    registry: ClassVar[Registry[Any]] = KINDS

    def config(self, fields: Fields) -> Any:
        """The object of the config class. Raises TypeError and ValueError for fields that it does not take."""
        return resolve(self.config_class)(**fields)

    def skeleton(self, fields: Fields) -> Any:
        """The module without memory."""
        import torch

        with torch.device("meta"):
            return resolve(self.module)(self.config(fields))

    @property
    def pinned(self) -> str:
        """Its name, with its code where it is not ditkit's own: what is equal computes the same."""
        return KINDS.pinned(self.name)

    def written_as(self, layout: str) -> str | None:
        """The name of its own layout for a model in ``layout``: transformers' networks lie in folders of diffusers."""
        if layout in self.layouts or layout == "native":
            return layout if layout in self.layouts else None
        return next((name for name in self.layouts if name != "native"), None)

    def read_config(
        self, layout: str, config: Fields | None, tensors: Tensors | None = None, rules: Rules = (),
        notes: list[str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The fields of the config class: from ``config``, held against the tensors where there are some; from their
        shapes where there is no config. ``tensors``: facts under the layout's names. ``notes`` grows by unknown keys.
        Raises LoadError."""
        if config is None:
            return self.sizes(tensors or {}, layout).alone(f"telling the sizes of {self.name} from its tensors")
        form, asked = self.layouts[layout], f"reading the config of {self.noun}"
        said = config.get("_class_name", config.get("model_type"))
        if form.config is None or said not in (None, *form.classes, *form.model_types):
            raise LoadError(asked, f"it is of {said!r}", "Use the config.json of these weights")
        keys = ConfigKeys(form.config.inner(config, asked), asked, rules, [] if notes is None else notes)
        fields = form.config.fields(keys)
        if tensors is None:
            return fields
        sizes, advice = self.sizes(tensors, layout), dict[str, str]()
        for rule, claim in self.claims.items():
            first = claim.fields[0]
            advice[first] = f"Use the config of these weights; if they are whole, {claim.advice}, or allow {rule}"
            if rule in rules and sizes.fields[first] is None:
                fields |= dict.fromkeys(claim.fields)
        whole = sizes.beside(asked, fields, keys.names, advice)
        self.check(keys, whole)
        return whole

    def write_config(self, layout: str, fields: Fields) -> dict[str, Any] | None:
        """The config.json of these fields; None where the layout has none."""
        form = self.layouts[layout].config
        return None if form is None else form.config({**self.unsaid, **fields})


def side_of(layout: str) -> Side:
    return "native" if layout == "native" else "other"


def kind_of_config(config: Fields) -> tuple[str, str] | None:
    """(kind, layout) of the weights that a config belongs to; None when it is none of ours."""
    found = ((kind.name, name) for kind in KINDS.values() for name, form in kind.layouts.items() if form.names(config))
    return next(found, None)


def kinds_of(component: str) -> list[Kind]:
    """The kinds that a component may be; none for a name that no kind knows."""
    return [kind for kind in KINDS.values() if component in kind.components]
