import io
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.data.vectors import MOST_NUMBERS, fingerprint, npz, read, require_width
from lmtrain.errors import TextError

FUZZED = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
GOOD = {
    "inputs": np.arange(10.0).reshape(5, 2),
    "lengths": np.array([2, 3]),
    "labels": np.array(["b", "a"]),
}


def saved(**changes) -> bytes:
    """The good file with other arrays; None for none."""
    arrays = {name: each for name, each in (GOOD | changes).items() if each is not None}
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def zipped(compression=zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """The good file with other members, whatever they are."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, member in ({key: npy(each) for key, each in GOOD.items()} | members).items():
            archive.writestr(f"{name}.npy", member)
    return content.getvalue()


def npy(array) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def headed(header: bytes, version: bytes = b"\1\0") -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header


def test_sequences_have_their_steps_and_labels(write):
    first, second = read([write(saved())], labels=True)

    assert (first.label, second.label) == ("b", "a")
    assert first.vectors.dtype == np.float32
    assert first.vectors.tolist() == [[0, 1], [2, 3]]
    assert second.vectors.tolist() == [[4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint64", "bool", ">f4"])
def test_numbers_of_any_kind_are_read(write, dtype):
    place = write(saved(inputs=GOOD["inputs"].astype(dtype), lengths=np.array([2, 3], "uint8")))

    found = [each.vectors for each in read([place], labels=False)]

    expected = GOOD["inputs"].astype(dtype).astype("float32")
    assert np.array_equal(np.concatenate(found), expected)


def test_files_and_globs_follow_each_other(write, tmp_path):
    for name in ("2.npz", "1.npz"):
        write(saved(labels=np.array([name, name])), name)

    found = [each.label for each in read([f"{tmp_path}/*.npz"], labels=True)]

    assert found == ["1.npz", "1.npz", "2.npz", "2.npz"]


def test_what_is_written_is_read_again(write):
    frames = np.eye(3, dtype=np.int8)

    (found,) = read([write(npz(frames))], labels=False)

    assert np.array_equal(found.vectors, frames)
    assert found.label == ""


class Mine:
    def __reduce__(self):
        return pytest.fail, ("an object was unpickled",)


NOTHING = np.zeros((0, 2))
WRONG = {
    "pickled": (saved(inputs=np.array([[Mine()]], object)), "has an array of Python objects"),
    "pickled labels": (saved(labels=np.array(["a", 1], object)), "has an array of Python objects"),
    "no inputs": (saved(inputs=None), "has no array inputs; it has: lengths, labels"),
    "no lengths": (saved(lengths=None), "has no array lengths; it has: inputs, labels"),
    "no labels": (
        saved(labels=None),
        "has no array labels; it has: inputs, lengths\n"
        "  try: numpy.savez(FILE, inputs=vectors, lengths=steps_of_each, labels=label_of_each)",
    ),
    "text": (saved(inputs=np.array([["a"]])), "inputs (1, 1) <U1 are not numbers (steps, F)"),
    "complex": (saved(inputs=np.ones((5, 2), complex)), "complex128 are not numbers"),
    "flat": (saved(inputs=np.ones(5)), "inputs (5,) float64 are not numbers (steps, F)"),
    "no width": (saved(inputs=np.ones((5, 0))), "inputs (5, 0) float64 are not numbers"),
    "no steps": (saved(inputs=NOTHING), "lengths add up to 5, but inputs has 0 steps"),
    "fractions": (saved(lengths=np.array([2.0, 3.0])), "lengths (2,) float64 are not integers"),
    "one length": (saved(lengths=np.array(5)), "lengths () int64 are not integers (N,)"),
    "no sequence": (
        saved(inputs=NOTHING, lengths=np.array([], int)),
        "lengths (0,) int64 are not integers (N,)",
    ),
    "zero length": (saved(lengths=np.array([5, 0])), "sequence 2 has no steps"),
    "below zero": (saved(lengths=np.array([6, -1])), "sequence 2 has no steps"),
    "too short": (saved(lengths=np.array([2, 2])), "add up to 4, but inputs has 5 steps"),
    "overflow": (
        saved(lengths=np.array([2**63, 2**63, 5], "uint64")),
        "add up to 18,446,744,073,709,551,621, but",
    ),
    "a label short": (saved(labels=np.array(["a"])), "(1,) <U1 are not texts or integers (2,)"),
    "bytes": (saved(labels=np.array([b"a", b"b"])), "(2,) |S1 are not texts or integers (2,)"),
    "real": (saved(labels=np.array([0.5, 1.5])), "(2,) float64 are not texts or integers (2,)"),
    "an empty label": (saved(labels=np.array(["a", " \n"])), "the label of sequence 2 is empty"),
    "not unicode": (
        saved(labels=np.array(["a", "\ud800"])),
        "a label is not valid Unicode",
    ),
    "no character": (
        zipped(
            inputs=npy(GOOD["inputs"]),
            lengths=npy(GOOD["lengths"]),
            labels=npy(np.array(["a", "b"])).replace(b"b\0\0\0", b"\xff\xff\xff\x7f"),
        ),
        "a label is not valid Unicode",
    ),
    "nan": (
        saved(inputs=np.array([[1.0, 2], [3, 4], [5, 6], [7, np.nan], [9, 9]])),
        "sequence 2 has a number that is not finite",
    ),
    "beyond float32": (saved(inputs=np.full((5, 2), 1e300)), "sequence 1 has a number that is not"),
    "not a zip": (npy(GOOD["inputs"]), "is not a .npz file of NumPy"),
    "empty": (b"", "is not a .npz file of NumPy"),
    "truncated": (saved()[:-30], "is not a .npz file of NumPy"),
    "damaged": (saved().replace(b"@", b"A"), "is not a .npz file of NumPy: Bad CRC-32"),
    "raw members": (zipped(inputs=b"1", lengths=b"2", labels=b"3"), "is not a .npz file of NumPy"),
    "half a header": (zipped(inputs=headed(b"{'descr': ")), "is not a .npz file of NumPy"),
    "an open bracket": (zipped(inputs=headed(b"(" * 90)), "is not a .npz file of NumPy"),
    "a header with half a type": (
        zipped(inputs=headed(b"{'descr': ('<f8',), 'fortran_order': False, 'shape': (2,)}")),
        "is not a .npz file of NumPy",
    ),
    "a deep header": (zipped(inputs=headed(b"-" * 9000 + b"1")), "is not a .npz file of NumPy"),
    "a long header": (zipped(inputs=headed(b" " * 20_000)), "is not a .npz file of NumPy"),
    "too large": (
        zipped(
            inputs=headed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}" % 2**50)
        ),
        "is not a .npz file of NumPy",
    ),
    "beyond all numbers": (
        zipped(
            inputs=headed(b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,)}" % 2**70)
        ),
        "is not a .npz file of NumPy",
    ),
    "too wide": (
        saved(inputs=np.ones((5, MOST_NUMBERS + 1), "int8")),
        "vectors of 1,000,001 numbers; at most 1,000,000 are read",
    ),
    "encrypted": (zipped(inputs=npy(1)).replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"),
                  "is not a .npz file of NumPy: File 'inputs.npy' is encrypted"),
    "many names": (
        saved(inputs=None, **{f"{index}\n" * 30: np.ones(1) for index in range(99)}),
        "has no array inputs; it has: lengths, labels, 0 0 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_plain_words(write, case):
    content, told = WRONG[case]
    place = write(content, "my.npz")

    with pytest.raises(TextError) as caught:
        list(read([place], labels=True))

    message = str(caught.value)
    assert message.startswith(place)
    assert told in message
    assert len(message.splitlines()) <= 3
    assert len(message) < 1000


def test_a_file_of_another_width_is_refused(write):
    places = [write(saved(), "1.npz"), write(saved(inputs=np.ones((5, 3))), "2.npz")]

    with pytest.raises(TextError, match=r"2\.npz: vectors of 3 numbers, others have 2$"):
        list(read(places, labels=True))


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nothing.npz", "no text file nothing.npz"),
        ("x" * 300, "File name too long"),
        (".", "directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch, place, told):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(TextError, match=told):
        list(read([place], labels=False))


@pytest.mark.parametrize(
    ("vectors", "told"),
    [
        (np.ones((2, 3)), "predict: vectors of 3 numbers, the model takes 2"),
        (np.ones(2), r"predict: \(2,\) float64 are not vectors \(steps, 2\)"),
        (np.ones((0, 2)), r"\(0, 2\) float64 are not vectors"),
        (np.array([["a", "b"]]), "are not vectors"),
        ("text", "are not vectors"),
        ([[1, 2], [3]], "are not vectors"),
        (np.array([[1, np.inf]]), "predict: a number is not finite"),
        (np.array([[1, 1e300]]), "predict: a number is not finite"),
    ],
)
def test_vectors_that_a_model_cannot_take_are_refused(vectors, told):
    with pytest.raises(TextError, match=told):
        require_width(vectors, 2, "predict")


def test_the_fingerprint_follows_vectors_labels_lengths_and_order(write):
    contents = [
        saved(), saved(labels=np.array(["a", "b"])), saved(lengths=np.array([3, 2])),
        saved(inputs=GOOD["inputs"][::-1]),
    ]  # fmt: skip

    found = [list(read([write(content)], labels=True)) for content in contents]

    assert len({fingerprint(each) for each in (*found, found[0][::-1])}) == 5
    assert fingerprint(found[0]) == fingerprint(list(found[0]))


@FUZZED
@given(st.data())
def test_a_damaged_file_is_read_or_refused_in_plain_words(write, data):
    content = bytearray(zipped(data.draw(st.sampled_from(COMPRESSIONS))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    place = write(bytes(content[: data.draw(st.integers(0, len(content)))] or content), "my.npz")
    try:
        found = list(read([place], labels=True))
    except TextError as error:
        assert 1 <= len(str(error).splitlines()) <= 3  # noqa: PT017
        return
    assert all(each.vectors.size and np.isfinite(each.vectors).all() for each in found)
