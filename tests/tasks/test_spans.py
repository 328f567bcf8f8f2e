import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.padded import pad
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.tasks.examples import Examples
from lmtrain.tasks.spans import SpanF1, spans
from lmtrain.tasks.tag import TaggedData, Tagging

TAGS = ["O", "B-X", "I-X", "B-Y", "I-Y"]
# Of each sentence, the right and the predicted tags.
sentences = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=9),
    min_size=1,
    max_size=4,
)


class Chunks:
    """The chunks of one column of tags, token by token, as conlleval finds them."""

    def __init__(self):
        self.prefix, self.kind, self.count = "O", "", 0

    def take(self, tag):
        """Whether a chunk ends before this tag, whether one starts at it, and its kind."""
        prefix, _, kind = tag.partition("-")
        pair = self.prefix + prefix
        has_changed = kind != self.kind
        ends = pair in ("BB", "BO", "IB", "IO") or (self.prefix != "O" and has_changed)
        starts = pair in ("BB", "IB", "OB", "OI") or (prefix != "O" and has_changed)
        self.prefix, self.kind = prefix, kind
        self.count += starts
        return ends, starts, kind


def conlleval(examples):
    """Predicted, true and matched chunks and the F1, counted in the way of conlleval's loop."""
    true, predicted = Chunks(), Chunks()
    matched, is_in_both = 0, False
    # conlleval takes the end of a sentence for a token outside.
    for right, guess in (pair for each in examples for pair in [*each, ("O", "O")]):
        (ends, starts, kind), other = true.take(right), predicted.take(guess)
        if is_in_both and (ends or other[0]):
            matched += ends and other[0]
            is_in_both = False
        is_in_both |= starts and other[1] and kind == other[2]
    precision = matched / predicted.count if predicted.count else 0
    recall = matched / true.count if true.count else 0
    f1 = 2 * precision * recall / (precision + recall) if matched else 0
    return predicted.count, true.count, matched, f1


@settings(max_examples=100, deadline=None)
@given(sentences)
def test_f1_is_that_of_conlleval(examples):
    truth = [np.array([TAGS.index(tag) for tag, _ in each]) for each in examples]
    guesses, lengths = pad([np.array([TAGS.index(tag) for _, tag in each]) for each in examples])
    padded, _ = pad(truth)
    logits = torch.nn.functional.one_hot(torch.tensor(guesses).clamp(min=0), len(TAGS)).float()
    data = TaggedData(Tokenizer([UNK, EOS]), TAGS)

    found = Tagging.batch_metrics(
        lambda tokens, lengths: logits,
        data,
        (torch.tensor(padded), torch.tensor(lengths), torch.tensor(padded)),
        Examples(truth, truth, "", ""),
        np.arange(len(examples)),
    )

    predicted, true, matched, f1 = conlleval(examples)
    assert (found.predicted, found.true, found.matched) == (predicted, true, matched)
    assert found.span_f1 == pytest.approx(f1)
    assert found.count == sum(map(len, examples))
    assert found.correct == sum(tag == guess for each in examples for tag, guess in each)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], []),
        (["O", "O"], []),
        (["B-X", "I-X", "B-X"], [("X", 0, 2), ("X", 2, 3)]),
        (["I-X", "I-Y", "I-Y"], [("X", 0, 1), ("Y", 1, 3)]),
        (["B-X", "O", "I-X"], [("X", 0, 1), ("X", 2, 3)]),
        (["B-a-b", "I-a-b"], [("a-b", 0, 2)]),
        (["NN", "B-X", "NN", "I-X"], [("NN", 0, 1), ("X", 1, 2), ("NN", 2, 3), ("X", 3, 4)]),
        (["B", "I", "B-"], [("B", 0, 1), ("I", 1, 2), ("B-", 2, 3)]),
    ],
)
def test_spans_of_tags(tags, expected):
    assert list(spans(tags)) == expected


def test_nothing_predicted_and_nothing_to_find_is_no_division_by_zero():
    figures = SpanF1(0.5, 2, 2, 0, 0, 0).values()

    assert figures == {
        "loss": 0.25, "span_f1": 0, "precision": 0, "recall": 0, "accuracy": 1, "spans": 0,
    }  # fmt: skip
