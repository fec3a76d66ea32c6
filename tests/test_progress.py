"""Progress as a log tells it."""

from training import progress


def test_lines_tell_rate_time_left_and_note(monkeypatch):
    now, said = [100.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.told(said.append, every_s=30):
        for done in range(
            8, 81, 8
        ):  # one batch of 8 every 10 seconds, the first of which no one has timed
            progress.report("images", done, 80, f"{done / 10:.1f} MB")
            now[0] += 10
        progress.report("crops", 3, 9)
        now[0] += 30
        progress.report("crops", 3, 9)
    progress.report("images", 80, 80)
    assert said == [
        "32 of 80 images, 0.8/s, 60 s left, 3.2 MB",
        "56 of 80 images, 0.8/s, 30 s left, 5.6 MB",
        "80 of 80 images, 0.8/s, 0 s left, 8.0 MB",
        "3 of 9 crops, 0/s",
    ]
