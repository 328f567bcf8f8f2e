import io
import sys

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from lmtrain.data.midi import midi, picture, png
from lmtrain.errors import ConfigError

STEP_SECONDS = 0.25


def notes(content: bytes) -> list[tuple[int, float, float]]:
    """Number, beginning and end in seconds of each note of a MIDI file."""
    found, sounding, seconds = [], {}, 0.0
    for message in mido.MidiFile(file=io.BytesIO(content)):
        seconds += message.time
        if message.type == "note_on":
            assert message.velocity > 0
            assert message.note not in sounding
            sounding[message.note] = seconds
        elif message.type == "note_off":
            found.append((message.note, sounding.pop(message.note), seconds))
    assert not sounding
    return sorted(found)


def runs(frames, lowest: int) -> list[tuple[int, float, float]]:
    """The same of frames: where each key is on from which step to which."""
    found = []
    for key, column in enumerate(frames.T.tolist()):
        first = None
        for step, is_on in enumerate([*column, 0]):
            if is_on and first is None:
                first = step
            elif not is_on and first is not None:
                found.append((lowest + key, first * STEP_SECONDS, step * STEP_SECONDS))
                first = None
    return sorted(found)


@settings(deadline=None)
@given(
    st.sampled_from([(1, 20), (7, 60), (88, 21), (127, 0), (128, 0)]).flatmap(
        lambda keys: st.tuples(
            arrays(np.int8, st.tuples(st.integers(1, 9), st.just(keys[0])),
                   elements=st.integers(0, 1)),
            st.just(keys[1] if keys[0] != 1 else 63),
        )
    )
)  # fmt: skip
def test_a_midi_file_has_the_notes_of_its_frames(drawn):
    frames, lowest = drawn

    found = notes(midi(frames))

    assert [note for note, *_ in found] == [note for note, *_ in runs(frames, lowest)]
    assert np.array(found) == pytest.approx(np.array(runs(frames, lowest)), abs=1e-6)


def test_more_keys_than_midi_has_are_refused():
    message = r"^frames of 129 keys cannot be written as MIDI: it has 128 notes$"
    with pytest.raises(ConfigError, match=message):
        midi(np.zeros((2, 129), np.int8))


def test_without_mido_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mido", None)

    with pytest.raises(ConfigError, match=r"need mido: pip install 'lmtrain\[music\]'$"):
        midi(np.zeros((2, 3), np.int8))


@pytest.mark.parametrize("shape", [(1, 1), (5, 88), (3, 7)])
def test_a_picture_has_time_from_left_to_right_and_high_notes_at_the_top(shape):
    frames = np.zeros(shape, np.int8)
    frames[-1, 0] = 1

    found = picture(frames)

    steps, keys = shape
    assert found.shape == (4 * keys, 6 * steps)
    assert found.dtype == np.uint8
    is_black = found == 0
    assert is_black[-4:, -6:].all()
    assert is_black.sum() == 4 * 6
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(frames)))), found)


@pytest.mark.parametrize("keys", [88, 24, 128])
def test_a_picture_has_a_grey_line_at_each_c_of_the_midi_file(keys):
    frames = np.eye(keys, dtype=np.int8)
    numbers = [number for number, _, _ in notes(midi(frames))]

    found = picture(np.zeros((1, keys), np.int8))

    grey = [key for key in range(keys) if found[4 * (keys - 1 - key), 0] < 255]
    assert grey == [key for key, number in enumerate(numbers) if number % 12 == 0]
    assert grey
