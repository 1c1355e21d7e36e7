"""Bias and spread of Feynman-Kac steering by the number of particles, on N(0, 1) tilted by e^(2x).

With the exact denoiser, 50 calls in 5 transitions and 16384 / K groups per row; the exact mean is 2 and log Z is 2.
Prints the table of docs/steering.md: half a minute on 2 cores.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from glassflows.smc.weights import normalise
from test_exact import steer, variance


def main() -> None:
    exact = 2 * variance(50, 2)
    print(f"the discretised sampler's own 2 Var: {exact:.3f}")
    print("| K | mean − 2 Var | spread of one run | log Ẑ − 2 Var | spread | E[Ẑ] / Z |")
    print("|---|---|---|---|---|---|")
    for particles in (8, 32, 128, 512):
        groups = max(32, 16384 // particles)
        out = steer(0, particles, prompt=["x"] * groups)
        means = (normalise(out.log_weights).exp() * out.rewards).sum(-1)
        ratio = (out.log_evidence - exact).exp()
        error = float(ratio.std()) / math.sqrt(groups)
        print(
            f"| {particles} | {float(means.mean()) - exact:+.3f} | {float(means.std()):.3f} | "
            f"{float(out.log_evidence.mean()) - exact:+.3f} | {float(out.log_evidence.std()):.3f} | "
            f"{float(ratio.mean()):.3f} ± {error:.3f} |"
        )


if __name__ == "__main__":
    main()
