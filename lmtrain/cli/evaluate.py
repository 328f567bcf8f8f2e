"""`lmtrain evaluate`: metrics of a model on data."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain.cli.loading import DeviceOption, RunArgument, load, load_with
from lmtrain.cli.output import JsonOption, print_json, print_table, shown
from lmtrain.errors import ConfigError, TextError

if TYPE_CHECKING:
    from lmtrain.tasks.base import Metrics


def command(
    run: RunArgument,
    file: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data files, globs, - for standard input, or corpora (their test part, if any); "
            "without any, the run's own validation and test data.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of streams a text is split into, or of examples in a batch; more is "
            "faster.  [default: 1 stream, 64 examples]",
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,SHARPNESS,WEIGHT",
            help="Mix in a cache of the words that followed similar states (neural cache).",
            show_default=False,
        ),
    ] = None,
    dynamic: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,DECAY,TOKENS",
            help="Continue training on the text, with an update every TOKENS tokens"
            " (dynamic evaluation).",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Print the metrics of a model on data.

    Perplexity of text, accuracy of labels, F1 of tags, BLEU of translations.

    \b
    lmtrain evaluate runs/python-docs-lstm-1
    lmtrain evaluate runs/ptb test.txt --json
    lmtrain evaluate runs/ptb --cache 2000,0.3,0.2
    """
    cache_values = _numbers("--cache", cache, (int, float, float)) if cache else None
    dynamic_values = _numbers("--dynamic", dynamic, (float, float, int)) if dynamic else None
    adapts = cache_values is not None or dynamic_values is not None
    # Only a language model adapts to the text it predicts.
    option = "--cache" if cache else "--dynamic"
    model = load_with("tune_cache", run, device, feature=option) if adapts else load(run, device)
    options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    if adapts:
        from lmtrain.tasks.adaptation import Cache, Dynamic

        options["cache"] = Cache(*cache_values) if cache_values else None
        options["dynamic"] = Dynamic(*dynamic_values) if dynamic_values else None
    if file:
        # All files are read first, so that an unreadable one is reported at once.
        texts = {name: model.read([name]) for name in file}
    else:
        texts = {f"{split}: {data.name}": data for split, data in model.own_data().items()}
    if not texts:
        raise TextError(
            f"{run} was trained without validation or test data",
            f"try: lmtrain evaluate {run} FILE",
        )
    entries = []
    for name, data in texts.items():
        start = time.monotonic()
        metrics = model.measure(data, **options)
        entries.append((name, metrics, time.monotonic() - start))
    if json:
        results = [_entry(*entry) for entry in entries]
        print_json("lmtrain.evaluate/1", {"results": results})
        return
    for name, metrics, seconds in entries:
        print(shown(name))
        rows = [*metrics.table(), ("seconds", f"{seconds:.1f}")]
        print_table([(f"  {title}", figure) for title, figure in rows])


def _entry(name: str, metrics: "Metrics", seconds: float) -> dict[str, Any]:
    return {
        "file": name,
        "metric": metrics.headline,
        "value": metrics.value,
        "count": round(metrics.count),
        **metrics.figures,
        "seconds": seconds,
    }


_KINDS = {int: "INTEGER", float: "NUMBER"}


def _numbers(option: str, text: str, kinds: Sequence[type]) -> list[Any]:
    parts = text.split(",")
    try:
        return [kind(part) for kind, part in zip(kinds, parts, strict=True)]
    except ValueError:
        raise ConfigError(
            f"{option} {text}: expected {','.join(_KINDS[kind] for kind in kinds)}",
            "lmtrain tune RUN finds good ones",
        ) from None
