"""HTTP servers of tests."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

_LOOK_EVERY = 0.01  # seconds; otherwise a server takes half a second to end


@contextmanager
def answering(server: ThreadingHTTPServer) -> Iterator[str]:
    """Have a server answer until the block ends, and give its address."""
    with server:
        threading.Thread(target=server.serve_forever, args=(_LOOK_EVERY,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
