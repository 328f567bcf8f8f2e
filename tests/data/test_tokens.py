import contextlib
import json
import os
import random
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from corpora import TINY, UNICODE
from lmtrain.data import tokens
from lmtrain.data.corpus import open_text
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer, build_tokenizer
from lmtrain.data.tokens import cached_tokenizer, load_tokens, tokenize
from lmtrain.errors import LmtrainError, TextError
from lmtrain.files import sha256

COMMON = ["the", "sat", "cat", "on", "dog", "a"]
# Peak memory of counting and tokenizing a file, over that before; in KiB on Linux, bytes on macOS.
MEASURE = """
import json, resource, sys
from lmtrain.data import tokens
from lmtrain.data.corpus import open_text

def peak():
    unit = 1024 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit

before = peak()
text = open_text([sys.argv[1]])
options = {"vocab_size": 10_000, "min_count": 1, "lowercase": False}
tokenizer = tokens.cached_tokenizer(text, text, "word", sys.argv[2], **options)
found = tokens.tokenize(text, tokenizer)
print(json.dumps({
    "growth_mb": (peak() - before) // 1024, "tokens": len(found), "vocab_size": tokenizer.vocab_size
}))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text(TINY, "utf-8")
    return path


@pytest.fixture
def tokenizer():
    return build_tokenizer([TINY], "word")


@pytest.fixture
def no_encoding(monkeypatch):
    """Calling it forbids that any text is cut into tokens again."""

    def refuse(*arguments):
        pytest.fail("the text was tokenized again")

    return lambda: monkeypatch.setattr(Tokenizer, "encode_chunks", refuse)


def counted(text, alphabet=None, level="word", **options):
    chosen = {"vocab_size": 10_000, "min_count": 1, "lowercase": False, **options}
    return cached_tokenizer(text, alphabet or text, level, "words", **chosen)


def test_tokens_are_the_ids_of_the_text(place, tokenizer):
    found = tokenize(open_text([str(place)]), tokenizer)

    assert found.ids.tolist() == tokenizer.encode(TINY).tolist()
    assert len(found) == len(found.ids)
    assert found.characters == len(TINY)
    assert found.name == str(place)
    assert isinstance(found.ids, np.memmap)


def test_the_same_text_is_tokenized_once(place, tokenizer, no_encoding, tmp_path):
    first = tokenize(open_text([str(place)]), tokenizer)
    (tmp_path / "copy.txt").write_text("\ufeff" + TINY.replace("\n", "\r\n"), "utf-8")
    no_encoding()

    again = tokenize(open_text([str(place)]), Tokenizer.from_json(tokenizer.to_json()))
    copied = tokenize(open_text([str(tmp_path / "copy.txt")]), tokenizer)

    assert again.ids.tolist() == copied.ids.tolist() == first.ids.tolist()
    assert again.key == copied.key == first.key
    assert copied.name.endswith("copy.txt")


def test_a_changed_text_of_the_same_size_and_time_is_tokenized_again(place, tokenizer):
    status = place.stat()
    first = tokenize(open_text([str(place)]), tokenizer)
    place.write_text(TINY.replace("cat", "dog"), "utf-8")
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))

    second = tokenize(open_text([str(place)]), tokenizer)

    assert place.stat().st_size == status.st_size
    assert place.stat().st_mtime_ns == status.st_mtime_ns
    assert second.ids.tolist() == tokenizer.encode(TINY.replace("cat", "dog")).tolist()
    assert second.key != first.key


def test_another_way_to_cut_the_text_has_tokens_of_its_own(place, tokenizer):
    text = open_text([str(place)])
    others = [build_tokenizer([TINY], "char"), build_tokenizer([TINY], "byte"),
              build_tokenizer([TINY], "word", vocab_size=5),
              build_tokenizer([TINY], "word", lowercase=True)]  # fmt: skip

    keys = {tokenize(text, each).key for each in [tokenizer, *others]}

    assert len(keys) == 5


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "removed", "another's"])
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_damaged_token_file_is_made_again(place, tokenizer, cache, damage, suffix):
    expected = tokenizer.encode(TINY).tolist()
    key = tokenize(open_text([str(place)]), tokenizer).key
    path = cache / f"{key}{suffix}"
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 0x40]) + whole[1:]
    content = {"truncated": whole[:-3], "flipped": flipped, "emptied": b"", "another's": b"[3]"}
    path.unlink() if damage == "removed" else path.write_bytes(content[damage])

    assert load_tokens(key, tokenizer.vocab_size, "") is None
    assert tokenize(open_text([str(place)]), tokenizer).ids.tolist() == expected
    assert path.read_bytes() == whole


def test_no_flipped_bit_goes_unseen(place, tokenizer, cache):
    expected = tokenize(open_text([str(place)]), tokenizer)
    note, array = cache / f"{expected.key}.json", cache / f"{expected.key}.npy"

    for path in (note, array):
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 150)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            found = load_tokens(expected.key, tokenizer.vocab_size, "")
            assert found is None or found.characters == expected.characters
            assert path == note or found is None
        path.write_bytes(whole)


@pytest.mark.parametrize(("vocab_size", "kind"), [(3, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_two_bytes_until_they_need_four(tmp_path, vocab_size, kind):
    words = [f"w{n}" for n in range(vocab_size - 2)]
    (tmp_path / "many.txt").write_text(" ".join(words) + "\n")

    found = tokenize(open_text([str(tmp_path / "many.txt")]), Tokenizer([UNK, EOS, *words]))

    assert found.ids.dtype == np.dtype(kind)
    assert found.ids.tolist() == [*range(2, vocab_size), 1]


def test_a_text_of_one_token_is_stored(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\n")

    found = tokenize(open_text([str(tmp_path / "bytes.txt")]), build_tokenizer([], "byte"))

    assert found.ids.tolist() == [10]


def test_a_text_that_cannot_be_tokenized_leaves_nothing_behind(place, cache):
    with pytest.raises(TextError, match="not in the vocabulary"):
        tokenize(open_text([str(place)]), build_tokenizer(["abc"], "char"))

    assert list(cache.iterdir()) == []


def test_tokens_are_reloaded_by_their_key_alone(place, tokenizer):
    known = tokenize(open_text([str(place)]), tokenizer)
    place.unlink()

    found = load_tokens(known.key, tokenizer.vocab_size, "my name")

    assert (found.key, found.name, found.characters) == (known.key, "my name", len(TINY))
    assert load_tokens("0" * 64, tokenizer.vocab_size, "") is None
    assert load_tokens(known.key, 65_537, "") is None


def test_two_that_make_the_same_tokens_at_once_both_get_them(place, tokenizer, cache, monkeypatch):
    at_once = threading.Barrier(2, timeout=20)
    real, results = tokens._write_array, []

    def together(*arguments):
        at_once.wait()
        real(*arguments)
        at_once.wait()

    def work():
        results.append(tokenize(open_text([str(place)]), tokenizer).ids.tolist())

    monkeypatch.setattr(tokens, "_write_array", together)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [tokenizer.encode(TINY).tolist()] * 2
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


def test_text_that_changes_while_it_is_tokenized_is_not_stored_under_its_old_name(tokenizer):
    pieces = iter([["the cat\n"], ["a dog\n"]])
    source = SimpleNamespace(name="changing", chunks=lambda: iter(next(pieces, ["a dog\n"])))
    changing = tokens.Text((source,))
    steady = tokens.Text((SimpleNamespace(name="steady", chunks=lambda: iter(["the cat\n"])),))

    with contextlib.suppress(LmtrainError):
        tokenize(changing, tokenizer)

    assert tokenize(steady, tokenizer).ids.tolist() == tokenizer.encode("the cat\n").tolist()


def test_a_vocabulary_is_counted_once(place, monkeypatch):
    first = counted(open_text([str(place)]))
    monkeypatch.setattr(tokens, "build_tokenizer", lambda *a, **k: pytest.fail("counted again"))

    again = counted(open_text([str(place)]))

    assert again.vocabulary == first.vocabulary == build_tokenizer([TINY], "word").vocabulary


def test_a_vocabulary_is_known_by_text_and_options(place, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Other words\n", "utf-8")
    text = open_text([str(place)])

    assert counted(text).vocab_size == 11
    assert counted(text, vocab_size=5).vocab_size == 5
    assert counted(text, min_count=100).vocabulary == [
        UNK,
        EOS,
        *["the", "sat", "cat", "on", "dog", "a"],
    ]
    assert counted(open_text([str(other)])).vocabulary == [UNK, EOS, "Other", "words"]
    assert counted(open_text([str(other)]), lowercase=True).vocabulary[2] == "other"


def test_characters_are_those_of_the_whole_corpus_and_words_those_of_the_training_text(tmp_path):
    path = tmp_path / "unicode.txt"
    path.write_text(TINY + UNICODE, "utf-8")
    text = open_text([str(path)])
    train, _ = text.split([0.1], at_line_ends=True)

    assert "你" in counted(train, text, "char").vocabulary
    assert "你好" not in counted(train, text, "word").vocabulary
    assert counted(train, text, "byte").vocab_size == 256


def of_another_version(_):
    content = b"{}"
    return content + b"\n" + sha256([content]).encode()


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: b"x" + c[1:], lambda c: b"", of_another_version]
)
def test_a_damaged_vocabulary_is_counted_again(place, cache, damage):
    whole = counted(open_text([str(place)])).vocabulary
    [path] = cache.glob("*.tokenizer.json")
    content = path.read_bytes()
    path.write_bytes(damage(content))

    assert counted(open_text([str(place)])).vocabulary == whole
    assert path.read_bytes() == content


def measured(path, splitter):
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), splitter],
        capture_output=True,
        check=True,
        timeout=100,
        text=True,
    )
    return json.loads(ended.stdout)


def test_a_line_of_200_megabytes_takes_less_than_300(tmp_path):
    words = [f"word{n}" * 2 for n in range(30_000)]
    random.Random(1).shuffle(words)
    piece = (" ".join(words) + " ").encode()
    times = 200_000_000 // len(piece) + 1
    with (tmp_path / "line.txt").open("wb") as stream:
        stream.writelines(piece for _ in range(times))

    found = measured(tmp_path / "line.txt", "whitespace")

    assert (tmp_path / "line.txt").stat().st_size >= 200_000_000
    assert found["tokens"] == times * len(words) + 1
    assert found["vocab_size"] == 10_000
    assert found["growth_mb"] < 300


@pytest.mark.parametrize("splitter", ["whitespace", "words"])
def test_a_line_without_any_space_takes_little_memory(tmp_path, splitter):
    piece = "0123456789abcdef你好é" * 4096
    with (tmp_path / "line.txt").open("wb") as stream:
        stream.writelines(piece.encode() for _ in range(400))

    found = measured(tmp_path / "line.txt", splitter)

    assert (tmp_path / "line.txt").stat().st_size > 35_000_000
    assert found["tokens"] == 400 * 19 + 1
    assert found["growth_mb"] < 150


def test_a_token_file_is_a_plain_numpy_array(place, tokenizer, cache):
    found = tokenize(open_text([str(place)]), tokenizer)

    plain = np.load(cache / f"{found.key}.npy", allow_pickle=False)

    assert plain.tolist() == found.ids.tolist()
    assert json.loads((cache / f"{found.key}.json").read_bytes())["characters"] == len(TINY)
