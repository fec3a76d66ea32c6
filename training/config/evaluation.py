"""How checkpoints are sampled, scored and compared: `[evaluation]`, with a section for each stage
that reads it."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from training.errors import ConfigError
from training.names import check_fractions, check_positive

Sampler = Literal[
    "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "euler", "euler_a", "ddim"
]
Schedule = Literal["karras", "exponential", "ays", "plain"]
PromptWeights = Literal["off", "plain", "mean_restored"]
PromptSyntax = Literal["a1111", "strict"]
PromptTimes = Literal["new", "old"]
PromptEnds = Literal["a1111", "exact"]
Enlarge = Literal["latent", "latent_bicubic", "pixels"]
SamplingPrecision = Literal["fp32", "tf32", "bf16"]
ScorerName = Literal["pickscore", "hps_v2", "image_reward"]

PROMPT_GROUPS = (
    "hands", "heads", "sides", "pose", "two_colours", "writing", "general", "unknown_words",
)  # fmt: skip
"""Shipped groups of prompts, written in `training/evaluation/prompt_groups.py`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondPassConfig:
    """A second pass over the enlarged image, as "hires fix" of the UIs."""

    scale: float = 1.5
    """Side of the final image over that of the first pass; sides are rounded to the VAE's pixels
    per latent."""
    strength: float = 0.5
    """Share of the noise schedule that the second pass walks: 0 leaves the image as it is, 1
    forgets it."""
    num_steps: int = 15
    """Steps that the second pass takes, whatever its strength."""
    enlarge: Enlarge = "latent"
    """`latent`: A1111's "Latent", bilinear; `latent_bicubic`: its "Latent (bicubic antialiased)";
    `pixels`: decoded, enlarged by Lanczos and encoded, which keeps edges and bears strengths below
    0.5."""

    def __post_init__(self) -> None:
        owner = "evaluation.sampling.second_pass"
        check_positive(owner, scale=self.scale, strength=self.strength, num_steps=self.num_steps)
        if self.scale < 1 or self.strength > 1:
            raise ConfigError(
                f"{owner}: scale={self.scale} must be at least 1, strength={self.strength} at most 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """A LoRA that is added to every checkpoint before it is sampled."""

    path: str
    """A .safetensors file of kohya's, diffusers' or PEFT's; relative to the workspace."""
    weight: float = 1.0
    """Factor of what it adds."""

    @property
    def name(self) -> str:
        """What it is called in images; PEFT's files are all called the same and take their
        folder's name."""
        path = PurePath(self.path)
        return path.parent.name if path.name == "adapter_model.safetensors" else path.stem


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How a checkpoint draws its images."""

    sampler: Sampler = "dpmpp_2m"
    """Solver, by the name that people use."""
    schedule: Schedule = "karras"
    """Where its steps lie: `ays` is Align Your Steps as ComfyUI has it (its authors' levels of 10
    steps, log-linear for other numbers, then 0), `plain` the UIs' Normal. DDIM has steps of its
    own: `plain`."""
    num_steps: int = 30
    """Sampler steps; one of `dpmpp_sde` calls the UNet twice, one of the others once."""
    guidance_scale: float = 6.0
    """Classifier-free guidance."""
    pag_scale: float = 0.0
    """Perturbed-attention guidance, some 3 where it is used; 0 for none. It makes a step half as
    long again."""
    clip_skip: int = 0
    """SD 1.x: layer of the text encoder that is read, from the end. 0 for the one that the
    checkpoint was trained with, which for models without a run is 1."""
    prompt_weights: PromptWeights = "off"
    """`off` reads prompts literally, as they were trained; the others read `(tag:1.5)` as the UIs
    do and multiply: `mean_restored` then restores the mean of a chunk (A1111's "Original"), `plain`
    does not ("No norm")."""
    prompt_syntax: PromptSyntax = "a1111"
    """What is done with prompts that A1111 reads otherwise than they look: marks that it takes for
    letters, a number at the end that it takes for a weight, a time beyond the last call. `a1111`
    follows it and warns once a prompt, `strict` refuses. Schedules, `[from:to:when]` and `[a|b]`,
    are drawn with both."""
    prompt_times: PromptTimes = "new"
    """What the times in schedules are, in A1111's words for its rules. `new`: a number with a point
    is a fraction, one without is a step, and the second pass goes on counting: 1.5 is its middle.
    `old`: a number below 1 is a fraction, others are steps, and the second pass has the schedule of
    the first."""
    prompt_ends: PromptEnds = "a1111"
    """`a1111` gives the first text of a schedule one call of the UNet more than its time says, as
    A1111 does, `exact` as many as it says: of 20 calls `[cat:dog:0.5]` has 11 or 10 of the cat."""
    second_pass: SecondPassConfig | None = None
    """Draw the image again, larger."""
    loras: tuple[LoraConfig, ...] = ()
    """LoRAs, added in this order."""
    weights: Literal["raw", "ema"] = "raw"
    """`ema` draws with the averaged weights of checkpoints that have them, and with the others'
    own."""
    precision: SamplingPrecision = "fp32"
    """Arithmetic of the models. `tf32`: TF32 where the device has it, else as `fp32`; `bf16`: the
    UNet in bfloat16, its weights rounded once, text encoders and VAE as with `tf32`. Latents, noise
    and guidance are always fp32."""
    batch_size: int = 8
    """Images sampled at a time."""

    def __post_init__(self) -> None:
        owner = "evaluation.sampling"
        check_positive(owner, num_steps=self.num_steps, batch_size=self.batch_size)
        if self.pag_scale < 0 or self.clip_skip < 0:
            raise ConfigError(
                f"{owner}: pag_scale={self.pag_scale} and clip_skip={self.clip_skip} must be >= 0"
            )
        names = [lora.name for lora in self.loras]
        if len(set(names)) != len(names):
            raise ConfigError(
                f"{owner}.loras: names {names} must differ, because images tell them apart by these"
            )
        if self.sampler == "ddim" and self.schedule != "plain":
            raise ConfigError(
                f'{owner}: sampler="ddim" walks evenly over the trained timesteps and takes schedule="plain", not '
                f'"{self.schedule}"; "euler" is the same solver on any schedule'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """How images are scored. Scoring again never samples again."""

    batch_size: int = 16
    """Images scored at a time."""
    scorers: tuple[ScorerName, ...] = ()
    """Scorers of human preference beside CLIP score and aesthetic; their weights lie under
    [models]."""

    def __post_init__(self) -> None:
        check_positive("evaluation.scoring", batch_size=self.batch_size)
        if len(set(self.scorers)) < len(self.scorers):
            raise ConfigError(
                f"evaluation.scoring.scorers={list(self.scorers)} must name each scorer once"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictConfig:
    """Differences that matter in practice."""

    clip_margin: float = 0.003
    """Of the CLIP score."""
    aesthetic_margin: float = 0.05
    """Of the aesthetic score."""
    further_margins: dict[str, float] = field(default_factory=dict)
    """Of further scorers, by name; without a margin a scorer is shown and not judged."""
    deciding: tuple[str, ...] = ("clip_score", "aesthetic")
    """Metrics that decide over the champion: it gives way to a checkpoint that is better in one and
    worse in none."""

    def __post_init__(self) -> None:
        check_positive(
            "evaluation.verdicts",
            clip_margin=self.clip_margin,
            aesthetic_margin=self.aesthetic_margin,
        )
        check_positive("evaluation.verdicts.further_margins", **self.further_margins)
        unknown = [name for name in self.deciding if name not in self.margins]
        if unknown or not self.deciding:
            raise ConfigError(
                f"evaluation.verdicts.deciding={list(self.deciding)} must name metrics with a margin: "
                f"{', '.join(self.margins)}"
            )

    @property
    def margins(self) -> dict[str, float]:
        """Metric -> difference that matters."""
        return {
            "clip_score": self.clip_margin,
            "aesthetic": self.aesthetic_margin,
            **self.further_margins,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutPromptsConfig:
    """How held-out images become prompts: as the workspace's recipe writes prompts, without what it
    leaves to chance.

    `foundry init --preset` takes these from the recipe's `[run.prompts]`; the defaults are those of
    its defaults.
    """

    prefix: str = "score_7_up"
    """What opens every prompt that has tags, as users of the model will open theirs; empty for
    recipes without score tags."""
    num_tags: int = 32
    """Tags at most, chosen by the image's id; 0 for all."""
    order: Literal["shuffled", "kohaku"] = "shuffled"
    """As in `[run.prompts]`; the shuffle follows from the image's id."""
    first_tags: tuple[str, ...] = ()
    """Tags that open the tags of an image that has them, in this order, and are never left out."""
    spaces: bool = False
    """Write spaces for underscores in tags of more than three characters."""
    caption_prob: float = 0.0
    """Share of the images with a caption that become their caption alone,"""
    caption_and_tags_prob: float = 0.0
    """and their caption, then their tags. An image without tags becomes its caption whatever the
    shares."""

    def __post_init__(self) -> None:
        owner = "prompt_sets.*.prompts"
        check_fractions(
            owner, caption_prob=self.caption_prob, caption_and_tags_prob=self.caption_and_tags_prob
        )
        if self.caption_prob + self.caption_and_tags_prob > 1:
            raise ConfigError(
                f"{owner}: caption_prob={self.caption_prob} and caption_and_tags_prob={self.caption_and_tags_prob} "
                "must sum to at most 1"
            )
        if self.num_tags < 0:
            raise ConfigError(f"{owner}.num_tags={self.num_tags} must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSetConfig:
    """Prompts that checkpoints are judged by: from a file, or made from held-out images and shipped
    groups."""

    file: str = ""
    """CSV with columns prompt_id, text, negative, group, height, width, or a tab-separated file in
    PartiPrompts' form; relative to the workspace."""
    held_out: int = 0
    """Prompts from captions and tags of held-out images, or as many as there are. 256 for verdicts,
    30 for smoke."""
    groups: tuple[str, ...] = ()
    """Shipped groups besides, each of 32 prompts: hands, heads, sides, pose, two_colours, writing,
    general, unknown_words."""
    negative: str = ""
    """Negative prompt of those that have none: basic, drawn, realistic, non_adult, letter_box, or a
    text."""
    encoding: str = ""
    """Encoding whose bucket plan gives the sizes of prompts that come without; empty where there is
    but one."""
    prompts: HeldOutPromptsConfig = field(default_factory=HeldOutPromptsConfig)
    """How held-out images become prompts."""

    def __post_init__(self) -> None:
        made = bool(self.held_out or self.groups)
        if bool(self.file) == made:
            raise ConfigError(
                f"prompt_sets.*: file={self.file!r}, held_out={self.held_out}, groups={list(self.groups)}: "
                "either a file, or held_out or groups"
            )
        if self.held_out < 0:
            raise ConfigError(f"prompt_sets.*.held_out={self.held_out} must be >= 0")
        if not self.held_out and self.prompts != HeldOutPromptsConfig():
            raise ConfigError(
                "prompt_sets.*.prompts says how held-out images become prompts, but held_out=0"
            )
        unknown = [name for name in self.groups if name not in PROMPT_GROUPS]
        if unknown:
            raise ConfigError(
                f"prompt_sets.*.groups: {unknown} are unknown; there are {', '.join(PROMPT_GROUPS)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """One protocol for all checkpoints of a workspace, so that any two of them compare."""

    prompt_set: str = "standard"
    """Name of a prompt set of the workspace."""
    every: int = 1
    """Of a run's checkpoints, every so many-th is evaluated; the first and the last always."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How images are drawn."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How they are scored."""
    verdicts: VerdictConfig = field(default_factory=VerdictConfig)
    """When a difference counts."""

    def __post_init__(self) -> None:
        check_positive("evaluation", every=self.every)
        unscored = [
            name for name in self.verdicts.further_margins if name not in self.scoring.scorers
        ]
        if unscored:
            raise ConfigError(
                f"evaluation.verdicts.further_margins: {unscored} are not among evaluation.scoring.scorers="
                f"{list(self.scoring.scorers)}"
            )
