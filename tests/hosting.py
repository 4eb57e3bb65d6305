"""A host in a thread of this process, on a free port, until a block ends."""

import contextlib
import threading

from ditkit.placement.http.host import Host, bind


@contextlib.contextmanager
def in_thread(worker, port=0, **options):
    listening = threading.Event()
    host = Host(worker, bind(port=port, token=options.get("token")), announce=lambda url: listening.set(), **options)
    thread = threading.Thread(target=host.serve_here, name="host", daemon=True)
    thread.start()
    try:
        while not listening.wait(0.05):
            if not thread.is_alive():
                raise RuntimeError("the host did not start")
        yield host
    finally:
        host.should_exit = True
        thread.join()
