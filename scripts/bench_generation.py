"""Times sampling, scoring and evaluation of a language model beside a plain loop of torch.nn.

    python scripts/bench_generation.py --threads 2

LSTM 2 x 650, vocabulary 10,000, new weights, fp32. Sampling: 64 texts in a batch, and one text,
beside `nn.LSTM` of the same size with `torch.multinomial`, in alternation; figures are medians.
Scoring: sentences of the lengths of the Penn Treebank's, and their text as one stream; the share of
the peak is multiply-adds per second over those of a large product of torch.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lmtrain import config, device
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.model.language_model import LanguageModel
from lmtrain.tasks import perplexity, sampling
from lmtrain.tasks.language_model import LanguageModelling, TextData
from lmtrain.tasks.sampling import Sampling

HIDDEN_SIZE, NUM_LAYERS, VOCAB_SIZE = 650, 2, 10_000
NUM_TOKENS = 40
NUM_SENTENCES, MEAN_LENGTH = 1000, 21
TOKENIZER = Tokenizer([UNK, EOS, *(f"w{index}" for index in range(2, VOCAB_SIZE))])


class TorchModel(nn.Module):
    """The same network of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
        self.lstm = nn.LSTM(HIDDEN_SIZE, HIDDEN_SIZE, NUM_LAYERS)
        self.head = nn.Linear(HIDDEN_SIZE, VOCAB_SIZE)

    def forward(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits (T, B, V) and the final state."""
        hidden, state = self.lstm(self.embedding(tokens), state)
        return self.head(hidden), state


def lmtrain_model() -> LanguageModel:
    """A new language model of lmtrain."""
    resolved = config.load(
        overrides={
            "model.hidden_size": HIDDEN_SIZE,
            "model.num_layers": NUM_LAYERS,
            "data.vocab_size": VOCAB_SIZE,
            "train.precision": "fp32",
        }
    )
    return LanguageModelling.build(resolved, TextData(TOKENIZER)).eval()


@torch.no_grad()
def sample_torch(model: TorchModel, num: int) -> None:
    """Samples NUM_TOKENS tokens of `num` texts."""
    tokens, state = torch.ones(1, num, dtype=torch.long), None
    for _ in range(NUM_TOKENS):
        logits, state = model(tokens, state)
        tokens = torch.multinomial(logits[0].softmax(-1), 1).T


def sample_lmtrain(model: LanguageModel, num: int) -> None:
    """Samples NUM_TOKENS tokens of `num` texts, none of which ends earlier."""
    chosen = Sampling(num=num, max_tokens=NUM_TOKENS)
    ends = sampling.Ends(TOKENIZER.eos_id, None)
    for _ in sampling.generate(model, TOKENIZER, [], chosen, ends):
        pass


def seconds(action: Callable[[], object]) -> float:
    """Duration of a call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak() -> float:
    """Multiply-adds per second of a large product."""
    a = torch.randn(2048, 2048)
    return 2048**3 / min(seconds(lambda: a @ a) for _ in range(10))


def main() -> None:
    """Measures and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device.keep_memory()
    ours, theirs = lmtrain_model(), TorchModel().eval()
    print(f"{options.threads} threads, torch {torch.__version__}, fp32, tokens per second")
    for num in (64, 1):
        times: tuple[list[float], list[float]] = ([], [])
        sample_lmtrain(ours, num)
        sample_torch(theirs, num)
        for _ in range(options.rounds):
            times[0].append(seconds(lambda num=num: sample_lmtrain(ours, num)))
            times[1].append(seconds(lambda num=num: sample_torch(theirs, num)))
        ours_speed, torch_speed = (num * NUM_TOKENS / statistics.median(each) for each in times)
        print(
            f"sample {num:>2}: lmtrain {ours_speed:,.0f}, torch.nn {torch_speed:,.0f}, "
            f"ratio {ours_speed / torch_speed:.2f}"
        )
    generator = np.random.default_rng(1)
    lengths = generator.poisson(MEAN_LENGTH, NUM_SENTENCES) + 1
    sentences = [generator.integers(2, VOCAB_SIZE, length).tolist() for length in lengths]
    ids = np.concatenate(sentences)
    text = Tokens(ids, len(ids), "0" * 64, "random tokens")
    adds = NUM_LAYERS * 8 * HIDDEN_SIZE**2 + HIDDEN_SIZE * VOCAB_SIZE
    highest = peak()
    for name, action in (
        ("score", lambda: perplexity.sentence_log_probs(ours, sentences, TOKENIZER.eos_id)),
        ("evaluate, 1 stream", lambda: perplexity.evaluate(ours, text, TOKENIZER)),
        ("evaluate, 20 streams", lambda: perplexity.evaluate(ours, text, TOKENIZER, batch_size=20)),
    ):
        speed = len(ids) / min(seconds(action) for _ in range(3))
        print(f"{name}: {speed:,.0f}, {100 * speed * adds / highest:.0f} % of a large product")


if __name__ == "__main__":
    main()
