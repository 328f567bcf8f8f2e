"""Converts public data sets from their published format to the formats that lmtrain reads.

    python scripts/prepare_data.py wnut17 FOLDER                   # ./wnut17/train.conll, ...
    python scripts/prepare_data.py names FOLDER --out surnames

Writes train, valid and test: .tsv, or vectors in .npz, for `classify`, .conll for `tag`, one file
per language for `translate`, .npz without labels for `frames`. MATLAB files need scipy:
pip install 'lmtrain[data]'.
"""

import argparse
import inspect
import io
import itertools
import re
import sys
import tarfile
import textwrap
import wave
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import features
import numpy as np

from lmtrain import files
from lmtrain.errors import ConfigError, LmtrainError, TextError

SPLITS = ("train", "valid", "test")
NUM_KEYS = 88
NUM_JOINTS = 20
ACTIONS = (
    "high arm wave", "horizontal arm wave", "hammer", "hand catch", "forward punch", "high throw",
    "draw x", "draw tick", "draw circle", "hand clap", "two hand wave", "side boxing", "bend",
    "forward kick", "side kick", "jogging", "tennis swing", "tennis serve", "golf swing",
    "pick up and throw",
)  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]
Example = TypeVar("Example")


def snips_intent(source: Path) -> dict[str, list[tuple[str, str]]]:
    """Intents of spoken commands (Coucke et al. 2018, split of Goo et al. 2018).

    Source: SPLIT.seq.in, one command per line, and SPLIT.label.
    """
    return {
        split: aligned(source / f"{split}.label", source / f"{split}.seq.in") for split in SPLITS
    }


def snips_slots(source: Path) -> dict[str, list[list[tuple[str, str]]]]:
    """Slots of spoken commands, BIO tags (Coucke et al. 2018, split of Goo et al. 2018).

    Source: SPLIT.seq.in, one command per line, and SPLIT.seq.out.
    """
    return {split: _slots(source / f"{split}.seq.in") for split in SPLITS}


def _slots(path: Path) -> list[list[tuple[str, str]]]:
    sentences = []
    for number, (text, slots) in enumerate(aligned(path, path.with_suffix(".out")), start=1):
        tokens, tags = text.split(), slots.split()
        if len(tokens) != len(tags):
            raise TextError(f"{path}, line {number}: {len(tokens)} tokens, {len(tags)} slots")
        sentences.append(list(zip(tokens, tags, strict=True)))
    return sentences


def wnut17(source: Path) -> dict[str, list[list[tuple[str, str]]]]:
    """Named entities in noisy text, BIO tags (Derczynski et al. 2017).

    Source: SPLIT.conll, one token, tab and tag per line; a blank line ends a sentence.
    """
    return by_split(
        source,
        ((split, each) for split in SPLITS for each in _tagged(source / f"{split}.conll")),
    )


def _tagged(path: Path) -> Iterator[list[tuple[str, str]]]:
    numbered = enumerate(lines(path), start=1)
    for is_sentence, group in itertools.groupby(numbered, key=lambda each: each[1] != ""):
        if is_sentence:
            yield [_token_and_tag(path, number, line) for number, line in group]


def _token_and_tag(path: Path, number: int, line: str) -> tuple[str, str]:
    token, _, tag = line.partition("\t")
    if not tag:
        raise TextError(f"{path}, line {number}: not a token, a tab and a tag")
    return token, tag


def sst2(source: Path) -> dict[str, list[tuple[str, str]]]:
    """Sentiment of film reviews, 0 or 1 (Socher et al. 2013).

    Source: train.txt, dev.txt and test.txt, one label, space and sentence per line.
    """
    return {
        split: _first_word_apart(source / f"{name}.txt")
        for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True)
    }


def _first_word_apart(path: Path) -> list[tuple[str, str]]:
    examples = []
    for number, line in enumerate(lines(path), start=1):
        label, _, text = line.partition(" ")
        if not text:
            raise TextError(f"{path}, line {number}: not a label, a space and a text")
        examples.append((label, text))
    return examples


def multi30k(source: Path) -> dict[str, list[tuple[str, str]]]:
    """German and English descriptions of pictures, tokenized (Elliott et al. 2016).

    Source: line-aligned .de and .en of train, val and test_2016_flickr.
    """
    return {
        split: aligned(source / f"{name}.de", source / f"{name}.en")
        for split, name in zip(SPLITS, ("train", "val", "test_2016_flickr"), strict=True)
    }


def names(source: Path) -> dict[str, list[tuple[str, str]]]:
    """Surnames and their languages; of each language a tenth for validation, a tenth for testing.

    Source: LANGUAGE.txt, one name per line.
    """
    return by_split(
        source,
        (
            (split, (path.stem, name))
            for path in sorted(source.glob("*.txt"))
            for split, name in in_tenths([line for line in lines(path) if line])
        ),
    )


def splice(source: Path) -> dict[str, list[tuple[str, str]]]:
    """DNA around splice junctions: donor (EI), acceptor (IE) or neither (N), and 60 bases.

    A word is two neighbouring bases and the position of the first, such as GT31: the junction lies
    between 30 and 31, and every position has its own meaning. One fixed split: of the distinct
    sequences of each class a tenth, drawn with a fixed seed, is for validation and a tenth for
    testing. Copies of a sequence are in the same split.

    Source: splice.data of the UCI repository, `class, name, bases` a line.
    """
    return by_split(source, _junctions(source / "splice.data"))


def _junctions(path: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    copies: dict[str, list[str]] = {}
    for number, line in enumerate(lines(path), start=1):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3 or not all(fields):
            raise TextError(f"{path}, line {number}: not a class, a name and bases")
        copies.setdefault(fields[2], []).append(fields[0])
    for label in sorted({labels[0] for labels in copies.values()}):
        distinct = [bases for bases, labels in copies.items() if labels[0] == label]
        for split, bases in in_tenths(distinct):
            yield from ((split, (each, _with_positions(bases))) for each in copies[bases])


def _with_positions(bases: str) -> str:
    pairs = map("".join, itertools.pairwise(bases))
    return " ".join(f"{pair}{position}" for position, pair in enumerate(pairs, start=1))


def jsb(source: Path) -> dict[str, list[Array]]:
    """Chorales of J. S. Bach, 88 keys on or off per step (Boulanger-Lewandowski et al. 2012).

    Source: JSB_Chorales.mat.
    """
    return by_split(source, _pieces(source / "JSB_Chorales.mat"))


def nottingham(source: Path) -> dict[str, list[Array]]:
    """Folk tunes with chords, 88 keys on or off per step (Boulanger-Lewandowski et al. 2012).

    Source: Nottingham.mat.
    """
    return by_split(source, _pieces(source / "Nottingham.mat"))


def digits(source: Path) -> dict[str, list[tuple[Array, str]]]:
    """Spoken digits (Free Spoken Digit Dataset): log-mel energies of 40 bands and their slopes.

    Index 0 to 4 of each digit and speaker is the test set, as its authors say; 5 to 9 is for
    validation, the others for training. One vector each 10 ms, of a window of 25 ms; each feature
    has mean 0 and deviation 1 over the training set.

    Source: DIGIT_SPEAKER_INDEX.wav, in a folder or a .tar.gz.
    """
    return features.standardized(by_split(source, _spoken(source)))


def _spoken(source: Path) -> Iterator[tuple[str, tuple[Array, str]]]:
    for name, recorded in recordings(source, ".wav"):
        digit, index = parts(name, r"(\d)_\w+_(\d+)\.wav")
        split = "test" if int(index) < 5 else "valid" if int(index) < 10 else "train"
        energies = features.log_mel(*waveform(name, recorded))
        yield split, (features.with_deltas(energies), digit)


def action3d(source: Path) -> dict[str, list[tuple[Array, str]]]:
    """Actions of people (MSR Action3D, Li et al. 2010): vectors between joints and their changes.

    Subjects 1, 3, 5 and 7 are for training, 9 for validation, the others for testing. Lengths are
    in torsos, and the person faces the camera. Each feature has mean 0 over the training set; the
    vectors, and the changes over each number of frames, have deviation 1 together. Frames without
    a skeleton are left out.

    Source: aAA_sSS_eEE_skeleton3D.txt, in a folder or a .tar.gz.
    """
    return features.standardized(by_split(source, _acted(source)), features.MOVEMENT_GROUPS)


def _acted(source: Path) -> Iterator[tuple[str, tuple[Array, str]]]:
    for name, recorded in recordings(source, "_skeleton3D.txt"):
        action, subject = map(int, parts(name, r"a(0[1-9]|1\d|20)_s(\d\d)_e\d\d_skeleton3D\.txt"))
        split = "valid" if subject == 9 else "train" if subject % 2 else "test"
        joints = skeletons(name, recorded)
        if len(joints):
            yield split, (features.movement(joints), ACTIONS[action - 1])
        else:
            print(f"{name} is left out: no frame has a skeleton")


def read_bytes(path: Path) -> bytes:
    """The bytes of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from None


def lines(path: Path) -> list[str]:
    """The lines of a file, without white space around them."""
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text: byte {error.start}") from None
    return [line.strip() for line in text.removesuffix("\n").split("\n")]


def aligned(first: Path, second: Path) -> list[tuple[str, str]]:
    """The lines of two files that belong together by their numbers."""
    columns = [lines(path) for path in (first, second)]
    counts = [len(column) for column in columns]
    if counts[0] != counts[1]:
        raise TextError(f"{first} has {counts[0]:,} lines, {second} {counts[1]:,}")
    for path, column in zip((first, second), columns, strict=True):
        if "" in column:
            raise TextError(f"{path}, line {column.index('') + 1}: empty")
    return list(zip(*columns, strict=True))


def in_tenths(items: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each item with its split: a tenth for validation, a tenth for testing, in a fixed order."""
    tenth = max(1, len(items) // 10)
    for place, index in enumerate(np.random.default_rng(1).permutation(len(items))):
        split = "valid" if place < tenth else "test" if place < 2 * tenth else "train"
        yield split, items[index]


def by_split(source: Path, examples: Iterable[tuple[str, Example]]) -> dict[str, list[Example]]:
    """The examples of each split, in their order."""
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for split, example in examples:
        splits[split].append(example)
    for split, found in splits.items():
        if not found:
            raise TextError(f"{source} has no examples for {split}: is it the right folder?")
    return splits


def recordings(source: Path, suffix: str) -> list[tuple[str, bytes]]:
    """Names and contents of the files of a folder, also those in a .tar.gz, in order of names."""
    found = {path.name: read_bytes(path) for path in source.rglob(f"*{suffix}")}
    for path in source.glob("*.tar.gz"):
        found.update(_archived(path, suffix))
    if not found:
        raise TextError(f"{source} has no *{suffix} and no .tar.gz that holds them")
    return sorted(found.items())


def _archived(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=io.BytesIO(read_bytes(path)), mode="r:gz") as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(suffix):
                    yield Path(member.name).name, archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise TextError(f"{path} is not a whole .tar.gz: {error}") from None


def parts(name: str, pattern: str) -> tuple[str, ...]:
    """What the groups of a pattern match in the name of a file."""
    match = re.fullmatch(pattern, name)
    if match is None:
        raise TextError(f"{name} is not named like the files of this data set")
    return match.groups()


def _pieces(path: Path) -> Iterator[tuple[str, Array]]:
    """The cells of traindata, validdata and testdata, each (steps, keys)."""
    tables = matlab_tables(path)
    for split in SPLITS:
        if f"{split}data" not in tables:
            raise TextError(f"{path} has no {split}data")
        for number, cell in enumerate(tables[f"{split}data"].flat, start=1):
            is_steps = np.size(cell) > 0 and np.shape(cell)[1:] == (NUM_KEYS,)
            if not is_steps or not np.isin(cell, (0, 1)).all():
                raise TextError(
                    f"{path}, {split}data, cell {number}: not steps of {NUM_KEYS} keys, 0 or 1"
                )
            yield split, cell


def matlab_tables(path: Path) -> dict[str, Array]:
    """The variables of a MATLAB file."""
    try:
        from scipy.io import loadmat, matlab
    except ImportError:
        raise ConfigError(f"{path} needs scipy: pip install 'lmtrain[data]'") from None
    # What loadmat raises for damaged files is not documented.
    damaged = (
        matlab.MatReadError, OSError, LookupError, ValueError, TypeError, NotImplementedError,
        zlib.error,
    )  # fmt: skip
    try:
        return dict(loadmat(io.BytesIO(read_bytes(path))))
    except damaged as error:
        raise TextError(f"{path} is not a whole MATLAB file: {error}") from None


def waveform(name: str, recorded: bytes) -> tuple[Array, int]:
    """The samples of a recording, between -1 and 1, and the number of samples per second."""
    try:
        with wave.open(io.BytesIO(recorded)) as recording:
            form = (recording.getnchannels(), 8 * recording.getsampwidth())
            rate, count = recording.getframerate(), recording.getnframes()
            samples = recording.readframes(count)
    except (wave.Error, EOFError) as error:
        raise TextError(f"{name} is not a .wav file: {error}") from None
    if (*form, rate) != (1, 16, 8000):
        raise TextError(
            f"{name} is not one channel of 16 bits at 8000 Hz, but {form[0]} of {form[1]} at {rate}"
        )
    if not samples or len(samples) != 2 * count:
        raise TextError(f"{name} has {len(samples)} of {2 * count} bytes of sound")
    return np.frombuffer(samples, "<i2") / 2**15, rate


def skeletons(name: str, recorded: bytes) -> Array:
    """The joints of each frame that has a skeleton: (frames, NUM_JOINTS, 3)."""
    try:
        rows = np.array(recorded.split(), float).reshape(-1, NUM_JOINTS, 4)
    except ValueError:
        raise TextError(f"{name}: not frames of {NUM_JOINTS} rows of 4 numbers") from None
    joints = rows[:, :, :3]
    if not np.isfinite(joints).all():
        raise TextError(f"{name}: a coordinate is not finite")
    # Where the camera saw nobody, all coordinates are 0.
    has_torso = (joints[:, features.NECK] != joints[:, features.HIP_CENTRE]).any(axis=1)
    return joints[has_torso]


class File(NamedTuple):
    """A file to write: its suffix, its content, and what was counted in it."""

    suffix: str
    content: bytes
    counts: str


def tsv(examples: Sequence[tuple[str, str]]) -> list[File]:
    """Lines `label<TAB>text`."""
    content = "".join(f"{label}\t{text}\n" for label, text in examples)
    return [File("tsv", content.encode(), f"{len(examples):,} examples")]


def conll(sentences: Sequence[Sequence[tuple[str, str]]]) -> list[File]:
    """One token, tab and tag per line; an empty line after each sentence."""
    content = "".join(
        "".join(f"{token}\t{tag}\n" for token, tag in sentence) + "\n" for sentence in sentences
    )
    steps = sum(map(len, sentences))
    return [File("conll", content.encode(), f"{len(sentences):,} sentences, {steps:,} tokens")]


def translation(pairs: Sequence[tuple[str, str]]) -> list[File]:
    """Line-aligned German and English."""
    return [
        File(
            language,
            "".join(f"{text}\n" for text in texts).encode(),
            f"{len(texts):,} sentences, {sum(len(text.split()) for text in texts):,} tokens",
        )
        for language, texts in zip(("de", "en"), zip(*pairs, strict=True), strict=True)
    ]


def frames(sequences: Sequence[Array]) -> list[File]:
    """`inputs` (all steps, F), 0 or 1, and `lengths` (N)."""
    return [_npz(sequences, np.uint8)]


def labelled_vectors(examples: Sequence[tuple[Array, str]]) -> list[File]:
    """`inputs` (all steps, F), `lengths` (N) and `labels` (N)."""
    sequences, labels = zip(*examples, strict=True)
    return [_npz(sequences, np.float32, labels=np.array(labels))]


def _npz(sequences: Sequence[Array], kind: type, **others: Array) -> File:
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    content = io.BytesIO()
    inputs = np.concatenate(sequences).astype(kind)
    np.savez_compressed(content, inputs=inputs, lengths=lengths, **others)
    counts = f"{len(lengths):,} sequences, {len(inputs):,} steps"
    return File("npz", content.getvalue(), counts)


SETS: dict[str, tuple[Callable[[Path], dict[str, Any]], Callable[[Any], list[File]]]] = {
    "snips-intent": (snips_intent, tsv),
    "snips-slots": (snips_slots, conll),
    "wnut17": (wnut17, conll),
    "sst2": (sst2, tsv),
    "multi30k": (multi30k, translation),
    "names": (names, tsv),
    "splice": (splice, tsv),
    "jsb": (jsb, frames),
    "nottingham": (nottingham, frames),
    "digits": (digits, labelled_vectors),
    "action3d": (action3d, labelled_vectors),
}


def prepared(name: str, source: Path) -> list[tuple[str, File]]:
    """The files of a data set, each with its split."""
    read, form = SETS[name]
    return [(split, file) for split, examples in read(source).items() for file in form(examples)]


def description(sets: Iterable[str]) -> str:
    """What the script does, and what each data set is."""
    about = (
        f"{name}:\n{textwrap.indent(inspect.getdoc(SETS[name][0]) or '', '    ')}" for name in sets
    )
    return "\n".join((__doc__ or "", *about))


def main() -> None:
    """Reads a source completely, then writes its files."""
    parser = argparse.ArgumentParser(
        description=description(SETS), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=SETS, help="the data set")
    parser.add_argument("source", type=Path, help="the folder of its files")
    parser.add_argument("--out", type=Path, help="where the files go; without it, ./NAME")
    options = parser.parse_args()
    out = options.out or Path(options.name)
    try:
        for split, file in prepared(options.name, options.source):
            path = out / f"{split}.{file.suffix}"
            files.write(path, file.content)
            print(f"{path}: {file.counts}")
    except LmtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
