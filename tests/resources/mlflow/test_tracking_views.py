"""Views, tables of images and the champion, read back past the code that wrote them."""

import base64
import json
import os
import shutil
import zlib

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resources.mlflow import calls as mlflow_calls
from resources.mlflow import scores, views
from resources.mlflow.tracking import NUM_IMAGES, Tracking, workspace_tracking
from resources.mlflow.views import KNOWN_VERSIONS, Images
from training.config.evaluation import VerdictConfig
from training.errors import TrackingError
from training.tables.schemas import TABLES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*")
SHARE = "mlflow.sharedViewState."


@pytest.fixture
def home(tmp_path, empty_database):
    (tmp_path / "space").mkdir()
    shutil.copy(empty_database, tmp_path / "space" / "mlflow.db")
    return tmp_path / "space"


def client_of(home):
    from mlflow import MlflowClient

    uri = f"sqlite:///{home / 'mlflow.db'}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_tags(home):
    return client_of(home).get_experiment("1").tags


def the_run(home, name):
    (found,) = client_of(home).search_runs(["1"], f"tags.`foundry.run` = '{name}'")
    return found


def shared(home):
    """Key -> name and state of each view, read as the pages of MLflow 3.17 read them
    (mlflow/server/js of its package)."""
    found = {}
    for tag, value in experiment_tags(home).items():
        if tag.startswith(SHARE):
            envelope = json.loads(value)
            assert isinstance(envelope["createdAt"], int)
            assert envelope["state"].startswith("deflate;")
            state = json.loads(zlib.decompress(base64.b64decode(envelope["state"][8:])))
            found[tag.removeprefix(SHARE)] = (envelope["name"], state)
    return found


def evaluate(home, checkpoint, prompts=14, color=0, missing=(), seed=0):
    """Send drawn images of one colour; some are `missing` from the folder, or were not drawn."""
    folder = home / "sample_images" / checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(prompts):
        name = f"{number:02d}"
        if name not in missing:
            Image.fromarray(np.full((96, 64, 3), color, np.uint8)).save(folder / f"{name}.png")
        rows.append({"prompt_id": f"p{name}", "text": f"a {name}", "negative": "", "group": "all", "height": 96,
                     "width": 64, "seed": seed + number, "file": f"{name}.png", "sha256": ""})  # fmt: skip
    samples = pl.DataFrame(rows, schema=TABLES["sample_images"].schema)
    workspace_tracking(home).log_evaluation(
        checkpoint, metrics=TABLES["eval_metrics"].empty(), samples=samples, folder=folder
    )


def table(home, run, name=None):
    """Columns, and prompt -> paths of a run's table of images, by MLflow's own record of
    tables."""
    info = the_run(home, run)
    tables = [item["path"] for item in json.loads(info.data.tags["mlflow.loggedArtifacts"])]
    folder = home / "mlartifacts" / info.info.artifact_uri.removeprefix("mlflow-artifacts:/")
    content = json.loads((folder / (name or tables[-1])).read_bytes())
    cells = {}
    for prompt, cell in content["data"]:
        assert cell["type"] == "image"
        cells[prompt] = (folder / cell["filepath"], folder / cell["compressed_filepath"])
    return content["columns"], cells, tables


def test_views_are_written_once_and_linked(home):
    links = workspace_tracking(home).views()
    written = shared(home)
    assert len(written) == 4
    for key, (name, state) in written.items():
        assert f"viewStateShareKey={key}&" in links[name]
        assert links[name].startswith("/mlflow/#/experiments/1/runs?compareRunsMode=")
        assert state["orderByKey"] == f"metrics.`eval/{VerdictConfig().deciding[0]}_mean`"
        assert state["orderByAsc"] is False
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert all(
            card["metricSectionId"] in sections
            for card in state["compareRunCharts"]
            if not card["deleted"] and card["type"] == "LINE"
        )
        uuids = [item["uuid"] for item in state["compareRunCharts"] + state["compareRunSections"]]
        assert len(uuids) == len(set(uuids))
    before = experiment_tags(home)
    assert workspace_tracking(home).views() == links
    assert experiment_tags(home) == before
    assert all(len(value) < 5_000 for value in before.values())  # the least that any MLflow takes


def test_views_follow_the_images_and_a_person_keeps_theirs(home):
    evaluate(home, "demo@40")
    (name, state) = shared(home)["foundry-pictures"]
    (grid,) = [
        card
        for card in state["compareRunCharts"]
        if card["type"] == "IMAGE" and not card["deleted"]
    ]
    assert (name, grid["step"], len(grid["imageKeys"])) == (
        "Images, with a slider",
        40,
        NUM_IMAGES,
    )
    assert grid["imageKeys"][0] == "samples/p00"
    assert all(len(value) < 5_000 for value in experiment_tags(home).values())
    for _, other in shared(home).values():
        hidden = [
            card["imageKeys"]
            for card in other["compareRunCharts"]
            if card["type"] == "IMAGE" and card["deleted"]
        ]
        assert hidden == [[key] for key in grid["imageKeys"]]
    # What MLflow's pages write when a person overwrites a view.
    mine = json.dumps({"name": "mine", "createdAt": 1, "updatedAt": 2, "state": "{}"})
    client_of(home).set_experiment_tag("1", SHARE + "foundry-pictures", mine)
    client_of(home).set_experiment_tag("1", SHARE + "foundry-curves", "damaged")
    evaluate(home, "demo@80")
    assert experiment_tags(home)[SHARE + "foundry-pictures"] == mine
    client_of(home).set_experiment_tag("1", SHARE + "foundry-pictures", "damaged")
    workspace_tracking(home).views()
    assert shared(home).keys() == {
        "foundry-runs",
        "foundry-pictures",
        "foundry-prompts",
        "foundry-curves",
    }


def test_the_grid_has_only_runs_with_images_of_its_prompts(home):
    tracking = workspace_tracking(home)
    for name in ("one", "two", "other", "none"):
        tracking.run_url(name)
        client_of(home).set_tag(the_run(home, name).info.run_id, "foundry.fingerprint", "f")
    evaluate(home, "one@40")
    evaluate(home, "two@40")
    evaluate(home, "other@40", seed=100)
    state = shared(home)["foundry-pictures"][1]
    found = client_of(home).search_runs(["1"], state["searchFilter"])
    assert {run.data.tags["foundry.run"] for run in found} == {"one", "two"}


def test_parameters_that_differ_are_the_first_columns(home):
    tracking = workspace_tracking(home)
    for name, rate in (("one", "0.1"), ("two", "0.2")):
        tracking.run_url(name)
        run_id = the_run(home, name).info.run_id
        client_of(home).set_tag(run_id, "foundry.fingerprint", "f")
        client_of(home).log_param(run_id, "learning_rate", rate)
        client_of(home).log_param(run_id, "num_samples", "8000")
    tracking.run_url("base.x")  # has no parameters, and counts for none
    tracking.views()
    columns = shared(home)["foundry-runs"][1]["selectedColumns"]
    assert columns[:2] == ["attributes.`Created`", "params.`learning_rate`"]
    assert [name for name in columns if name.startswith("params")] == columns[1:2]


def test_another_mlflow_gets_links_without_views_and_an_absent_one_none(home, monkeypatch):
    tracking = workspace_tracking(home)
    for version in ((0, 0), (KNOWN_VERSIONS[0][0], KNOWN_VERSIONS[0][1] - 1), KNOWN_VERSIONS[1]):
        with monkeypatch.context() as patch:
            patch.setattr(mlflow_calls, "version", lambda uri, version=version: version)
            links = tracking.views()
        assert (
            links["Curves"]
            == "/mlflow/#/experiments/1/runs?compareRunsMode=CHART&workflowType=machine_learning"
        )
        assert not shared(home)

    def refuse(*arguments):
        raise PermissionError("read only")

    with monkeypatch.context() as patch:
        patch.setattr(views, "seed", refuse)
        assert "viewStateShareKey" not in tracking.views()["Curves"]
    assert Tracking(uri="http://127.0.0.1:1", experiment="x").views() == {}
    import mlflow

    assert KNOWN_VERSIONS[0] <= mlflow_calls.version("sqlite:///x") < KNOWN_VERSIONS[1]
    assert (
        ".".join(map(str, mlflow_calls.version("sqlite:///x")))
        == mlflow.__version__.rpartition(".")[0]
    )


images = st.builds(
    Images,
    prompt_set=st.sampled_from("abc"),
    keys=st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3, unique=True).map(tuple),
    steps=st.sets(st.integers(0, 50), min_size=1, max_size=5).map(sorted).map(tuple),
)


@given(found=st.lists(images, max_size=6))
def test_the_grid_opens_at_a_step_that_no_other_beats(found):
    state = views.views(found)["foundry-pictures"].state
    (grid,) = [
        card
        for card in state["compareRunCharts"]
        if card["type"] == "IMAGE" and not card["deleted"]
    ]
    if not found:
        assert grid["imageKeys"] == []
        return
    by_set = {name: [item for item in found if item.prompt_set == name] for name in "abc"}
    largest = [items for items in by_set.values() if len(items) == max(map(len, by_set.values()))]
    step, explained = grid["step"], []
    for items in largest:
        have = [sum(number in item.steps for item in items) for number in range(1, 51)]
        best = have[step - 1] == max(have) if any(have) else step == 0
        explained.append(best and grid["imageKeys"] == list(items[0].keys))
    assert any(explained)
    assert all(Images.read({"foundry.pictures": item.tag()}) == item for item in found)


@pytest.mark.parametrize("value", ["", "[]", "{}", '{"prompt_set": 1}', "null"])
def test_a_tag_that_cannot_be_read_says_nothing(value):
    assert Images.read({"foundry.pictures": value}) is None


def test_the_table_has_the_newest_images_of_each_prompt(home):
    evaluate(home, "demo@40", color=10)
    evaluate(home, "demo@80", color=200)
    evaluate(home, "demo@40", color=10)  # sent again, late
    columns, cells, tables = table(home, "demo")
    # One column of text and one of images: MLflow's view then groups by the one and compares the
    # other by itself.
    assert columns == ["prompt", "newest"]
    assert list(cells)[:2] == ["p00: a 00", "p01: a 01"]
    assert len(cells) == NUM_IMAGES
    assert len(tables) == 1
    for whole, small in cells.values():
        assert "+step+80+" in whole.name
        with Image.open(whole) as image:
            assert image.size == (64, 96)
            assert image.getpixel((5, 5)) == (200, 200, 200)
        with Image.open(small) as image:
            alpha = np.asarray(image.convert("RGBA"))[..., 3]
        # All of the image is in the upper half of the square, which is what MLflow's rows show.
        assert alpha.shape[0] == alpha.shape[1]
        assert alpha[: len(alpha) // 2].max() == 255
        assert alpha[len(alpha) // 2 :].max() == 0
    assert Images.read(the_run(home, "demo").data.tags).steps == (40, 80)


def test_other_prompts_get_a_table_of_their_own(home):
    evaluate(home, "demo@80")
    evaluate(home, "demo@40", seed=1)
    evaluate(home, "base.x@0", seed=1)
    _, cells, tables = table(home, "demo")
    assert len(set(tables)) == 2
    assert all("+step+40+" in whole.name for whole, _ in cells.values())
    _, cells, _ = table(home, "demo", tables[0])
    assert all("+step+80+" in whole.name for whole, _ in cells.values())
    assert table(home, "base.x")[2] == tables[1:]
    assert the_run(home, "base.x").info.status == "FINISHED"


def test_images_that_were_not_drawn_are_left_out(home):
    evaluate(home, "demo@40", prompts=3, missing=("01",))
    (home / "sample_images" / "demo@40" / "00.png").write_bytes(b"no image")
    evaluate(home, "demo@80", prompts=3, missing=("01",))
    shutil.copy(
        home / "sample_images" / "demo@80" / "02.png", home / "sample_images" / "demo@40" / "02.png"
    )
    assert list(table(home, "demo")[1]) == ["p00: a 00", "p02: a 02"]
    evaluate(home, "none@40", prompts=2, missing=("00", "01"))
    assert "mlflow.loggedImages" not in the_run(home, "none").data.tags


def versions(home):
    """Version -> checkpoint, verdict, description; and who has the alias."""
    client = client_of(home)
    found = {
        int(item.version): (item.tags.get("checkpoint"), item.tags.get("verdict"), item.description)
        for item in client.search_model_versions("name = 'space'")
    }
    aliases = client.get_registered_model("space").aliases
    return found, {name: int(version) for name, version in aliases.items()}


def test_the_champion_is_an_alias_that_moves_while_versions_stay(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = workspace_tracking(home)
    assert "Champion" not in tracking.views()
    tracking.set_champion("demo@40", "better by 0.1")
    first = ("demo@40", "better by 0.1", "better by 0.1")
    assert versions(home) == ({1: first}, {"champion": 1})
    assert the_run(home, "demo").data.tags["foundry.champion"] == "at 40 samples"
    (model,) = client_of(home).search_logged_models(["1"])
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "space", "version": "1"}]
    (version,) = client_of(home).search_model_versions("name = 'space'")
    assert version.source == f"models:/{model.model_id}"
    before = client_of(home).get_registered_model("space").last_updated_timestamp
    tracking.set_champion("demo@40", "better by 0.1")
    assert client_of(home).get_registered_model("space").last_updated_timestamp == before
    tracking.set_champion("other@80", "better still")
    second = ("other@80", "better still", "better still")
    assert versions(home) == ({1: first, 2: second}, {"champion": 2})
    assert "foundry.champion" not in the_run(home, "demo").data.tags
    assert tracking.views()["Champion"] == "/mlflow/#/models/space?workflowType=machine_learning"
    tracking.set_champion("demo@40", "x" * 9_000)
    assert versions(home)[1] == {"champion": 1}
    assert versions(home)[0][1][1] == "x" * 5_000
    assert "foundry.champion" not in the_run(home, "other").data.tags
    assert not (tmp_path / "mlflow.db").exists()
    assert "MLFLOW_TRACKING_URI" not in os.environ


class Killed(BaseException):
    """Like SIGKILL: nothing catches it."""


def test_a_death_at_any_call_leaves_a_champion_that_the_next_call_completes(home, monkeypatch):
    import mlflow

    calls = ["create_registered_model", "create_model_version", "set_model_version_tag", "update_model_version",
             "set_logged_model_tags", "set_registered_model_alias", "set_tag", "delete_tag"]  # fmt: skip
    tracking = workspace_tracking(home)
    tracking.set_champion("old@40", "was better")
    left, deaths = 0, 0

    def dying(method):
        def call(*args, **kwargs):
            nonlocal left
            result = method(*args, **kwargs)
            left -= 1
            if left == 0:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(mlflow.MlflowClient, name, dying(getattr(mlflow.MlflowClient, name)))
        for _ in range(20):
            left = 1
            try:
                tracking.set_champion("new@80", "is better")
            except Killed:
                deaths += 1
            else:
                break
    assert deaths == 8
    found, aliases = versions(home)
    assert (found[2], aliases, len(found)) == (
        ("new@80", "is better", "is better"),
        {"champion": 2},
        2,
    )
    assert the_run(home, "new").data.tags["foundry.champion"] == "at 80 samples"
    assert "foundry.champion" not in the_run(home, "old").data.tags


def test_a_champion_without_mlflow_is_an_error_with_a_reason():
    with pytest.raises(TrackingError, match="champion demo@40 is not sent"):
        Tracking(uri="http://127.0.0.1:1", experiment="x").set_champion("demo@40", "")


def test_names_of_scores():
    rows = [
        {"prompt_id": None, "group": None, "metric": metric, "value": value}
        for metric, value in {
            "count_LAIONScore": 3.0, "75%_LAIONScore": 6.0, "mean_LAIONScore": 5.0, "Clipscore_std": 0.1,
            "num_failed": 2.0, "aesthetic_std_within": 0.2, "cmmd": float("nan"),
            "train_similarity_p95": 0.8, "pickscore_mean": 21.0,
        }.items()
    ]  # fmt: skip
    rows += [{"prompt_id": "p", "group": "a b", "metric": "saturation", "value": 0.5},
             {"prompt_id": "p", "group": "a b", "metric": "failed", "value": None}]  # fmt: skip
    assert scores.points(pl.DataFrame(rows, schema=TABLES["eval_metrics"].schema)) == {
        "eval_spread/aesthetic_count": 3.0, "eval_spread/aesthetic_q75": 6.0, "eval/aesthetic_mean": 5.0,
        "eval_spread/clip_score_std": 0.1, "eval/num_failed": 2.0, "eval_spread/aesthetic_std_within": 0.2,
        "eval/train_similarity_p95": 0.8, "eval_spread/pickscore_mean": 21.0,
        f"eval_groups/saturation {mlflow_calls.slug('a b')}": 0.5,
    }  # fmt: skip
