"""Run the ablation: unattended, and again from where it stopped.

python experiments/ablation/run.py --jobs 2

Cohort, store and checkpoints go to ``--work``; a table and a JSON per training to ``results/``,
which is committed. A training whose JSON is there is not repeated. Plan: PLAN.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from arms import (
    alignment_jobs,
    confirm_jobs,
    curve_jobs,
    distillation_jobs,
    explore_jobs,
    real_jobs,
)
from choice import choose, choose_distillation
from cohorts import make_cohort, make_real, protocol_weights
from exploratory import TEST_WEIGHTS
from study import REAL_COHORTS, Job
from training import train_job

HERE = Path(__file__).parent


class Runner:
    """Trains jobs in processes of their own, teachers before their students.

    Args:
        work: folder of store and checkpoints.
        results: folder of what is committed.
        jobs: processes.
        until: do not start a training after this moment (``time.time()``).
        real: folder of the real cases, where they are trained on.
    """

    def __init__(
        self, work: Path, results: Path, jobs: int, until: float, real: Path | None = None
    ) -> None:
        self.work, self.results, self.jobs, self.until = work, results, jobs, until
        self.real = real
        # Forked children of a process that has used torch's threads may hang.
        self.context = multiprocessing.get_context("spawn")

    def done(self, job: Job) -> bool:
        """Whether its last file is there, and with it a checkpoint that others need."""
        checkpoint = self.work / "checkpoints" / f"{job.name}.ckpt"
        kept = job.role == "student" or job.stage == "curve" or checkpoint.is_file()
        return kept and (self.results / f"{job.name}.json").is_file()

    def run(self, jobs: list[Job]) -> None:
        """Train what is not there yet, in order.

        Raises:
            SystemExit: a training failed, or time is up.
        """
        waiting = [job for job in jobs if not self.done(job)]
        for cohort in sorted({job.cohort for job in waiting}):
            if cohort not in REAL_COHORTS:
                make_cohort(self.work, cohort)
            elif self.real is not None:
                make_real(self.work, self.real)
        finished = {job.name for job in jobs if self.done(job)}
        running: dict[Future[dict[str, Any]], Job] = {}
        failed: list[str] = []
        with ProcessPoolExecutor(self.jobs, mp_context=self.context) as pool:
            while waiting or running:
                ready = [j for j in waiting if j.needs <= finished]
                for job in ready[: self.jobs - len(running)]:
                    if time.time() > self.until:
                        break
                    waiting.remove(job)
                    running[pool.submit(train_job, job, self.work, self.results)] = job
                if not running:
                    break
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    job = running.pop(future)
                    try:
                        found = future.result()
                    except Exception:
                        traceback.print_exc()
                        failed.append(job.name)
                        continue
                    finished.add(job.name)
                    print(
                        f"{time.strftime('%H:%M:%S')}  {job.name:<64} dice {found['dice']:.4f}  "
                        f"{found['cpu_seconds']:.0f} + {found['scoring_cpu_seconds']:.0f} s CPU, "
                        f"{len(waiting)} of this stage wait",
                        flush=True,
                    )
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}")
        if waiting:
            raise SystemExit(f"{len(waiting)} trainings are left; run the command again.")


def unique(jobs: Iterable[Job]) -> list[Job]:
    """Each once, in order."""
    return list({job.name: job for job in jobs}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none later")
    parser.add_argument("--real", type=Path, help="seven BraTS 2021 cases: the six arms on them")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * args.minutes
    runner = Runner(args.work, args.results, args.jobs, until, args.real)
    runner.run(curve_jobs())
    first = distillation_jobs()
    runner.run([job for _, job in first])
    told = choose_distillation(args.results)
    runner.run([job for _, job in first] + [job for _, _, job in alignment_jobs(told)])
    weights = choose(args.results)
    print(f"chosen on validation cases: {weights}", flush=True)
    runner.run([job for _, job in confirm_jobs(weights)])
    if args.real is not None:
        print("real scans", flush=True)
        runner.run([job for _, job in real_jobs()])
    questions = explore_jobs(weights)
    for question, rows in questions.items():
        print(f"exploratory: {question}", flush=True)
        runner.run(unique(job for _, job in rows))
        if question == "missingness":
            protocol_weights(args.work).to_csv(args.results / TEST_WEIGHTS, index=False)
    print("all trainings are done; now: python experiments/ablation/analyse.py")


if __name__ == "__main__":
    sys.exit(main())
