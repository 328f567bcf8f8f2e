"""Times a training step and a prediction of a language model with each softmax.

    python scripts/bench_softmax.py --vocab-size 100000

LSTM 1 x 512, 20 streams of 35 tokens, word frequencies proportional to 1 / rank, SGD. The softmaxes
are timed in alternation; times are medians.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from lmtrain import config, device
from lmtrain.data.tokenizer import EOS, UNK, Tokenizer
from lmtrain.data.tokens import Tokens
from lmtrain.model.lookup import allow_sparse_gradients
from lmtrain.tasks.base import Shard
from lmtrain.tasks.language_model import LanguageModelling, TextData

ROUNDS = 8
STREAMS, STEPS = 20, 35


def task(softmax: str, vocab_size: int) -> LanguageModelling:
    """The task of a language model with `softmax`, on random tokens."""
    resolved = config.load(
        overrides={
            "model.softmax": softmax, "model.hidden_size": 512, "model.num_layers": 1,
            "optimizer.name": "sgd", "train.batch_size": STREAMS, "train.seq_len": STEPS,
            "train.state_reset": 0,
        }
    )  # fmt: skip
    length = STREAMS * (ROUNDS * STEPS + 1)
    ranks = vocab_size ** np.random.default_rng(1).random(length)
    ids = ranks.astype(np.uint32).clip(max=vocab_size - 1)
    tokenizer = Tokenizer([UNK, EOS, *(f"w{index}" for index in range(2, vocab_size))])
    data = TextData(tokenizer, {"train": Tokens(ids, length, "0" * 64, "random tokens")})
    model = LanguageModelling.build(resolved, data)
    allow_sparse_gradients(model)
    return LanguageModelling(resolved, data, model, Shard())


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device.keep_memory()
    tasks = {name: task(name, options.vocab_size) for name in ("full", "sampled", "adaptive")}
    training: dict[str, list[float]] = {name: [] for name in tasks}
    predicting: dict[str, list[float]] = {name: [] for name in tasks}
    for step in range(ROUNDS):
        for name, each in tasks.items():
            batch, model = each.batch(step), each.model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
            start = time.perf_counter()
            each.loss(batch, None).objective.backward()
            optimizer.step()
            training[name].append(time.perf_counter() - start)
            optimizer.zero_grad()
            model.eval()
            start = time.perf_counter()
            model.log_probs(*batch.tensors)
            predicting[name].append(time.perf_counter() - start)
    print(
        f"vocabulary {options.vocab_size:,}, {options.threads} threads, torch {torch.__version__}"
    )
    for name, each in tasks.items():
        print(
            f"{name:>8}: training {1e3 * statistics.median(training[name]):,.0f} ms, predicting "
            f"{1e3 * statistics.median(predicting[name]):,.0f} ms, "
            f"{each.model.num_parameters:,} parameters"
        )


if __name__ == "__main__":
    main()
