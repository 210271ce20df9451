"""The command line. Each command is one module; heavy libraries are imported by what needs them.

Exit codes: 0 done, 2 the input is bad (one sentence on stderr), 1 something failed, 130 Ctrl-C.

    app                                 the table of commands
    command_options, console            options that commands share, and what they print
    compile, explain, debug             a plan, what it keeps, how it was found
    inspect, models, devices, kernels   what operators cost, what is known, what was generated
    calibrate                           what this machine takes, measured
    calibrate_utilities, labels, audit  what switches are worth, measured and judged
    spreading                           measuring on a Ray cluster
    run, bench, measuring               a model under plans
    serve                               the same over HTTP
    export, heal, stock_model           its weights under a plan, recovered, as a checkpoint
    convert                             an authors' checkpoint as a stock one
    train, eval, experiment             what is learned
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

# What shells give a process that ended by Ctrl-C, and typer the command.
_INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit."""
    code = execute(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        # A full disk. What is left in the buffer goes nowhere, or Python would try once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or _fail(f"the output cannot be written: {error.strerror}", 1)
    sys.exit(code)


def execute(arguments: list[str]) -> int:
    """Run the command line; the exit code."""
    from planner.cli.app import app
    from planner.ir.errors import PlannerError, first_line

    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        code = app(arguments, prog_name="planner", standalone_mode=False)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    except PlannerError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        # Usage errors of the command-line library (its own copy of click, or click itself).
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.args[0], file=sys.stderr)
            return 2
        if hasattr(error, "format_message"):
            # pydantic's words, which say nothing to users.
            return _fail(error.format_message().replace(": Value error, ", ": "), 2)
        if debug:
            raise
        kind, said = type(error).__name__, first_line(error)
        reason = kind if said == kind else f"{kind}: {said}"
        return _fail(f"{reason} (run again with --debug for the traceback)", 1)
    if code == _INTERRUPTED:
        return _fail("interrupted", _INTERRUPTED)
    return code if isinstance(code, int) else 0


def _fail(sentence: str, code: int) -> int:
    from planner.ir.errors import one_sentence

    print(f"planner: {one_sentence(sentence)}", file=sys.stderr)
    return code
