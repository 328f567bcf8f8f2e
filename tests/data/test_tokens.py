import json
import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from corpora import TINY, UNICODE
from lmtrain.data import corpus, tokens
from lmtrain.data import tokenizer as tokenizing
from lmtrain.data.corpus import Text, open_text
from lmtrain.data.division import Division
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer, build_tokenizer
from lmtrain.data.tokens import load_tokens, read_tokens
from lmtrain.errors import MachineError, TextError
from lmtrain.files import sha256
from lmtrain.schema import DataConfig

COMMON = ["the", "sat", "cat", "on", "dog", "a"]
# Growth of the peak memory by counting and tokenizing a file. On Linux, ru_maxrss would include the
# memory of the parent; on macOS it is in bytes.
MEASURE = """
import json, resource, sys
from lmtrain.data import tokens
from lmtrain.data.corpus import open_text
from lmtrain.data.division import Division
from lmtrain.schema import DataConfig

def peak():
    if sys.platform == "linux":
        return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
division = Division(open_text([sys.argv[1]]))
tokenizer, texts = tokens.read_tokens(division, DataConfig(splitter=sys.argv[2]))
[found] = texts.values()
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

    return lambda: monkeypatch.setattr(Text, "checked_chunks", refuse)


def tokenize(text, tokenizer):
    [found] = tokens.tokenize(Division(text), tokenizer).values()
    return found


def counted(text, level="word", **options):
    tokenizer, _ = read_tokens(Division(text), DataConfig(level=level, **options))
    return tokenizer


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


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "emptied", "removed", "[3]", "null", "3"]
)
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_damaged_token_file_is_made_again(place, tokenizer, cache, damage, suffix):
    expected = tokenizer.encode(TINY).tolist()
    key = tokenize(open_text([str(place)]), tokenizer).key
    path = cache / f"{key}{suffix}"
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 0x40]) + whole[1:]
    content = {"truncated": whole[:-3], "flipped": flipped, "emptied": b""}
    path.write_bytes(content.get(damage, damage.encode()))
    if damage == "removed":
        path.unlink()

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


def test_unknown_characters_are_counted_and_kept_in_the_cache(place, no_encoding):
    tokenizer = build_tokenizer(["the cat\n"], "char")

    found = tokenize(open_text([str(place)]), tokenizer)

    unknown = {c: TINY.count(c) for c in "somndlg" if c not in "the cat"}
    assert dict(found.unknown_characters) == unknown
    assert list(found.unknown_characters.values()) == sorted(unknown.values(), reverse=True)
    assert int((found.ids == tokenizer.unk_id).sum()) == sum(unknown.values())
    known = tokenize(open_text([str(place)]), build_tokenizer([TINY], "char"))
    assert known.unknown_characters == {}
    no_encoding()
    assert tokenize(open_text([str(place)]), tokenizer).unknown_characters == unknown


def test_tokens_are_reloaded_by_their_key_alone(place, tokenizer):
    known = tokenize(open_text([str(place)]), tokenizer)
    place.unlink()

    found = load_tokens(known.key, tokenizer.vocab_size, "my name")

    assert (found.key, found.name, found.characters) == (known.key, "my name", len(TINY))
    assert load_tokens("0" * 64, tokenizer.vocab_size, "") is None
    assert load_tokens(known.key, 65_537, "") is None


def test_two_that_make_the_same_tokens_at_once_both_get_them(place, tokenizer, cache, monkeypatch):
    at_once = threading.Barrier(2, timeout=20)
    real, results = tokens._write_header, []

    def together(*arguments):
        at_once.wait()
        real(*arguments)
        at_once.wait()

    def work():
        results.append(tokenize(open_text([str(place)]), tokenizer).ids.tolist())

    monkeypatch.setattr(tokens, "_write_header", together)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == [tokenizer.encode(TINY).tolist()] * 2
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("content", ["a dog sat on\n", "the cat \n", "the cat\nand more\n"])
def test_text_that_changes_between_the_two_readings_is_refused(place, tokenizer, cache, content):
    text = open_text([str(place)])
    assert text.fingerprint
    place.write_text(content)

    with pytest.raises(TextError, match=r"my\.txt changed while it was read"):
        tokenize(text, tokenizer)
    with pytest.raises(TextError, match=r"my\.txt changed while it was read"):
        counted(text)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_a_new_text_is_decoded_once(place, level, monkeypatch):
    begun = []
    real = Text._decoded
    monkeypatch.setattr(Text, "_decoded", lambda *a: begun.append(1) or real(*a))
    division = Division(open_text([str(place)]), ("train", "valid"), (0.2,), level == "word")

    read_tokens(division, DataConfig(level=level))
    assert len(begun) == 1

    read_tokens(division, DataConfig(level=level))
    assert len(begun) == 1


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 18])
@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_parts_of_a_text_have_the_ids_of_their_characters(
    tmp_path, level, chunk_bytes, monkeypatch
):
    monkeypatch.setattr(corpus, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "unicode.txt"
    path.write_bytes((TINY + UNICODE).encode())
    division = Division(
        open_text([str(path)]), ("train", "valid", "test"), (0.2, 0.1), level == "word"
    )
    whole = "".join(division.text.chunks())

    tokenizer, texts = read_tokens(division, DataConfig(level=level))

    done = 0
    for name in division.names:
        part = whole[done : done + texts[name].characters]
        assert texts[name].ids.tolist() == tokenizer.encode(part).tolist()
        done += len(part)
        if name == "train":
            assert tokenizer.vocabulary == build_tokenizer([part], level).vocabulary
    assert done == len(whole)
    assert len({text.key for text in texts.values()}) == 3
    again = tokens.tokenize(division, tokenizer)
    assert {name: text.key for name, text in again.items()} == tokens.token_keys(
        division, tokenizer
    )
    for name, text in texts.items():
        assert again[name].ids.tolist() == text.ids.tolist()


def test_a_vocabulary_is_counted_once(place, monkeypatch):
    first = counted(open_text([str(place)]))
    monkeypatch.setattr(tokens, "_numbered", lambda *a, **k: pytest.fail("counted again"))

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


def test_the_vocabulary_is_that_of_the_training_part_alone(tmp_path):
    path = tmp_path / "unicode.txt"
    path.write_text(TINY + UNICODE, "utf-8")

    def read(level):
        division = Division(open_text([str(path)]), ("train", "valid"), (0.1,), at_line_ends=True)
        return read_tokens(division, DataConfig(level=level))

    tokenizer, texts = read("char")
    assert tokenizer.vocabulary == [UNK, *sorted(set(TINY))]
    assert texts["train"].unknown_characters == {}
    assert texts["valid"].unknown_characters["你"] == 1
    assert "你好" not in read("word")[0].vocabulary
    assert len(read("byte")[0].vocabulary) == 256


def test_a_vocabulary_of_text_split_in_another_way_is_not_used(place, monkeypatch):
    first = counted(open_text([str(place)]))
    monkeypatch.setattr(tokenizing, "_pattern", lambda splitter, last=0: "[a-z]")
    tokenizing._compiled.cache_clear()

    letters = counted(open_text([str(place)]))

    tokenizing._compiled.cache_clear()
    assert "the" in first.vocabulary
    assert "the" not in letters.vocabulary


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 18])
@pytest.mark.parametrize("level", ["word", "char", "byte"])
def test_composed_text_has_the_tokens_of_its_composed_form(
    tmp_path, level, chunk_bytes, monkeypatch
):
    monkeypatch.setattr(corpus, "_CHUNK_BYTES", chunk_bytes)
    apart, composed = "une e\u0301te\u0301 a\u030a\r\n" * 30, "une été å\n" * 30
    (tmp_path / "apart.txt").write_bytes(apart.encode())
    division = Division(open_text([str(tmp_path / "apart.txt")]), ("train", "valid"), (0.2,), True)

    tokenizer, texts = read_tokens(division, DataConfig(level=level, nfc=True))

    ids = [*texts["train"].ids.tolist(), *texts["valid"].ids.tolist()]
    assert tokenizer.vocabulary == build_tokenizer([composed], level).vocabulary
    assert ids == tokenizer.encode(composed).tolist()
    if level == "char":
        assert sum(text.characters for text in texts.values()) == len(composed)


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


def test_a_folder_in_the_place_of_a_vocabulary_is_told(place, cache):
    counted(open_text([str(place)]))
    [path] = cache.glob("*.tokenizer.json")
    path.unlink()
    path.mkdir()

    with pytest.raises(MachineError, match=r"could not write .*tokenizer\.json: Is a directory"):
        counted(open_text([str(place)]))


def measured(path, splitter):
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), splitter],
        capture_output=True,
        check=True,
        timeout=100,
        text=True,
    )
    return json.loads(ended.stdout)


@pytest.mark.slow
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
    # Checking the cached ids does not leave the file of 22 MB in memory.
    assert measured(tmp_path / "line.txt", "whitespace")["growth_mb"] < 15


@pytest.mark.slow
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
