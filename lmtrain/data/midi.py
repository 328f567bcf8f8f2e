"""Writes frames of piano keys as a MIDI file and as a piano roll.

A frame is a time step: 0 or 1 for each key. MIDI needs mido.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain.errors import ConfigError

_LOWEST_PIANO_NOTE, _PIANO_KEYS, _MIDI_NOTES = 21, 88, 128
_TICKS_PER_STEP = 240
_VELOCITY = 80
# Microseconds per beat of 480 ticks: a step of 240 ticks lasts 0.25 seconds.
_TEMPO = 500_000
# Pixels of a key and of a step in a piano roll.
_KEY_HEIGHT, _STEP_WIDTH = 4, 6


def midi(frames: NDArray[Any]) -> bytes:
    """A MIDI file of frames (T, F); a key that is on in several steps is held.

    88 keys start at note 21, as on a piano; other numbers of keys are centred in the MIDI range.

    Raises:
        ConfigError: mido is not installed, or there are more keys than MIDI has notes.
    """
    try:
        import mido
    except ImportError:
        raise ConfigError("MIDI files need mido: pip install 'lmtrain[music]'") from None
    _, keys = frames.shape
    if keys > _MIDI_NOTES:
        raise ConfigError(
            f"frames of {keys} keys cannot be written as MIDI: it has {_MIDI_NOTES} notes"
        )
    lowest = _lowest_note(keys)
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=_TEMPO)])
    silence = np.zeros((1, keys), np.int8)
    changes = np.diff(np.concatenate([silence, frames.astype(np.int8), silence]), axis=0)
    written = 0
    for step, change in enumerate(changes):
        # Keys are released before others are pressed.
        for kind, sign in (("note_off", -1), ("note_on", 1)):
            for key in np.flatnonzero(change == sign).tolist():
                ticks = step * _TICKS_PER_STEP - written
                note = lowest + key
                track.append(mido.Message(kind, note=note, velocity=_VELOCITY, time=ticks))
                written += ticks
    file = mido.MidiFile(type=0, tracks=[track])
    content = io.BytesIO()
    file.save(file=content)
    return content.getvalue()


def _lowest_note(keys: int) -> int:
    """The MIDI note of the first of so many keys."""
    return _LOWEST_PIANO_NOTE if keys == _PIANO_KEYS else (_MIDI_NOTES - keys) // 2


def picture(frames: NDArray[Any]) -> NDArray[np.uint8]:
    """A piano roll of frames (T, F): grey values (F · 4, T · 6), high notes at the top."""
    image = np.where(frames.T[::-1] > 0, 0, 255).astype(np.uint8)
    # A grey line at each C.
    keys = len(image)
    is_c = (np.arange(keys)[::-1] + _lowest_note(keys)) % 12 == 0
    image[is_c] = np.minimum(image[is_c], 224)
    enlarged: NDArray[np.uint8] = image.repeat(_KEY_HEIGHT, 0).repeat(_STEP_WIDTH, 1)
    return enlarged


def png(frames: NDArray[Any]) -> bytes:
    """The piano roll as a PNG file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture(frames)).save(content, "PNG")
    return content.getvalue()
