"""Turns public data sets from the form their authors published into the forms that lmtrain reads.

    python scripts/prepare_data.py snips ../shared/data/snips          # ./snips/train.tsv, ...
    python scripts/prepare_data.py names folder-of-languages --out names

snips: the intents of spoken commands (Coucke et al. 2018, the split of Goo et al. 2018), files
SPLIT.seq.in and SPLIT.label. names: surnames, one file for each language; a tenth of each language
is for validation and a tenth for testing.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmtrain import files
from lmtrain.errors import LmtrainError, TextError

Splits = dict[str, list[tuple[str, str]]]


def snips(source: Path) -> Splits:
    """Label and text of each command."""
    splits = {}
    for split in ("train", "valid", "test"):
        texts, labels = (lines(source / f"{split}.{suffix}") for suffix in ("seq.in", "label"))
        if len(texts) != len(labels):
            raise TextError(f"{source}: {len(texts)} texts and {len(labels)} labels in {split}")
        splits[split] = list(zip(labels, texts, strict=True))
    return splits


def names(source: Path) -> Splits:
    """Language and name; a tenth of each language for validation, a tenth for testing."""
    splits: Splits = {"train": [], "valid": [], "test": []}
    for path in sorted(source.glob("*.txt")):
        own = lines(path)
        order = np.random.default_rng(1).permutation(len(own))
        tenth = max(1, len(own) // 10)
        for place, index in enumerate(order):
            split = "valid" if place < tenth else "test" if place < 2 * tenth else "train"
            splits[split].append((path.stem, own[index]))
    if not splits["train"]:
        raise TextError(f"{source} has no .txt files, one for each language")
    return splits


def lines(path: Path) -> list[str]:
    """The lines of a file, without white space around them; empty ones are left out."""
    try:
        return [line.strip() for line in path.read_text("utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from None


SETS: dict[str, Callable[[Path], Splits]] = {"snips": snips, "names": names}


def main() -> None:
    """Reads the source and writes train.tsv, valid.tsv and test.tsv."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS, help="the data set")
    parser.add_argument("source", type=Path, help="the folder of its files")
    parser.add_argument("--out", type=Path, help="where the files go; without it, ./NAME")
    options = parser.parse_args()
    out = options.out or Path(options.name)
    try:
        for split, examples in SETS[options.name](options.source).items():
            content = "".join(f"{label}\t{text}\n" for label, text in examples)
            files.write(out / f"{split}.tsv", content.encode())
            print(f"{out / f'{split}.tsv'}: {len(examples):,} examples")
    except LmtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
