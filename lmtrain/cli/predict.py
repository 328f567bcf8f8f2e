"""`lmtrain predict`: labels, tags or translations of new data."""

from typing import Annotated

import typer

from lmtrain.cli.loading import DeviceOption, RunArgument, load_with
from lmtrain.cli.output import JsonOption, print_json, shown
from lmtrain.errors import ConfigError


def command(
    run: RunArgument,
    file: Annotated[
        str,
        typer.Argument(help="Input file in the form of the training data; - for standard input."),
    ] = "-",
    beam: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Beam size for translations; 1 is greedy.  [default: 5]",
            show_default=False,
        ),
    ] = None,
    nbest: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of translations of each sentence.  [default: 1]", show_default=False
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Print the label, tags or translation of each input.

    \b
    lmtrain predict runs/reviews-lstm-1 new.txt          label, text, probability
    lmtrain predict runs/slots dev.conll                 token, tag
    echo "play some jazz" | lmtrain predict runs/snips --json
    """
    model = load_with("predict", run, device)
    options = {name: value for name, value in (("beam", beam), ("nbest", nbest)) if value}
    if options and model.config.data.task != "translate":
        raise ConfigError(f"--beam and --nbest are for translation models; {run} is not one")
    for prediction in model.predict(model.inputs(file), **options):
        if json:
            print_json("lmtrain.predict/1", prediction.fields(), indent=None)
        else:
            print(shown(prediction.line()))
