"""Property-based requests by schemathesis from the server's own OpenAPI document: no answer may be a 5xx.

`python tools/fuzz_api.py PATH_OF_SCHEMATHESIS [EXAMPLES]` starts `garserve serve tiny` and runs it; the exit code is
schemathesis's. Besides server errors it looks for undocumented statuses and content types, and for
answers that do not fit their schemas.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def main() -> int:
    """Return schemathesis's exit code."""
    program, examples = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "200"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(  # noqa: S603  (this Python, and a number)
        [sys.executable, "-m", "garserve", "serve", "tiny", "--port", str(port), "--log-format", "text"],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    try:
        while server.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/ready", timeout=5)  # noqa: S310  (the server just started)
                break
            time.sleep(0.5)
        return subprocess.call(  # noqa: S603  (the program that the user named)
            [program, "run", f"{url}/openapi.json", "--checks", CHECKS, "--max-examples", examples, "--workers", "1"]
        )
    finally:
        server.terminate()
        server.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
