"""``python -m ditkit`` is the command ``ditkit``."""

from ditkit.cli.main import main

raise SystemExit(main())
