"""Which settings a model is tried with: every combination of layers, timestep and threshold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from ...diffseg.settings import ALL_LAYERS, DiffSegSettings
from ...pipelines.checks import check_choice
from ...pipelines.diffseg_inputs import listed_features

__all__ = ["METHODS", "Setting", "Sweep"]

METHODS = ("diffseg", "walk", "cut", "clusters")
_OF_OTHER_METHODS = ("method", "features", "cut_power", "walk_steps", "num_clusters", "encoder_size", "encoder_layer")


@dataclass(frozen=True)
class Sweep:
    """The settings that a model is tried with: every combination of layers, timestep and threshold.

    Attributes:
        timesteps: Of the denoising step whose attention is read.
        thresholds: Of merging, each used in all passes.
        layers: `"all"`, or names of attention layers or blocks joined by `+`, such as `"up_blocks.1.attentions.0"`.
        relative: Whether thresholds are in units of the mean divergence between an image's maps.
        refine: Whether to refine segments by k-means.
        num_merges: Passes of merging.
        anchors_per_side: Of the grid of maps that merging starts from; None: 16, or as many as there are.
        add_noise: Whether the model sees noised latents in place of clean ones, where attention is read.
        size: Side in pixels that the model sees images at; None: the UNet's own.
        mask_size: Side of the segments in pixels.
        seed: Of the noise, and of clusters.
        method: How segments are made. `"diffseg"` merges attention maps, `"walk"` cuts them, `"cut"` cuts features,
            and `"clusters"` groups the features of all images of the other half of the patients, and names lungs among
            the clusters: no mask is looked at. Thresholds are those of merging or cutting; clusters have none.
        features: Of `"cut"` and `"clusters"`: see `DiffSegPipeline.patch_features`; also `cut_power`, `walk_steps`,
            `num_clusters`, `encoder_size` and `encoder_layer` are as in that class.

    ValueError if there is no timestep, threshold or choice of layers, or no such method or features.
    """

    timesteps: tuple[int, ...] = (1, 50, 100, 300)
    thresholds: tuple[float, ...] = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
    layers: tuple[str, ...] = (ALL_LAYERS,)
    relative: bool = True
    refine: bool = True
    num_merges: int = 3
    anchors_per_side: int | None = None
    add_noise: bool = False
    size: int | None = None
    mask_size: int = 256
    seed: int = 0
    method: str = METHODS[0]
    features: tuple[str, ...] = ("encoder",)
    cut_power: float = 4.0
    walk_steps: int = 2
    num_clusters: tuple[int, ...] = tuple(range(4, 13))
    encoder_size: int | None = None
    encoder_layer: int | None = None

    def __post_init__(self) -> None:
        check_choice(METHODS, method=self.method)
        object.__setattr__(self, "features", tuple(listed_features(self.features)))
        object.__setattr__(self, "num_clusters", tuple(self.num_clusters))
        if self.method in ("cut", "clusters"):
            object.__setattr__(self, "add_noise", False)
        if self.method == "clusters":
            object.__setattr__(self, "thresholds", (0.0,))
        if not self.reads_denoiser:
            object.__setattr__(self, "timesteps", (0,))
            object.__setattr__(self, "layers", (ALL_LAYERS,))
        for name in ("timesteps", "thresholds", "layers"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"A sweep needs one or more {name}, all different, got {list(values)}.")
            object.__setattr__(self, name, tuple(values))  # lists, as JSON gives them, are welcome

    def at(self, settings: DiffSegSettings) -> Sweep:
        """A sweep of only these settings, such as those that were noted with a model; all else is as here."""
        timesteps, thresholds = (settings.timestep,), (settings.merge_threshold,)
        layers = (settings.joined_layers,)
        return replace(self, timesteps=timesteps, thresholds=thresholds, layers=layers, relative=True)

    @property
    def reads_denoiser(self) -> bool:
        """Whether segments depend on the denoiser, and not on the encoder only."""
        return self.method in ("diffseg", "walk") or "unet" in self.features

    @property
    def title(self) -> str:
        """What to call the method behind a model's name; nothing for DiffSeg."""
        named = {"diffseg": "", "walk": "walk on attention", "cut": "cut of ", "clusters": "clusters of "}[self.method]
        return named + " + ".join(self.features) if named.endswith(" ") else named

    @property
    def identity(self) -> dict[str, object]:
        """What tells its segments from those of other settings; of DiffSeg, what older versions noted."""
        values = asdict(self)
        return {name: values[name] for name in values if self.method != METHODS[0] or name not in _OF_OTHER_METHODS}

    @property
    def views(self) -> list[tuple[str, int]]:
        """All (layers, timestep): what attention maps are computed for."""
        return [(layers, timestep) for layers in self.layers for timestep in self.timesteps]


@dataclass(frozen=True)
class Setting:
    """One point of a sweep over the checkpoints of a model."""

    checkpoint: str
    layers: str
    timestep: int
    threshold: float
    title: str = ""

    def __str__(self) -> str:
        parts = [self.checkpoint] if self.checkpoint else []
        parts += [self.layers] if self.layers != ALL_LAYERS else []
        if not self.title or self.timestep:
            parts.append(f"t {self.timestep}")
        if not self.title.startswith("clusters"):
            parts.append(f"threshold {self.threshold:g}")
        return ", ".join(parts) or self.title
