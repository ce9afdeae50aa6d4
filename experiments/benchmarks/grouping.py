"""Four encoders' convolutions one by one, or as one grouped convolution.

    python experiments/benchmarks/grouping.py [--threads 1]

With one thread times are processor time, which other jobs disturb least.
"""

import argparse
import sys
from typing import Any

import torch
from measuring import timed
from torch import Tensor

from pmixseg.backbones.layers import lean


def main() -> int:
    """The 3x3x3 convolutions of four encoders one by one, or as one grouped convolution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for width, side in ((16, 80), (32, 40), (64, 20), (128, 10)):
            x = lean.fast_layout(torch.randn(1, 4 * width, side, side, side, dtype=dtype))
            each = [lean.fast_layout(part) for part in x.chunk(4, 1)]
            weight = torch.randn(4 * width, width, 3, 3, 3, dtype=dtype)
            kernels = weight.chunk(4)

            def separate(each: Any = each, kernels: Any = kernels) -> None:
                for some, kernel in zip(each, kernels, strict=True):
                    torch.mkldnn_convolution(some, kernel, None, [1] * 3, [1] * 3, [1] * 3, 1)

            def grouped(x: Tensor = x, weight: Tensor = weight) -> None:
                torch.mkldnn_convolution(x, weight, None, [1] * 3, [1] * 3, [1] * 3, 4)

            cpu = args.threads == 1
            best = [min(timed(c, cpu)[0] for _ in range(5)) * 1e3 for c in (separate, grouped)]
            print(
                f"{precision} 4 x {width} channels at {side}^3: {best[0]:.1f} ms one by one, "
                f"{best[1]:.1f} ms grouped"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
