"""Times reading a text, first and from the cache, beside the tokenizers library.

    python scripts/bench_text.py novel.txt

Each reading is a process of its own with an empty or filled cache; the library counts the words of
the same file and encodes its lines with the vocabulary. Peak memory is that of the whole process.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

VOCAB_SIZE = 10_000


def read(path: str) -> int:
    """Reads the text with lmtrain; returns the number of tokens."""
    from lmtrain.data.corpus import open_text
    from lmtrain.data.division import Division
    from lmtrain.data.tokens import read_tokens
    from lmtrain.schema import DataConfig

    _, parts = read_tokens(Division(open_text([path])), DataConfig(vocab_size=VOCAB_SIZE))
    return sum(map(len, parts.values()))


def read_with_library(path: str) -> int:
    """Trains a vocabulary and encodes with the tokenizers library; returns the number of tokens."""
    import tokenizers
    from tokenizers import trainers

    from lmtrain.data.tokenizer import EOS, UNK, build_tokenizer

    library = tokenizers.Tokenizer.from_str(build_tokenizer([], "word").to_json())
    trainer = trainers.WordLevelTrainer(
        vocab_size=VOCAB_SIZE, show_progress=False, special_tokens=[UNK, EOS]
    )
    library.train([path], trainer)
    count = 0
    with Path(path).open(encoding="utf-8") as stream:
        while lines := stream.readlines(1 << 20):
            count += sum(len(each) for each in library.encode_batch_fast(lines))
    return count


def measure(name: str, function: Callable[[str], int], path: str) -> None:
    """Prints the time and the peak memory of a function in this process."""
    start = time.perf_counter()
    count = function(path)
    seconds = time.perf_counter() - start
    unit = 1e6 if sys.platform == "darwin" else 1e3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    speed = Path(path).stat().st_size / 1e6 / seconds
    print(f"{name:>18}: {seconds:.2f} s, {speed:,.1f} MB/s, peak {peak:,.0f} MB, {count:,} tokens")


def main() -> None:
    """Measures and prints a line for each reading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a file of UTF-8 text")
    path = parser.parse_args().text
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LMTRAIN_CACHE"] = cache
        readings = [("first", read), ("cached", read), ("tokenizers library", read_with_library)]
        for name, function in readings:
            process = context.Process(target=measure, args=(name, function, path))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
