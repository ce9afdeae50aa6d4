"""A server on this machine that knows byte ranges, and can break off."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files:
    """What is served, and what was asked for.

    Args:
        content: path -> bytes.
    """

    def __init__(self, content):
        self.content = content
        self.requests = []
        self.break_after = None
        self.ranges = True


@contextmanager
def serving(files):
    """Serve ``files`` on the loopback interface; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # the name that the base class calls
            asked = self.headers.get("Range")
            files.requests.append((self.path, asked))
            data = files.content.get(self.path)
            if data is None:
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and files.ranges else 0
            if start >= len(data) > 0 and start:
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            end = len(data) if files.break_after is None else start + files.break_after
            self.wfile.write(data[start:end])

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
