"""`lmtrain evaluate`: how well a model predicts text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain.cli.output import JsonOption, print_json, print_table, shown
from lmtrain.errors import ConfigError, TextError

if TYPE_CHECKING:
    from lmtrain.evaluation import Evaluation


def command(
    run: Annotated[
        str, typer.Argument(help="A run, meaning its best checkpoint, or a checkpoint.")
    ],
    file: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, globs, - or corpora (of these the test part, if they have one); "
            "without any, the run's own validation and test text.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Streams a text is cut into: more is faster, a little worse.")
    ] = 1,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,SHARPNESS,WEIGHT",
            help="Point to words that followed states like the present one.",
            show_default=False,
        ),
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,DECAY,TOKENS",
            help="Let the weights learn from the text after every so many tokens.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Print perplexity and bits per character of text under a model, every token counted once.

    \b
    lmtrain evaluate runs/python-docs-lstm-1
    lmtrain evaluate runs/ptb test.txt --json
    lmtrain evaluate runs/ptb --cache 2000,0.3,0.2             numbers from lmtrain tune
    """
    of_cache = _numbers("--cache", cache, (int, float, float)) if cache else None
    of_dynamic = _numbers("--dynamic", dynamic, (float, float, int)) if dynamic else None
    # torch is imported only now, so that wrong options are answered at once.
    from lmtrain import api
    from lmtrain.adaptation import Cache, Dynamic

    pointer = Cache(*of_cache) if of_cache else None
    learning = Dynamic(*of_dynamic) if of_dynamic else None
    model = api.load(run, device_name=device)
    if file:
        # All are read before the first is predicted: what cannot be read is said at once.
        texts = {place: model.tokens([place]) for place in file}
    else:
        texts = {f"{part}: {tokens.name}": tokens for part, tokens in model.own_texts().items()}
    if not texts:
        raise TextError(
            f"{run} was trained without validation or test text",
            f"try: lmtrain evaluate {run} FILE",
        )
    results = {
        name: model.evaluate_tokens(tokens, batch_size, cache=pointer, dynamic=learning)
        for name, tokens in texts.items()
    }
    if json:
        entries = [_entry(name, result) for name, result in results.items()]
        print_json("lmtrain.evaluate/1", {"results": entries})
        return
    for name, result in results.items():
        print(shown(name))
        print_table(_rows(result))


def _numbers(option: str, text: str, kinds: Sequence[type]) -> list[Any]:
    parts = text.split(",")
    try:
        return [kind(part) for kind, part in zip(kinds, parts, strict=True)]
    except ValueError:
        raise ConfigError(
            f"{option} {text}: {len(kinds)} numbers with commas between them are needed",
            "lmtrain tune RUN finds them",
        ) from None


def _entry(name: str, result: "Evaluation") -> dict[str, Any]:
    return {
        "file": name,
        "tokens": result.num_tokens,
        "characters": result.characters,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_token": result.bits_per_token,
        "bits_per_char": result.bits_per_char,
        "oov": result.oov,
        "oov_rate": result.oov_rate,
        "perplexity_without_oov": result.perplexity_without_oov,
        "seconds": result.seconds,
    }


def _rows(result: "Evaluation") -> list[tuple[str, str]]:
    known = result.perplexity_without_oov
    return [
        ("  perplexity", f"{result.perplexity:.3f}"),
        ("  perplexity without <UNK>", "none" if known is None else f"{known:.3f}"),
        ("  loss (nats per token)", f"{result.loss:.5f}"),
        ("  bits per token", f"{result.bits_per_token:.5f}"),
        ("  bits per character", f"{result.bits_per_char:.5f}"),
        ("  tokens", f"{result.num_tokens:,}"),
        ("  characters", f"{result.characters:,}"),
        ("  out of vocabulary", f"{result.oov:,} ({100 * result.oov_rate:.2f} %)"),
        ("  seconds", f"{result.seconds:.1f}"),
    ]
