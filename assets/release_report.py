"""What a report shows of a workspace: which checkpoints beside each other, curves, nearest training
images."""

from collections.abc import Sequence

import polars as pl

from assets import references
from assets.verdicts import scores_of
from resources.workspace.store import Store
from training.errors import DataError
from training.names import CheckpointName, VerdictName
from training.reports import report
from training.reports.overfitting import score_charts, sentences
from training.reports.report import Exhibit, Section
from training.reports.run_charts import loss_charts, timestep_map
from training.reports.scores import Side
from training.runs.event_log import read_events
from training.runs.run_folder import EVENTS, read_config, read_inputs
from training.runs.training_set import count_forgotten


def sides(store: Store, names: Sequence[str]) -> list[Side]:
    """Checkpoints as the report shows them, from left to right."""
    return [
        Side(
            checkpoint=name,
            samples=store.read("sample_images", parts=[name]),
            metrics=store.read("eval_metrics", parts=[name]),
            folder=store.paths.sample_folder(name),
        )
        for name in names
    ]


def evaluated(store: Store, run: str) -> list[str]:
    """A run's checkpoints with scores, oldest first."""
    names = (CheckpointName.parse(name) for name in store.tables.parts("eval_metrics"))
    return [str(name) for name in sorted(names) if name.run == run]


def shown(store: Store, run: str, last: str) -> list[str]:
    """The base and checkpoints of the run up to the last, as far as they were drawn and scored as
    the last one was."""
    protocol = scores_of(store, last).protocol
    names = [store.checkpoints.base() or ""]
    for name in evaluated(store, run):
        try:
            alike = scores_of(store, name).protocol == protocol
        except DataError:
            continue
        if alike and name != last:
            names.append(name)
    return report.spread([*names, last])


def summary_of(store: Store, checkpoint: str) -> dict[str, float]:
    """A checkpoint's summary: column to value."""
    rows = store.read("eval_metrics", ["prompt_id", "metric", "value"], [checkpoint])
    return dict(rows.filter(pl.col("prompt_id").is_null()).select("metric", "value").iter_rows())


def render_report(store: Store, run: str, last: str) -> str:
    """The run's report as one HTML page."""
    names = shown(store, run, last)
    folder = store.paths.run_folder(run)
    events = read_events(folder / EVENTS)
    marks = [CheckpointName.parse(name).samples_seen for name in names[1:]]
    inputs = read_inputs(folder)
    forgotten = count_forgotten(inputs.training_set)
    facts = {
        "training set": inputs.fingerprint[:12]
        + (f", {forgotten} of its images forgotten since" if forgotten else ""),
        "samples": f"{read_config(folder).num_samples:,}",
        **protocol_facts(store, last),
    }
    summaries = [(name, summary_of(store, name)) for name in names]
    warnings = " ".join(sentences(summaries))
    exhibits = closest(store, last)
    section = Section(title="Copies and over-baking", text=warnings, exhibits=exhibits)
    return report.render(
        f"Run {run}",
        sides(store, names),
        store.read("verdicts", parts=[str(VerdictName.against_base(last))]),
        facts,
        charts=[*loss_charts(events, marks), *score_charts(summaries)],
        maps=timestep_map(events),
        sections=[section] if warnings or exhibits else [],
    )


def protocol_facts(store: Store, checkpoint: str) -> dict[str, object]:
    """How images were drawn, in small print, and how many of a checkpoint's have no score."""
    from training.sampling.schedulers import label

    sampling = store.config.evaluation.sampling
    facts: dict[str, object] = {
        "prompts": store.config.evaluation.prompt_set,
        "sampler": f"{label(sampling.sampler, sampling.schedule)}, {sampling.num_steps} steps, guidance "
        f"{sampling.guidance_scale:g}",
    }
    if sampling.weights == "ema":
        facts["weights"] = "averaged, where there are some"
    failed = summary_of(store, checkpoint).get("num_failed")
    return facts | (
        {"images without scores": f"{failed:.0f}, so there is no verdict"} if failed else {}
    )


def closest(store: Store, checkpoint: str) -> list[Exhibit]:
    """The images nearest to a training image, that image on the right, the nearest first."""
    metrics, samples = (
        store.read(table, parts=[checkpoint]) for table in ("eval_metrics", "sample_images")
    )
    return [
        Exhibit(
            images=[pair.picture, pair.image],
            caption=f"{pair.prompt_id}: cosine {pair.similarity:.3f} with {pair.image_id[:12]}",
        )
        for pair in references.closest(store, checkpoint, metrics, samples)
    ]
