"""BLEU of translations, computed by sacrebleu."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmtrain.errors import ConfigError
from lmtrain.tasks.base import Metrics

_ORDERS = 4
_STATISTICS = 2 * _ORDERS + 2


def _metric() -> Any:
    """The BLEU metric of sacrebleu for text that is tokenized by white space.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ConfigError(
            "evaluating translations needs sacrebleu, which is not installed",
            "try: pip install 'lmtrain[translate]'",
        ) from None
    metric = BLEU(tokenize="none", force=True)
    metric.num_refs = 1  # which its signature names
    return metric


def require() -> None:
    """Checks that BLEU can be computed.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    _metric()


def statistics(pairs: Iterable[tuple[str, str]]) -> tuple[float, ...]:
    """The counts of `Bleu` over pairs of a translation and its reference."""
    sums = [0.0] * _STATISTICS
    metric = _metric()
    for translation, reference in pairs:
        found = metric.corpus_score([translation], [[reference]])
        counts = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
    return tuple(sums)


@dataclass(frozen=True)
class Bleu(Metrics):
    """BLEU of translations, and the loss of their references.

    Args:
        total_nats: Σ −log P of the tokens of the references.
        count: number of these tokens.
        statistics: for n-grams of 1 to 4 words the number of matches, then the number in the
            translations; the length of the translations and of the references in words.

    Source: Papineni et al. 2002; Post 2018.
    """

    headline = "bleu"
    is_higher_better = True
    digits = 2

    statistics: tuple[float, ...]

    @classmethod
    def from_sums(cls, sums: Sequence[float]) -> "Bleu":
        """The metrics with these values of their fields."""
        return cls(sums[0], sums[1], tuple(sums[2:]))

    @classmethod
    def zero(cls) -> "Bleu":
        """The metrics of no translations."""
        return cls(0.0, 0.0, (0.0,) * _STATISTICS)

    @property
    def sums(self) -> list[float]:
        """The values of the fields."""
        return [self.total_nats, self.count, *self.statistics]

    @property
    def bleu(self) -> float:
        """BLEU, 0 to 100."""
        counts, metric = [int(each) for each in self.statistics], _metric()
        found = metric.compute_bleu(
            correct=counts[:_ORDERS],
            total=counts[_ORDERS : 2 * _ORDERS],
            sys_len=counts[-2],
            ref_len=counts[-1],
            # sacrebleu smooths the counts of sentences without a matching 4-gram.
            smooth_method=metric.smooth_method,
            smooth_value=metric.smooth_value,
        )
        return float(found.score)

    @property
    def length_ratio(self) -> float:
        """Length of the translations over the length of the references, in words."""
        length, reference = self.statistics[-2:]
        return length / max(1, reference)

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {
            "loss": self.loss,
            "bleu": self.bleu,
            "length_ratio": self.length_ratio,
        }

    def table(self) -> list[tuple[str, str]]:
        """Names and formatted values of all figures."""
        return [
            ("BLEU", f"{self.bleu:.2f}"),
            ("sacrebleu", str(_metric().get_signature())),
            ("length ratio", f"{self.length_ratio:.3f}"),
            ("loss (nats per token)", f"{self.loss:.5f}"),
            ("tokens", f"{self.count:,.0f}"),
        ]
