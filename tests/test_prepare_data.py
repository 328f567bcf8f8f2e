"""scripts/prepare_data.py, on data in the form that its authors published."""

import io
import runpy
import subprocess
import sys
import tarfile
import wave

import numpy as np
import pytest
from scipy.io import savemat
from test_architecture import ROOT

from lmtrain.data import labelled

SPLITS = ("train", "valid", "test")
# Data set, folder it is published in, and examples in each of its three splits.
PUBLISHED = [
    ("snips-intent", "snips", (13_084, 700, 700)),
    ("snips-slots", "snips", (13_084, 700, 700)),
    ("wnut17", "wnut17", (3_394, 1_009, 1_287)),
    ("sst2", "sst2", (6_920, 872, 1_821)),
    ("multi30k", "multi30k", (29_000, 1_014, 1_000)),
    ("names", "names", (16_058, 1_996, 1_996)),
    ("splice", "splice", (2_560, 311, 319)),
    ("jsb", "music", (229, 76, 77)),
    ("nottingham", "music", (694, 173, 170)),
    ("digits", "digits", (2_400, 300, 300)),
    ("action3d", "action3d", (232, 59, 275)),
]


def prepared(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, arguments)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def outcome(tmp_path, name):
    """The folder that a data set in `tmp_path` is written to."""
    done = prepared(tmp_path, name, tmp_path, "--out", "out")
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def examples(path):
    return [(each.label, each.text) for each in labelled.read([str(path)])]


def features(name):
    return runpy.run_path(str(ROOT / "scripts" / "features.py"))[name]


def recording(samples, rate=8000):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes((samples * 2**15).astype("<i2").tobytes())
    return stream.getvalue()


def tone(hertz, seconds=0.1):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(8000 * seconds)) / 8000)


def skeleton(joints):
    """The text of frames (T, 20, 3), with a confidence of 1."""
    rows = np.pad(joints.reshape(-1, 3), ((0, 0), (0, 1)), constant_values=1)
    return "".join(" ".join(f"{value:.6f}" for value in row) + "\n" for row in rows)


def piece(*steps, keys=88):
    """Steps of a piece of music, of which only the first keys are named."""
    return np.array([[*step, *[0] * (keys - len(step))] for step in steps], np.uint8)


def cells(*pieces):
    found = np.empty((1, len(pieces)), object)
    for place, each in enumerate(pieces):
        found[0, place] = each
    return found


def write_music(folder, **changes):
    splits = {f"{split}data": cells(piece([0, 1], [1, 1]), piece([1])) for split in SPLITS}
    savemat(folder / "JSB_Chorales.mat", splits | changes)


def test_commands_get_their_intents(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.seq.in").write_text("play jazz \nrate this book\n")
        (tmp_path / f"{split}.label").write_text("PlayMusic\nRateBook\n")

    done = prepared(tmp_path, "snips-intent", tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "snips-intent/valid.tsv: 2 examples"
    found = examples(tmp_path / "snips-intent" / "valid.tsv")
    assert found == [("PlayMusic", "play jazz"), ("RateBook", "rate this book")]


def test_words_of_commands_get_their_slots(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.seq.in").write_text("play  jazz \nstop\n")
        (tmp_path / f"{split}.seq.out").write_text("O B-genre \nO \n")

    found = outcome(tmp_path, "snips-slots") / "test.conll"

    assert found.read_text() == "play\tO\njazz\tB-genre\n\nstop\tO\n\n"


def test_a_line_of_white_space_ends_a_sentence(tmp_path):
    for split in SPLITS:
        (tmp_path / f"{split}.conll").write_text("in\tO\nRome\tB-location\n\t\n\nyes\tO\n")

    found = outcome(tmp_path, "wnut17") / "train.conll"

    assert found.read_text() == "in\tO\nRome\tB-location\n\nyes\tO\n\n"


def test_reviews_have_a_label_and_a_text(tmp_path):
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.txt").write_text(f"1 fine in {split} .\n0 dull\n")

    found = outcome(tmp_path, "sst2") / "valid.tsv"

    assert found.read_text() == "1\tfine in dev .\n0\tdull\n"


def test_translations_stay_aligned(tmp_path):
    for split in ("train", "val", "test_2016_flickr"):
        (tmp_path / f"{split}.de").write_text("ein hund .\nzwei männer .\n", "utf-8")
        (tmp_path / f"{split}.en").write_text("a dog .\ntwo men .\n", "utf-8")

    out = outcome(tmp_path, "multi30k")

    assert (out / "test.de").read_text("utf-8") == "ein hund .\nzwei männer .\n"
    assert (out / "test.en").read_text("utf-8") == "a dog .\ntwo men .\n"


def test_each_language_is_in_every_split(tmp_path):
    for language, count in (("Korean", 20), ("Irish", 40)):
        (tmp_path / f"{language}.txt").write_text("".join(f"name{i}\n" for i in range(count)))

    out = outcome(tmp_path, "names")

    counts = {}
    for split in SPLITS:
        for label, _ in examples(out / f"{split}.tsv"):
            counts[label, split] = counts.get((label, split), 0) + 1
    assert counts["Korean", "train"] == 16
    assert counts["Irish", "valid"] == counts["Irish", "test"] == 4


def test_copies_of_a_sequence_are_in_the_same_split(tmp_path):
    generator = np.random.default_rng(0)
    sequences = ["".join(generator.choice(list("ACGT"), 60)) for _ in range(60)]
    rows = [f"{('EI', 'IE', 'N')[i % 3]},  NAME-{i},   {s}\n" for i, s in enumerate(sequences)]
    (tmp_path / "splice.data").write_text("".join(rows + rows[:30]))

    out = outcome(tmp_path, "splice")

    found = [examples(out / f"{split}.tsv") for split in SPLITS]
    assert sum(map(len, found)) == 90
    kept = [{text for _, text in split} for split in found]
    assert set.union(*kept) == {
        " ".join(f"{sequence[i - 1 : i + 1]}{i}" for i in range(1, 60)) for sequence in sequences
    }
    assert [len(split) for split in kept] == [48, 6, 6]
    assert all({label for label, _ in split} == {"EI", "IE", "N"} for split in found)


def test_pieces_of_music_are_steps_of_keys(tmp_path):
    write_music(tmp_path)

    with np.load(outcome(tmp_path, "jsb") / "valid.npz") as found:
        assert set(found) == {"inputs", "lengths"}
        assert found["inputs"].dtype == np.uint8
        np.testing.assert_array_equal(found["inputs"], piece([0, 1], [1, 1], [1]))
        assert found["lengths"].dtype == np.int64
        assert found["lengths"].tolist() == [2, 1]


def test_recordings_are_split_by_their_index(tmp_path):
    with tarfile.open(tmp_path / "recordings.tar.gz", "w:gz") as archive:
        for digit, index in ((0, 4), (1, 5), (2, 9), (3, 10), (4, 49)):
            content = recording(tone(200 * (digit + 1)) * np.linspace(0.1, 1, 800))
            member = tarfile.TarInfo(f"recordings/{digit}_anna_{index}.wav")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

    out = outcome(tmp_path, "digits")

    labels = {}
    for split in SPLITS:
        with np.load(out / f"{split}.npz") as found:
            labels[split] = found["labels"].tolist()
            assert found["inputs"].dtype == np.float32
            assert found["inputs"].shape == (8 * len(labels[split]), 80)
            assert found["lengths"].tolist() == [8] * len(labels[split])
            inputs = found["inputs"]
            if split == "train":
                np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-5)
                np.testing.assert_allclose(inputs.std(axis=0), 1, atol=1e-5)
    assert labels == {"test": ["0"], "valid": ["1", "2"], "train": ["3", "4"]}


@pytest.mark.parametrize("hertz", [150, 440, 1000, 3500])
def test_a_tone_is_loudest_in_its_mel_band(hertz):
    energies = features("log_mel")(tone(hertz), 8000)

    # The centres of bands lie at equal distances on the mel scale up to half of the rate.
    mel = 2595 * np.log10(1 + np.array([hertz, 4000]) / 700)
    assert energies.shape == (8, 40)
    assert abs(energies.mean(axis=0).argmax() + 1 - 41 * mel[0] / mel[1]) < 1


def test_silence_has_finite_energies():
    energies = features("log_mel")(np.zeros(100), 8000)

    assert energies.shape == (1, 40)
    assert np.isfinite(energies).all()


def test_deltas_are_slopes():
    line = 3.0 * np.arange(7)[:, None] + [[1, 2]]

    found = features("with_deltas")(line)

    assert found.shape == (7, 4)
    np.testing.assert_array_equal(found[:, :2], line)
    np.testing.assert_allclose(found[2:-2, 2:], 3)


def test_people_are_split_by_their_number(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("a01_s01_e01", "a20_s07_e02", "a13_s09_e01", "a02_s02_e03"):
        frames = generator.normal(size=(4, 20, 3))
        frames[1] = 0
        (tmp_path / f"{name}_skeleton3D.txt").write_text(skeleton(frames))
    (tmp_path / "a13_s10_e02_skeleton3D.txt").write_text(skeleton(np.zeros((3, 20, 3))))

    done = prepared(tmp_path, "action3d", tmp_path)

    assert done.stdout.splitlines() == [
        "a13_s10_e02_skeleton3D.txt is left out: no frame has a skeleton",
        "action3d/train.npz: 2 sequences, 6 steps",
        "action3d/valid.npz: 1 sequences, 3 steps",
        "action3d/test.npz: 1 sequences, 3 steps",
    ]
    found = {split: np.load(tmp_path / "action3d" / f"{split}.npz") for split in SPLITS}
    assert found["train"]["labels"].tolist() == ["high arm wave", "pick up and throw"]
    assert found["valid"]["labels"].tolist() == ["bend"]
    assert found["test"]["labels"].tolist() == ["horizontal arm wave"]
    assert found["test"]["inputs"].shape == (3, 324)
    assert found["test"]["inputs"].dtype == np.float32


def test_a_feature_that_never_changes_stays_finite():
    standardized = features("standardized")
    vectors = np.array([[1.0, 5.0], [3.0, 5.0]])

    found = standardized({"train": [(vectors, "a")], "test": [(vectors + 2, "b")]})

    assert found["train"][0][0].tolist() == [[-1, 0], [1, 0]]
    assert found["test"][0][0].tolist() == [[1, 2], [3, 2]]


def test_features_of_a_group_share_their_deviation():
    vectors = np.array([[1.0, 5.0, 0.0, 7.0], [3.0, 5.0, 8.0, 7.0]])

    found = features("standardized")({"train": [(vectors, "a")]}, groups=2)["train"][0][0]

    np.testing.assert_allclose(found, np.array([[-1, 0, -1, 0], [1, 0, 1, 0]]) * 2**0.5)


def test_movement_depends_on_neither_place_nor_size_nor_direction():
    joints = np.random.default_rng(0).normal(size=(9, 20, 3))
    paths = np.random.default_rng(1).normal(size=(9, 1, 3))
    cosine, sine = np.cos(0.7), np.sin(0.7)
    turn = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
    movement = features("movement")

    found = movement(3 * joints @ turn + paths)

    np.testing.assert_allclose(found, movement(joints), atol=1e-12)


def test_changes_of_movement_are_over_four_and_eight_frames():
    vectors, changes, longer = np.split(
        features("movement")(np.random.default_rng(0).normal(size=(12, 20, 3))), 3, axis=1
    )

    np.testing.assert_allclose(changes[2:-2], vectors[4:] - vectors[:-4], atol=1e-12)
    np.testing.assert_allclose(longer[4:-4], vectors[8:] - vectors[:-8], atol=1e-12)


def test_people_face_the_camera():
    joints = np.random.default_rng(0).normal(size=(9, 20, 3))

    turned = features("facing_camera")(joints)

    hips, shoulders = turned[:, 5] - turned[:, 4], turned[:, 1] - turned[:, 0]
    x, _, z = (hips + shoulders).mean(axis=0)
    assert x > 0
    np.testing.assert_allclose(z, 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=2), np.linalg.norm(joints, axis=2))


@pytest.mark.parametrize("name", [name for name, _, _ in PUBLISHED])
def test_what_is_not_there_is_said(tmp_path, name):
    done = prepared(tmp_path, name, tmp_path / "nowhere")

    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "published", "problem"),
    [
        ("snips-intent", {"train.label": "A\n", "train.seq.in": "a\nb\n"}, "1 lines"),
        ("snips-slots", {"train.seq.in": "a b\n", "train.seq.out": "O\n"}, "2 tokens, 1 slots"),
        ("wnut17", {"train.conll": "a\tO\nb\n"}, "train.conll, line 2"),
        ("sst2", {"train.txt": "1 fine\ndull\n"}, "train.txt, line 2"),
        ("sst2", {"train.txt": b"1 f\xff\n"}, "train.txt is not UTF-8 text: byte 3"),
        ("multi30k", {"train.de": "ein\n\n", "train.en": "a\nb\n"}, "train.de, line 2: empty"),
        ("names", {"Irish.txt": "\n"}, "no examples for train"),
        ("splice", {"splice.data": "EI, NAME\n"}, "splice.data, line 1"),
        ("jsb", {"JSB_Chorales.mat": "MATLAB 5.0 MAT-file"}, "not a whole MATLAB file"),
        ("digits", {"recordings.tar.gz": "PK"}, "not a whole .tar.gz"),
        ("digits", {"0_anna_0.wav": recording(tone(100))[:-3]}, "1597 of 1600 bytes"),
        ("digits", {"0_anna_0.wav": recording(tone(100)[:0])}, "0 of 0 bytes"),
        ("digits", {"0_anna_0.wav": "RIFF"}, "0_anna_0.wav is not a .wav file"),
        ("digits", {"0_anna_0.wav": recording(tone(100), 16000)}, "but 1 of 16 at 16000"),
        ("digits", {"0_anna_0.wav": recording(tone(100))}, "no examples for train"),
        ("digits", {"zero.wav": ""}, "zero.wav is not named"),
        ("action3d", {"a01_s01_e01_skeleton3D.txt": "1 2 3 4\n"}, "not frames of 20 rows"),
        ("action3d", {"a21_s01_e01_skeleton3D.txt": ""}, "a21_s01_e01_skeleton3D.txt is not named"),
        ("action3d", {"a01_s01_e01_skeleton3D.txt": "nan " * 80}, "not finite"),
    ],
)
def test_what_is_wrong_with_a_source_is_said(tmp_path, name, published, problem):
    for path, content in published.items():
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode())

    done = prepared(tmp_path, name, tmp_path, "--out", "out")

    assert done.returncode == 3
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (cells(piece([0, 2])), "testdata, cell 1"),
        (cells(piece([1]), np.empty((0, 88))), "testdata, cell 2"),
        (cells(piece([1]), piece([1], keys=87)), "testdata, cell 2"),
        (np.array(["a"]), "testdata, cell 1"),
    ],
)
def test_music_is_keys_on_or_off(tmp_path, wrong, problem):
    write_music(tmp_path, testdata=wrong)

    done = prepared(tmp_path, "jsb", tmp_path, "--out", "out")

    assert done.returncode == 3
    assert problem in done.stderr
    assert not (tmp_path / "out").exists()


def test_files_come_out_the_same_every_time(tmp_path):
    write_music(tmp_path)

    first, second = ((outcome(tmp_path, "jsb") / "train.npz").read_bytes() for _ in range(2))

    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder", "counts"), PUBLISHED)
def test_published_data_come_out_whole(public_data, tmp_path, name, folder, counts):
    done = prepared(tmp_path, name, public_data / folder, "--out", "out")

    assert done.returncode == 0, done.stderr
    for split, count in zip(SPLITS, counts, strict=True):
        assert f"out/{split}." in done.stdout
        assert f": {count:,} " in next(
            line for line in done.stdout.splitlines() if line.startswith(f"out/{split}.")
        )
