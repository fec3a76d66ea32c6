"""How often verdicts are wrong, and how small a difference they see: simulated with the spreads of
real models.

Usage: python benchmarks/bench_verdicts.py

Scores are drawn as measured on seven published models (sd between prompts 0.33, of prompt x model
0.25 for the aesthetic score; 0.038 and 0.026 for CLIP score), one image per prompt, the product's
own test and verdict.
"""

import numpy as np

from training.evaluation.verdict import PairedTest, holm, judge

SPREADS = {"clip_score": (0.038, 0.026, 0.003), "aesthetic": (0.33, 0.25, 0.05)}
"""Between prompts; of the difference of two models at one prompt; the default margin."""
COUNTS = (30, 64, 128, 256, 512)
NUM_TRIALS = 2_000
MAX_FALSE_POSITIVES = 0.07


def words(
    rng: np.random.Generator, count: int, shifts: dict[str, float], *, with_margin: bool
) -> list[str]:
    """Verdicts on both metrics of one comparison; `shifts` in units of the margin."""
    tests, margins = [], []
    for metric, (between, within, margin) in SPREADS.items():
        a = rng.normal(0, between, count)
        tests.append(PairedTest.of(a, a + shifts[metric] * margin + rng.normal(0, within, count)))
        margins.append(margin if with_margin else 1e-9)
    adjusted = holm([test.p_value for test in tests])
    return [
        judge(test, p, margin)[0] for test, p, margin in zip(tests, adjusted, margins, strict=True)
    ]


def main() -> None:
    """Print error rates and the power curve."""
    rng = np.random.default_rng(0)
    equal = {"clip_score": 0.0, "aesthetic": 0.0}
    print(
        f"equal models called better or worse on any metric, {NUM_TRIALS} comparisons (limit {MAX_FALSE_POSITIVES:.0%})"
    )
    for count in COUNTS:
        rates = [
            np.mean(
                [
                    bool({"better", "worse"} & set(words(rng, count, equal, with_margin=on)))
                    for _ in range(NUM_TRIALS)
                ]
            )
            for on in (False, True)
        ]
        print(
            f"  {count:4d} prompts: {rates[0]:.1%} without a margin, {rates[1]:.1%} with the default margins"
        )
    print(
        "a better model called better on its aesthetic score, by its true gain in margins of 0.05"
    )
    gains = (1.0, 1.5, 2.0, 3.0, 4.0)
    print("  prompts  " + "".join(f"{gain:8.1f}" for gain in gains))
    for count in COUNTS:
        power = [
            np.mean([words(rng, count, equal | {"aesthetic": gain}, with_margin=True)[1] == "better"
                     for _ in range(NUM_TRIALS // 4)])
            for gain in gains
        ]  # fmt: skip
        print(f"  {count:7d}  " + "".join(f"{value:8.0%}" for value in power))


if __name__ == "__main__":
    main()
