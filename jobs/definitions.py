"""The one `Definitions`: every asset, check, job, schedule and sensor of the code location
`foundry`."""

import dagster as dg

from assets import checks, currency
from assets.registry import MODULES, STAGES
from jobs import annotate, bring_up_to_date, curate, encode, evaluate, schedules, sensors, train
from resources.handles import io_manager, store_resource

__all__ = ["STAGES", "defs"]

defs = dg.Definitions(
    assets=[*dg.load_assets_from_modules(MODULES), *currency.external_specs()],
    asset_checks=[*checks.ALL, *currency.CHECKS],
    jobs=[
        bring_up_to_date.JOB,
        annotate.JOB,
        curate.JOB,
        encode.JOB,
        encode.REENCODE_JOB,
        train.JOB,
        evaluate.JOB,
    ],
    schedules=schedules.ALL,
    sensors=sensors.ALL,
    resources={"store": store_resource, "io_manager": io_manager},
    executor=dg.in_process_executor,
)
