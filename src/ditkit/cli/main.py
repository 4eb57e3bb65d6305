"""The command ``ditkit``: its list of commands, and what happens to errors. Starts without importing torch."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, TextIO, cast

import typer
from typer.core import TyperGroup

import ditkit
from ditkit import failures
from ditkit.cli import bench, cache, doctor, expand, host, plan, run, show, weights
from ditkit.cli.flags import PastClick
from ditkit.cli.terminal import interruptible
from ditkit.errors import DitkitError, shortened
from ditkit.hiding import hidden, printable
from ditkit.request import OLD_NAMES

INTERRUPTED = 130


class Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, EOFError) as e:
            raise PastClick from e


app = typer.Typer(
    name="ditkit", cls=Commands, help="Runs diffusion transformers in pieces that you can move, swap and watch.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ditkit {ditkit.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": run.generate, "expand": expand.expand, "demo": run.demo, "run": run.run, "fork": run.fork,
    "runs": plan.runs, "plan": plan.plan, "replay": run.replay, "stages": plan.stages, "plugs": plan.plugs,
    "host": host.host, "doctor": doctor.doctor, "inspect": weights.inspect, "lock": weights.lock,
    "convert": weights.convert,
}  # fmt: skip
GROUPS: dict[str, tuple[str, dict[str, Callable[..., Any]]]] = {
    "config": ("Settings and where their values come from.", {"explain": plan.explain}),
    "bench": ("Measure quality.", {"quality": bench.quality}),
    "cache": ("Results of stages that are kept on disk.",
              {"show": cache.show_, "trim": cache.trim, "clear": cache.clear}),
}  # fmt: skip
for name, command in COMMANDS.items():
    app.command(name)(command)
for name, (text, commands) in GROUPS.items():
    group = typer.Typer(name=name, help=text, no_args_is_help=True)
    for inner, command in commands.items():
        group.command(inner)(command)
    app.add_typer(group)


def _today(argument: str) -> str:
    """A flag by its earlier name, under today's."""
    flag, equals, value = argument.partition("=")
    old = flag.removeprefix("--").removeprefix("no-")
    if not flag.startswith("--") or (name := OLD_NAMES.get(old.replace("-", "_"))) is None:
        return argument
    return flag.removesuffix(old) + name.replace("_", "-") + equals + value


@contextmanager
def streams() -> Iterator[None]:
    """Stdout and stderr as commands find them. A service, or ``pythonw``, has none: then what is printed goes nowhere.
    (Where only the number is free, the next file that is opened would get it, and with it what a library prints.)"""
    before = sys.stdin, sys.stdout, sys.stderr
    with ExitStack() as opened:

        def there(stream: TextIO | None, mode: str) -> TextIO:
            if isinstance(stream, io.TextIOWrapper) and mode == "w":
                stream.reconfigure(errors="replace")  # a prompt's letters may be more than the terminal's
            if stream is not None:
                return stream
            return cast("TextIO", opened.enter_context(open(os.devnull, mode, encoding="utf-8")))

        sys.stdin, out, err = there(sys.stdin, "r"), there(sys.stdout, "w"), there(sys.stderr, "w")
        sys.stdout, sys.stderr = cast("TextIO", show.Output(out)), cast("TextIO", show.Errors(err))
        try:
            yield
        finally:
            sys.stdin, sys.stdout, sys.stderr = before


def _failed(error: Exception, arguments: Sequence[str]) -> int:
    """Tell of it; its exit code."""
    if "--debug" in arguments or os.environ.get("DITKIT_DEBUG", "0").lower() not in ("0", "false"):
        import traceback

        print(printable(hidden("".join(traceback.format_exception(error))), keep="\n"), file=sys.stderr)
    if not isinstance(error, DitkitError):
        named = [word for word in arguments[:2] if word in COMMANDS or word in GROUPS]
        error = failures.told(error, " ".join(["ditkit", *named]))
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 (it failed), 2 (a mistake of the user's), 130 (interrupted).

    An error is one sentence on stderr; with ``--debug`` or DITKIT_DEBUG its traceback comes too. That of an error that
    is none of ditkit's is also written into a file, which the sentence names."""
    with streams():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    arguments = [_today(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    try:
        with interruptible():
            code = app(args=arguments, prog_name="ditkit", standalone_mode=False)
        sys.stdout.flush()
    except Exception as caught:
        e = caught.__cause__ if isinstance(caught, PastClick) else caught
        assert isinstance(e, Exception)
        if show.lost_output(e):
            show.silence(sys.stdout)
            if not isinstance(e, BrokenPipeError):  # else whoever read it has gone
                why = (getattr(e, "strerror", None) or str(e)).lower()
                print(f"error: the output: {why}. Print to a place that has room.", file=sys.stderr)
            return 1
        if hasattr(e, "format_message") and hasattr(e, "exit_code"):  # click's usage errors, or typer's
            message = printable(hidden(shortened(e.format_message()))).rstrip(".")
            print(f"error: {message}{'' if message.endswith('?') else '.'}", file=sys.stderr)
            return int(e.exit_code)
        if type(e).__name__ != "Abort":
            return _failed(e, arguments)
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("error: interrupted", file=sys.stderr)
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
