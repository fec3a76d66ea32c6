"""What counts as having lost most of a source."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from training.sources import absence
from training.sources.absence import Loss


def frame(names, source="s", gone=()):
    rows = [
        {"source": source, "source_id": name, "gone_at": 1 if name in gone else None}
        for name in sorted(names)
    ]
    return pl.DataFrame(
        rows, schema={"source": pl.String, "source_id": pl.String, "gone_at": pl.Int64}
    )


@given(
    known=st.integers(0, 200),
    missing=st.integers(0, 200),
    new=st.integers(0, 3),
    gone=st.integers(0, 3),
)
def test_most_is_all_or_more_than_a_fifth_and_at_least_ten(known, missing, new, gone):
    missing = min(missing, known)
    here = {f"k{n}" for n in range(known)}
    before = pl.concat(
        [frame(here), frame({f"g{n}" for n in range(gone)}, gone={f"g{n}" for n in range(gone)})]
    )
    now = frame({f"k{n}" for n in range(missing, known)} | {f"n{n}" for n in range(new)})
    most = known > 0 and (missing == known or (missing >= 10 and 5 * missing > known))
    assert absence.losses(before, now, ["s"]) == ([Loss("s", missing, known, new)] if most else [])


def test_each_source_is_judged_by_itself_and_one_that_was_removed_is_not():
    before = pl.concat(
        [frame({"a"}, "one"), frame({f"{n}" for n in range(50)}, "two"), frame({"a"}, "removed")]
    )
    now = frame({f"{n}" for n in range(50)}, "two")
    (loss,) = absence.losses(before, now, ["one", "two", "new"])
    assert str(loss) == "source 'one': 1 of 1 image files are missing"
    assert (
        str(Loss("s", 10, 40, 2)) == "source 's': 10 of 40 image files are missing, and 2 are new"
    )
