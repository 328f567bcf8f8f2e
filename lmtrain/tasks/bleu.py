"""BLEU of translations, counted by sacrebleu."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmtrain.errors import ConfigError
from lmtrain.tasks.base import Metrics

_ORDERS = 4
_STATISTICS = 2 * _ORDERS + 2


def _metric() -> Any:
    """The BLEU of sacrebleu for text whose tokens have white space between them.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ConfigError(
            "translations are measured by sacrebleu", "try: pip install 'lmtrain[translate]'"
        ) from None
    metric = BLEU(tokenize="none", force=True)
    metric.num_refs = 1  # which its signature names
    return metric


def require() -> None:
    """Checks that BLEU can be counted.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    _metric()


def statistics(pairs: Iterable[tuple[str, str]]) -> tuple[float, ...]:
    """Counts over translations and references, which add up: see `Bleu`."""
    sums = [0.0] * _STATISTICS
    metric = _metric()
    for translation, reference in pairs:
        found = metric.corpus_score([translation], [[reference]])
        counts = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
    return tuple(sums)


@dataclass(frozen=True)
class Bleu(Metrics):
    """How well translations agree with their references.

    Args:
        total_nats: Σ −log P of the references' tokens.
        count: these tokens.
        statistics: one to four words in a row that a translation and its reference share, as many
            in a row of the translations, words of the translations and of the references.

    Source: Papineni et al. 2002; Post 2018.
    """

    headline = "bleu"
    is_higher_better = True
    digits = 2

    statistics: tuple[float, ...]

    @classmethod
    def of(cls, sums: Sequence[float]) -> "Bleu":
        """The metrics with these numbers in their order."""
        return cls(sums[0], sums[1], tuple(sums[2:]))

    @classmethod
    def nothing(cls) -> "Bleu":
        """The metrics of no translation."""
        return cls(0.0, 0.0, (0.0,) * _STATISTICS)

    @property
    def sums(self) -> list[float]:
        """All numbers in a row."""
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
            # Without it, one without four words in a row is 0, unlike sacrebleu's.
            smooth_method=metric.smooth_method,
            smooth_value=metric.smooth_value,
        )
        return float(found.score)

    @property
    def length_ratio(self) -> float:
        """Words of the translations over those of the references."""
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
        """All figures, as a person reads them."""
        return [
            ("BLEU", f"{self.bleu:.2f}"),
            ("sacrebleu", str(_metric().get_signature())),
            ("length over that of references", f"{self.length_ratio:.3f}"),
            ("loss (nats per token)", f"{self.loss:.5f}"),
            ("tokens", f"{self.count:,.0f}"),
        ]
