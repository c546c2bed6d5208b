"""A service as the process driver meets them: run as a script, with habits by option.

It writes its process id, and that of the child it may have, to the file `--pids`.
"""

import argparse
import http.server
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    options = _options()
    pids = [os.getpid()]
    if options.stubborn_child:  # what is ignored here is ignored there, from its first moment
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pids.append(subprocess.Popen(["sleep", "300"]).pid)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if options.child:
        pids.append(subprocess.Popen(["sleep", "300"]).pid)
    if options.ignore_terms:
        ignore_terms(options.ignore_terms)
    if options.pids:
        Path(f"{options.pids}.new").write_text("\n".join(map(str, pids)))
        Path(f"{options.pids}.new").rename(options.pids)
    for number in range(options.lines):
        print(f"line {number}", flush=True)
    print(options.say, file=sys.stderr, flush=True)
    if options.exit is not None:
        raise SystemExit(options.exit)
    time.sleep(options.ready_after)
    http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()


def ignore_terms(left: int) -> None:
    def on_term(_signum: int, _frame: object) -> None:
        nonlocal left
        print(f"TERM, {left} left to ignore", flush=True)
        left -= 1
        if left < 0:
            os._exit(0)

    signal.signal(signal.SIGTERM, on_term)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/crash":
            os._exit(7)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pids")
    parser.add_argument("--ready-after", type=float, default=0)
    parser.add_argument("--ignore-terms", type=int, default=0)
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--stubborn-child", action="store_true")
    parser.add_argument("--lines", type=int, default=0)
    parser.add_argument("--say", default="hello")
    parser.add_argument("--exit", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
