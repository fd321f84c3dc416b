"""`vikhr-mistral`: holds the name until the Mistral branch arrives."""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Say that there is nothing to run yet; the exit status is 2, as for any request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="vikhr-mistral",
        description="Adapts Mistral-7B to Russian: arrives in a later version. This one trains T5 (vikhr-t5 --help).",
        epilog="example:\n  vikhr-t5 train --gin_file=recipes/demo.gin --dry_run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_known_args(argv)
    message = "the Mistral branch arrives in a later version; this one trains T5 (vikhr-t5 --help)"
    print(f"vikhr-mistral: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
