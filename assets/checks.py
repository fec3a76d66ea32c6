"""Asset checks: what must hold of each table, said once, shown beside the asset, able to fail."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import polars as pl

from assets.rules import Finding, check
from resources.workspace import generations
from resources.workspace.store import Store
from training.evaluation.prompt_building import TEXTS, trained_texts
from training.evaluation.prompt_sets import overlap
from training.latents.files import MAX_RECONSTRUCTION_ERROR
from training.names import ShardKey, VerdictName

MIN_USABLE_SHARE = 0.5
MAX_JUNK_SHARE = 0.5
MIN_PAIR_ACCURACY = 0.6
MAX_TRUNCATED_SHARE = 0.05
MAX_LISTED = 50


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _report_numbers(store: Store, table: str) -> list[Mapping[str, Any]]:
    manifests = [store.manifest(table, part) for part in store.tables.parts(table)]
    return [manifest.report.get("numbers", {}) for manifest in manifests if manifest is not None]


@check("source_listing")
def sidecars_readable(store: Store) -> Finding:
    """Every sidecar could be read."""
    problems = sum(
        int(numbers.get("sidecar problems", 0))
        for numbers in _report_numbers(store, "source_listing")
    )
    return Finding(problems == 0, "no sidecar is unreadable or ill-typed", {"problems": problems})


@check("raw_images")
def mostly_usable(store: Store) -> Finding:
    """Most candidates are images; many rejections mean a wrong folder or a wrong limit."""
    accepted = store.read("raw_images", ["image_id"]).height
    rejected = (
        store.read("rejected_images", ["stage"]).filter(pl.col("stage") == "raw_images").height
    )
    share = _share(accepted, accepted + rejected)
    return Finding(
        share >= MIN_USABLE_SHARE,
        f"at least {MIN_USABLE_SHARE:.0%} of the candidates are usable",
        {"accepted": accepted, "rejected": rejected, "share": share},
    )


@check("raw_images", error=True)
def every_candidate_accounted_for(store: Store) -> Finding:
    """Candidates = accepted + rejected, exactly, in every shard that was read."""
    listed = store.read("source_listing", ["source", "source_id", "shard"])
    read = listed.filter(pl.col("shard").is_in(store.tables.parts("raw_images")))
    accepted = store.read("raw_images", ["source", "source_id"])
    rejected = store.read("rejected_images", ["stage", "source", "source_id"]).filter(
        pl.col("stage") == "raw_images"
    )
    known = pl.concat([accepted, rejected.drop("stage")])
    lost = read.join(known, on=["source", "source_id"], how="anti").height
    twice = int(known.is_duplicated().sum())
    return Finding(
        lost == 0 and twice == 0,
        "each candidate is accepted or rejected, and only once",
        {"candidates": read.height, "lost": lost, "twice": twice},
    )


@check("embeddings", error=True)
def projections_normalised(store: Store) -> Finding:
    """Projected embeddings are finite and of length 1: aesthetic and CLIP scores rest on it."""
    norms = (
        store.read("embeddings", ["projection"])["projection"]
        .list.eval(pl.element() ** 2)
        .list.sum()
        .sqrt()
    )
    off = len(norms) - int(((norms - 1).abs() <= 1e-3).sum())
    return Finding(
        off == 0, "every projection has length 1", {"embeddings": len(norms), "off": off}
    )


@check("tags")
def tagger_speaks(store: Store) -> Finding:
    """The tagger says something about most images; silence means a wrong model or
    preprocessing."""
    tags = store.read("tags", ["tags"])["tags"]
    silent = int((tags.list.len() == 0).sum())
    return Finding(
        _share(silent, len(tags)) <= 0.5,
        "at most half of the images have no tag at all",
        {"images": len(tags), "without": silent},
    )


@check("captions")
def captions_have_no_markup(store: Store) -> Finding:
    """Captions are sentences, not HTML."""
    captions = store.read("captions", ["caption"])["caption"].drop_nulls()
    marked = int(captions.str.contains(r"<[A-Za-z/!]").sum())
    return Finding(
        marked == 0,
        "no caption contains markup",
        {"captions": len(captions), "with markup": marked},
    )


@check("watermark_boxes", error=True)
def boxes_inside_images(store: Store) -> Finding:
    """Every box lies inside its upright image."""
    boxes = (
        store.read("watermark_boxes", ["image_id", "boxes"])
        .explode("boxes")
        .drop_nulls()
        .unnest("boxes")
    )
    sizes = store.read("raw_images", ["image_id", "height", "width"]).unique("image_id")
    joined = boxes.join(sizes, on="image_id", how="left")
    inside = (pl.col("y0") >= 0) & (pl.col("x0") >= 0) & (pl.col("y1") <= pl.col("height")) & (
        pl.col("x1") <= pl.col("width")
    )  # fmt: skip
    outside = joined.height - joined.filter(inside).height
    return Finding(
        outside == 0, "all boxes lie inside", {"boxes": joined.height, "outside": outside}
    )


@check("duplicate_groups", error=True)
def one_kept_per_group(store: Store) -> Finding:
    """Of every group exactly one candidate goes on."""
    kept = (
        store.read("duplicate_groups", ["group", "kept"])
        .group_by("group")
        .agg(pl.col("kept").sum())
    )
    wrong = kept.filter(pl.col("kept") != 1).height
    return Finding(wrong == 0, "one of each group is kept", {"groups": kept.height, "wrong": wrong})


@check("quality_pairs")
def judgements_readable(store: Store) -> Finding:
    """Every line of the judgement files could be read."""
    bad = sum(
        int(numbers.get("unreadable lines", 0))
        for numbers in _report_numbers(store, "quality_pairs")
    )
    return Finding(bad == 0, "no judgement is unreadable", {"unreadable": bad})


@check("quality_model")
def beats_chance(store: Store) -> Finding:
    """The fitted head orders held-out pairs better than chance; a supplied one is taken as it
    is."""
    row = store.read("quality_model", ["model", "report"]).row(0, named=True)
    accuracy = json.loads(row["report"]).get("held_out_accuracy")
    holds = row["model"] == "supplied" or (accuracy is not None and accuracy >= MIN_PAIR_ACCURACY)
    rule = f"held-out pair accuracy is at least {MIN_PAIR_ACCURACY}"
    return Finding(
        holds,
        rule,
        {"heads": row["model"], **({"accuracy": accuracy} if accuracy is not None else {})},
    )


@check("quality_scores")
def not_mostly_junk(store: Store) -> Finding:
    """At most half of the images score 0; more means a junk head that does not fit these
    images."""
    scores = store.read("quality_scores", ["score"])["score"]
    junk = int((scores == 0).sum())
    share = _share(junk, len(scores))
    return Finding(
        share <= MAX_JUNK_SHARE,
        f"at most {MAX_JUNK_SHARE:.0%} are junk",
        {"images": len(scores), "junk": junk},
    )


@check("tag_vocabulary", error=True)
def no_alias_is_a_tag(store: Store) -> Finding:
    """No name is both a canonical tag and an alias of another."""
    frame = store.read("tag_vocabulary", ["tag", "aliases"])
    aliases = set(frame["aliases"].explode().drop_nulls())
    both = sorted(aliases & set(frame["tag"]))
    return Finding(
        not both, "canonical names and aliases are apart", {"tags": frame.height, "both": len(both)}
    )


@check("selected_images", error=True)
def splits_never_leak(store: Store) -> Finding:
    """No duplicate cluster has images in both splits, and the stable list is of training images
    only."""
    kept = store.read("selected_images", ["cluster", "split", "stable", "kept"]).filter(
        pl.col("kept")
    )
    parted = (
        kept.group_by("cluster").agg(pl.col("split").n_unique()).filter(pl.col("split") > 1).height
    )
    misplaced = kept.filter(pl.col("stable") & (pl.col("split") != "train")).height
    return Finding(
        parted == 0 and misplaced == 0,
        "clusters are in one split; stable images are training images",
        {"kept": kept.height, "parted clusters": parted, "stable outside train": misplaced},
    )


@check("selected_images")
def something_held_out(store: Store) -> Finding:
    """There is a validation image."""
    held_out = (
        store.read("selected_images", ["split"]).filter(pl.col("split") == "validation").height
    )
    return Finding(held_out > 0, "at least one image is held out", {"validation": held_out})


@check("bucket_assignments", error=True)
def resized_fills_bucket(store: Store) -> Finding:
    """The resized image covers its bucket, or lies within it where it is padded; never enlarged
    unless allowed."""
    wrong = images = 0
    for name in store.tables.parts("bucket_assignments"):
        frame = store.read("bucket_assignments", parts=[name])
        low, high = pl.min_horizontal, pl.max_horizontal
        gaps = [
            pl.col(f"resized_{side}") - pl.col(f"bucket_{side}") for side in ("height", "width")
        ]
        fills = (
            pl.when("padded")
            .then((high(*gaps) == 0) & (low(*gaps) <= 0))
            .otherwise(low(*gaps) == 0)
        )
        shrunk = (pl.col("resized_height") <= pl.col("height")) & (
            pl.col("resized_width") <= pl.col("width")
        )
        encoding = store.config.encodings.get(name)
        grown = pl.lit(encoding is not None and encoding.buckets.allow_upscale)
        images += frame.height
        wrong += frame.height - frame.filter(fills & (shrunk | grown)).height
    rule = "resized covers the bucket, or is padded to it, without enlarging"
    return Finding(wrong == 0, rule, {"images": images, "wrong": wrong})


@check("latents")
def reconstruction_faithful(store: Store) -> Finding:
    """Decoded latents look like the crops they came from."""
    errors = [
        float(numbers.get("reconstruction error (of 255)", 0))
        for numbers in _report_numbers(store, "latents")
    ]
    worst = max(errors, default=0.0)
    rule = f"mean absolute error is at most {MAX_RECONSTRUCTION_ERROR} of 255"
    return Finding(worst <= MAX_RECONSTRUCTION_ERROR, rule, {"worst shard": worst})


@check("latents", error=True)
def generations_hold_all(store: Store) -> Finding:
    """The current generation of each shard holds every image that has a bucket, or rejected it."""
    encoded = {item.part: item for item in generations.listed(store) if item.current}
    older = Counter(item.part for item in generations.listed(store) if not item.current)
    rejected = store.read(
        "rejected_images",
        ["stage"],
        [p for p in store.tables.parts("rejected_images") if p.startswith("latents.")],
    )
    placed = store.read("bucket_assignments", ["image_id"]).height
    held = sum(item.images for item in encoded.values())
    now = datetime.now(UTC)
    oldest = sorted(encoded.values(), key=lambda item: item.encoded_at)[:MAX_LISTED]
    rows = [
        dg.TableRecord({
            "shard": item.part,
            "generation": item.generation,
            "age, hours": round((now - item.encoded_at).total_seconds() / 3600, 1),
            "encoded (UTC)": item.encoded_at.strftime("%Y-%m-%d %H:%M"),
            "images": item.images,
            "MB": round(item.num_bytes / 1e6, 2),
            "older generations": older[item.part],
        })
        for item in oldest
    ]  # fmt: skip
    numbers: dict[str, Any] = {
        "images with a bucket": placed,
        "encoded": held,
        "rejected": rejected.height,
    }
    if rows:
        numbers["generations, the oldest first"] = dg.MetadataValue.table(rows)
    rule = "encoded and rejected are together all images with a bucket"
    return Finding(held + rejected.height == placed, rule, numbers)


@check("training_set", error=True)
def all_samples_encoded(store: Store) -> Finding:
    """Every sample has latents."""
    missing = 0
    for part in store.tables.parts("training_set"):
        samples = store.read("training_set", ["image_id"], [part])
        encoded = [
            name for name in store.tables.parts("latents") if ShardKey.parse(name).encoding == part
        ]
        missing += samples.join(
            store.read("latents", ["image_id"], encoded), on="image_id", how="anti"
        ).height
    return Finding(missing == 0, "no sample is without latents", {"missing": missing})


@check("prompt_statistics")
def prompts_not_cut(store: Store) -> Finding:
    """Few prompts are longer than the text encoders' chunks."""
    reports = _report_numbers(store, "prompt_statistics")
    cut, whole = (
        sum(int(numbers.get(name, 0)) for numbers in reports) for name in ("truncated", "prompts")
    )
    rule = f"at most {MAX_TRUNCATED_SHARE:.0%} of the prompts are cut"
    return Finding(_share(cut, whole) <= MAX_TRUNCATED_SHARE, rule, {"prompts": whole, "cut": cut})


@check("base_model", error=True)
def base_unchanged(store: Store) -> Finding:
    """The folder still holds the weights that were recorded."""
    recorded = store.read("base_model", ["digest"], ["base"])["digest"][0]
    found = store.models.digest("base")
    return Finding(
        recorded == found,
        "digest of the folder is the recorded one",
        {"recorded": recorded, "found": found},
    )


@check("checkpoints")
def validation_improves(store: Store) -> Finding:
    """The last checkpoint of each run has no higher validation loss than its first."""
    frame = (
        store.read("checkpoints", ["run", "samples_seen", "validation_loss"])
        .drop_nulls()
        .sort("samples_seen")
    )
    ends = frame.group_by("run", maintain_order=True).agg(
        pl.col("validation_loss").first().alias("first"),
        pl.col("validation_loss").last().alias("last"),
    )
    worse = ends.filter(pl.col("last") > pl.col("first"))["run"].to_list()
    return Finding(
        not worse,
        "validation loss does not rise over a run",
        {"runs": ends.height, "worse": ", ".join(worse)},
    )


@check("prompt_sets", error=True)
def prompts_never_trained(store: Store) -> Finding:
    """No evaluation prompt is a caption or the tags of a training image."""
    trained = (
        store.read("training_set", TEXTS, [part]) for part in store.tables.parts("training_set")
    )
    found = overlap(
        store.read("prompt_sets"), itertools.chain.from_iterable(map(trained_texts, trained))
    )
    rule = "no prompt of a set equals a training image's caption, made caption or tags"
    return Finding(not found, rule, {"found": ", ".join(dict.fromkeys(found[:10]))})


@check("sample_images")
def images_not_blank(store: Store) -> Finding:
    """Sample images are not all one image: equal pixels for different prompts mean a dead
    model."""
    frame = pl.concat([store.read("sample_images", ["sha256"], [part]).drop_nulls().with_columns(part=pl.lit(part))
                       for part in store.tables.parts("sample_images")])  # fmt: skip
    repeated = int(frame.is_duplicated().sum())
    return Finding(repeated == 0, "no two images of a checkpoint are equal", {"equal": repeated})


@check("eval_metrics", error=True)
def every_image_scored(store: Store) -> Finding:
    """Each sample image has a finite CLIP score."""
    unscored = 0
    for part in store.tables.parts("eval_metrics"):
        scores = store.read("eval_metrics", ["prompt_id", "metric", "value"], [part])
        good = scores.filter((pl.col("metric") == "clip_score") & pl.col("value").is_finite())
        pictures = store.read("sample_images", ["prompt_id"], [part])
        unscored += pictures.join(good, on="prompt_id", how="anti").height
    return Finding(
        unscored == 0, "every sample image has a finite CLIP score", {"without": unscored}
    )


@check("verdicts")
def nothing_got_worse(store: Store) -> Finding:
    """No checkpoint is worse than its base on any metric over all prompts."""
    against_base = [
        part for part in store.tables.parts("verdicts") if VerdictName.parse(part).is_against_base
    ]
    frame = store.read("verdicts", parts=against_base)
    frame = frame.filter((pl.col("group") == "all") & (pl.col("verdict") == "worse"))
    worse = [f"{b} ({metric})" for b, metric in frame.select("b", "metric").iter_rows()]
    return Finding(not worse, "no verdict over all prompts is `worse`", {"worse": ", ".join(worse)})


@check("release", error=True)
def release_complete(store: Store) -> Finding:
    """Every file of a release is there with the size recorded."""
    missing = []
    for part in store.tables.parts("release"):
        for file, num_bytes in store.read("release", ["file", "bytes"], [part]).iter_rows():
            path = store.home / "release" / part / file
            if not path.is_file() or path.stat().st_size != num_bytes:
                missing.append(f"{part}/{file}")
    return Finding(
        not missing, "all files of a release are whole", {"missing": ", ".join(missing[:10])}
    )
