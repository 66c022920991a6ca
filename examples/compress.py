"""Fewer bits, as long as the quality allows: `python examples/compress.py MODEL OUT`.

Compresses a model to several sizes, largest first, and compares each with the original. It stops at
the first that is worse than `--most` nats of KL, and says which one to take. Everything can be
stopped with Ctrl-C: the same command goes on.
"""

import argparse
import sys
from pathlib import Path

import pvrt


def main() -> int:
    """Returns the exit code: 1 where no size is good enough, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder, a .gguf file or a hub id")
    parser.add_argument("out", type=Path, help="a folder, which gets one folder for each size")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.0, 3.0, 2.5, 2.0])
    parser.add_argument("--most", type=float, default=0.3, help="KL in nats per token")
    parser.add_argument("--data", help="calibration text; without it the model writes its own")
    parser.add_argument("--minutes", type=float, help="the time for each size")
    parser.add_argument("--effort", choices=["quick", "standard", "best"], default="standard")
    asked = parser.parse_args()

    best: Path | None = None
    try:
        for bits in sorted(asked.bits, reverse=True):
            out = asked.out / f"{bits:g}-bits"
            checkpoint = pvrt.tune(
                asked.model,
                out,
                bits=bits,
                data=asked.data,
                minutes=asked.minutes,
                effort=asked.effort,
                report=False,
                on_progress=print,
            )
            found = pvrt.compare(asked.model, checkpoint, html=out / "report.html")
            (figures,) = found.models
            assert figures.kl is not None  # only the original has none
            print(
                f"\n{out}: {figures.sizes.file_bytes / 1e6:.1f} MB, KL {figures.kl.mean:.4f} "
                f"(noise floor {found.noise_floor.mean:.5f}), perplexity "
                f"{figures.perplexity:.2f} (original {found.original.perplexity:.2f})"
            )
            question, answer = found.questions[0].prompt, found.questions[0].answers[0]
            print(f"> {question}\n{answer.same}{answer.rest}\n")
            if figures.kl.mean > asked.most:
                break
            best = out
    except pvrt.PvrtError as error:  # one sentence: what is wrong, where, what to do
        print(error, file=sys.stderr)
        return 2
    if best is None:
        print(f"no size has a KL of {asked.most:g} or less: give more bits, or more time")
        return 1
    print(f"take {best}: pvrt serve {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
