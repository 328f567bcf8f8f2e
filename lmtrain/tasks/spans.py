"""Spans of tagged tokens and their F1, as for named entities.

Source: the evaluation of the CoNLL shared tasks, conlleval (Tjong Kim Sang & Buchholz 2000).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmtrain.tasks.base import Metrics


def spans(tags: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """The type, the first token and the token after the last token of each span.

    B-TYPE starts a span; I-TYPE continues a span of the same type, or else starts one. O is
    outside. A tag of any other form, such as a part of speech, is a span of one token.

    Example:
        >>> list(spans(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "NN"]))
        [('PER', 0, 2), ('LOC', 3, 4), ('LOC', 4, 5), ('NN', 5, 6)]
    """
    open_type, first = "", 0
    for index, tag in enumerate(tags):
        prefix, _, span_type = tag.partition("-")
        if prefix == "I" and span_type and span_type == open_type:
            continue
        if open_type:
            yield open_type, first, index
        is_bio = prefix in ("B", "I") and span_type
        open_type, first = (span_type if is_bio else ""), index
        if not is_bio and tag != "O":
            yield tag, index, index + 1
    if open_type:
        yield open_type, first, len(tags)


@dataclass(frozen=True)
class SpanF1(Metrics):
    """F1 of spans and accuracy of tags.

    Args:
        total_nats: Σ −log P of the correct tags.
        count: number of tokens.
        correct: number of tokens whose most likely tag is correct.
        predicted: number of spans in the most likely tags.
        true: number of spans in the correct tags.
        matched: number of spans in both, with the same type, start and end.
    """

    headline = "span_f1"
    is_higher_better = True

    correct: float
    predicted: float
    true: float
    matched: float

    @property
    def span_f1(self) -> float:
        """F1 = 2 PR / (P + R) = 2 · matched / (predicted + true)."""
        return 2 * self.matched / max(1, self.predicted + self.true)

    @property
    def precision(self) -> float:
        """The fraction of predicted spans that are correct."""
        return self.matched / max(1, self.predicted)

    @property
    def recall(self) -> float:
        """The fraction of true spans that are predicted."""
        return self.matched / max(1, self.true)

    @property
    def accuracy(self) -> float:
        """The fraction of tokens whose tag is correct."""
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
        """Names and formatted values of all figures."""
        return [
            ("span F1", f"{self.span_f1:.4f}"),
            ("precision", f"{self.precision:.4f}"),
            ("recall", f"{self.recall:.4f}"),
            ("spans", f"{self.true:,.0f}"),
            ("accuracy of tokens", f"{self.accuracy:.4f}"),
            ("loss (nats per token)", f"{self.loss:.5f}"),
            ("tokens", f"{self.count:,.0f}"),
        ]
