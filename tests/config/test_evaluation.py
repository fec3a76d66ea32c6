"""What may decide over a champion has a margin, and what has a margin is scored."""

import tomllib

import pytest
import tomlkit

from resources.workspace.setup import TINY
from training import toml
from training.config import recipes
from training.config.evaluation import PROMPT_GROUPS, EvaluationConfig
from training.config.workspace import WorkspaceConfig
from training.errors import ConfigError


def build(**verdicts):
    return toml.build(
        EvaluationConfig, {"scoring": {"scorers": ["pickscore"]}, "verdicts": verdicts}
    )


def test_a_further_scorer_with_a_margin_is_judged_and_may_decide():
    config = build(further_margins={"pickscore": 0.2}, deciding=["pickscore"])
    assert config.verdicts.margins == {"clip_score": 0.003, "aesthetic": 0.05, "pickscore": 0.2}
    assert build().verdicts.margins.keys() == {"clip_score", "aesthetic"}


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (
            {"further_margins": {"hps_v2": 0.1}},
            r"\['hps_v2'\] are not among evaluation.scoring.scorers=\['pickscore'\]",
        ),
        (
            {"further_margins": {"pickscore": 0}},
            r"further_margins\.pickscore=0.* must be greater than 0",
        ),
        ({"deciding": ["taste"]}, "must name metrics with a margin: clip_score, aesthetic"),
        ({"deciding": []}, "must name metrics with a margin"),
    ],
)
def test_what_cannot_be_judged_is_refused(verdicts, said):
    with pytest.raises(ConfigError, match=said):
        build(**verdicts)


def test_every_counts():
    with pytest.raises(ConfigError, match=r"evaluation\.every=0 must be greater than 0"):
        toml.build(EvaluationConfig, {"every": 0})


def test_a_plain_workspace_is_evaluated_on_its_own_prompts_and_on_every_shipped_group(tmp_path):
    text = recipes.plain_workspace_toml([str(tmp_path)], tiny=None)
    config = toml.build(WorkspaceConfig, tomlkit.parse(text).unwrap())
    prompts = config.prompt_sets[config.evaluation.prompt_set]
    assert (prompts.held_out, set(prompts.groups)) == (256, set(PROMPT_GROUPS))


def test_new_workspaces_sample_in_bf16_unless_their_models_are_tiny(tmp_path):
    for tiny, precision in ((None, "bf16"), (TINY, "fp32")):
        values = tomllib.loads(recipes.plain_workspace_toml([str(tmp_path)], tiny=tiny))
        assert values["evaluation"]["sampling"]["precision"] == precision


def test_a_source_inside_the_workspace_is_named_from_there(tmp_path):
    home, outside = tmp_path / "workspace", tmp_path / "photos"
    text = recipes.plain_workspace_toml([str(home / "own"), str(outside)], tiny=None, home=home)
    assert [source["path"] for source in tomllib.loads(text)["sources"]] == ["own", str(outside)]
