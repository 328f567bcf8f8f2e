"""BLEU of translations, counted by sacrebleu."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lmtrain.errors import ConfigError
from lmtrain.tasks.base import Metrics

_ORDERS = 4


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


def statistics(pairs: Iterable[tuple[str, str]]) -> list[float]:
    """Counts over translations and references, which add up: those of `Bleu` after the loss."""
    sums = [0.0] * (2 * _ORDERS + 2)
    metric = _metric()
    for translation, reference in pairs:
        found = metric.corpus_score([translation], [[reference]])
        counts = [*found.counts, *found.totals, found.sys_len, found.ref_len]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
    return sums


@dataclass(frozen=True)
class Bleu(Metrics):
    """How well translations agree with their references.

    Args:
        total_nats: Σ −log P of the references' tokens.
        count: these tokens.
        matches_1: words that a translation and its reference share.
        matches_2: pairs of words.
        matches_3: three words.
        matches_4: four words.
        words_1: words of the translations.
        words_2: pairs of words in them.
        words_3: three words in them.
        words_4: four words in them.
        length: words of the translations.
        reference_length: words of the references.

    Source: Papineni et al. 2002; Post 2018.
    """

    headline = "bleu"
    is_higher_better = True
    digits = 2

    matches_1: float
    matches_2: float
    matches_3: float
    matches_4: float
    words_1: float
    words_2: float
    words_3: float
    words_4: float
    length: float
    reference_length: float

    @property
    def bleu(self) -> float:
        """BLEU, 0 to 100."""
        sums, metric = [int(each) for each in self.sums[2:]], _metric()
        found = metric.compute_bleu(
            correct=sums[:_ORDERS],
            total=sums[_ORDERS : 2 * _ORDERS],
            sys_len=sums[-2],
            ref_len=sums[-1],
            # Without it, one without four words in a row is 0, unlike sacrebleu's.
            smooth_method=metric.smooth_method,
            smooth_value=metric.smooth_value,
        )
        return float(found.score)

    def values(self) -> dict[str, float | None]:
        """All figures by name."""
        return {
            "loss": self.loss,
            "bleu": self.bleu,
            "length_ratio": self.length / max(1, self.reference_length),
        }

    def table(self) -> list[tuple[str, str]]:
        """All figures, as a person reads them."""
        return [
            ("BLEU", f"{self.bleu:.2f}"),
            ("sacrebleu", str(_metric().get_signature())),
            ("length over that of references", f"{self.values()['length_ratio']:.3f}"),
            ("loss (nats per token)", f"{self.loss:.5f}"),
            ("tokens", f"{self.count:,.0f}"),
        ]
