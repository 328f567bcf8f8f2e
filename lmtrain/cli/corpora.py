"""`lmtrain corpora`: public text and data sets to train on."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lmtrain.cli.output import JsonOption, print_json

command = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


@command.callback()
def _list(context: typer.Context, json: JsonOption = False) -> None:
    """List the public corpora and data sets that lmtrain can fetch.

    Corpora are texts for language models, known by name to the other commands. Data sets are for
    the other tasks; scripts/prepare_data.py turns each into the form that its recipe reads.

    \b
    lmtrain corpora
    lmtrain corpora fetch ptb
    """
    if context.invoked_subcommand:
        return
    from lmtrain.data import download

    entries = download.listing()
    if json:
        print_json("lmtrain.corpora/1", {"corpora": entries})
        return
    for entry in entries:
        state = "downloaded" if entry["is_here"] else f"{entry['bytes'] / 1e6:,.1f} MB to download"
        print(f"{entry['name']} ({state})\n  {entry['about']}\n  licence: {entry['licence']}")
        if entry["level"]:
            print(f"  train: lmtrain train {entry['name']} {_options(entry)}")
        for name in entry["prepare"]:
            print(f"  prepare: python scripts/prepare_data.py {name} {entry['folder']}")
        for name, digest in entry["sha256"].items():
            print(f"  SHA-256 {name}: {digest}")


def _options(entry: Mapping[str, Any]) -> str:
    """The options that the corpus needs: its tokens are not those of raw prose."""
    splitter = f" --set data.splitter={entry['splitter']}" if entry["splitter"] else ""
    return f"--level {entry['level']}{splitter}"


@command.command()
def fetch(
    name: Annotated[str, typer.Argument(help="The corpus or data set.")],
    url: Annotated[
        str | None, typer.Option(help="A mirror: the folder that has the same files.")
    ] = None,
) -> None:
    """Download a corpus or a data set, check its SHA-256, and keep it in the cache.

    A download that was interrupted resumes where it stopped.

    \b
    lmtrain corpora fetch tiny-shakespeare
    """
    from lmtrain.data import download

    for path in download.fetch(name, mirror=url):
        print(path)
