"""Secrets of one namespace, over HTTPS, as the Kubernetes API serves them to a pod: within the rules of a Role."""

import base64
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme

TOKEN = "the pod's token"
NAMESPACE = "prod"
PATH = f"/api/v1/namespaces/{NAMESPACE}/secrets"
VERBS = {"GET": "get", "PUT": "update", "POST": "create"}


class Cluster:
    """`account` is what a pod finds at /var/run/secrets/kubernetes.io/serviceaccount; `env` what it finds in its
    environment. `secrets` is what is kept; `refused` what the rules did not allow."""

    def __init__(self, rules: list[dict[str, Any]], account: Path) -> None:
        self.account = account
        self.env: dict[str, str] = {}
        self.secrets: dict[str, dict[str, Any]] = {}
        self.refused: list[str] = []
        self._rules = rules

    def answer(self, method: str, path: str, token: str, body: Any) -> tuple[int, Any]:
        name = path.removeprefix(PATH).strip("/")
        if token != f"Bearer {TOKEN}" or not path.startswith(PATH) or not self._allows(VERBS[method], name):
            self.refused.append(f"{method} {path}")
            return 403, {"message": "forbidden"}
        if method == "POST":
            name = body["metadata"]["name"]
        elif name not in self.secrets:
            return 404, {"message": "not found"}
        if body is not None:
            self.secrets[name] = body
        return 201 if method == "POST" else 200, self.secrets[name]

    def _allows(self, verb: str, name: str) -> bool:
        return any(
            verb in rule["verbs"] and ("resourceNames" not in rule or name in rule["resourceNames"])
            for rule in self._rules
        )

    def mount(self, directory: Path) -> dict[str, Path]:
        """Every Secret as a directory of files, each put in place at once, as a kubelet does."""
        for name, secret in self.secrets.items():
            (directory / name).mkdir(exist_ok=True)
            for key, value in secret["data"].items():
                partial = directory / name / f".{key}"
                partial.write_bytes(base64.b64decode(value))
                partial.replace(directory / name / key)
        return {name: directory / name for name in self.secrets}


@contextmanager
def cluster(rules: list[dict[str, Any]], account: Path) -> Iterator[Cluster]:
    served, authority = Cluster(rules, account), trustme.CA()
    account.mkdir()
    (account / "token").write_text(TOKEN)
    (account / "namespace").write_text(NAMESPACE)
    authority.cert_pem.write_to_path(account / "ca.crt")

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, answer = served.answer(self.command, self.path, self.headers["authorization"], body)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_PUT = do_POST = handle_one

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    served.env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(server.server_port)}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
