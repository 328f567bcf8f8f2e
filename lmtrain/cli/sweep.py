"""`lmtrain sweep`: hyperparameter search within a time limit."""

from pathlib import Path
from typing import Annotated

import typer

from lmtrain import screen
from lmtrain.cli.output import JsonOption, print_json, print_table


def command(
    space: Annotated[Path, typer.Argument(help="TOML file that describes the search.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for its runs; without it, runs/sweep-NAME.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Search settings at random or by successive halving.

    The same command resumes a search.

    \b
    SPACE.toml:
      config = "ptb-small"
      search = {method = "halving", trials = 27, max_seconds = 3600}
      [space]
      "model.dropout" = {low = 0.0, high = 0.6}
      "optimizer.learning_rate" = {low = 0.0005, high = 0.01, scale = "log"}
      "model.hidden_size" = {values = [200, 300]}
      "train.batch_size" = {low = 10, high = 80, scale = "log", integer = true}
      [fixed]
      "train.max_epochs" = 5
    \b
    lmtrain sweep space.toml
    lmtrain sweep space.toml --out runs/search --json
    """
    from lmtrain import sweep

    search = sweep.load_space(space)
    trials = sweep.run_sweep(
        search, out or Path("runs") / f"sweep-{space.stem}", report=screen.note
    )
    if json:
        print_json("lmtrain.sweep/1", {"trials": [vars(trial) for trial in trials]})
        return
    names = list(search.space)
    rows = [("trial", trials[0].metric if trials else "", "seconds", *names)]
    for trial in trials:
        result = trial.result + (" (cut short)" if trial.is_cut else "")
        values = [str(trial.settings[name]) for name in names]
        rows.append((trial.name, result, f"{trial.seconds:.0f}", *values))
    print_table(rows)
