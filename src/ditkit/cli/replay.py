"""``ditkit replay FILE``: make a clip again from its manifest and compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ditkit.cli import show
from ditkit.cli.flags import PathArgument, PathOption, Plugs, Quiet
from ditkit.cli.opening import model_name
from ditkit.errors import RequestError


def named_pictures(texts: list[str]) -> dict[str, str | list[str]]:
    """``image=a.png`` and the like; several of ``reference_images`` are a list. Raises RequestError."""
    from ditkit.pictures import FIELDS

    found: dict[str, str | list[str]] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or name not in FIELDS:
            do = f"Write NAME=FILE with one of {', '.join(FIELDS)}"
            raise RequestError(f"--picture {text}", "it does not name a picture", do)
        found[name] = [*found.get(name, []), file] if name == "reference_images" else file
    return found


def replay(
    file: Annotated[Path, PathArgument(metavar="FILE", help="A clip that ditkit wrote, or its .json.")],
    out: Annotated[Path | None, PathOption(metavar="PATH", help="Write the clip that was made again here.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER|NAME", help="Where its model is now. Default: where it was then.")
    ] = None,
    picture: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Where a picture of its request is now, such as image=a.png."),
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Run all stages here, though some ran at hosts or in other processes.")
    ] = False,
    quiet: Quiet = False,
    plugs: Plugs = None,
) -> int:
    """Make a clip again and compare: exit code 0 when every pixel is the same, 1 when not."""
    from ditkit import media
    from ditkit import replay as replays

    script = replays.read(file)
    request = script.request
    if out is not None:
        media.check_writable(out, width=request.width, height=request.height, fps=request.fps)
    pipe = replays.prepare(script, None if model is None else model_name(model), here, plugs or ())
    for difference in [*replays.plug_differences(script, pipe), *replays.machine_differences(script.manifest)]:
        print(f"note: {difference}", file=sys.stderr)
    console = show.console()
    with show.view(console, quiet, pipe.look(), request.frames) as listeners:
        replayed = replays.replay(script, pipe, listeners, named_pictures(picture or []))
    if out is not None:
        clip = replayed.result.manifests[script.clip]
        written = media.write_video(out, replayed.result.videos[script.clip], request.fps, clip)
        console.print(f"clip   {written}")
    if replayed.identical:
        console.print(f"identical: {file} was made again, bit for bit")
        return 0
    console.print(f"different: {file} was not made again")
    for difference in replayed.differences:
        console.print(f"  {difference}")
    return 1
