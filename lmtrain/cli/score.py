"""`lmtrain score`: log-probabilities of sentences."""

import math
import sys
from enum import StrEnum
from typing import Annotated

import typer

from lmtrain import screen
from lmtrain.cli.loading import DeviceOption, RunArgument, load_with
from lmtrain.cli.output import JsonOption, print_json


class Base(StrEnum):
    """The base of the logarithms."""

    e = "e"
    two = "2"
    ten = "10"

    @property
    def nats(self) -> float:
        """Nats in one unit of this base."""
        return {"e": 1.0, "2": math.log(2), "10": math.log(10)}[self.value]


def command(
    run: RunArgument,
    file: Annotated[
        str, typer.Argument(help="A text file, one sentence a line; - for standard input.")
    ] = "-",
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Print each token with its log P.")
    ] = False,
    base: Annotated[Base, typer.Option(help="Base of the logarithms.")] = Base.e,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Print log P, the log probability, of each line of a text.

    The end of a line is included; higher is more likely.

    \b
    echo "the apple and pear salad" | lmtrain score runs/recipes
    lmtrain score runs/recipes candidates.txt --per-token --base 10
    """
    from lmtrain.data import corpus

    model = load_with("score", run, device)
    num_unknown = 0
    for scored in model.score(corpus.open_text([file]).lines()):
        unit = base.nats
        num_unknown += scored.oov
        log_probs = [nats / unit for nats in scored.log_probs]
        if json:
            entry = {"text": scored.text, "log_prob": scored.log_prob / unit, "base": base.value,
                     "tokens": len(log_probs), "oov": scored.oov}  # fmt: skip
            if per_token:
                pairs = zip(scored.tokens, log_probs, strict=True)
                entry["per_token"] = [{"token": token, "log_prob": p} for token, p in pairs]
            print_json("lmtrain.score/1", entry, indent=None)
            continue
        print(f"{scored.log_prob / unit:.4f}\t{_shown(scored.text)}")
        if per_token:
            for token, p in zip(scored.tokens, log_probs, strict=True):
                print(f"  {p:.4f}\t{_shown(token)}")
    if num_unknown and model.config.data.level == "word":
        screen.note(
            f"warning: words not in the vocabulary: {num_unknown:,}; each is scored as <UNK>: "
            "compare sentences with the same number of them"
        )


def _shown(text: str) -> str:
    return screen.one_line(text) if sys.stdout.isatty() or text == "\n" else text
