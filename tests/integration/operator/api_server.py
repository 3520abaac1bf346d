"""A real API server without nodes: etcd and kube-apiserver as two processes. Tests play kubelet and controllers."""

import base64
import datetime
import io
import ipaddress
import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from ..ports import free_port

START_SECONDS = 180
ADMIN_TOKEN = "admin"
PROGRAMS = ("etcd", "kube-apiserver")


@dataclass
class ApiServer:
    """Both processes; stopped and started again on the same ports and data."""

    programs: Path
    folder: Path
    port: int = field(default_factory=free_port)
    etcd_port: int = field(default_factory=free_port)
    etcd_peer_port: int = field(default_factory=free_port)
    flags: tuple[str, ...] = ()
    """More of them for kube-apiserver."""
    _etcd: subprocess.Popen[bytes] | None = None
    _server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Of kube-apiserver."""
        assert self._server is not None
        return self._server.pid

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def kubeconfig(self) -> Path:
        """Of an administrator who may do everything."""
        return self.write_kubeconfig("admin", ADMIN_TOKEN)

    def write_kubeconfig(self, user: str, token: str) -> Path:
        """Return a kubeconfig of somebody who has only ``token``."""
        file = self.folder / f"{user}.kubeconfig"
        cluster = {
            "server": self.url,
            "certificate-authority-data": base64.b64encode(self.ca_file.read_bytes()).decode(),
        }
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user}}],
            "current-context": "test",
        }
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.ca_file.exists():
            write_certificates(self.folder)
            (self.folder / "tokens.csv").write_text(f'{ADMIN_TOKEN},admin,admin,"system:masters"\n', encoding="utf-8")
        self._etcd = self._run(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{self.etcd_port}",
            f"--advertise-client-urls=http://127.0.0.1:{self.etcd_port}",
            f"--listen-peer-urls=http://127.0.0.1:{self.etcd_peer_port}",
            f"--initial-advertise-peer-urls=http://127.0.0.1:{self.etcd_peer_port}",
            f"--initial-cluster=default=http://127.0.0.1:{self.etcd_peer_port}",
            "--unsafe-no-fsync",
        )
        self.start_server()

    def start_server(self) -> None:
        files = self.folder
        self._server = self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{self.etcd_port}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--tls-cert-file={files / 'server.crt'}",
            f"--tls-private-key-file={files / 'server.key'}",
            f"--token-auth-file={files / 'tokens.csv'}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={files / 'accounts.key'}",
            f"--service-account-signing-key-file={files / 'accounts.key'}",
            "--service-cluster-ip-range=10.96.0.0/16",
            # Nobody creates the service account "default" here.
            "--disable-admission-plugins=ServiceAccount",
            "--shutdown-delay-duration=0s",
            *self.flags,
        )
        self._await_ready()

    def stop_server(self) -> None:
        """Stop the API server and keep its data."""
        # Asked to end it would wait for half a minute that all watches do.
        self._server = _kill(self._server)

    def stop(self) -> None:
        self.stop_server()
        self._etcd = _kill(self._etcd)

    def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        """Return the answer of the API server to the administrator; HTTPError when it refuses."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {ADMIN_TOKEN}", "Content-Type": content_type},
        )
        context = ssl.create_default_context(cafile=str(self.ca_file))
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as response:
                content = response.read()
        except urllib.error.HTTPError as refusal:
            said = refusal.read()
            told = urllib.error.HTTPError(refusal.url, refusal.code, refusal.msg, refusal.headers, io.BytesIO(said))
            told.add_note(said.decode(errors="replace"))
            raise told from None
        return json.loads(content) if content[:1] in (b"{", b"[") else content.decode()

    def await_path(self, path: str, seconds: float = 30) -> None:
        """Wait until ``path`` is served."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.request("GET", path)
                return
            except urllib.error.HTTPError as refusal:
                # 429: its storage is being made.
                if refusal.code not in (404, 429):
                    raise
                assert time.monotonic() < deadline, f"{path} is not served after {seconds:.0f} s"
                time.sleep(0.05)

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{program}.log").open("ab") as log:
            return subprocess.Popen([self.programs / program, *arguments], cwd=self.folder, stdout=log, stderr=log)

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._server is not None
            assert self._server.poll() is None, f"kube-apiserver ended; see {self.folder / 'kube-apiserver.log'}"
            try:
                self.request("GET", "/readyz")
                return
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline, f"kube-apiserver is not ready; see {self.folder}"
                time.sleep(0.1)


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.kill()
        process.wait(30)


def write_certificates(folder: Path) -> None:
    """Write a certificate authority, the server's certificate and the key that signs service accounts' tokens."""
    ca_key, server_key, accounts_key = (rsa.generate_private_key(65537, 2048) for _ in range(3))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().issuer_name(name)
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    authority = (
        builder.subject_name(name)
        .public_key(ca_key.public_key())
        .serial_number(1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    server = (
        builder.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")]))
        .public_key(server_key.public_key())
        .serial_number(2)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))],
            ),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(authority.public_bytes(pem))
    (folder / "server.crt").write_bytes(server.public_bytes(pem))
    for file, key in (("server.key", server_key), ("accounts.key", accounts_key)):
        content = key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
        (folder / file).write_bytes(content)
