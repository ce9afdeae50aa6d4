"""Peak memory of segmenting one 240x240x155 case with the default model, from NIfTI to NIfTI.

    python experiments/benchmarks/segment_memory.py [--window 128] [--whole] [--probabilities]

The case is segmented in a process of its own. Reported is its largest resident set
(``ru_maxrss``), with everything that was imported. Memory does not depend on the windows' overlap;
without any, the run is short.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = (240, 240, 155)
LIMIT_GIB = 3.0


def write_case(folder: Path, whole: bool, shape: list[int]) -> None:
    """Four scans, without any background or with a brain: of 240x240x155 voxels 136x176x148."""
    import nibabel as nib
    import numpy as np

    from pmixseg.task import BRATS

    rng = np.random.default_rng(0)
    axes = np.ogrid[tuple(slice(-n / 2, n / 2) for n in shape)]
    radii = np.array((68, 88, 74)) * shape / SHAPE
    inside = sum((a / r) ** 2 for a, r in zip(axes, radii, strict=True)) <= 1
    for modality in BRATS.modalities:
        scan = rng.integers(1, 1000, shape, dtype=np.int16)
        data = scan if whole else np.where(inside, scan, 0).astype(np.int16)
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"case_{modality}.nii")


def segment(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Segment the case in this process, and say what it took."""
    import torch

    from pmixseg.evaluation.prediction.scans import SegmentSettings
    from pmixseg.inference.outputs import Outputs
    from pmixseg.inference.segment import segment_files
    from pmixseg.modules import StudentModule
    from pmixseg.modules.preparation import Preparation
    from pmixseg.task import BRATS

    torch.set_num_threads(1)
    module = StudentModule().eval()
    module.preparation = Preparation(patch=(args.window,) * 3)
    settings = SegmentSettings(
        tta=args.tta, overlap=args.overlap, precision=args.precision, force=True
    )
    images = {m: folder / f"case_{m}.nii" for m in BRATS.modalities}
    outputs = Outputs(folder, args.probabilities, args.probabilities)
    imported, wall, cpu = peak_gib(), time.perf_counter(), time.process_time()
    segment_files(module, images, outputs, settings)
    return {
        "imported_gib": imported,
        "peak_gib": peak_gib(),
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }


def peak_gib() -> float:
    """Largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> int:
    """Make the case, run the child, compare with the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, help="voxels of the case")
    parser.add_argument("--window", type=int, default=80)
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--whole", action="store_true", help="no background: the largest box")
    parser.add_argument("--tta", action="store_true")
    parser.add_argument("--probabilities", action="store_true", help="write them, and the entropy")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(segment(args.child, args)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write_case(Path(folder), args.whole, args.shape)
        child = [sys.executable, *sys.argv, "--child", folder]
        done = subprocess.run(child, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    return 0 if figures["peak_gib"] < LIMIT_GIB else 1


if __name__ == "__main__":
    sys.exit(main())
