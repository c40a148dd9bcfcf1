"""What is moved: a program, how each contestant starts it, how it is filled, used and verified."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kernel import run
from workload import Failed, Move, Place


@dataclass(frozen=True)
class Tools:
    """What a program may need from around it."""

    godwit: str
    images: Path
    # On the disk on which labs keep their hosts' files too, and seen by them.
    disk: Path


class Watch(Protocol):
    """A client at work."""

    def finish(self, move: Move) -> None:
        """Ends it and notes what it saw around the move."""

    def kill(self) -> None:
        """Ends it whatever state it is in."""


class Program:
    """One program. What is not overridden fits Redis and its like: no files of its own, nothing to fill in."""

    service = "program"
    port = 0
    # Namespaces that it needs where CRIU is driven alone: what must be the same number on the other side.
    namespaces: Sequence[str] = ("--pid",)
    # Memory that is touched before each move, and what must be available for the benchmark to try, in MiB.
    warm_mib = 0
    need_mib = 0
    # Contestants that cannot carry it, each with the reason.
    cannot: Mapping[str, str] = {}
    # For runc: capabilities beside its usual ones, user and group.
    capabilities: Sequence[str] = ()
    user = (0, 0)

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    def compose(self) -> str:
        """The environment for godwit, named `bench`."""
        raise NotImplementedError

    def command(self, directory: Path) -> list[str]:
        """The command line where the machine's own files are seen. `directory` is new for each move."""
        raise NotImplementedError

    def make_files(self, directory: Path) -> None:
        """What that command needs; both hosts see it."""

    def root(self, directory: Path) -> None:
        """Makes a root file system for runc in `directory`."""
        raise NotImplementedError

    def command_in_root(self) -> list[str]:
        """The command line inside it."""
        raise NotImplementedError

    def binds(self, directory: Path) -> list[tuple[str, str]]:
        """Directories of the machine, made by `make_files`, and where runc shows them."""
        return []

    def remove_files(self) -> None:
        """What `make_files` made outside its directory."""

    def answers(self, place: Place) -> bool:
        """Whether it is ready for clients."""
        raise NotImplementedError

    def fill(self, place: Place) -> None:
        """Gives it something to carry."""

    def client(self, place: Place) -> Watch:
        """Starts what looks at it during the move."""
        raise NotImplementedError

    def check(self, place: Place) -> list[str]:
        """After the move: what is wrong with what it carried."""
        return []


def copy_with_libraries(programs: Sequence[str], root: Path) -> None:
    """Puts programs and what they need to start into a root file system."""
    for directory in ("usr/bin", "proc", "sys", "dev", "tmp", "etc", "data"):
        (root / directory).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    for program in programs:
        found = run(["ldd", program]).stdout
        files = [word for line in found.splitlines() for word in line.split() if word.startswith("/")]
        for file in (program, *files):
            target = root / file.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(file).resolve(), target)


def unpack(image: Path, root: Path) -> None:
    """The root file system of an OCI image."""
    bundle = root.parent / f"{root.name}.bundle"
    done = run(["umoci", "unpack", "--image", f"{image}:latest", str(bundle)], timeout=300)
    if done.returncode:
        raise Failed(f"umoci unpack {image}: {done.stderr.strip()[-500:]}")
    (bundle / "rootfs").rename(root)
    shutil.rmtree(bundle)
