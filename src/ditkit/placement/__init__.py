"""Any stage anywhere: other devices, a child process, a host over HTTP, a Ray actor.

``places.py`` reads the setting, ``remote.py`` is a place over any channel, ``worker.py`` is the other end of it; the
channels are ``http``, ``process`` and ``ray.py``. Leaves out: what stages do."""

from ditkit.placement.places import Places

__all__ = ["Places"]
