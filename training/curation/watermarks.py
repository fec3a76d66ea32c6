"""Which of a detector's boxes count as watermarks. Raw boxes are stored once; the threshold is
applied here."""

import polars as pl


def above(watermark_boxes: pl.DataFrame, threshold: float) -> pl.DataFrame:
    """The boxes of each image that count.

    Args:
        watermark_boxes: Rows of `watermark_boxes`, of one or several models; upright source pixels.
        threshold: Confidence from which a box counts.

    Returns:
        Columns image_id, boxes (most confident first), watermark (whether there is one): a row for
        each image that was looked at.
    """
    confidence = pl.element().struct.field("confidence")
    merged = watermark_boxes.group_by("image_id").agg(
        pl.col("boxes").list.explode(empty_as_null=False)
    )
    counted = pl.col("boxes").list.filter(confidence >= threshold)
    ranked = counted.list.eval(
        pl.element().sort_by(
            -confidence, *(pl.element().struct.field(side) for side in ("y0", "x0", "y1", "x1"))
        )
    )
    return merged.select("image_id", boxes=ranked, watermark=ranked.list.len() > 0).sort("image_id")
