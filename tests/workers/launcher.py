"""run.py without data and models: `python launcher.py <overrides>`. The worker that hardware.launch names is the real test."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import runner.prepare
from runner.watch import stop

if __name__ == "__main__":
    stop.MARGIN = 1.0  # time limits are seconds here
    runner.prepare.prepare = lambda cfg, steps: {step.stage: {} for step in steps}
    runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
