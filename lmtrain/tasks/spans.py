"""Spans of tagged tokens, and how well they are found: the F1 of named entities.

Source: the evaluation of the CoNLL shared tasks, conlleval (Tjong Kim Sang & Buchholz 2000).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmtrain.tasks.base import Metrics


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Kind, first token and the token after the last of each span.

    B-KIND begins a span; I-KIND goes on with one of its kind, and else begins one. O is outside. A
    tag of any other form, such as a part of speech, is a span of one token.

    Example:
        >>> list(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "NN"]))
        [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5), ('NN', 5, 6)]
    """
    open_kind, first = "", 0
    for index, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "I" and kind and kind == open_kind:
            continue
        if open_kind:
            yield open_kind, first, index
        is_bio = prefix in ("B", "I") and kind
        open_kind, first = (kind if is_bio else ""), index
        if not is_bio and tag != "O":
            yield tag, index, index + 1
    if open_kind:
        yield open_kind, first, len(tags)


@dataclass(frozen=True)
class SpanF1(Metrics):
    """How well tags and the spans that they form are predicted.

    Args:
        total_nats: Σ −log P of the right tags.
        count: tokens.
        correct: tokens whose most likely tag is right.
        predicted: spans of the most likely tags.
        true: spans of the right tags.
        matched: spans of both, with the same kind, beginning and end.
    """

    headline = "span_f1"
    is_higher_better = True

    correct: float
    predicted: float
    true: float
    matched: float

    @property
    def span_f1(self) -> float:
        """F1 = 2 PR / (P + R), the same as 2 · matched / (predicted + true)."""
        return 2 * self.matched / max(1, self.predicted + self.true)

    @property
    def precision(self) -> float:
        """The fraction of predicted spans that are right."""
        return self.matched / max(1, self.predicted)

    @property
    def recall(self) -> float:
        """The fraction of spans that are found."""
        return self.matched / max(1, self.true)

    @property
    def accuracy(self) -> float:
        """The fraction of tokens whose tag is right."""
        return self.correct / self.count

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {
            "loss": self.loss,
            "span_f1": self.span_f1,
            "precision": self.precision,
            "recall": self.recall,
            "accuracy": self.accuracy,
            "spans": round(self.true),
        }

    def table(self) -> list[tuple[str, str]]:
        """All figures, as a person reads them."""
        return [
            ("span F1", f"{self.span_f1:.4f}"),
            ("precision", f"{self.precision:.4f}"),
            ("recall", f"{self.recall:.4f}"),
            ("spans", f"{self.true:,.0f}"),
            ("accuracy of tokens", f"{self.accuracy:.4f}"),
            ("loss (nats per token)", f"{self.loss:.5f}"),
            ("tokens", f"{self.count:,.0f}"),
        ]
