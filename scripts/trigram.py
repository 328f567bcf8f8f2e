"""Perplexity of an interpolated Kneser-Ney trigram model, a baseline without a network.

    python scripts/trigram.py                              # the Python manuals
    python scripts/trigram.py --config ptb-small           # a recipe's text
    python scripts/trigram.py --set data.train=novel.txt   # any text

Text, vocabulary and validation data are those of `lmtrain train` with the same settings. As for the
recurrent models, contexts cross line ends, which are `<EOS>`. One discount per order,
n1 / (n1 + 2 n2).

Source: Kneser & Ney 1995; Chen & Goodman 1998, section 4.1.6.
"""

import argparse
import math
from collections import Counter, defaultdict

from lmtrain import config
from lmtrain.tasks.language_model import LanguageModelling


class Order:
    """One order of the model: discounted counts of what follows each context.

    Args:
        counts: how often each word followed each context.
    """

    def __init__(self, counts: dict[tuple, Counter]) -> None:
        self.counts = counts
        self.totals = {context: sum(after.values()) for context, after in counts.items()}
        of_counts = Counter(n for after in counts.values() for n in after.values())
        self.discount = of_counts[1] / (of_counts[1] + 2 * of_counts[2]) if of_counts[1] else 0.5

    def probability(self, context: tuple, word: int, below: float) -> float:
        """P(word | context), interpolated with that of the order below."""
        after = self.counts.get(context)
        if after is None:
            return below
        kept = max(after[word] - self.discount, 0)
        return (kept + self.discount * len(after) * below) / self.totals[context]


def orders(ids: list[int]) -> list[Order]:
    """Unigrams to trigrams: the highest order by counts, the others by distinct words before."""
    trigrams = defaultdict(Counter)
    for first, second, third in zip(ids, ids[1:], ids[2:], strict=False):
        trigrams[first, second][third] += 1
    bigrams, unigrams = defaultdict(Counter), defaultdict(Counter)
    for (_, second), after in trigrams.items():
        for word in after:
            bigrams[(second,)][word] += 1
    for after in bigrams.values():
        for word in after:
            unigrams[()][word] += 1
    return [Order(unigrams), Order(bigrams), Order(trigrams)]


def loss(model: list[Order], ids: list[int], before: list[int], vocab_size: int) -> float:
    """Mean nats a word of a text after the words `before` it."""
    total, history = 0.0, before[-2:]
    for word in ids:
        p = 1 / vocab_size
        for length, order in enumerate(model):
            context = tuple(history[len(history) - length :])
            p = order.probability(context, word, p)
        total -= math.log(p)
        history = [*history[-1:], word]
    return total / len(ids)


def main() -> None:
    """Counts, and prints what it comes to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="python-docs", help="recipe or settings file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    settings = config.load(options.config, config.assignments(options.set))
    data = LanguageModelling.read(settings)
    tokenizer, texts = data.tokenizer, data.texts
    model = orders(texts["train"].ids.tolist())
    start = tokenizer.start_id if tokenizer.start_id is not None else 0
    for part in ("valid", "test"):
        if part in texts:
            nats = loss(model, texts[part].ids.tolist(), [start, start], tokenizer.vocab_size)
            print(f"{part}: Kneser-Ney trigram perplexity {math.exp(nats):.2f}")


if __name__ == "__main__":
    main()
