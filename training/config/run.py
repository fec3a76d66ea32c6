"""Every option of a training run: frozen dataclasses, the only home of a default, read from a
recipe's `[run]` half."""

from dataclasses import dataclass, field, fields
from typing import Literal

from training.errors import ConfigError
from training.names import check_fractions, check_name, check_positive

RULES_VERSION = 3
"""Raised when a rule that no option names changes what a run learns; a run that was begun keeps its
own."""
EIGHT_BIT = ("adamw_8bit", "lion_8bit")
"""Optimizers that bitsandbytes has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """How a sample's prompt is made, anew in each epoch."""

    mean_tags: float = 32.0
    """Mean of the normal distribution of the number of tags; 0 takes all of an image's tags.
    bigASP's, measured on people's prompts; `foundry prompts --fit FILE` measures it on others."""
    std_tags: float = 19.8
    """Its standard deviation."""
    min_tags: int = 1
    """Floor of that number. bigASP's code has 5, its page names none."""
    order: Literal["shuffled", "kohaku"] = "shuffled"
    """`shuffled`: all tags and words alike, score tags before them. `kohaku`: people, character,
    series, artists, then special and general tags shuffled together."""
    first_tags: tuple[str, ...] = ()
    """Tags that open the prompt of an image that has them, in this order, and are never dropped."""
    always_tags: tuple[str, ...] = ("watermark",)
    """Tags that are in the prompt of every image that has them, wherever the shuffle puts them."""
    tag_dropout: float = 0.0
    """Probability that a general or special tag is left out. Kohaku XL Delta: 0.1."""
    alias_prob: float = 0.2
    """Probability that a tag with aliases is written as one of them. bigASP's code."""
    spaces_prob: float = 1 / 3
    """Probability that a whole prompt writes spaces for underscores; what these two leave keeps
    them. bigASP's code."""
    mixed_prob: float = 1 / 3
    """Probability that each tag draws for itself, spaces in 80 %."""
    loose_separators_prob: float = 0.2
    """Probability that separators are typed carelessly: commas missing, spaces missing. bigASP's
    code."""
    missing_space_prob: float = 0.0
    """Probability that the space after a comma is missing in the other prompts; in careless ones it
    is 0.2, whatever this is. bigASP's code: 0.2, so in all prompts."""
    misspelling_prob: float = 0.0
    """Probability that a tag has two letters exchanged, one left out or one doubled."""
    score_tags: bool = True
    """Begin prompts that have tags with a random few of `score_N` and `score_N_up`; a caption comes
    after them, as in bigASP's second version."""
    caption_prob: float = 0.0
    """Probability that a sample with a caption uses it alone instead of tags,"""
    caption_and_tags_prob: float = 0.0
    """and that it uses the caption and then the tags."""
    made_caption_prob: float = 0.95
    """Where an image has a caption of its source and one made by a model: probability of the
    latter. DALL-E 3's mix."""
    empty_prob: float = 0.1
    """Probability of an unconditional sample, for classifier-free guidance."""
    empty_as: Literal["string", "zeros"] = "string"
    """What such a sample reads: the empty string's encoding, or zeros in its place. bigASP's page
    has the string."""
    max_chunks: int = 3
    """Text-encoder chunks of 75 tokens, at most."""
    chunk_shares: tuple[float, ...] = ()
    """Shares of prompts with 1, 2, ... chunks, drawn per prompt, which is then cut at a tag's
    border or filled up with empty chunks; bigASP's batches came to 0.09, 0.66, 0.25. Empty lets
    every prompt have the chunks that it fills."""

    def __post_init__(self) -> None:
        check_fractions(
            "prompts",
            tag_dropout=self.tag_dropout,
            alias_prob=self.alias_prob,
            spaces_prob=self.spaces_prob,
            mixed_prob=self.mixed_prob,
            loose_separators_prob=self.loose_separators_prob,
            missing_space_prob=self.missing_space_prob,
            misspelling_prob=self.misspelling_prob,
            caption_prob=self.caption_prob,
            caption_and_tags_prob=self.caption_and_tags_prob,
            made_caption_prob=self.made_caption_prob,
            empty_prob=self.empty_prob,
        )
        for one, other in (
            ("spaces_prob", "mixed_prob"),
            ("caption_prob", "caption_and_tags_prob"),
        ):
            total = getattr(self, one) + getattr(self, other)
            if total > 1:
                raise ConfigError(
                    f"prompts.{one} and prompts.{other} sum to {total:g}, must be at most 1"
                )
        if self.mean_tags < 0 or self.std_tags < 0 or self.min_tags < 1:
            raise ConfigError(
                f"prompts: mean_tags={self.mean_tags} and std_tags={self.std_tags} must be >= 0, min_tags="
                f"{self.min_tags} >= 1"
            )
        if not 1 <= self.max_chunks <= 3:
            raise ConfigError(f"prompts.max_chunks={self.max_chunks} must lie between 1 and 3")
        shares = self.chunk_shares
        if shares and (
            len(shares) > self.max_chunks or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6
        ):
            raise ConfigError(
                f"prompts.chunk_shares={list(shares)} must be at most max_chunks={self.max_chunks} shares that sum to 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """How many samples make one optimizer step."""

    global_batch_size: int = 2048
    """Samples per optimizer step, over all devices."""
    micro_batch_size: int = 8
    """Samples per forward pass on one device, at most."""
    shards_at_a_time: int = 0
    """Shards that are shuffled together, in a keyed order of shards; 0 for all. A few let training
    start while the latents of the others still arrive (`latents_url`)."""

    def __post_init__(self) -> None:
        if self.shards_at_a_time < 0:
            raise ConfigError(f"batch.shards_at_a_time={self.shards_at_a_time} must be >= 0")
        check_positive(
            "batch",
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
        )
        if self.micro_batch_size > self.global_batch_size:
            raise ConfigError(
                f"batch.micro_batch_size={self.micro_batch_size} exceeds "
                f"batch.global_batch_size={self.global_batch_size}"
            )


SLICE_NUMBERS = 32_000_000
"""Gradients that one message between ranks holds at most: 128 MB, which bounds what a gather of all
ranks' takes."""
GROUP_NUMBERS = 64_000_000
"""Weights that the optimizer steps at once, about: what is there beside each of them meanwhile
stays small."""
OptimizerName = Literal["adamw", "adamw_8bit", "lion", "lion_8bit", "adafactor", "prodigy"]
Precision = Literal["auto", "fp32", "tf32", "fp16_amp", "bf16_amp", "bf16", "fp16"]
Compile = Literal["auto", False, "blocks", "whole"]

_TAKEN_BY: dict[str, tuple[OptimizerName, ...]] = {
    "betas": ("adamw", "adamw_8bit", "lion", "lion_8bit", "prodigy"),
    "epsilon": ("adamw", "adamw_8bit", "prodigy"),
    "clip_threshold": ("adafactor",),
}
"""Options that only some optimizers have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its rates and its averages."""

    name: OptimizerName = "adamw"
    """`adamw` is fused where the device has that; the 8-bit ones need bitsandbytes and a GPU;
    `adafactor` takes its rate from the schedule alone, as bigASP and kohya call it
    (`scale_parameter=False, relative_step=False`)."""
    learning_rate: float = 1e-4
    """Peak rate of the UNet; Prodigy finds its own and takes 1."""
    text_encoder_learning_rate: float | None = None
    """Peak rate of the text encoders; the UNet's where it is absent, and 0 freezes them, as in
    kohya's trainers. Kohaku XL Delta: 1e-5 beside 4e-5."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up, to 0 at the end (constant stays)."""
    warmup_samples: int = 100_000
    """Samples of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running moments; Adafactor has none."""
    epsilon: float = 1e-8
    """Of AdamW, its 8-bit form and Prodigy."""
    weight_decay: float = 0.1
    """Decoupled from the gradient, times the rate."""
    clip_threshold: float = 1.0
    """Adafactor's: largest root mean square of an update."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 for never."""
    ema_half_life_samples: int = 0
    """Half-life of the averaged weights, samples; 0 for none."""
    ema_warmup: bool = True
    """Average over few steps while there are few: after n of them the decay is at most (1 + n) /
    (10 + n), as in diffusers. Without it the base model's weights fade by the half-life alone."""

    def __post_init__(self) -> None:
        check_positive(
            "optimizer",
            learning_rate=self.learning_rate,
            epsilon=self.epsilon,
            clip_threshold=self.clip_threshold,
        )
        least = (
            "text_encoder_learning_rate",
            "warmup_samples",
            "ema_half_life_samples",
            "max_grad_norm",
            "weight_decay",
        )
        for name in least:
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} must be >= 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={list(self.betas)} must each lie in [0, 1)")
        for option in fields(self):
            names, value = _TAKEN_BY.get(option.name), getattr(self, option.name)
            if names and self.name not in names and value != option.default:
                raise ConfigError(
                    f"optimizer.{option.name}={value} is an option of {', '.join(names)}, optimizer.name={self.name} "
                    f"has none: leave it at {option.default}"
                )
        if self.name == "prodigy" and (
            self.learning_rate != 1 or self.text_encoder_learning_rate not in (None, 0, 1)
        ):
            raise ConfigError(
                f"optimizer.name=prodigy with learning_rate={self.learning_rate} and text_encoder_learning_rate="
                f"{self.text_encoder_learning_rate}: it estimates one rate for all weights and multiplies it by "
                "learning_rate; set that to 1 and leave the other out, or at 0, which freezes the text encoders"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """What the UNet is asked to minimise."""

    weighting: Literal["plain", "min_snr", "debiased", "p2"] = "min_snr"
    """How timesteps are weighed: arXiv:2303.09556 section 3.4, arXiv:2310.08442,
    arXiv:2204.00227."""
    min_snr_gamma: float = 5.0
    """Cap of the signal-to-noise ratio of `min_snr`."""
    p2_gamma: float = 1.0
    """Exponent of `p2`, (1 + SNR)^-gamma."""
    noise_offset: float = 0.0
    """Standard deviation of a constant added to each channel's noise."""
    watermark_weight: float = 1.0
    """Weight of latent pixels under a watermark box; 1 for no mask."""

    def __post_init__(self) -> None:
        check_fractions("loss", watermark_weight=self.watermark_weight)
        check_positive("loss", min_snr_gamma=self.min_snr_gamma, p2_gamma=self.p2_gamma)
        if self.noise_offset < 0:
            raise ConfigError(f"loss.noise_offset={self.noise_offset} must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeConfig:
    """How the model is laid out on the devices; the samples, the order and the recipe are the same
    for all of these."""

    gradient_checkpointing: tuple[str, ...] = ()
    """Blocks that are computed again in the backward pass instead of stored, by name in the UNet
    (`down_blocks.1`, `mid_block`, `up_blocks`), `text_encoders`, or `all`."""
    channels_last: Literal["auto", True, False] = "auto"
    """Convolutions read the channels last: quicker on GPUs. `auto`: on a GPU."""
    compile: Compile = "auto"
    """What is compiled: `blocks`, the UNet's transformer blocks, which are alike and share their
    graphs over all sizes; `whole`, the UNet with one graph for each bucket and length of text,
    short micro-batches left as they are; or false. `auto`: `blocks` on a GPU."""
    prefetch: int = 4
    """Batches that are made and sent to the device ahead of their use, at most."""
    shard_optimizer: bool = False
    """Each rank holds its share of the optimizer's state (ZeRO-1), for cards that cannot hold all
    of it."""

    def __post_init__(self) -> None:
        check_positive("compute", prefetch=self.prefetch)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """The plain loss on held-out images, with fixed noise and stratified timesteps."""

    every_samples: int = 50_000
    """Interval, samples."""
    num_images: int = 2048
    """Held-out and stable images at most."""
    num_bins: int = 10
    """Equal ranges of timesteps that the loss is also reported for."""

    def __post_init__(self) -> None:
        check_positive(
            "validation",
            every_samples=self.every_samples,
            num_images=self.num_images,
            num_bins=self.num_bins,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When weights are saved and which are kept."""

    every_samples: int = 500_000
    """Interval, samples; the end of the run is always saved."""
    keep_last: int = 2
    """Whole checkpoints, with optimizer state, to keep: the newest ones."""
    keep_every_samples: int = 0
    """Of the older ones the weights of the first at or after each multiple stay; 0 keeps the
    weights of all. The one with the lowest validation loss stays in any case."""

    def __post_init__(self) -> None:
        check_positive("checkpoints", every_samples=self.every_samples, keep_last=self.keep_last)
        if self.keep_every_samples < 0:
            raise ConfigError(
                f"checkpoints.keep_every_samples={self.keep_every_samples} must be >= 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One training run: fixed by its first launch, stored beside every checkpoint."""

    encoding: str
    """Encoding whose training set and latents it reads."""
    num_samples: int = 30_000_000
    """Length, samples."""
    seed: int = 0
    """Keys order, prompts, timesteps and noise."""
    base: str = "base"
    """The model it starts from: `base` for [models] base of foundry.toml, or a name under
    [models.bases]."""
    family: Literal["any", "sdxl", "sd1"] = "any"
    """What the base model must be, for recipes that fit one family only."""
    prediction_type: Literal["base", "epsilon", "v_prediction"] = "base"
    """What the UNet learns to predict; `base` goes on as the base model does."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step holds no signal, arXiv:2305.08891 section
    3.1; needs v_prediction."""
    clip_skip: int = 1
    """SD 1.x: layer of the text encoder that is read, from the end; NovelAI's family reads 2."""
    trainable: str | None = None
    """What is trained, by its name in `training/models/trainables.py`; absent: the whole UNet, and
    text encoders as below."""
    train_text_encoder: bool = True
    """Train text encoder 1, unless `optimizer.text_encoder_learning_rate` is 0."""
    train_text_encoder_2: bool = False
    """Train text encoder 2, unless that rate is 0."""
    freeze_embeddings: bool = False
    """Leave token and position embeddings of a trained text encoder as they are."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward: exact `fp32`; `tf32`, fp32 whose products a GPU rounds to
    TF32; fp32 weights with 16-bit autocast (`fp16_amp` with a gradient scaler, `bf16_amp`); or
    `bf16` weights with an fp32 master copy in the optimizer. `auto`: `fp32` on a CPU, on a GPU
    `bf16_amp`, or `fp16_amp` where it has no bf16."""
    num_processes: int = 1
    """Ranks that torchrun starts."""
    latents_url: str = ""
    """Folder `latents/<encoding>` of another workspace or a bucket, as fsspec reads it
    (`s3://...`); its files are fetched in the order of training. Empty for the workspace's own."""
    rules_version: int = RULES_VERSION
    """Version of the rules that no option names. In 1, by which runs of older versions go on, a
    mirrored image is told what was cut off on its right as it is seen, and `debiased` for v has
    no cap. Up to 2, a recorded `optimizer.text_encoder_learning_rate` of 0 is the UNet's rate."""
    reduction: Literal["canonical", "fast"] = "fast"
    """Gradient reduction over ranks: canonical is bit-equal for any number of them, fast differs by
    rounding."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """Prompts."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Layout on the devices."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    def __post_init__(self) -> None:
        check_name("encoding", self.encoding)
        check_positive(
            "run",
            num_samples=self.num_samples,
            num_processes=self.num_processes,
            clip_skip=self.clip_skip,
        )
        if not 1 <= self.rules_version <= RULES_VERSION:
            raise ConfigError(
                f"rules_version={self.rules_version} must lie between 1 and {RULES_VERSION}"
            )
        if self.precision == "fp16":
            raise ConfigError(
                'precision="fp16": updates smaller than 1/2048 of a weight vanish in fp16 weights and the training '
                'stalls or diverges; take "fp16_amp" (fp32 weights), "bf16_amp" or "bf16"'
            )
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ConfigError(
                'zero_terminal_snr=true with prediction_type="epsilon": the last step holds no signal, it is asked '
                'for its own input and learns nothing; take "v_prediction"'
            )
        if self.zero_terminal_snr and self.loss.weighting == "min_snr":
            raise ConfigError(
                'zero_terminal_snr=true with loss.weighting="min_snr": the last step would have weight 0 and never be '
                'learned; take "plain" or "debiased"'
            )
        if self.family == "sdxl" and self.clip_skip != 1:
            raise ConfigError(
                f"clip_skip={self.clip_skip}: SDXL always reads the layer before the last; leave it at 1"
            )
        if self.family == "sd1" and self.train_text_encoder_2:
            raise ConfigError("train_text_encoder_2=true: SD 1.x has one text encoder")

    @property
    def trained_text_encoders(self) -> tuple[bool, bool]:
        """Whether text encoders 1 and 2 are trained."""
        frozen = self.optimizer.text_encoder_learning_rate == 0
        return self.train_text_encoder and not frozen, self.train_text_encoder_2 and not frozen


FREE_KEYS = ("validation.", "checkpoints.", "compute.", "num_processes", "latents_url")
"""Keys of a run that may change when it is resumed: intervals, retention, layout, ranks, and where
latents are read."""


def shares_optimizer(config: RunConfig, num_ranks: int) -> bool:
    """Whether a run of so many ranks shares its optimizer's state.

    Raises:
        ConfigError: it would, and the optimizer needs all parameters at once.
    """
    active = config.compute.shard_optimizer and num_ranks > 1
    if active and config.optimizer.name == "prodigy":
        raise ConfigError(
            "compute.shard_optimizer=true: prodigy estimates one rate from all parameters, so no rank can hold a "
            "part of them; take another optimizer or false"
        )
    return active
