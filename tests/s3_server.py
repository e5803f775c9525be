"""A real S3 server on loopback, SeaweedFS's `weed`, that can be killed and started again over the same data."""

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BUCKET = "farm-tests"
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
START_S = 60.0
GRPC_OFFSET = 10_000  # of weed's second port beside each


class S3Server:
    """One `weed server -s3`; its ports are chosen when it is made, so that the environment can name them early."""

    def __init__(self) -> None:
        self._ports = self.master, self.volume, self.filer, self.port = _free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def client(self) -> Any:
        """boto3's own client, for what happens behind the store's back."""
        import boto3
        from botocore.config import Config

        return boto3.client("s3", config=Config(retries={"total_max_attempts": 1, "mode": "standard"}))

    def start(self, folder: Path) -> None:
        """Returns once the bucket is there and takes objects."""
        folder.mkdir(parents=True, exist_ok=True)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
        with (folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen([*self._command(folder)], stdout=log, stderr=log)
        end = time.monotonic() + START_S
        while True:
            try:
                self._create_bucket()
                return
            except Exception as error:
                if time.monotonic() > end or self._process.poll() is not None:
                    tail = (folder / "weed.log").read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"weed did not start: {error}\n{tail}") from error
                time.sleep(0.1)

    def kill(self) -> None:
        """As a power cut: no time to finish anything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            ports = {port + offset for port in self._ports for offset in (0, GRPC_OFFSET)}
            for port in ports:  # it makes its sockets there whatever TMPDIR says, and leaves them
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)

    def _create_bucket(self) -> None:
        client = self.client
        if BUCKET not in [each["Name"] for each in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="started", Body=b"1")

    def _command(self, folder: Path) -> list[str]:
        own = Path(sys.executable).with_name("weed")
        weed = str(own) if own.exists() else shutil.which("weed") or "weed"
        return [
            weed, "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-master.port={self.master}", "-master.telemetry=false", "-master.volumeSizeLimitMB=128",
            "-master.electionTimeout=500ms", "-master.resumeState=false",
            f"-volume.port={self.volume}", "-volume.max=50", f"-filer.port={self.filer}",
            f"-filer.localSocket={folder}/filer.sock", "-s3", f"-s3.port={self.port}", "-s3.port.iceberg=0",
            "-s3.port.lance=0", f"-s3.config={folder}/identities.json", "-s3.autoCreateBucket=false",
        ]  # fmt: skip


def _free_ports(number: int) -> list[int]:
    """Below the range of outgoing connections, so that none is taken before the server starts."""
    found: list[int] = []
    while len(found) < number:
        port = random.randrange(12_000, 22_000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + GRPC_OFFSET))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
