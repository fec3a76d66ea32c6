"""`foundry graph`: the one page of all stages, in docs/graph.md as it is printed."""

import json
from pathlib import Path

from graph_tools import foundry

from assets.registry import STAGES
from jobs.cli.graph import markdown

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_the_graph_changes_only_on_purpose():
    """The page in the documentation is the golden copy; `python -m jobs.cli.graph > docs/graph.md`
    writes it anew."""
    assert (DOCS / "graph.md").read_text("utf-8") == markdown()


def test_the_page_names_every_stage_and_all_that_it_declares():
    printed = foundry("graph").stdout
    assert max(map(len, printed.splitlines())) <= 80
    entries = printed.split("\n\n")
    assert [entry.partition(":")[0] for entry in entries] == list(STAGES)
    for entry, stage in zip(entries, STAGES.values(), strict=True):
        words = entry.replace(",", " ").replace(":", " ").split()
        assert {stage.group, str(stage.version), *stage.models} <= set(words), stage.name
        for item in (*stage.reads, *stage.follows, *stage.also):
            assert {item.table, *item.columns} <= set(words), stage.name


def test_scripts_read_the_same():
    found = json.loads(foundry("graph", "--json").stdout)
    assert [item["stage"] for item in found] == list(STAGES)
    buckets = next(item for item in found if item["stage"] == "bucket_assignments")
    assert buckets["reads"] == [{"table": "selected_images", "per": "all",
                                 "columns": ["image_id", "shard", "height", "width", "kept", "tags"]}]  # fmt: skip
    assert buckets["config"] == {"encodings.NAME": ["buckets", "up_crop", "seed"]}
    listing = found[0]
    assert (listing["config"], listing["models"]) == ({"sources": [], "": ["shard_size"]}, [])
    assert listing["others"].startswith("Digests of what the sources hold")
