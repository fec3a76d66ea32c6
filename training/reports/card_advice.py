"""What a model card advises: how to prompt a model that was trained on such prompts, and how to
sample it."""

from training.config.evaluation import SamplingConfig
from training.config.run import PromptConfig
from training.curation.tags import LETTERBOXED
from training.reports.card_facts import SetFacts
from training.reports.card_markdown import escape
from training.sampling.schedulers import label

_UNWANTED = ("watermark", LETTERBOXED)
"""Tags that are trained so that a negative prompt can ask for their absence."""
_GOOD, _POOR = 7, 3
"""Scores from which an image is good, and up to which it is poor."""
_ORDERS = {
    "shuffled": "in any order",
    "kohaku": "in this order: people, character, series, artists, special words, then all others",
}


def prompting(prompts: PromptConfig, facts: SetFacts) -> list[str]:
    """Advice on prompts, as Markdown, a line each."""
    number = (
        f"about {prompts.mean_tags:.0f} of them" if prompts.mean_tags else "all tags of their image"
    )
    lines = [f"Tags, separated by commas, {_ORDERS[prompts.order]}; training prompts had {number}."]
    lines += _captions(prompts, facts)
    scores = [score for score, _ in facts.scores]
    if prompts.score_tags and scores:
        poor = ", ".join(f"`score_{score}`" for score in scores if score <= _POOR)
        lines.append(
            f"Begin with `score_{scores[-1]}` or `score_{min(_GOOD, scores[-1])}_up` for quality; `score_N_up` means N "
            "or better." + (f" In the negative prompt: {poor}." if poor else "")
        )
    if prompts.first_tags:
        lines.append(
            f"Then, where they apply: {_listed(prompts.first_tags)}; prompts of such images opened with them."
        )
    trained = {tag for tag, _ in facts.tags}
    if unwanted := [tag for tag in _UNWANTED if tag in trained]:
        lines.append(f"In the negative prompt as well: {_listed(unwanted)}.")
    lines += _spelling(prompts, trained)
    lines.append(
        "Words that are not among the tags were not trained by themselves: they may do nothing, or make images worse."
    )
    chunks = f"Prompts of up to {prompts.max_chunks * 75} tokens"
    lines.append(chunks + (", in chunks of 75." if prompts.max_chunks > 1 else "."))
    if prompts.empty_prob:
        empty = "left empty" if prompts.empty_as == "string" else "zeros in place of its encoding"
        lines.append(
            f"{prompts.empty_prob:.0%} of the prompts were empty: a negative prompt may be {empty}."
        )
    return lines


def sampling_advice(sampling: SamplingConfig, family: str) -> list[str]:
    """Advice on samplers, as Markdown, a line each.

    Args:
        sampling: How the images of the evaluation were drawn.
        family: sdxl or sd1.
    """
    drawn = f"{label(sampling.sampler, sampling.schedule)}, {sampling.num_steps} steps, guidance "
    drawn += f"{sampling.guidance_scale:g}"
    if sampling.pag_scale:
        drawn += f", perturbed-attention guidance {sampling.pag_scale:g}"
    if second := sampling.second_pass:
        drawn += f", a second pass at {second.scale:g} times the size with denoising strength {second.strength:g}"
    for lora in sampling.loras:
        drawn += (
            f", with LoRA {escape(lora.name)} at {lora.weight:g}, which is not part of this model"
        )
    if sampling.weights == "ema":
        drawn += ", from the averaged weights where there are some"
    lines = [f"{drawn}, at one of the sizes above: so were the images of the evaluation drawn."]
    if family == "sdxl":
        lines.append(
            "Take a Karras, exponential or Align Your Steps schedule. **Avoid the plain one (“Normal”)**: "
            "fine-tunes of SDXL are known to draw garbage with it."
        )
    return lines


def _captions(prompts: PromptConfig, facts: SetFacts) -> list[str]:
    if not (facts.num_captions or facts.num_made_captions):
        return []
    lines = []
    if prompts.caption_prob:
        lines.append(
            f"Sentences work too: {prompts.caption_prob:.0%} of the captioned images were trained with them."
        )
    if prompts.caption_and_tags_prob:
        lines.append(
            f"So does a sentence and then tags: {prompts.caption_and_tags_prob:.0%} of them were."
        )
    return lines


def _spelling(prompts: PromptConfig, trained: set[str]) -> list[str]:
    lines = []
    if prompts.spaces_prob or prompts.mixed_prob:
        lines.append("Tags may be written with underscores or with spaces.")
    if prompts.alias_prob:
        lines.append(
            f"The aliases in tags.csv work too: {prompts.alias_prob:.0%} of the tags that have some were so written."
        )
    if bracketed := next((tag for tag in sorted(trained) if "(" in tag), ""):
        shown = escape(bracketed.replace("(", "\\(").replace(")", "\\)"))
        lines.append(
            f"Parentheses are part of tags; UIs read them as weights unless they are escaped: {shown}."
        )
    return lines


def _listed(tags: tuple[str, ...] | list[str]) -> str:
    return ", ".join(escape(tag) for tag in tags)
