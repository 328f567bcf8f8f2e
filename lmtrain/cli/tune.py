"""`lmtrain tune`: hyperparameters of the neural cache and of dynamic evaluation."""

import itertools
from typing import TYPE_CHECKING, Annotated

import typer

from lmtrain import screen
from lmtrain.cli.loading import DeviceOption, RunArgument, load_with
from lmtrain.cli.output import JsonOption, print_json, print_table
from lmtrain.errors import ConfigError

if TYPE_CHECKING:
    from lmtrain.tasks.adaptation import Cache, Dynamic
    from lmtrain.tasks.tuning import TuningResult


def command(
    run: RunArgument,
    cache: Annotated[bool, typer.Option(help="Whether to tune the cache.")] = True,
    dynamic: Annotated[bool, typer.Option(help="Whether to tune dynamic evaluation.")] = True,
    seq_len: Annotated[
        int, typer.Option(min=1, help="Dynamic evaluation: tokens between two updates.")
    ] = 5,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Dynamic evaluation: number of tokens used, from the start of the text."
        ),
    ] = 20_000,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Find the best values of evaluate --cache and --dynamic.

    The best values are those with the lowest perplexity on the validation text.

    \b
    lmtrain tune runs/ptb
    lmtrain tune runs/ptb --no-dynamic
    """
    if not (cache or dynamic):
        raise ConfigError("--no-cache and --no-dynamic leave nothing to tune")
    model = load_with("tune_cache", run, device, feature="tune")
    from lmtrain.tasks.perplexity import perplexity

    best: dict[str, TuningResult] = {}
    entries = []
    tuned = {"cache": cache, "dynamic": dynamic}
    for name in (name for name, is_tuned in tuned.items() if is_tuned):
        results = model.tune_cache() if name == "cache" else model.tune_dynamic(seq_len, max_tokens)
        for result in results:
            numbers = _numbers(result.hyperparameters)
            screen.note(f"--{name} {numbers}: perplexity {perplexity(result.loss):.3f}")
            entries.append(
                {
                    "option": f"--{name}",
                    "numbers": numbers,
                    "loss": result.loss,
                    "perplexity": perplexity(result.loss),
                }
            )
            if name not in best or result.loss < best[name].loss:
                best[name] = result
    chosen = {f"--{name}": _numbers(result.hyperparameters) for name, result in best.items()}
    if json:
        print_json("lmtrain.tune/1", {"best": chosen, "trials": entries})
        return
    print_table(
        [
            (f"--{name}", _numbers(result.hyperparameters), f"{perplexity(result.loss):.3f}")
            for name, result in best.items()
        ]
    )
    options = " ".join(itertools.chain.from_iterable(chosen.items()))
    print(f"next  lmtrain evaluate {run} {options}")


def _numbers(hyperparameters: "Cache | Dynamic") -> str:
    return ",".join(f"{number:g}" for number in vars(hyperparameters).values())
