"""What is refused before weights are loaded, against what the libraries do."""

import pytest
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config.run import LossConfig
from training.errors import ModelError, TrainingError
from training.models.noise_schedules import check_last_step

PLAIN = LossConfig(weighting="plain")


@settings(max_examples=60, deadline=None)
@given(
    curve=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]),
    beta_end=st.sampled_from([0.012, 0.5, 1.0]),
    rescaled=st.booleans(),
    trained=st.sampled_from([None, [0.1, 0.5], [0.1, 1.0]]),
)
def test_a_schedule_is_refused_where_the_librarys_ends_without_signal(
    curve, beta_end, rescaled, trained
):
    config = {
        "num_train_timesteps": 50, "beta_start": 0.00085, "beta_end": beta_end, "beta_schedule": curve,
        "rescale_betas_zero_snr": rescaled, "trained_betas": trained,
    }  # fmt: skip
    ends = bool(DDPMScheduler.from_config(config).alphas_cumprod[-1] <= 0)
    for prediction_type, loss in (
        ("epsilon", PLAIN),
        ("v_prediction", LossConfig(weighting="min_snr")),
    ):
        try:
            check_last_step({**config, "prediction_type": prediction_type}, loss)
        except TrainingError:
            assert ends
        else:
            assert not ends
    check_last_step({**config, "prediction_type": "v_prediction"}, PLAIN)


def test_a_schedule_that_the_library_does_not_know_is_refused_by_name():
    with pytest.raises(NotImplementedError):
        DDPMScheduler(beta_schedule="cubic")
    with pytest.raises(ModelError, match=r"beta_schedule='cubic' is none of linear, scaled_linear"):
        check_last_step({"beta_schedule": "cubic"}, PLAIN)
