"""Exactly the work that must be redone is redone: counted by the files that changed."""

import subprocess
import sys
from dataclasses import replace

from graph_tools import digests, foundry
from PIL import Image

CURATE_ON = {
    "tag_vocabulary",
    "selected_images",
    "bucket_assignments",
    "latents",
    "training_set",
    "prompt_statistics",
}


def manifests(home):
    """When and for which Dagster run each part was made."""
    found = {}
    for path in [*home.glob("tables/*/*.json"), *home.glob("latents/*/*/g*.json")]:
        found[str(path.relative_to(home))] = path.stat().st_mtime_ns
    return found


def remade(home, before):
    """Tables of which a part was made since, with the number of parts."""
    counts = {}
    for name, made in manifests(home).items():
        if before.get(name) != made:
            table = name.split("/")[1] if name.startswith("tables/") else "latents"
            counts[table] = counts.get(table, 0) + 1
    return {table: count for table, count in counts.items() if table != "rejected_images"}


RUN = """
import sys
from jobs.cli.app import main
try:
    main()
finally:
    print("imported:", sorted({"torch", "diffusers", "transformers", "mlflow", "scipy"} & set(sys.modules)))
"""


def test_a_second_run_does_nothing_and_says_so(small_copy):
    """In a process of its own, which must not spend seconds on libraries that it has no use for."""
    foundry(
        "run", "--home", small_copy
    )  # the first command of a copy gives it an experiment of its own in MLflow
    before = manifests(small_copy)
    command = [sys.executable, "-c", RUN, "run", "--home", str(small_copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert remade(small_copy, before) == {}
    assert "everything selected is up to date: nothing was done" in done.stdout
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_a_changed_threshold_starts_at_the_selection(small_copy):
    config = small_copy / "foundry.toml"
    config.write_text(config.read_text().replace("threshold = 0.6\n", "threshold = 0.4\n", 1))
    before, digests_before = manifests(small_copy), digests(small_copy)
    foundry("run", "--home", small_copy, "--select", "training_set,tag_vocabulary")
    changed = remade(small_copy, before)
    assert set(changed) <= CURATE_ON
    assert changed["selected_images"] == 1
    assert changed["tag_vocabulary"] == 1
    after = digests(small_copy)
    untouched = (
        "raw_images",
        "embeddings",
        "tags",
        "watermark_boxes",
        "quality_scores",
        "captions",
    )
    assert all(
        after[name] == value for name, value in digests_before.items() if name.startswith(untouched)
    )


def test_new_images_are_added_and_nothing_else_is_read_again(small_copy, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    Image.effect_noise((160, 160), 60).convert("RGB").save(new / "a.png")
    config = small_copy / "foundry.toml"
    config.write_text(config.read_text() + f'\n[[sources]]\nname = "new"\npath = "{new}"\n')
    before = manifests(small_copy)
    foundry("run", "--home", small_copy, "--select", "raw_images,embeddings")
    assert remade(small_copy, before) == {"source_listing": 1, "raw_images": 1, "embeddings": 1}


def test_a_raised_version_redoes_that_stage_alone(small_copy, monkeypatch):
    """Equal output has an equal digest, so nothing below is redone."""
    from jobs import pipeline  # isort: skip - it silences Dagster's beta warnings first
    from assets import duplicates
    from assets.registry import STAGES

    monkeypatch.setenv("FOUNDRY_HOME", str(small_copy))
    raised = replace(duplicates.duplicate_groups, version=duplicates.duplicate_groups.version + 1)
    monkeypatch.setattr(duplicates, "duplicate_groups", raised)
    monkeypatch.setitem(STAGES, "duplicate_groups", raised)
    before = manifests(small_copy)
    pipeline.bring_up_to_date(small_copy)
    assert remade(small_copy, before) == {"duplicate_groups": 1}
