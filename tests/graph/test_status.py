"""`foundry status`, the check `current`, Dagster's own column and `keep_current` say what
`store.currency.stale` says."""

import json
import re
import shutil
from dataclasses import replace

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from graph_tools import foundry
from PIL import Image

from assets import currency
from assets.partitions import mirror
from assets.registry import STAGES
from jobs import automation, pipeline
from jobs.definitions import defs
from resources.instance import instance as open_instance
from resources.workspace.store import Store
from training.evaluation import candidates


def stale(home):
    """Sentence of each stage that is stale, as `foundry status` finds it."""
    return {item.stage: item.sentence for item in pipeline.status(home) if item.stale or item.error}


def set_value(home, line, new):
    """Exchange one line of foundry.toml."""
    path = home / "foundry.toml"
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, new, 1))


@pytest.fixture
def kind(small_copy, monkeypatch):
    monkeypatch.setenv("FOUNDRY_HOME", str(small_copy))
    assert stale(small_copy) == {}
    return small_copy


def source_of(home):
    return Store(home).paths.source_path(Store(home).config.sources[0])


def own_source(home, tmp_path):
    """Let the workspace read a copy of its source, at the same name."""
    copy = tmp_path / "source"
    root = source_of(home)
    shutil.copytree(root, copy)
    path = home / "foundry.toml"
    path.write_text(path.read_text().replace(str(root), str(copy)))
    foundry(
        "run", "--home", home, "--select", "source_listing"
    )  # other inodes: the folder is listed again
    assert stale(home) == {}
    return copy


def test_a_setting_changed_and_changed_back(kind):
    set_value(kind, "min_score = 1", "min_score = 3")
    assert stale(kind) == {"selected_images": "stale: [selection] min_score 1 → 3"}
    set_value(kind, "min_score = 3", "min_score = 1")
    assert stale(kind) == {}


def test_a_setting_of_an_encoding_names_its_table(kind):
    path = kind / "foundry.toml"
    path.write_text(
        path.read_text().replace("[encodings.sdxl]\n", "[encodings.sdxl]\nseed = 7\n", 1)
    )
    found = stale(kind)
    assert found["bucket_assignments"] == "stale: [encodings.sdxl] seed 0 → 7"
    assert found["latents"] == "stale: [encodings.sdxl] seed 0 → 7"


def test_a_model_folder_replaced(kind, tmp_path):
    model = tmp_path / "tagger"
    shutil.copytree(Store(kind).models.path("tagger"), model)
    set_value(kind, 'tagger = "demo:models/tagger"', f'tagger = "{model}"')
    assert stale(kind) == {}  # other place, same weights
    with next(model.glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert stale(kind) == {"tags": f"stale: model tagger ({model}) changed"}


def test_images_added_changed_and_removed(kind, tmp_path):
    source = own_source(kind, tmp_path)
    name = Store(kind).config.sources[0].name
    Image.effect_noise((160, 160), 60).convert("RGB").save(source / "new.png")
    assert stale(kind) == {"source_listing": f"stale: source {name} changed"}
    (source / "new.png").unlink()
    assert stale(kind) == {}
    old = next(path for path in sorted(source.rglob("*.png")))
    Image.effect_noise((170, 160), 60).convert("RGB").save(old)
    assert stale(kind) == {"source_listing": f"stale: source {name} changed"}


def judgement(number):
    """A line of a label file."""
    return json.dumps(
        {
            "pair_id": f"p{number}", "a": "a" * 64, "b": "b" * 64, "outcome": "a", "origin": "person",
            "created_at": "2026-01-01T00:00:00+00:00",
        }
    ) + "\n"  # fmt: skip


def test_a_label_file_new_and_grown(kind):
    file = kind / "labels" / "pairs" / "me.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(judgement(1))
    assert stale(kind) == {"quality_pairs": "stale: labels/pairs/me.jsonl is new"}
    foundry("run", "--home", kind, "--select", "quality_pairs")
    assert "quality_pairs" not in stale(kind)
    file.write_text(judgement(1) + judgement(2))
    assert stale(kind)["quality_pairs"] == "stale: labels/pairs/me.jsonl changed"


def test_a_raised_version(kind, monkeypatch):
    stage = STAGES["duplicate_groups"]
    monkeypatch.setitem(STAGES, "duplicate_groups", replace(stage, version=stage.version + 1))
    assert stale(kind) == {
        "duplicate_groups": f"stale: version {stage.version} → {stage.version + 1}"
    }


def test_a_table_or_its_content_deleted_by_hand(kind):
    content = next((kind / "tables" / "duplicate_groups").glob("*.parquet"))
    content.rename(kind / "kept.parquet")
    assert stale(kind) == {"duplicate_groups": f"stale: file {content.name} is missing"}
    shutil.rmtree(kind / "tables" / "duplicate_groups")
    found = stale(kind)
    assert found["duplicate_groups"] == "stale: not made yet"
    assert found["selected_images"] == "stale: waits for duplicate_groups"


def test_a_prompt_file_that_is_missing_is_named_whether_or_not_the_set_was_made_before(kind):
    (kind / "prompts.csv").rename(kind / "kept.csv")
    assert stale(kind)["prompt_sets"] == "stale: file prompts.csv is missing"
    with (kind / "foundry.toml").open("a") as config:
        config.write('\n[prompt_sets.parti]\nfile = "PartiPrompts.tsv"\n')
    shutil.rmtree(kind / "tables" / "prompt_sets")
    found = stale(kind)["prompt_sets"]
    assert "file prompts.csv is missing" in found
    assert "file PartiPrompts.tsv is missing" in found
    assert "not made yet" not in found
    (kind / "kept.csv").rename(kind / "prompts.csv")
    assert "not made yet" in stale(kind)["prompt_sets"]


def test_what_a_person_and_a_script_read(kind):
    set_value(kind, "min_score = 1", "min_score = 3")
    lines = foundry("status", "--home", kind).stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(
        line.split()[:2] == ["selected_images", "1"] and "[selection] min_score 1 → 3" in line
        for line in lines
    )
    assert any(line.split() == ["latents", "may", "follow", "selected_images"] for line in lines)
    printed = json.loads(
        foundry("status", "--home", kind, "--json", "--select", "selected_images+").stdout
    )
    assert [item["stage"] for item in printed if item["stale"]] == ["selected_images"]
    assert next(item for item in printed if item["stage"] == "latents")["follows"] == [
        "selected_images"
    ]
    assert "raw_images" not in {item["stage"] for item in printed}
    done = foundry("run", "--home", kind, "--select", "selected_images")
    assert "selected_images: [selection] min_score 1 → 3" in done.stderr


def test_a_missing_model_is_the_reason_and_not_a_traceback(kind):
    set_value(kind, 'tagger = "demo:models/tagger"', 'tagger = "nowhere"')
    found = stale(kind)
    assert list(found) == ["tags"]
    assert found["tags"].startswith("cannot be judged: [models] tagger = 'nowhere'")


def dagster_says(instance):
    """Whole tables that Dagster's own reckoning calls unsynced."""
    graph = defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, currency._Loading(instance))
    whole = [name for name, stage in STAGES.items() if stage.scope.value == "all"]
    return {name for name in whole if resolver.get_status(dg.AssetKey(name)) is StaleStatus.STALE}


def checks(instance):
    """Sentences of the checks `current` that did not pass."""
    keys = {name: dg.AssetCheckKey(dg.AssetKey(name), currency.CHECK) for name in STAGES}
    found = instance.event_log_storage.get_latest_asset_check_execution_by_key(list(keys.values()))
    return {
        name: one.description
        for name, key in keys.items()
        if (one := found[key].evaluation) is not None and not one.passed
    }


def test_dagster_shows_the_same_before_and_after(kind):
    graph = defs.resolve_asset_graph()
    with open_instance(kind) as instance:
        assert (
            currency.report(instance, Store(kind), graph) == 0
        )  # `foundry run` told it everything
        assert (checks(instance), dagster_says(instance)) == ({}, set())
        set_value(kind, "min_score = 1", "min_score = 3")
        assert currency.report(instance, Store(kind), graph) == 2
        assert checks(instance) == {"selected_images": "stale: [selection] min_score 1 → 3"}
        assert dagster_says(instance) == {"selected_images"}
        set_value(kind, "min_score = 3", "min_score = 1")
        currency.report(instance, Store(kind), graph)
        assert (checks(instance), dagster_says(instance)) == ({}, set())
        # What a stage does not read makes nothing stale, neither for the store nor for Dagster.
        with (kind / "foundry.toml").open("a") as config:
            config.write("\n[quality]\njunk_threshold = 0.7\n")
        currency.report(instance, Store(kind), graph)
        assert set(checks(instance)) == {"quality_scores"}
        assert dagster_says(instance) == set()


def requested(home, instance):
    """What `keep_current` asks for now, by asset."""
    automated = defs.map_resolved_asset_specs(
        func=lambda spec: spec.replace_attributes(automation_condition=automation.CONDITION),
        selection=dg.AssetSelection.assets(*STAGES),
    )
    found = dg.evaluate_automation_conditions(defs=automated, instance=instance)
    return {
        result.key.to_user_string(): result.true_subset.get_internal_value()
        for result in found.results
        if result.true_subset.size
    }


def test_keep_current_asks_for_the_first_stale_stages_and_no_other(kind):
    with open_instance(kind) as instance:
        assert requested(kind, instance) == {}
        set_value(kind, "min_score = 1", "min_score = 3")
        assert set(requested(kind, instance)) == {"selected_images"}
        shutil.rmtree(kind / "tables" / "tags")
        shutil.rmtree(kind / "tables" / "embeddings")
        assert set(requested(kind, instance)) == {
            "tags",
            "embeddings",
        }  # both of one body, what reads them later


def test_a_partition_that_keeps_failing_is_left_until_something_changes(kind):
    stage = STAGES["selected_images"]
    with open_instance(kind) as instance:
        set_value(kind, "min_score = 1", "min_score = 3")
        for _ in range(automation.MAX_ATTEMPTS):
            assert set(requested(kind, instance)) == {"selected_images"}
            store = Store(kind)
            store.currency.begin(stage, "all", store.currency.basis(stage, "all"))
        assert requested(kind, instance) == {}
        set_value(kind, "min_score = 3", "min_score = 4")
        assert set(requested(kind, instance)) == {"selected_images"}


@pytest.mark.filterwarnings("ignore::dagster.PreviewWarning", "ignore::dagster.BetaWarning")
def test_an_external_model_that_fails_holds_up_no_release(kind):
    key, stage = (
        candidates.add_external_model(kind, "outside", kind / "nowhere"),
        STAGES["sample_images"],
    )
    with open_instance(kind) as instance:
        mirror(instance, Store(kind))
        assert {name: set(keys.subset) for name, keys in requested(kind, instance).items()} == {
            "sample_images": {key}
        }
        shutil.rmtree(kind / "tables" / "release")
        assert set(requested(kind, instance)) == {"sample_images", "release"}
        for _ in range(automation.MAX_ATTEMPTS):
            store = Store(kind)
            store.currency.begin(stage, key, store.currency.basis(stage, key))
        assert set(requested(kind, instance)) == {"release"}


NO_PARTITION = "the run was launched without a partition"


@pytest.mark.parametrize(
    ("asset", "key", "words"),
    [
        ("raw_images", None, NO_PARTITION),
        ("raw_images", "s000099", "there is no partition 's000099'"),
        (
            "tags",
            None,
            "Cannot access partition_key for a non-partitioned run",
        ),  # Dagster itself says this
        ("tags", "s000099", "there is no partition 's000099'"),
        ("latents", "sdxl|s000099", "there is no partition 'sdxl|s000099'"),
        ("bucket_assignments", "other", "there is no partition 'other'"),
        ("sample_images", "demo@7", "there is no partition 'demo@7'"),
        ("checkpoints", "unknown", "there is no partition 'unknown'"),
    ],
)
def test_an_unknown_partition_fails_in_one_line_and_commits_nothing(kind, asset, key, words):
    before = sorted(path.name for path in kind.glob("tables/**/*"))
    job = defs.resolve_implicit_global_asset_job_def()
    with open_instance(kind) as instance:
        for name, part in (
            ("shards", "s000099"),
            ("encodings", "other"),
            ("checkpoints", "demo@7"),
            ("runs", "unknown"),
        ):
            instance.add_dynamic_partitions(
                name, [part]
            )  # as a person adds them in the launch dialog
        done = job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey(asset)], partition_key=key, raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )  # fmt: skip
        assert not done.success
        failure = next(event for event in done.all_events if event.is_step_failure)
        error = failure.step_failure_data.error
        message = (error.cause or error).message
        assert words in message
        assert message.strip().count("\n") == 0
        assert sorted(path.name for path in kind.glob("tables/**/*")) == before
        from assets.partitions import mirror

        mirror(instance, Store(kind))
        for name, part in (
            ("shards", "s000099"),
            ("encodings", "other"),
            ("checkpoints", "demo@7"),
            ("runs", "unknown"),
        ):
            assert part not in instance.get_dynamic_partitions(name)


def test_what_cannot_be_judged_is_not_up_to_date(kind):
    """A model folder that is missing: each stage that needs it says so, and the last line names
    them."""
    path = kind / "foundry.toml"
    path.write_text(re.sub(r"(?m)^clip = .*", 'clip = "models/no-such-folder"', path.read_text()))
    said = foundry("status", "--home", kind).stdout
    assert "up to date" not in said
    assert "cannot be judged: embeddings" in " ".join(said.split())
