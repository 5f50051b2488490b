"""Any reward as an HTTP service, as `rewards/remote.py` asks for it: the reference that other services can be written after.

python -m nextflow.rewards.server --reward nextflow.rewards.compressibility.CompressibilityReward --port 8000
"""

from __future__ import annotations

import base64
import json
import math
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nextflow.rewards.picture_file import decode_picture
from nextflow.rewards.reward import Reward


def make_server(reward: Reward, host: str = "127.0.0.1", port: int = 0) -> ThreadingHTTPServer:
    """A server that is not running yet: call `serve_forever`, and `shutdown` to end it.

    Args:
        reward: what scores.
        host: address to listen at.
        port: 0 takes a free one; `server_address` names it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                images = [decode_picture(base64.b64decode(image)) for image in asked["images"]]
                metadata = [_with_pictures(known) for known in asked["metadata"]]
                prompts = asked["prompts"]
            except (ValueError, KeyError, TypeError, OSError) as error:
                self._answer(400, {"error": f"{type(error).__name__}: {error}"})
                return
            try:
                scores = reward(images, prompts, metadata).tolist()
            except Exception as error:  # whatever a model raises: the client shall hear of it and not wait
                self._answer(500, {"error": f"{type(error).__name__}: {error}"})
                return
            self._answer(200, {"scores": [None if math.isnan(score) else score for score in scores]})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A line per request would drown everything else."""

    return ThreadingHTTPServer((host, port), Handler)


def _with_pictures(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"png"}:
            return decode_picture(base64.b64decode(value["png"]))
        return {key: _with_pictures(item) for key, item in value.items()}
    return [_with_pictures(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Command line."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m nextflow.rewards.server", description="Serve a reward over HTTP.")
    parser.add_subclass_arguments(Reward, "reward", required=True)
    parser.add_argument("--host", type=str, default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    server = make_server(parser.instantiate(given).reward, given.host, given.port)
    print(f"serving {given.reward.class_path} at http://{given.host}:{server.server_address[1]}", file=sys.stderr)
    server.serve_forever()


if __name__ == "__main__":
    main()
