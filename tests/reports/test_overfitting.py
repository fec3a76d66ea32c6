"""What is said of copies and over-baking follows from the summary, and nothing is said that was not
measured."""

from training.reports.overfitting import score_charts, sentences

CALM = {
    "Clipscore_mean": 0.3, "train_similarity_p50": 0.7, "train_similarity_p95": 0.9, "train_similarity_max": 0.95,
    "train_similarity_validation_p50": 0.6, "train_similarity_validation_p95": 0.8,
    "train_similarity_validation_max": 0.85, "train_similarity_above_p95": 0.25, "overbaked_index": 0.1,
    "border_share": 0.02, "border_share_base": 0.0, "border_share_train": 0.01,
}  # fmt: skip
BAKED = {**CALM, "overbaked_index": 1.5}


def test_similarities_stand_beside_those_of_held_out_images():
    said = sentences([("base.0@0", {}), ("run@9", CALM)])
    assert "p50 / p95 / max: 0.700 / 0.900 / 0.950." in said[0]
    assert "copies: 0.600 / 0.800 / 0.850; 25% of the images" in said[1]
    assert said[2].startswith("Over-baked index 0.10")
    assert "2% of the images have uniform borders" in said[2]
    assert len(said) == 3


def test_an_alarm_names_the_last_checkpoint_before_it():
    said = sentences([("base.0@0", {}), ("run@5", CALM), ("run@9", BAKED)])
    assert (
        said[-1] == "Alarm: over-baked index 1.50 is above 0.5. Last checkpoint before it: run@5."
    )
    past = sentences([("run@5", BAKED), ("run@9", CALM)])
    assert (
        past[-1]
        == "Alarm: none here, but at an earlier checkpoint. Last checkpoint before it: none."
    )


def test_what_was_not_measured_is_not_said():
    assert sentences([("run@9", {"Clipscore_mean": 0.3})]) == []
    bare = {
        name: value
        for name, value in CALM.items()
        if "validation" not in name and "above" not in name
    }
    assert not any("held-out" in line for line in sentences([("run@9", bare)]))


def test_scores_are_drawn_over_the_run_with_the_base_at_zero():
    odd = {"Clipscore_mean": float("nan"), "overbaked_index": float("inf")}
    charts = score_charts(
        [("base.0@0", {"Clipscore_mean": 0.2}), ("run@5", CALM), ("run@7", odd), ("run@9", BAKED)]
    )
    found = {chart.title: list(chart.lines[0].points) for chart in charts}
    assert found == {
        "CLIP score, mean": [(0, 0.2), (5, 0.3), (9, 0.3)],
        "Nearest training image, 95th percentile of cosines": [(5, 0.9), (9, 0.9)],
        "Over-baked index": [(5, 0.1), (9, 1.5)],
    }
