"""The one `Definitions`: every asset, check, job, schedule and sensor of the code location
`foundry`."""

import dagster as dg

from assets import definitions
from jobs import annotate, bring_up_to_date, curate, encode, evaluate, schedules, sensors, train

defs = dg.Definitions.merge(
    definitions.GRAPH,
    dg.Definitions(
        jobs=[
            bring_up_to_date.JOB, annotate.JOB, curate.JOB, encode.JOB, encode.REENCODE_JOB, train.JOB, evaluate.JOB,
        ],
        schedules=schedules.ALL,
        sensors=sensors.ALL,
    ),
)  # fmt: skip
