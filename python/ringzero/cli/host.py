"""`ringzero host`: a host with many guests. Each group of commands has a file of its own."""

from __future__ import annotations

import typer

from ringzero.cli import host_daemon, host_guests, host_see, host_simulate
from ringzero.cli.exec import exec_

app = typer.Typer(
    help="A host with many guests, in the hands of a daemon.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback()
def root(context: typer.Context) -> None:
    """A host with many guests, in the hands of a daemon."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (
    host_daemon.start,
    host_daemon.status,
    host_daemon.stop,
    host_guests.up,
    host_guests.down,
    host_guests.list_,
    host_guests.console,
    host_guests.events,
    host_see.top,
    host_see.map_,
    host_see.metrics,
    host_see.audit,
    host_simulate.simulate,
):
    app.command(name=_command.__name__.rstrip("_"))(_command)
app.command(name="exec", context_settings={"allow_interspersed_args": False})(exec_)
