"""`release`: a run's last checkpoint as a folder that stands alone, with a card that says how it
came about."""

import re
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from assets.metadata import materialize
from assets.release_report import evaluated, render_report, shown, sides, summary_of
from resources.graph import Reads, Scope, Stage
from resources.mlflow.catch_up import catch_up
from resources.mlflow.images import choose_images
from resources.workspace.paths import file_digest
from resources.workspace.store import Store
from resources.workspace.writer import Made, git_revision
from training.commit import json_digest, write_bytes
from training.errors import DataError
from training.images import figures
from training.manifests import read_parquet
from training.names import VerdictName
from training.reports import contact_sheet
from training.reports.model_card import Card, Image
from training.runs import release as releasing
from training.runs.event_log import read_lines
from training.runs.run_folder import CONFIG, EVENTS, read_config, read_inputs, read_ready
from training.runs.training_set import count_forgotten
from training.sampling.image_files import read_if_there

NUM_SHOWN = 8
NUM_IN_SHEET = 24
"""Prompts, of each group in turn, in Dagster's metadata and in the contact sheet."""
NUM_IN_CARD = 3


def _inputs(store: Store, key: str) -> dict[str, str]:
    """Digests of the last checkpoint, of the scores of all that its report shows, its verdict, and
    the licence."""
    last = store.checkpoints.last(key)
    if last is None:
        return {"checkpoint": "absent"}
    base = store.checkpoints.base() or "base"
    tables = [
        ("verdicts", str(VerdictName.against_base(last))),
        *(("eval_metrics", name) for name in (base, *evaluated(store, key))),
    ]
    found = {f"{table}:{part}": store.manifest(table, part) for table, part in tables}
    digests = {name: manifest.digest if manifest else "absent" for name, manifest in found.items()}
    texts = {name: file_digest(path) for name, path in _licences(store, key).items()}
    is_named = read_config(store.paths.run_folder(key)).base != "base"
    named = (
        {"base": json_digest(_base(store, key))} if is_named else {}
    )  # of the other one the settings tell
    count = count_forgotten(read_inputs(store.paths.run_folder(key)).training_set)
    forgotten = {"forgotten images": str(count)} if count else {}
    own = {"checkpoint": store.checkpoints.digest(last), "licence": json_digest(texts)}
    return {**own, **digests, **named, **forgotten}


@Stage(
    version=3,
    scope=Scope.RUN,
    group="evaluate",
    kinds=("huggingface",),
    follows=(Reads("checkpoints"), Reads("verdicts")),
    # Scores are digested by the others; their place in the order follows from the verdicts on them.
    also=(
        Reads("eval_metrics"),
        Reads("sample_images"),
        Reads("raw_images", ("image_id", "source", "locator")),
    ),
    config=lambda config, key: {"base_license": config.models.base_license},
    settings="models",
    others=_inputs,
)
def release(
    context: dg.AssetExecutionContext, store: dg.ResourceParam[Store]
) -> dg.MaterializeResult:
    """One row per file of the release: the last checkpoint's model, its card, its report, licence
    and images."""

    def make(key: str) -> Made:
        last = store.checkpoints.last(key)
        if last is None:
            raise DataError(
                f"release {key}: the run has no finished checkpoint; run `foundry train --run {key}`"
            )
        folder, model = store.home / "release" / key, store.checkpoints.folder(last)
        licences, pictures = _licences(store, key), _card_images(store, last)
        card, tags = render_card(store, key, last, list(licences), [image for image, _ in pictures])
        texts = {
            releasing.CARD: card,
            releasing.REPORT: render_report(store, key, last),
            releasing.TAGS: tags,
        }
        if not licences:
            texts[releasing.NO_LICENCE] = releasing.missing_licence(*_base(store, key))
        releasing.assemble(
            folder,
            model=model,
            model_files=[entry.name for entry in read_ready(model).files],
            texts=texts,
            copies={
                releasing.CONFIG: store.paths.run_folder(key) / CONFIG,
                **licences,
                **{image.file: path for image, path in pictures},
            },
        )
        write_bytes(store.paths.sheet_file(key), _sheet(store, key, last))
        return Made(
            frame=releasing.table(folder, read_config(store.paths.run_folder(key))),
            report={
                "numbers": {
                    "checkpoint": last,
                    "folder": str(folder),
                    **_clock(store, key),
                    "licence": ", ".join(licences) or "its text is missing beside the base model",
                },
                "pictures": {"before and after": _grid(store, last)},
            },
        )

    result = materialize(context, store, release, make)
    catch_up(store, context.log)
    return result


def _clock(store: Store, run: str) -> dict[str, object]:
    """How long the run took: for people, and not for the card, which equal runs have alike."""
    from training.reports import card_facts

    facts = card_facts.summarise_run(read_lines(store.paths.run_folder(run) / EVENTS))
    return {
        "hours": facts.hours,
        "attempts": facts.num_attempts,
        "images a second": facts.images_per_s or 0.0,
    }


def render_card(
    store: Store, run: str, last: str, licences: Sequence[str], pictures: Sequence[Image]
) -> tuple[str, str]:
    """The model card as Markdown, and the list of tags as CSV."""
    from training.curation import vocabulary
    from training.reports import card_facts, model_card

    folder, (base, license_name) = store.paths.run_folder(run), _base(store, run)
    inputs, config = read_inputs(folder), read_config(folder)
    model = releasing.inspect_model(store.checkpoints.folder(last), inputs.base_model, config)
    facts = card_facts.count_set(read_parquet(inputs.training_set))
    card = Card(
        checkpoint=last,
        base=base,
        family=model["family"],
        prediction_type=model["prediction_type"],
        license_name=license_name,
        license_files=licences,
        lineage={
            "weights": store.checkpoints.digest(last),
            "training set": inputs.fingerprint,
            "base model": inputs.base_digest,
            "configuration": file_digest(folder / CONFIG),
            "git revision that made this release": git_revision() or "outside of a checkout",
        },
        training_set=facts,
        run=config,
        run_facts=card_facts.summarise_run(read_lines(folder / EVENTS)),
        evaluation=store.config.evaluation,
        summaries=[(name, summary_of(store, name)) for name in shown(store, run, last)],
        verdicts=store.read("verdicts", parts=[str(VerdictName.against_base(last))]),
        images=pictures,
    )
    words = vocabulary.read(inputs.vocabulary, inputs.vocabulary_sha256)
    return model_card.render(card), card_facts.tags_csv(facts, words)


def _licences(store: Store, run: str) -> dict[str, Path]:
    """Texts of the licence of the model that a run began from."""
    from resources.operations.run_prompts import frozen_inputs

    inputs = frozen_inputs(store, run)
    return {} if inputs is None else releasing.licence_files(inputs.base_model)


def _base(store: Store, run: str) -> tuple[str, str]:
    """Name and licence of the model that a run began from; foundry.toml may name another one as its
    base by now."""
    models = store.config.models
    inputs, config = (
        read_inputs(store.paths.run_folder(run)),
        read_config(store.paths.run_folder(run)),
    )
    known = config.base == "base" or config.base in models.bases
    return inputs.base_model.name, models.base_named(
        config.base
    ).license if known else models.base_license


def _card_images(store: Store, last: str) -> list[tuple[Image, Path]]:
    """A few sample images for the card, of each group in turn, with the files that they come
    from."""
    found: list[tuple[Image, Path]] = []
    folder, samples = store.paths.sample_folder(last), store.read("sample_images", parts=[last])
    for row in choose_images(samples, NUM_IN_CARD).iter_rows(named=True):
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", row["prompt_id"])[:60]
        file = f"{releasing.IMAGES}/{len(found) + 1}-{name}.png"
        if read_if_there(folder, row["file"]) is not None:
            found.append(
                (
                    Image(file=file, text=row["text"], negative=row["negative"]),
                    folder / row["file"],
                )
            )
    return found


def _grid(store: Store, last: str) -> str:
    """Base and checkpoint side by side for a few prompts, as Markdown; black where there is no
    image."""
    before, after = sides(store, [store.checkpoints.base() or "", last])
    both = before.samples.join(after.samples.select("prompt_id", after="file"), on="prompt_id")
    rows = choose_images(both, NUM_SHOWN)
    pictures, captions = [], []
    for row in rows.iter_rows(named=True):
        pair = [
            read_if_there(before.folder, row["file"]),
            read_if_there(after.folder, row["after"]),
        ]
        pictures += [np.zeros((8, 8, 3), np.uint8) if image is None else image for image in pair]
        captions += [f"base: {row['text']}", "fine-tuned"]
    return figures.contact_sheet(pictures, captions)


def _sheet(store: Store, run: str, last: str) -> bytes:
    """A contact sheet of all that the report shows, as a JPEG."""
    columns = sides(store, shown(store, run, last))
    files = [dict(side.samples.select("prompt_id", "file").iter_rows()) for side in columns]
    drawn = columns[-1].samples.filter(pl.col("prompt_id").is_in(list(files[0])))
    rows = [
        contact_sheet.Row(
            title=row["prompt_id"],
            text=row["text"],
            images=[
                read_if_there(side.folder, names.get(row["prompt_id"]))
                for side, names in zip(columns, files, strict=True)
            ],
        )
        for row in choose_images(drawn, NUM_IN_SHEET).iter_rows(named=True)
    ]
    return contact_sheet.grid(rows, [side.label for side in columns])
