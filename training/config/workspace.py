"""Every option of a workspace: frozen dataclasses, the only home of a default, read from
`foundry.toml`.

A recipe's `[workspace]` half becomes `WorkspaceConfig`; its `[run]` half is in
`training/config/run.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from training.buckets.plans import BucketConfig, UpCropConfig
from training.config.evaluation import EvaluationConfig, PromptSetConfig
from training.errors import ConfigError
from training.names import check_fractions, check_name, check_positive

FORMAT = 1
"""Version of the workspace's layout that this code writes and reads."""

SOURCE_KINDS = {"folder": "training.sources.folder:FolderSource"}
"""Kinds of source: what `kind` may be, and `module:class` of the `training.sources.source.Source` that
lists and opens such a source. A new kind is a line here; `docs/extending.md` shows one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Where candidates come from."""

    name: str
    """Identity in every table."""
    kind: str = "folder"
    """How it is listed and opened: a key of `SOURCE_KINDS`."""
    path: str
    """Folder, or the file that a source of another kind is; relative to the workspace."""
    tags: tuple[str, ...] = ()
    """Tags that every image of it carries."""
    words: Literal["auto", "tags", "captions"] = "auto"
    """What the text files beside its images hold. auto: each line is judged by itself, and
    `.caption` is prose."""

    def __post_init__(self) -> None:
        check_name("source", self.name)
        if self.kind not in SOURCE_KINDS:
            known = ", ".join(sorted(SOURCE_KINDS))
            raise ConfigError(
                f"sources: kind={self.kind!r} of {self.name!r} is no kind of source; there are: {known}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """What may become an image."""

    max_bytes: int = 256_000_000
    """Largest file, bytes."""
    max_pixels: int = 200_000_000
    """Largest image, pixels, checked in the header before decoding."""
    min_side_px: int = 16
    """Shortest side that counts as an image, pixels."""
    timeout_s: float = 60.0
    """Longest decoding of one image, seconds."""
    memory_bytes: int = 1_500_000_000
    """Address space that a decoding worker may add to its own, bytes."""
    num_workers: int = 2
    """Decoding processes."""

    def __post_init__(self) -> None:
        check_positive(
            "decode",
            max_bytes=self.max_bytes,
            max_pixels=self.max_pixels,
            min_side_px=self.min_side_px,
            timeout_s=self.timeout_s,
            memory_bytes=self.memory_bytes,
            num_workers=self.num_workers,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseConfig:
    """A further model that runs may start from."""

    path: str
    """Diffusers folder or single .safetensors file; relative to the workspace, or `demo:PATH`."""
    license: str = "openrail++"
    """Its licence as Hugging Face names it; its fine-tunes inherit it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelsConfig:
    """Folders of borrowed weights; relative to the workspace, or `demo:PATH` inside `demo/`."""

    clip: str = "models/clip-vit-large-patch14"
    """CLIPModel: embeddings, CLIP score, quality and aesthetics."""
    aesthetic: str = "models/aesthetic"
    """LAION aesthetic head as safetensors."""
    pickscore: str = "models/PickScore_v1"
    """PickScore, for `evaluation.scoring.scorers`."""
    hps_v2: str = "models/HPSv2"
    """Human Preference Score v2.1, for `evaluation.scoring.scorers`."""
    image_reward: str = "models/ImageReward"
    """ImageReward, for `evaluation.scoring.scorers`."""
    quality_head: str = "models/quality_head"
    """Utility and junk heads used while a workspace has too few judgements of its own."""
    tagger: str = "models/joytag"
    """JoyTag layout."""
    detector: str = "models/owlv2-base-patch16-ensemble"
    """Owlv2ForObjectDetection."""
    base: str = "models/stable-diffusion-xl-base-1.0"
    """Diffusers folder that training starts from."""
    base_license: str = "openrail++"
    """Licence of the base model as Hugging Face names it; its fine-tunes inherit it."""
    bases: dict[str, BaseConfig] = field(default_factory=dict)
    """Further models that a run may start from, by the name that it gives as its `base`."""
    further: dict[str, str] = field(default_factory=dict)
    """Folders of annotators that are installed beside this package, by the key that each names."""

    def __post_init__(self) -> None:
        for name in self.bases:
            check_name("base", name)
            if name == "base":
                raise ConfigError(
                    "[models.bases.base]: `base` names the model under [models] base; take another name"
                )
        for name in self.further:
            check_name("model", name)
            if name in self.__dataclass_fields__:
                raise ConfigError(f"[models.further] {name}: set [models] {name} instead")

    def names(self, key: str) -> bool:
        """Whether there is a folder for the key that a network names."""
        return key in self.__dataclass_fields__ or key in self.further

    def folder(self, key: str) -> str:
        """The folder for the key that a network names.

        Raises:
            ConfigError: there is none; the message says where to set it.
        """
        if not self.names(key):
            raise ConfigError(
                f"[models.further] has no {key}: name the folder of its weights in foundry.toml"
            )
        return str(self.further[key] if key in self.further else getattr(self, key))

    def base_named(self, name: str) -> BaseConfig:
        """The model that a run's `base` names.

        Raises:
            ConfigError: there is none of that name; the message lists those that there are.
        """
        if name == "base":
            return BaseConfig(path=self.base, license=self.base_license)
        if name not in self.bases:
            known = ", ".join(["base", *sorted(self.bases)])
            raise ConfigError(
                f"base={name!r} is no model of [models.bases] in foundry.toml; there are: {known}"
            )
        return self.bases[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateConfig:
    """One pass of all annotators over each image."""

    batch_size: int = 16
    """Images decoded and annotated at a time; part of the result's identity."""
    watermark_query: str = "a watermark"
    """What the detector is asked for."""

    def __post_init__(self) -> None:
        check_positive("annotate", batch_size=self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class TagConfig:
    """From what sources and taggers say to canonical tags."""

    threshold: float = 0.4
    """Tagger probability from which a tag counts. JoyTag's published working point."""
    aliases: str = ""
    """CSV `name,category,count,"alias1,alias2"` without a header; relative to the workspace."""
    blacklist: tuple[str, ...] = ()
    """Canonical tags that are dropped."""

    def __post_init__(self) -> None:
        check_fractions("tags", threshold=self.threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """From judgements to scores 0-9."""

    min_pairs: int = 300
    """Judgements from which the workspace's own head is fitted; fewer use the supplied one."""
    shares: tuple[float, ...] = (0.05, 0.05, 0.10, 0.15, 0.15, 0.15, 0.15, 0.10, 0.10)
    """Share of the pool that gets score 1, 2, ... 9; the cut points are frozen with the model."""
    junk_threshold: float = 0.5
    """Junk probability from which the score is 0."""

    def __post_init__(self) -> None:
        if len(self.shares) != 9 or abs(sum(self.shares) - 1) > 1e-6 or min(self.shares) <= 0:
            raise ConfigError(
                f"quality.shares={list(self.shares)} must be nine positive shares that sum to 1"
            )
        check_fractions("quality", junk_threshold=self.junk_threshold)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionConfig:
    """Rules of taste. Each drops images with a reason and never rejects them."""

    min_score: int = 1
    """Lowest quality score that is kept; 0 is junk."""
    min_side_px: int = 0
    """Shortest upright side that is kept, pixels."""
    max_aspect: float = 4.0
    """Largest ratio of the longer to the shorter side."""
    min_bytes_per_pixel: float = 0.0
    """Lowest file size per pixel, bytes."""
    unwanted_tags: tuple[str, ...] = ()
    """Images with one of these are dropped."""
    watermark_threshold: float = 0.3
    """Confidence from which a box counts as a watermark."""
    flip_tags: tuple[str, ...] = ()
    """Images with one of these (`facing_left`) are mirrored, so that all subjects face one way."""
    never_flip_tags: tuple[str, ...] = (
        "text", "english_text", "watermark", "signature", "logo", "speech_bubble", "left-handed",
        "left-to-right_manga", "right-over-left_kimono", "left-hand_drive", "right-hand_drive",
    )  # fmt: skip
    """Images with one of these, or with a watermark box, are never mirrored: it would show."""
    drop_near_duplicates: bool = True
    """Keep one of each near-duplicate group."""
    num_validation: int = 2048
    """Held-out images at most; never more than 5 % of the kept, at least 1."""
    num_stable: int = 2048
    """Training images on the list of the stable training loss, at most."""
    seed: int = 0
    """Keys the split."""

    def __post_init__(self) -> None:
        check_fractions("selection", watermark_threshold=self.watermark_threshold)
        check_positive("selection", max_aspect=self.max_aspect, num_validation=self.num_validation)
        if not 0 <= self.min_score <= 9:
            raise ConfigError(f"selection.min_score={self.min_score} must lie between 0 and 9")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingConfig:
    """A bucket plan, a crop policy and a VAE under one name."""

    buckets: BucketConfig = field(default_factory=BucketConfig)
    """Training resolutions."""
    crop: Literal["random", "centre", "subject"] = "random"
    """Where in the slack the crop lies. `random` is keyed by (generation, image_id); `subject`
    draws the same way among the crops that keep what stands out, so that heads stay in. A crop box
    from a sidecar wins over all."""
    avoid_watermarks: float = 0.0
    """Confidence from which a watermark box is kept out of the crop where the slack allows it; 0
    for never."""
    up_crop: UpCropConfig = field(default_factory=UpCropConfig)
    """Which images are padded instead of cropped."""
    vae: str = "base"
    """`base` for the VAE inside [models] base, or a folder."""
    precision: Literal["tf32", "fp32", "bf16"] = "tf32"
    """Arithmetic of the VAE: TF32 where the device has it, else fp32; bf16 only where the
    reconstruction of the shard's first images is as good as in fp32."""
    tile_above_px: int = 4_194_304
    """Buckets of more pixels are encoded in overlapping tiles, which bounds the memory."""
    log_variance: bool = True
    """Store the posterior's log-variance, so that each epoch draws anew."""
    batch_size: int = 8
    """Images encoded at a time, within a bucket; part of the result's identity."""
    seed: int = 0
    """Keys the crops."""
    codec: Literal["raw", "split-zstd"] = "raw"
    """How latent files hold their values, without loss: as they are, or in two thirds of the bytes
    at some cost in reading."""
    max_file_bytes: int = 256_000_000
    """Largest latent file before compression, bytes."""

    def __post_init__(self) -> None:
        check_fractions("encodings.*", avoid_watermarks=self.avoid_watermarks)
        check_positive(
            "encodings.*",
            tile_above_px=self.tile_above_px,
            batch_size=self.batch_size,
            max_file_bytes=self.max_file_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReencodingConfig:
    """How latents are encoded anew while training goes on, by the schedule `reencode_latents`."""

    num_shards: int = 0
    """Shards per hour and encoding, those with the oldest latents first; 0 for all that are old
    enough."""
    min_age_hours: float = 24.0
    """Latents younger than this stay."""
    max_minutes: float = 55.0
    """No shard is begun when this much time has gone since the schedule's tick."""

    def __post_init__(self) -> None:
        check_positive("reencoding", max_minutes=self.max_minutes)
        if self.num_shards < 0 or self.min_age_hours < 0:
            raise ConfigError(
                f"reencoding: num_shards={self.num_shards} and min_age_hours={self.min_age_hours} must be >= 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackingConfig:
    """Where runs are compared."""

    uri: str = ""
    """MLflow tracking URI; empty for the workspace's own mlflow.db."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicesConfig:
    """Which cards which kind of work may hold, by index; empty for all."""

    train: tuple[int, ...] = ()
    """Cards for training."""
    annotate: tuple[int, ...] = ()
    """Cards for annotators."""
    encode: tuple[int, ...] = ()
    """Cards for latents."""
    evaluate: tuple[int, ...] = ()
    """Cards for sample images and scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceConfig:
    """`foundry.toml`: one data set and all that is made from it."""

    format: int = FORMAT
    """Layout of the workspace."""
    sources: tuple[SourceConfig, ...] = ()
    """Where candidates come from."""
    shard_size: int = 10_000
    """Candidates in a partition, at most; fixed once a candidate is listed."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits of decoding."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    """Borrowed weights."""
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    """The annotators' pass."""
    tags: TagConfig = field(default_factory=TagConfig)
    """Tag rules."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """Score rules."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """Rules of taste."""
    encodings: dict[str, EncodingConfig] = field(default_factory=dict)
    """Encodings by name."""
    reencoding: ReencodingConfig = field(default_factory=ReencodingConfig)
    """When latents are encoded anew."""
    prompt_sets: dict[str, PromptSetConfig] = field(default_factory=dict)
    """Prompt sets by name."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """One protocol for all checkpoints of the workspace, so that any two of them compare."""
    devices: DevicesConfig = field(default_factory=DevicesConfig)
    """Who may hold which card."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where runs are compared."""

    def encoding(self, name: str) -> EncodingConfig:
        """The encoding of this name.

        Raises:
            ConfigError: there is none; the message lists those that there are.
        """
        if name not in self.encodings:
            known = ", ".join(sorted(self.encodings)) or "none"
            raise ConfigError(f"foundry.toml has no [encodings.{name}]; there are: {known}")
        return self.encodings[name]

    def __post_init__(self) -> None:
        check_positive("workspace", shard_size=self.shard_size)
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ConfigError(f"sources: names {names} must differ")
        for kind, keys in (("encoding", self.encodings), ("prompt set", self.prompt_sets)):
            for name in keys:
                check_name(kind, name)
