"""The page ``/docs`` of a host: what can be asked, in one file without scripts. It loads nothing from anywhere, and
shows nothing but the names of the paths, which are the same for every host."""

from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = "body{font:16px/1.5 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em}code{font-size:15px}"
POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'", "X-Frame-Options": "DENY"}


def page_of(openapi: Mapping[str, Any]) -> str:
    """``openapi``: the description of the same paths as OpenAPI."""
    about, rows = openapi["info"], list[str]()
    for path, methods in openapi["paths"].items():
        for method, told in methods.items():
            headers = [p["name"] for p in told.get("parameters", ()) if p["in"] == "header"]
            wants = [*(["a token, if the host has one"] if told.get("security") else []), *headers]
            more = f"<p>Headers: {escape(', '.join(wants))}.</p>" if wants else ""
            rows.append(f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
                        f"<p>{escape(told.get('description', ''))}</p>{more}")  # fmt: skip
    title, text = escape(f"{about['title']} {about['version']}"), escape(about.get("description", ""))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><p>{text} The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(rows)}</html>"
    )
