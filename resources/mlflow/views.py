"""Views of an experiment that open by a link: the runs' table, curves in sections, images with a
slider of steps, and prompts beside runs. MLflow keeps such views in tags of the experiment, in a
form that it does not document (3.17), so everything here is best effort: another MLflow gets links
to its own pages instead.
"""

import base64
import json
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from resources.mlflow import calls

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

VIEW_TAG = "mlflow.sharedViewState."
_RUNS = "foundry-runs"
RUNS_VIEW = VIEW_TAG + _RUNS
"""Tag of the view that an experiment opens with."""
IMAGES_TAG = "foundry.pictures"
"""Tag of a run: which images it has, as `Images`."""
TRAINED_TAG = "foundry.fingerprint"
"""Tag that runs have which were trained here, and the base and external models have not."""
KNOWN_VERSIONS = ((3, 17), (4, 0))
"""Versions of MLflow whose form of views this is: from the first, below the second."""
TRAINING_PAGES = "workflowType=machine_learning"
"""MLflow opens its pages for agents unless told otherwise."""
_PACKED = "deflate;"
_OURS = "foundry"
"""Marks what we wrote: MLflow leaves it out when a person overwrites a view."""
_MAX_RUNS = 100
_CREATED = {"attributes.`Created`": 125}
_BEST = "metrics.`eval/clip_score_mean`"
"""What runs are sorted by, the highest first: the first of the metrics that decide over the champion by default."""
_COLUMNS = {
    "metrics.`eval/clip_score_mean`": 155, "metrics.`eval/aesthetic_mean`": 150, "metrics.`val/stable_loss`": 125,
    "tags.`foundry.champion`": 140, "tags.`verdict`": 235,
}  # fmt: skip
"""Columns of the runs' table and their widths, px; MLflow groups them by kind, in this order. All
others can be chosen on the page."""
_PARAM_PX, _MAX_PARAMS = 110, 6
"""Columns of the parameters in which runs differ, which stand before those."""
_IMAGES = "samples"
"""Section of the image grid, as MLflow makes it of the images' names."""
_SECTIONS = ("eval", "val", "train", "val_t", "perf", "progress", "eval_groups", "eval_spread")
"""Sections of curves, by how often they are looked at. MLflow itself sorts them by the alphabet."""
_OPEN = frozenset({"eval", "val", "train"})
_CURVES = (
    "eval/clip_score_mean", "eval/aesthetic_mean", "val/stable_loss", "val/loss", "train/loss", "train/grad_norm",
    "train/learning_rate", "perf/images_per_s", "progress/eta_s",
)  # fmt: skip
"""The first charts of their sections; MLflow puts those of all other metrics behind them."""
_CURVE_PX, _GRID_PX = 300, 600
"""Heights of cards; the grid scrolls inside, so that its slider stays in sight."""


class Images(NamedTuple):
    """Which images a run has in the image grid."""

    prompt_set: str
    """Digest of the prompts that were chosen; another one means other images."""
    keys: tuple[str, ...]
    """Names in the grid, one per prompt, in their order."""
    steps: tuple[int, ...]
    """samples_seen of its checkpoints with images, ascending."""

    def tag(self) -> str:
        """The value of the run's tag."""
        return json.dumps(self._asdict(), separators=(",", ":"))

    @classmethod
    def read(cls, tags: Mapping[str, str]) -> "Images | None":
        """What a run's tags say; None when they say nothing that can be read."""
        try:
            found = json.loads(tags[IMAGES_TAG])
            return cls(
                str(found["prompt_set"]),
                tuple(found["keys"]),
                tuple(int(step) for step in found["steps"]),
            )
        except (KeyError, TypeError, ValueError):
            return None


class View(NamedTuple):
    """One view."""

    name: str
    """As people read it, in MLflow's menu of saved views and in Dagster."""
    mode: str
    """MLflow's `compareRunsMode`."""
    state: dict[str, Any]


def links(ui: str, experiment_id: str, *, seeded: bool) -> dict[str, str]:
    """Name of a view -> its address.

    Args:
        ui: Address of MLflow's pages.
        experiment_id: MLflow's id of the experiment.
        seeded: Whether `seed` was done; else the addresses are those of MLflow's own pages.
    """
    page = f"{ui}/#/experiments/{experiment_id}"
    found = {}
    for key, view in views().items():
        share = f"&viewStateShareKey={key}" if seeded else ""
        found[view.name] = f"{page}/runs?compareRunsMode={view.mode}{share}&{TRAINING_PAGES}"
    return {**found, "Checkpoints": f"{page}/models?{TRAINING_PAGES}"}


def seed(client: "MlflowClient", experiment: "Experiment") -> None:
    """Write the views that are missing or no longer fit the runs; one that a person has overwritten
    stays theirs."""
    runs = client.search_runs([experiment.experiment_id], max_results=_MAX_RUNS)
    images = [found for run in runs if (found := Images.read(run.data.tags)) is not None]
    trained = [run.data.params for run in runs if TRAINED_TAG in run.data.tags]
    for key, view in views(images, differing(trained)).items():
        there = _read(experiment.tags.get(VIEW_TAG + key, ""))
        state = base64.b64encode(
            zlib.compress(json.dumps(view.state, separators=(",", ":")).encode())
        ).decode()
        now = time.time_ns() // 1_000_000
        envelope = {
            "name": view.name,
            "createdAt": now,
            "updatedAt": now,
            "state": f"{_PACKED}{state}",
            _OURS: True,
        }
        theirs = bool(there) and _OURS not in there
        if not theirs and any(
            there.get(name) != envelope[name] for name in ("name", "state", _OURS)
        ):
            envelope["createdAt"] = there.get("createdAt", now)
            client.set_experiment_tag(
                experiment.experiment_id, VIEW_TAG + key, json.dumps(envelope)
            )


def differing(params: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the parameters that are not the same in all runs, by the alphabet.

    Args:
        params: Those of each run.
    """
    names = sorted({name for one in params for name in one})
    return [name for name in names if len({one.get(name) for one in params}) > 1]


def views(images: Sequence[Images] = (), params: Sequence[str] = ()) -> dict[str, View]:
    """All views by their key.

    Args:
        images: Those of the experiment's runs; without any, only the views of images are
            poorer.
        params: Names of the parameters in which runs differ: the first columns.
    """
    prompt_set, keys, step = _most_common(images)
    # MLflow adds a card for each image that has none of its own, so those are there, but deleted.
    single = [_image_card([key], 0) | {"deleted": True} for key in keys]
    curves = [_line_card(metric) for metric in _CURVES]
    cards = curves + single
    grid = _image_card(keys, step) | {"uuid": _uuid("grid")}
    # Runs without images, and those with images of other prompts, would be columns of holes.
    shown = f"tags.`{TRAINED_TAG}` != ''" + (
        f" AND tags.`{IMAGES_TAG}` LIKE '%{prompt_set}%'" if prompt_set else ""
    )
    return {
        _RUNS: View("Runs, best images first", "TABLE", _state(cards, params)),
        "foundry-curves": View("Curves", "CHART", _state(cards, params)),
        "foundry-pictures": View(
            "Images, with a slider", "CHART",
            _state([grid, *cards], params, first=_IMAGES, facets={"searchFilter": shown}),
        ),
        "foundry-prompts": View("Prompts beside runs", "ARTIFACT", _state(cards, params)),
    }  # fmt: skip


def _most_common(images: Sequence[Images]) -> tuple[str, list[str], int]:
    """The set of prompts that most runs have images of, its keys in the grid, and the step at
    which most of those have some, the later of equals."""
    sets = Counter(item.prompt_set for item in images)
    if not sets:
        return "", [], 0
    chosen = [
        item for item in images if item.prompt_set == max(sets, key=lambda name: (sets[name], name))
    ]
    steps = Counter(
        step for item in chosen for step in item.steps if step
    )  # at 0 are the base and external models
    return (
        chosen[0].prompt_set,
        list(chosen[0].keys),
        max(steps, key=lambda step: (steps[step], step), default=0),
    )


def _state(
    cards: list[dict[str, Any]],
    params: Sequence[str],
    *,
    first: str = "",
    facets: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A view's state: which runs in which order, columns, charts and sections."""
    columns = _CREATED | {f"params.`{name}`": _PARAM_PX for name in params[:_MAX_PARAMS]} | _COLUMNS
    names = (*([first] if first else []), *_SECTIONS)
    sections = [
        {
            "uuid": _uuid("section", name), "name": name, "isReordered": True, "deleted": False, "isGenerated": True,
            "display": name == first or (not first and name in _OPEN),
            "columns": 1 if name == first else 3, "cardHeight": _GRID_PX if name == first else _CURVE_PX,
        }
        for name in names
    ]  # fmt: skip
    return {
        "searchFilter": "", "orderByKey": _BEST, "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs", **(facets or {}),
        "selectedColumns": list(columns), "columnOrder": list(columns), "columnWidths": columns,
        "runsHiddenMode": "FIRST_10_RUNS", "viewMaximized": False, "runListHidden": False, "groupBy": None,
        "isAccordionReordered": True, "hideEmptyCharts": True, "useGroupedValuesInCharts": True, "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunCharts": cards, "compareRunSections": sections,
    }  # fmt: skip


def _line_card(metric: str) -> dict[str, Any]:
    return {
        "uuid": _uuid("line", metric), "type": "LINE", "metricSectionId": _uuid("section", metric.partition("/")[0]),
        "metricKey": metric, "displayName": metric, "runsCountToCompare": 10, "deleted": False, "isGenerated": False,
        "lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear", "xAxisKey": "step",
        "selectedXAxisMetricKey": "", "yAxisKey": "metric", "yAxisExpressions": [], "range": {},
        "ignoreOutliers": False, "useGlobalXaxisKey": True, "useGlobalLineSmoothing": True,
    }  # fmt: skip


def _image_card(keys: list[str], step: int) -> dict[str, Any]:
    return {
        "uuid": _uuid("image", *keys), "type": "IMAGE", "metricSectionId": _uuid("section", _IMAGES),
        "imageKeys": keys, "step": step, "showRunParams": False, "runsCountToCompare": 10, "deleted": False,
        "isGenerated": False, "displayName": _IMAGES,
    }  # fmt: skip


def _uuid(*parts: str) -> str:
    """The same id each time for the same thing: views that are equal have equal states."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("foundry", *parts))))


def _read(tag: str) -> dict[str, Any]:
    """A stored view; empty where there is none that MLflow could read."""
    try:
        found = json.loads(tag)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "state" in found else {}


def unpacked(tag: str) -> dict[str, Any] | None:
    """The state of a stored view; None where it is none that we wrote."""
    view = _read(tag)
    if _OURS not in view:
        return None
    try:
        found = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix(_PACKED))))
    except (ValueError, zlib.error):
        return None
    return found if isinstance(found, dict) else None


def is_known(uri: str) -> bool:
    """Whether the MLflow at `uri` is of a version whose views have the form that `seed` writes."""
    first, end = KNOWN_VERSIONS
    return first <= calls.version(uri) < end
