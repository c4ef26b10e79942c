"""The root of the command line: names of commands, loaded one at a time.

typer takes 40 ms to load and a command's own modules take more, while a guest waits to start: so a command's
module is only imported when that command, or the list of all of them, is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from ringzero.errors import InputError

# name -> module with a typer application called `app`, in the order of --help.
COMMANDS = {
    "run": "ringzero.cli.run",
    "exec": "ringzero.cli.exec",
    "cp": "ringzero.cli.cp",
    "pull": "ringzero.cli.pull",
    "images": "ringzero.cli.images",
    "image": "ringzero.cli.image",
    "doctor": "ringzero.cli.doctor",
    "host": "ringzero.cli.host",
    "bench": "ringzero.bench.command",
}

EPILOG = """\
Examples:

  ringzero run hello                        a guest of our own, nothing to download

  ringzero run debian                       a shell in Debian's kernel; Ctrl-] leaves

  ringzero run debian -- sh -c 'exit 7'     one command; its exit status becomes ours

  ringzero run --kernel bzImage --initrd root.cpio --append 'console=ttyS0'
"""


class LazyGroup(TyperGroup):
    """A group whose commands are modules."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, for --help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load a command, or refuse with the one that was probably meant."""
        if cmd_name not in COMMANDS:
            from difflib import get_close_matches

            close = get_close_matches(cmd_name, COMMANDS, n=1)
            meant = f", did you mean {close[0]!r}?" if close else ":"
            raise InputError(f"there is no command {cmd_name!r}{meant} there is {', '.join(COMMANDS)}")
        command = typer.main.get_command(import_module(COMMANDS[cmd_name]).app)
        command.name = cmd_name
        return command


def _version(asked: bool) -> None:
    if asked:
        import ringzero

        typer.echo(f"ringzero {ringzero.__version__}")
        raise typer.Exit


def application() -> Any:
    """Return the root command."""
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=False,
        invoke_without_command=True,
        rich_markup_mode=None,
        epilog="\b\n" + EPILOG.replace("\n\n", "\n"),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )

    @app.callback()
    def root(
        context: typer.Context,
        version: bool = typer.Option(
            False, "--version", help="Show the version.", callback=_version, is_eager=True
        ),
    ) -> None:
        """Boot unmodified x86-64 Linux in an ordinary process: no root, no kernel module, no /dev/kvm."""
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return typer.main.get_command(app)
