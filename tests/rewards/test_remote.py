"""Remote rewards against the reference server: the same scores in the same order; failures are tried again, then told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from nextflow.rewards.remote import RemoteReward
from nextflow.rewards.reward import Reward
from nextflow.rewards.server import make_server

IMAGES = [torch.full((3, 8 + 8 * (i % 2), 16), i, dtype=torch.uint8) for i in range(11)]
PROMPTS = [f"prompt {i}" for i in range(11)]
METADATA = [{"number": i, "reference": IMAGES[i], "sources": [IMAGES[0]] * (i % 3)} for i in range(11)]


class Checks(Reward):
    """Reads everything that it is given."""

    def __call__(self, images, prompts, metadata):
        scores = []
        for image, prompt, known in zip(images, prompts, metadata):
            assert prompt == f"prompt {known['number']}" and torch.equal(known["reference"], image)
            assert all(torch.equal(source, IMAGES[0]) for source in known["sources"])
            scores.append(float("nan") if known["number"] == 4 else float(image.float().mean()))
        return torch.tensor(scores)


class Raises(Reward):
    def __call__(self, images, prompts, metadata):
        raise MemoryError("no room")


def serve(server):
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_scores_come_back_in_order():
    server = make_server(Checks())
    scores = RemoteReward(serve(server), batch_size=2)(IMAGES, PROMPTS, METADATA)
    server.shutdown()
    expected = Checks()(IMAGES, PROMPTS, METADATA)
    torch.testing.assert_close(scores, expected, equal_nan=True, rtol=0, atol=0)


def handler(answers):
    """A server that gives the prepared (status, body) answers one after another."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler), asked


def ask(url, **options):
    return RemoteReward(url, wait=0.01, **options)(IMAGES[:1], ["a"], [{}])


def test_a_failing_server_is_asked_again():
    server, asked = handler([(503, b"busy"), (500, b"oops"), (200, b'{"scores": [0.5]}')])
    assert ask(serve(server)).tolist() == [0.5] and len(asked) == 3
    server.shutdown()


@pytest.mark.parametrize(
    ("answers", "message", "times"),
    [
        ([(503, b"busy")], "failed 3 times, at last with: status 503: busy", 3),
        ([(404, b"where?")], "at last with: status 404: where?", 1),  # asking again would not help
        ([(200, b"[]")], "instead of", 1),
        ([(200, b'{"scores": [1, 2]}')], "returned 2 scores for 1 pictures", 1),
    ],
)
def test_what_is_said_when_it_keeps_failing(answers, message, times):
    server, asked = handler(answers)
    with pytest.raises(RuntimeError, match=message):
        ask(serve(server), retries=2)
    assert len(asked) == times
    server.shutdown()


@pytest.mark.parametrize(
    ("breaks", "message"),
    [("off", "IncompleteRead"), ("protocol", "BadStatusLine"), ("silence", "imeoutError|timed out")],
)
def test_an_answer_that_breaks_off_is_asked_for_again(breaks, message):
    """A body shorter than announced, a line that is no HTTP, and no answer within the timeout."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            if breaks == "silence":
                time.sleep(1.0)
            elif breaks == "protocol":
                self.wfile.write(b"nonsense\r\n\r\n")
            else:
                self.send_response(200)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b'{"sco')

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None  # what it says to a client that has gone
    with pytest.raises(RuntimeError, match=rf"127.0.0.1.*failed 2 times, at last with: .*({message})[^$]*--ckpt_path"):
        ask(serve(server), retries=1, timeout=0.2)
    server.shutdown()
    assert len(asked) == 2


def test_a_server_that_is_not_there():
    server, _ = handler([])
    url = f"http://127.0.0.1:{server.server_address[1]}"
    server.server_close()
    with pytest.raises(RuntimeError, match=r"failed 2 times.*resume"):
        ask(url, retries=1)


def test_the_server_tells_what_went_wrong():
    server = make_server(Raises())
    with pytest.raises(RuntimeError, match="MemoryError: no room"):
        ask(serve(server), retries=0)
    server.shutdown()
