"""Many requests of all kinds to a host in a process of its own: sound, garbage, without a token, vanishing clients.
Prints memory, descriptors and threads of the host before and after: ``python tools/strain_host.py MODEL [COUNT]``."""

import http.client
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import ditkit
from ditkit.state import State

TOKEN, JOB = "strain-strain-strain-strain", "X-Ditkit-Job"


def resident(pid: int) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    facts = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Threads"))}
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return f"{int(facts['VmRSS']) // 1024} MB, {files} descriptors, {facts['Threads']} threads"


def ask(port: int, path: str, body: bytes | None = None, token: str = TOKEN) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {JOB: "{}", "Authorization": f"Bearer {token}"}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def vanish(port: int, body: bytes, rng: random.Random) -> int:
    head = f"POST /stages/encode_text HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n{JOB}: {{}}\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(data[: rng.randrange(len(data))])
    return 0


def main(model: str, count: int) -> None:
    words = [sys.executable, "-m", "ditkit", "host", "--model", model, "--port", "0", "--threads", "1"]
    environment = {**os.environ, "DITKIT_HOST_TOKEN": TOKEN}
    host = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert host.stdout is not None
    port = int(host.stdout.readline().split()[0].rpartition(":")[2])
    pipe = ditkit.load(model)
    begun = pipe.begin(pipe.model.request({"prompt": "a red circle"}))
    body = State({name: begun[name] for name in pipe.stages["encode_text"].reads}).to_bytes()
    rng, wrong = random.Random(1), 0
    for number in range(count):
        if number in (count // 10, count // 2):
            print(f"after {number}: {resident(host.pid)}")
        what = rng.randrange(5)
        wanted = (200, 401, 400, 200, 0)[what]
        got = (
            lambda: ask(port, "/stages/encode_text", body),
            lambda: ask(port, "/stages/encode_text", body, "another-another-another"),
            lambda: ask(port, "/stages/encode_text", rng.randbytes(rng.randrange(5000))),
            lambda: ask(port, "/health"),
            lambda: vanish(port, body, rng),
        )[what]()
        while got == 503:  # those that vanished are still being taken leave of
            got = ask(port, "/stages/encode_text", body)
            wanted = got if got == 503 else 200
        wrong += got != wanted
    print(f"after {count}: {resident(host.pid)}; {wrong} answers were wrong")
    host.terminate()
    print(f"it ended with {host.wait(60)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
