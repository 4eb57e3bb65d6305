"""``ditkit host``: offer stages of a model to other machines."""

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ditkit import config
from ditkit.allowed import Limits
from ditkit.cli import terminal
from ditkit.cli.flags import PathOption, RawSettings, kebab, with_settings
from ditkit.cli.opening import model_name
from ditkit.cli.show import seconds
from ditkit.errors import SetupError
from ditkit.events import Event
from ditkit.hiding import printable
from ditkit.keys import token_in, token_of
from ditkit.request import Request
from ditkit.setup import Setup

LIMITS = Limits()


def most(what: str) -> Any:
    return typer.Option(help=what, min=1)


KEYS = tuple(name for name in Setup.model_fields if name not in ("placement", "expected_probes"))
"""The settings that a host has a use for: requests come with the jobs, and what it offers runs there."""


@partial(with_settings, keys=KEYS)
def host(
    given: RawSettings,
    stages: Annotated[
        list[str] | None, typer.Option(help="Stages to offer, with commas between them. Default: all.", metavar="A,B")
    ] = None,
    port: Annotated[int, typer.Option(help="0 for a free one.", min=0, max=65535)] = 8700,
    address: Annotated[
        str, typer.Option("--host", help="An address of this machine; others than loopback need a token.")
    ] = "127.0.0.1",
    token_file: Annotated[Path | None, PathOption(metavar="FILE", help="The token; else DITKIT_HOST_TOKEN.")] = None,
    max_bytes: Annotated[int, most("How large a State may be that comes in.")] = LIMITS.max_bytes,
    max_pixels: Annotated[
        int, most("Width x height x frames of a job, of all clips that it makes at once.")
    ] = LIMITS.max_pixels,
    max_steps: Annotated[int, most("Steps of a run.")] = LIMITS.max_steps,
    max_tokens: Annotated[int, most("Tokens of text of a job, of all its prompts.")] = LIMITS.max_tokens,
    max_seconds: Annotated[float, most("How long one job may work; within a step it ends.")] = LIMITS.max_seconds,
    queue: Annotated[int, typer.Option(help="How many jobs may wait.", min=0)] = LIMITS.queue,
    lazy: Annotated[bool, typer.Option("--lazy", help="Load parts when they are first needed.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="What computes the text encoder: torch, mlx, mlx-8bit or mlx-4bit.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, PathOption(metavar="FILE", help="Key of the TLS certificate.")] = None,
    ssl_certfile: Annotated[Path | None, PathOption(metavar="FILE", help="The TLS certificate.")] = None,
) -> int:
    """Offer stages of a model over HTTP, until Ctrl-C. Prints its address when it listens."""
    from ditkit.events import Events
    from ditkit.placement.http.host import Host, bind
    from ditkit.placement.worker import load_all, worker_of

    if (ssl_keyfile is None) != (ssl_certfile is None):
        found = "only one of its two files is given"
        raise SetupError("a host with TLS", found, "Give --ssl-keyfile and --ssl-certfile")
    setup = setup_of(given, backend)
    token = token_in(token_file) if token_file is not None else token_of()
    wanted = [name.strip() for text in stages for name in text.split(",")] if stages else None
    with terminal.plain_log(), bind(address, port, token) as listener:
        worker = worker_of(setup, wanted)
        if not lazy:
            load_all(worker, Events(tell_loads))
            worker.describe()  # fingerprints, which read all files once

        limits = Limits(
            max_bytes, queue, max_pixels=max_pixels, max_steps=max_steps, max_tokens=max_tokens, max_seconds=max_seconds
        )  # fmt: skip

        def announce(url: str) -> None:
            offered = f"{url} offers {', '.join(worker.stages)}; a job may have at most {limits.in_words()}"
            print(printable(offered), flush=True)

        server = Host(
            worker, listener, token, limits, announce=announce, ended=leave, ssl_keyfile=ssl_keyfile,
            ssl_certfile=ssl_certfile,
        )  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended in order, and hands the signal on
            server.serve_here()
    return 0


def leave(work: bool) -> None:
    """Where a step goes on that nothing can stop, its thread must not see Python end: torch would abort."""
    if work:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def setup_of(given: RawSettings, backend: str | None) -> Setup:
    """Raises SetupError; also for a typed setting of a request, which comes with each job."""
    for key in given.named():
        if key in Request.model_fields:
            raise SetupError(f"a host with --{kebab(key)}", "requests come with the jobs", "Leave it out")
    settled = config.settle(*given.layers())
    setup = settled.setup()
    if backend is not None:
        if (said := setup.backends.get("text_encoder", backend)) != backend:
            raise SetupError(f"--backend {backend}", f"{settled.origins['backends']} says {said}", "Give one")
        setup = Setup.of({**settled.of(Setup), "backends": {**setup.backends, "text_encoder": backend}})
    return setup.model_copy(update={"model": model_name(setup.model)})


def tell_loads(event: Event) -> None:
    """On the error stream: what is printed first is the address, for whoever started it to read."""
    if event.name == "load.start":
        print(f"loading {event['component']} ...", file=sys.stderr, flush=True)
    if event.name == "load.end":
        print(f"loaded {event['component']} in {seconds(event['elapsed'])}", file=sys.stderr, flush=True)
