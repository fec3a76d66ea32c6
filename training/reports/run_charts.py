"""From a run's event log to the charts of its report: losses over samples seen, and losses by
timestep."""

from collections.abc import Mapping, Sequence

from training.reports.charts import Chart, Line, Map, Points, thin
from training.runs.event_log import Event

_NUM_MEANS = 60
_VALIDATION = {
    "loss": "held-out images", "ema_loss": "held-out images, averaged weights",
    "stable_loss": "training images", "ema_stable_loss": "training images, averaged weights",
}  # fmt: skip


def loss_charts(events: Sequence[Event], marks: Sequence[int] = ()) -> list[Chart]:
    """The plain loss on fixed lists of held-out and of training images, raw and averaged, and the
    training loss.

    Args:
        events: As `event_log.read_events` gives them; a run without validations has no first chart.
        marks: Samples seen of the checkpoints that the report shows.
    """
    validations = _of(events, "validation")
    plain = [Line(name=name, points=_points(validations, key)) for key, name in _VALIDATION.items()]
    steps = _points(_of(events, "step"), "loss")
    trained = [
        Line(name="each step", points=steps, faint=True),
        Line(name="mean", points=thin(steps, _NUM_MEANS)),
    ]
    charts = [
        Chart(
            title="Plain loss, fixed noise and timesteps",
            lines=[line for line in plain if line.points],
            marks=marks,
        ),
        Chart(title="Training loss, as it is weighted", lines=trained, marks=marks),
    ]
    return [chart for chart in charts if any(len(line.points) > 1 for line in chart.lines)]


def timestep_map(events: Sequence[Event]) -> list[Map]:
    """The loss of held-out images by range of timesteps over the validations; none before the
    second validation."""
    validations = _of(events, "validation")
    names = sorted({name for event in validations for name in _by_bin(event)})
    if len(validations) < 2 or not names:
        return []
    return [
        Map(
            title="Held-out loss by timestep",
            note="Low timesteps hold little noise and decide on detail, high ones on composition. Green: lower than at "
            "the first validation; red: higher.",
            columns=[event["samples_seen"] for event in validations],
            rows={name: [_by_bin(event).get(name) for event in validations] for name in names},
        )
    ]


def _of(events: Sequence[Event], kind: str) -> list[Event]:
    return [event for event in events if event["event"] == kind]


def _points(events: Sequence[Event], key: str) -> Points:
    return [(event["samples_seen"], event[key]) for event in events if event.get(key) is not None]


def _by_bin(event: Event) -> Mapping[str, float]:
    found: Mapping[str, float] = event.get("t", {})
    return found
