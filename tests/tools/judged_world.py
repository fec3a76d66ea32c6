"""A workspace whose images were scored by hand: evaluation without a network, as a store sees
it."""

import numpy as np
import polars as pl

from assets import base_model, checkpoints, eval_metrics, prompt_sets, sample_images, verdicts
from resources.workspace.store import Store
from resources.workspace.writer import Made
from training.runs import run_folder
from training.runs.run_folder import Ready
from training.tables.schemas import TABLES

CONFIG = """
format = 1
[[sources]]
name = "a"
path = "pictures"
[models]
clip = "demo:models/clip"
aesthetic = "demo:models/aesthetic"
base = "demo:models/base"
[encodings.sdxl]
[prompt_sets.standard]
file = "prompts.csv"
[evaluation]
every = 1
[evaluation.sampling]
num_steps = 4
"""
EVERY = 1000
RUN = f"""
encoding = "sdxl"
num_samples = {3 * EVERY}
[checkpoints]
every_samples = {EVERY}
"""


class World:
    """A workspace with a base model and one prompt set; checkpoints and their scores are put in by
    hand."""

    def __init__(self, home, num_prompts=64):
        self.home = home
        self.num_prompts = num_prompts
        (home / "pictures").mkdir(parents=True)
        (home / "prompts.csv").write_text("prompt_id,text\n")
        self.write_config()
        row = {
            "name": "base",
            "checkpoint": f"base.{self.store.models.digest('base')[:8]}@0",
            "digest": "d",
        }
        self._commit(
            base_model.base_model,
            "base",
            pl.DataFrame([row], schema=TABLES["base_model"].schema, strict=False),
        )
        rows = [
            {"prompt_id": f"p{n:04d}", "text": f"star {n}", "negative": "", "group": "g", "seed": n}
            for n in range(num_prompts)
        ]
        self._commit(
            prompt_sets.prompt_sets,
            "standard",
            pl.DataFrame(rows, schema=TABLES["prompt_sets"].schema),
        )
        self.base = self.store.checkpoints.base()

    @property
    def store(self):
        """The store as a new process sees it."""
        return Store(self.home)

    def write_config(self, old="", new=""):
        """Write foundry.toml, one text in it exchanged for another."""
        assert old in CONFIG
        (self.home / "foundry.toml").write_text(CONFIG.replace(old, new))

    def save(self, run, *clocks, ended=True):
        """Write checkpoints of a run, as its trainer does."""
        folder = self.store.paths.run_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / run_folder.CONFIG).write_text(RUN)
        for clock in clocks:
            path = run_folder.checkpoint_folder(folder, clock)
            path.mkdir(parents=True)
            run_folder.write_ready(
                path,
                Ready(
                    run=run, checkpoint=f"{run}@{clock}", samples_seen=clock, files=(), state_files=(),
                    digest=f"weights of {run}@{clock}", fingerprint="f", base_digest="b", validation_loss=0.1,
                    config={},
                ),
            )  # fmt: skip
        if ended:
            (folder / run_folder.EVENTS).write_text(
                f'{{"event": "finished", "samples_seen": {max(clocks)}}}\n'
            )
            basis = {"inputs": {}, "models": {}}
            self.store.writer.commit(
                checkpoints.checkpoints,
                run,
                Made(frame=TABLES["checkpoints"].empty()),
                basis,
                seconds=0.0,
            )

    def folder(self, checkpoint):
        """A checkpoint's folder."""
        return self.store.checkpoints.folder(checkpoint)

    def draw(self, checkpoint, content=""):
        """Commit images of a checkpoint, whose files are not there."""
        prompts = self.store.read("prompt_sets", parts=["standard"])
        schema = TABLES["sample_images"].schema
        frame = prompts.with_columns(
            pl.lit("x.png").alias("file"), pl.lit(checkpoint + content).alias("sha256")
        ).select(list(schema))
        self._commit(sample_images.sample_images, checkpoint, frame.cast(dict(schema)))

    def score(self, checkpoint, aesthetic, failed=0):
        """Commit scores of a checkpoint's images, the last `failed` of which have none."""
        rows = []
        for n, value in enumerate(aesthetic):
            prompt = {"prompt_id": f"p{n:04d}", "group": "g"}
            if n < len(aesthetic) - failed:
                rows += [
                    {**prompt, "metric": "aesthetic", "value": float(value)},
                    {**prompt, "metric": "clip_score", "value": 0.25},
                ]
            else:
                rows.append({**prompt, "metric": "failed", "reason": "x.png is missing"})
        frame = pl.DataFrame(rows, schema=TABLES["eval_metrics"].schema)
        self._commit(eval_metrics.eval_metrics, checkpoint, frame)

    def judge(self, checkpoint):
        """Commit the verdict against the base, as the stage does."""
        self.store.writer.commit(
            verdicts.verdicts, checkpoint, verdicts.judge(self.store, checkpoint),
            self.store.currency.basis(verdicts.verdicts, checkpoint), seconds=0.0,
        )  # fmt: skip

    def evaluate(self, checkpoint, gain=0.0, failed=0, seed=0):
        """Images, scores and verdict of a checkpoint that is better than the base by `gain`."""
        self.draw(checkpoint)
        self.score(checkpoint, self.values(gain, seed), failed)
        self.judge(checkpoint)

    def values(self, gain=0.0, seed=0):
        """Aesthetic scores `(num_prompts,)` of a checkpoint."""
        return 5 + gain + np.random.default_rng(seed).normal(0, 0.1, self.num_prompts)

    def _commit(self, stage, key, frame):
        store = self.store
        store.writer.commit(
            stage, key, Made(frame=frame), store.currency.basis(stage, key), seconds=0.0
        )
