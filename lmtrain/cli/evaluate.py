"""`lmtrain evaluate`: how good a model is on data."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmtrain.cli.loading import DeviceOption, RunArgument, load, load_for
from lmtrain.cli.output import JsonOption, print_json, print_table, shown
from lmtrain.errors import ConfigError, TextError

if TYPE_CHECKING:
    from lmtrain.tasks.base import Metrics


def command(
    run: RunArgument,
    file: Annotated[
        list[str] | None,
        typer.Argument(
            help="Data files, globs, - or corpora (of these the test part, if they have one); "
            "without any, the run's own validation and test data.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Streams a text is cut into, or examples at once: more is faster.  "
            "[default: 1 stream, 64 examples]",
            show_default=False,
        ),
    ] = None,
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
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Print the metrics of a model on data: perplexity of text, accuracy of labels.

    \b
    lmtrain evaluate runs/python-docs-lstm-1
    lmtrain evaluate runs/ptb test.txt --json
    lmtrain evaluate runs/ptb --cache 2000,0.3,0.2             numbers from lmtrain tune
    """
    of_cache = _numbers("--cache", cache, (int, float, float)) if cache else None
    of_dynamic = _numbers("--dynamic", dynamic, (float, float, int)) if dynamic else None
    adapts = of_cache is not None or of_dynamic is not None
    # Only a language model adapts to the text it predicts.
    named = "--cache" if cache else "--dynamic"
    model = load_for("tune_cache", run, device, named=named) if adapts else load(run, device)
    options: dict[str, Any] = {} if batch_size is None else {"batch_size": batch_size}
    if adapts:
        from lmtrain.tasks.adaptation import Cache, Dynamic

        options["cache"] = Cache(*of_cache) if of_cache else None
        options["dynamic"] = Dynamic(*of_dynamic) if of_dynamic else None
    if file:
        # All are read before the first is predicted: what cannot be read is said at once.
        texts = {place: model.read([place]) for place in file}
    else:
        texts = {f"{split}: {data.name}": data for split, data in model.own().items()}
    if not texts:
        raise TextError(
            f"{run} was trained without validation or test data",
            f"try: lmtrain evaluate {run} FILE",
        )
    entries = []
    for name, data in texts.items():
        began = time.monotonic()
        metrics = model.measure(data, **options)
        entries.append((name, metrics, time.monotonic() - began))
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


def _numbers(option: str, text: str, kinds: Sequence[type]) -> list[Any]:
    parts = text.split(",")
    try:
        return [kind(part) for kind, part in zip(kinds, parts, strict=True)]
    except ValueError:
        raise ConfigError(
            f"{option} {text}: {len(kinds)} numbers with commas between them are needed",
            "lmtrain tune RUN finds them",
        ) from None
