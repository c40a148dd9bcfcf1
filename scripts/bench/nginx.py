"""nginx in the middle of a download: one client gets a big file, slowly enough to be at it during the whole move."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from program import Program, Tools, unpack
from workload import Client, Failed, Move, Place

COMPOSE = """name: bench
services:
  web:
    image: oci:{images}/nginx:latest
    ports: ["8080:80"]
    volumes: ["files:/srv"]
    x-godwit:
      cloudlets: {{reserved: 2, limit: 64}}
volumes: {{files: {{}}}}
"""
# That of the image, with the paths of one directory.
CONFIG = Path(__file__).resolve().parent.parent / "images/nginx.conf"
CHUNK_BYTES = 1 << 20


class Nginx(Program):
    """A master, a worker, one connection that is being written to."""

    service, port = "web", 80
    # Its master gives up root's rights for its workers.
    capabilities = ("CAP_CHOWN", "CAP_SETUID", "CAP_SETGID")

    def __init__(self, tools: Tools, mib: int, seconds: float) -> None:
        super().__init__(tools)
        self._mib, self._seconds = mib, seconds
        self.warm_mib, self.need_mib = mib, 4 * mib
        self._sha256 = ""

    def compose(self) -> str:
        return COMPOSE.format(images=self.tools.images)

    def make_files(self, directory: Path) -> None:
        files = directory / "files"
        files.mkdir()
        digest = hashlib.sha256()
        with open(files / "big", "wb") as file:
            for _ in range(self._mib):
                chunk = os.urandom(CHUNK_BYTES)
                digest.update(chunk)
                file.write(chunk)
        self._sha256 = digest.hexdigest()
        config = CONFIG.read_text().replace("/srv/", f"{files}/").replace("/run/nginx.pid", f"{directory}/nginx.pid")
        config = as_root(config.replace("mime.types", "/etc/nginx/mime.types"))
        (directory / "nginx.conf").write_text(config)

    def command(self, directory: Path) -> list[str]:
        return ["/usr/sbin/nginx", "-c", str(directory / "nginx.conf"), "-g", "daemon off;"]

    def root(self, directory: Path) -> None:
        unpack(self.tools.images / "nginx", directory)
        config = directory / "etc/nginx/nginx.conf"
        config.write_text(as_root(config.read_text()))

    def command_in_root(self) -> list[str]:
        return ["/usr/sbin/nginx", "-g", "daemon off;"]

    def binds(self, directory: Path) -> list[tuple[str, str]]:
        return [(str(directory / "files"), "/srv")]

    def answers(self, place: Place) -> bool:
        command = [self.tools.godwit, "workload", "http-client", "--address", place.address, "--path", "/"]
        return place.run(command, 30).returncode == 0

    def fill(self, place: Place) -> None:
        """Where the benchmark cannot reach the files from outside, the container makes them."""
        if place.inside:
            script = f"head -c {self._mib}M /dev/urandom >/srv/big && sync /srv/big && sha256sum </srv/big"
            self._sha256 = place.inside(["sh", "-ec", script]).split()[0]

    def client(self, place: Place) -> Download:
        command = [self.tools.godwit, "workload", "http-client", "--address", place.address, "--path", "/files/big"]
        client = Download(place, [*command, "--seconds", str(self._seconds), "--sha256", self._sha256])
        client.wait_connected(30)
        return client


def as_root(config: str) -> str:
    """CRIU may ask for the limits of another user's process only with CAP_SYS_RESOURCE, which root may lack."""
    return config.replace("user www-data;", "user root;")


class Download(Client):
    """It has to be at work until the move is over."""

    def finish(self, move: Move) -> None:
        if self.ended():
            seen = self.report()
            if not seen["errors"]:
                raise Failed(f"the download was over after {seen['elapsed_ms'] / 1e3:.1f} s, before the move was")
            move.note_errors(seen)
            return
        super().finish(move)
