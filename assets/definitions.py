"""The graph itself: every asset with its checks, and what they run with. What starts work is in `jobs/`."""

import dagster as dg

from assets import checks, currency
from assets.declared import assets
from assets.registry import STAGES, checks_of
from assets.stages import MODULES
from resources.handles import io_manager, store_resource

GRAPH = dg.Definitions(
    assets=[*assets(list(STAGES.values())), *currency.external_specs()],
    asset_checks=[
        *(check for module in (*MODULES, checks) for check in checks_of(module)),
        *currency.CHECKS,
    ],
    resources={"store": store_resource, "io_manager": io_manager},
    executor=dg.in_process_executor,
)
