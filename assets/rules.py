"""How a rule about a table becomes an asset check: those of `assets/checks.py`, and those that a
stage's own module states."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dagster as dg

from resources.workspace.store import Store


class Finding(NamedTuple):
    """Outcome of a check: whether the rule holds, the rule, and the numbers behind it."""

    holds: bool
    rule: str
    numbers: Mapping[str, Any]


def check(
    asset: str, *, error: bool = False
) -> Callable[[Callable[[Store], Finding]], dg.AssetChecksDefinition]:
    """A rule about an asset as its check: with `error` its breach is one, else a warning."""

    def decorate(rule: Callable[[Store], Finding]) -> dg.AssetChecksDefinition:
        @dg.asset_check(asset=asset, name=rule.__name__, description=rule.__doc__)
        def judge(store: dg.ResourceParam[Store]) -> dg.AssetCheckResult:
            finding = rule(store)
            return dg.AssetCheckResult(
                passed=finding.holds,
                severity=dg.AssetCheckSeverity.ERROR if error else dg.AssetCheckSeverity.WARN,
                description=finding.rule,
                metadata=dict(finding.numbers),
            )

        return judge

    return decorate
