"""How checkpoints are sampled, scored and compared: `[evaluation]`, with a section for each stage that reads it."""

from dataclasses import dataclass, field
from typing import Literal

from training.checks import check_positive
from training.errors import ConfigError
from training.evaluation import prompt_groups

Sampler = Literal["dpmpp_2m", "euler_a", "ddim"]
Schedule = Literal["karras", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How a checkpoint draws its pictures."""

    sampler: Sampler = "dpmpp_2m"
    """Solver, by the name that people use."""
    schedule: Schedule = "karras"
    """Where its steps lie."""
    num_steps: int = 30
    """Sampler steps."""
    guidance_scale: float = 6.0
    """Classifier-free guidance."""
    batch_size: int = 8
    """Pictures sampled at a time."""

    def __post_init__(self) -> None:
        check_positive("evaluation.sampling", num_steps=self.num_steps, batch_size=self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringConfig:
    """How pictures are scored. Scoring again never samples again."""

    batch_size: int = 16
    """Pictures scored at a time."""

    def __post_init__(self) -> None:
        check_positive("evaluation.scoring", batch_size=self.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictConfig:
    """Differences that matter in practice."""

    clip_margin: float = 0.003
    """Of the CLIP score."""
    aesthetic_margin: float = 0.05
    """Of the aesthetic score."""

    def __post_init__(self) -> None:
        check_positive("evaluation.verdicts", clip_margin=self.clip_margin, aesthetic_margin=self.aesthetic_margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSetConfig:
    """Prompts that checkpoints are judged by: from a file, or made from held-out images and shipped groups."""

    file: str = ""
    """CSV with columns prompt_id, text, negative, group, height, width, or a tab-separated file in PartiPrompts' form;
    relative to the workspace."""
    held_out: int = 0
    """Prompts from captions and tags of held-out images, or as many as there are. 256 for verdicts, 30 for smoke."""
    groups: tuple[str, ...] = ()
    """Shipped groups besides, each of 32 prompts: hands, heads, sides, pose, two_colours, writing, general,
    unknown_words."""
    negative: str = ""
    """Negative prompt of those that have none: basic, drawn, realistic, non_adult, letter_box, or a text."""
    encoding: str = ""
    """Encoding whose bucket plan gives the sizes of prompts that come without; empty where there is but one."""

    def __post_init__(self) -> None:
        made = bool(self.held_out or self.groups)
        if bool(self.file) == made:
            raise ConfigError(
                f"prompt_sets.*: file={self.file!r}, held_out={self.held_out}, groups={list(self.groups)}: "
                "either a file, or held_out or groups"
            )
        if self.held_out < 0:
            raise ConfigError(f"prompt_sets.*.held_out={self.held_out} must be >= 0")
        unknown = [name for name in self.groups if name not in prompt_groups.NAMES]
        if unknown:
            raise ConfigError(
                f"prompt_sets.*.groups: {unknown} are unknown; there are {', '.join(prompt_groups.NAMES)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """One protocol for all checkpoints of a workspace, so that any two of them compare."""

    prompt_set: str = "standard"
    """Name of a prompt set of the workspace."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How pictures are drawn."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """How they are scored."""
    verdicts: VerdictConfig = field(default_factory=VerdictConfig)
    """When a difference counts."""
