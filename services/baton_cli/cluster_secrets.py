"""Secrets of the Kubernetes namespace that this pod runs in, as a `certs.Store`: NAME-ca, NAME-router, NAME-worker.

Speaks to the API server with the pod's own service account, which needs get, create and update on Secrets.
"""

import base64
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from baton.errors import ConfigError, Unavailable
from baton_cli.certs import Files

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 10.0


@dataclass
class ClusterSecrets:
    """Owns an HTTP client; use it as a context manager."""

    prefix: str
    labels: Mapping[str, str]
    path: str  # of the namespace's Secrets
    http: httpx.Client

    @classmethod
    def in_pod(cls, prefix: str, labels: Mapping[str, str], env: Mapping[str, str], account: Path) -> Self:
        """Raises ConfigError outside of a pod."""
        try:
            host, port = env["KUBERNETES_SERVICE_HOST"], env["KUBERNETES_SERVICE_PORT"]
            token, namespace = (account / "token").read_text(), (account / "namespace").read_text()
            context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        except (KeyError, OSError) as error:
            raise ConfigError(f"--secrets: only in a pod with a service account ({error})") from error
        authority = f"[{host}]" if ":" in host else host
        http = httpx.Client(
            base_url=f"https://{authority}:{port}",
            headers={"authorization": f"Bearer {token.strip()}"},
            verify=context,
            timeout=TIMEOUT_S,
            trust_env=False,
        )
        return cls(prefix, labels, f"/api/v1/namespaces/{namespace.strip()}/secrets", http)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def read(self, name: str) -> Files:
        answer = self._call("GET", f"{self.path}/{self.prefix}-{name}", allowed=404)
        data = {} if answer is None else answer.get("data") or {}
        return {key: base64.b64decode(value) for key, value in data.items()}

    def write(self, name: str, files: Files) -> None:
        full_name = f"{self.prefix}-{name}"
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": full_name, "labels": dict(self.labels)},
            "type": "kubernetes.io/tls",
            "data": {key: base64.b64encode(content).decode() for key, content in files.items()},
        }
        if self._call("PUT", f"{self.path}/{full_name}", secret, allowed=404) is None:
            self._call("POST", self.path, secret)

    def _call(self, method: str, path: str, body: Any = None, *, allowed: int | None = None) -> Any:
        """None for a status that is allowed. Raises Unavailable."""
        try:
            answer = self.http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise Unavailable(f"the Kubernetes API does not answer: {error}") from error
        if answer.status_code == allowed:
            return None
        if answer.is_error:
            raise Unavailable(f"Kubernetes refuses {method} {path}: {answer.status_code} {answer.text[:200]}")
        return answer.json()
