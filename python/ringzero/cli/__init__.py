"""The command line: `ringzero COMMAND`. Each command has a file of its own here and is loaded when it is
asked for.

Exit statuses: those of `ringzero run` are in `ringzero.cli.run`; besides, 2 is input that the operator can
put right, 1 a defect of ours, 128+N the end by signal N. Every failure is one sentence on standard error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]

BAD_INPUT = 2
DEFECT = 1


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    status = run_command(sys.argv[1:] if arguments is None else arguments)
    # Not sys.exit: tearing the interpreter down takes 10 ms, and a thread that waits for a key would hold it
    # up.
    status = _flush(status)
    os._exit(status)


def run_command(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status."""
    refusal = unsupported_host()
    if refusal is not None:
        return fail(refusal)
    from ringzero.cli.quick import read_run
    from ringzero.errors import RingzeroError

    try:
        fields = read_run(arguments)
        if fields is not None:
            # First of all: the core measures the host's clock while the rest of Python's half is loaded.
            with contextlib.suppress(ImportError):  # told in its place
                import ringzero._core  # noqa: F401
            from ringzero.cli.guest import RunOptions, run_guest

            return run_guest(RunOptions(**fields))
        from ringzero.cli.app import application

        status = application().main(args=list(arguments), prog_name="ringzero", standalone_mode=False)
    except RingzeroError as error:
        return fail(str(error), error.exit_status)
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer makes it 1
            return output_closed()
        return error.code if isinstance(error.code, int) else DEFECT
    except BrokenPipeError:
        return output_closed()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF) and error.filename is None:
            return fail(f"standard output cannot be written: {error.strerror}")
        return defect(error)
    except Exception as error:
        # typer brings its own copy of click or uses the installed one, depending on its version: known by
        # their shape.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            return fail(usage_message(error.format_message()), BAD_INPUT)
        if type(error).__name__ == "Abort":
            return 130
        return defect(error)
    return status if isinstance(status, int) else 0


def fail(message: str, status: int = BAD_INPUT) -> int:
    """Say one sentence on standard error and return the exit status."""
    sentence = " ".join(message.split())
    with contextlib.suppress(OSError):  # nobody listens: the status must do
        os.write(2, f"ringzero: {sentence}\n".encode("utf-8", "replace"))
    return status


def output_closed() -> int:
    """Say that nobody takes our output any more, and return the exit status for it."""
    with contextlib.suppress(OSError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the flush at the end
    return fail("standard output was closed before everything was written to it")


def defect(error: Exception) -> int:
    """Report a defect of ours: a sentence, and the traceback on request."""
    import traceback

    if os.environ.get("RINGZERO_TRACEBACK"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(place[-1].filename)}:{place[-1].lineno}" if place else ""
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return fail(
        f"this is a defect of ringzero, please report it: {what}{where} (RINGZERO_TRACEBACK=1 shows more)",
        DEFECT,
    )


def usage_message(message: str) -> str:
    """Make click's message a sentence of ours, with what was probably meant and where to look."""
    text = message.strip().rstrip(".")
    text, _, close = text.partition(" (Possible options: ")
    meant = f", did you mean {close.rstrip(')')}?" if close else ""
    return f"{text[:1].lower()}{text[1:]}{meant} (ringzero --help shows what there is)"


def unsupported_host() -> str | None:
    """Return why this host cannot run guests at all, or None."""
    facts = os.uname()
    if sys.platform != "linux" or facts.sysname != "Linux":
        return f"ringzero runs on Linux only, and this is {facts.sysname}"
    if facts.machine not in ("x86_64", "amd64") or sys.maxsize < 2**32:
        return f"ringzero translates x86-64 to x86-64, and this host is {facts.machine}"
    return None


def _flush(status: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        return output_closed() if status == 0 else status
    except (ValueError, AttributeError):  # closed, or never there
        return status
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    return status
