"""``python -m tf_lbopt.batch_size``: a run's noise scale as a table and a plot."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tf_lbopt.batch_size.planning import recommend

EXIT_BAD_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Ends in one line where there is a mistake."""

    def error(self, message: str) -> NoReturn:
        """Says it, without the usage."""
        self.exit(EXIT_BAD_INPUT, f"{message} (--help lists the flags)\n")


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers with commas between them. Received: {text!r}"
        ) from None


def main(argv: Sequence[str]) -> int:
    """Prints the table and writes the plot; returns the exit code, 2 for input of no use."""
    parser = _Parser(
        prog="python -m tf_lbopt.batch_size",
        description="Prints what each batch costs by the noise scale of a run, and draws it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "history",
        help="JSON file of the history that `fit` returned, or a TensorBoard folder, of a run with "
        "callbacks.GradientNoiseScale",
    )
    parser.add_argument("--devices", type=int, default=1, help="how many (1)")
    parser.add_argument(
        "--examples_per_second", type=float, help="of one device; with --examples: hours"
    )
    parser.add_argument("--examples", type=int, help="that the run has seen in all")
    parser.add_argument(
        "--examples_per_device", type=int, help="that a device takes at once to be that fast"
    )
    parser.add_argument(
        "--batch_sizes", type=_integers, help="of the table, with commas between them"
    )
    parser.add_argument("--output", type=Path, help="the plot (batch_size.png beside the history)")
    options = parser.parse_args(argv)
    path = Path(options.history)
    output = options.output or (path if path.is_dir() else path.parent) / "batch_size.png"
    try:
        if options.examples is not None and options.examples_per_second is None:
            raise ValueError("`--examples` must be given with `--examples_per_second`")
        table = recommend(
            path,
            options.devices,
            1.0 if options.examples_per_second is None else options.examples_per_second,
            examples=options.examples,
            examples_per_device=options.examples_per_device,
            batch_sizes=options.batch_sizes,
        )
        print(table)
        table.plot(output)
    except (TypeError, ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return EXIT_BAD_INPUT
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
