"""`training.loop.run` that also writes down what every step is made of: one file per rank under
$TRACE.

With $SIGTERM_AT = "5.0" it gets that signal in step 5 (counted from 0), in the middle of its first
micro-batch.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from training.loop.conditioning import make_time_ids
from training.loop.run import main
from training.loop.trainer import Trainer


def trace(losses):
    """Wrap the loss of a micro-batch: who is in it, with which prompts, sizes, timesteps and
    noise."""
    counts = {}

    def traced(self, draw):
        batch, step, ranks = draw.batch, self.state.clock.step, self.ranks
        turn = counts[step] = counts.get(step, -1) + 1
        line = {
            "step": step, "index": ranks.rank + turn * ranks.size, "image_ids": batch.image_ids,
            "prompts": batch.prompts, "timesteps": draw.timesteps.tolist(),
            "noise": hashlib.sha256(draw.noise.numpy().tobytes()).hexdigest(),
            "time_ids": make_time_ids(batch.original_size, batch.crop_top_left, batch.target_size).tolist(),
            "latents": hashlib.sha256(batch.latents.numpy().tobytes()).hexdigest(),
        }  # fmt: skip
        with (Path(os.environ["TRACE"]) / f"{ranks.rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if os.environ.get("SIGTERM_AT") == f"{step}.{turn}":
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(self, draw)

    return traced


Trainer._losses = trace(Trainer._losses)
sys.exit(main(sys.argv[1:]))
