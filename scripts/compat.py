#!/usr/bin/env python3
"""Two versions of godwit in one lab: a container moves between them, both ways, while a client uses it.

./dev compat OTHER_BINARY: a godwit of another version, for example built from the last release. On host h2 (and in a second
turn as the controller, too) the other one runs, everywhere else this one. Ends with 0 if every move was done and no
client lost a byte, an answer or its connection.
"""

import json
import os
import subprocess
import sys
import time

LAB = "compat"
# What a container needs to run, and a client to connect, in seconds.
READY_S = 60
# Moves there and back with each choice.
TURNS = 3
MANIFEST = """
name: t
services:
  w:
    image: oci:{image}:workload
    command: [memory-files-streams, --port, "7000", --dir, /data, --memory-mib, "64"]
    volumes: ["files:/data"]
    ports: ["7000:7000"]
volumes: {{files: {{}}}}
"""


def run(*argv):
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}\n{done.stdout}{done.stderr}")
    return done.stdout


def host_of(ours):
    containers = json.loads(run(ours, "--lab", LAB, "--output", "json", "ps"))
    return next((c["host"] for c in containers if c["name"] == "t/w-1" and c["state"] == "running"), None)


def until(what, look):
    """Looks again until it is so: neither `ps` nor `workload status` can be waited for."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.1)
    sys.exit(f"not within {READY_S} s: {what}")


def turn(ours, other, controller_too):
    run(ours, "lab", "up", "--name", LAB, "--hosts", "2", "--link", "1gbit")
    replaced = ["h2", "ctl"] if controller_too else ["h2"]
    for node in replaced:
        run(ours, "lab", "kill", "--name", LAB, node)
        # The lab starts what it is itself.
        run(other, "lab", "start", "--name", LAB, node)
    connected = lambda: sum(h["connected"] for h in json.loads(run(ours, "--lab", LAB, "--output", "json", "host", "list")))
    until("both hosts are connected", lambda: connected() == 2)
    run(ours, "workload", "image", "--out", f"/var/lib/godwit-lab/{LAB}/image")
    manifest = f"/var/lib/godwit-lab/{LAB}/t.yaml"
    with open(manifest, "w") as file:
        file.write(MANIFEST.format(image=f"/var/lib/godwit-lab/{LAB}/image"))
    run(ours, "--lab", LAB, "env", "apply", "-f", manifest)
    at = until("the container runs", lambda: host_of(ours))
    client = [ours, "lab", "exec", "--name", LAB, "client", "--", ours, "workload"]
    address = ["--address", "192.168.77.11:7000"]
    status = lambda: subprocess.run([*client, "status", *address], capture_output=True, text=True)
    until("it answers", lambda: status().returncode == 0)
    load = subprocess.Popen([*client, "client", *address, "--connections", "4", "--until-stdin-closes"],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if load.stderr.readline().strip() != "connected":
        sys.exit("the client could not connect")
    for compress in ["always", "never"] * TURNS:
        for _ in range(2):
            to = "h1" if at == "h2" else "h2"
            done = json.loads(run(ours, "--lab", LAB, "--output", "json", "migrate", "t/w-1", "--to", to,
                                  "--compress", compress))
            summary = done["summary"]
            print(f"{at} -> {to}, --compress {compress}: {summary['bytes_sent'] >> 20} MiB sent, "
                  f"{summary['rounds']} rounds, downtime {summary['downtime_ms']:.0f} ms")
            at = to
    state = json.loads(status().stdout)
    load.stdin.close()
    report = json.loads(load.stdout.read())
    load.wait(READY_S)
    if not state["ok"] or state["streams_broken"] or report["errors"] or report["reconnects"]:
        sys.exit(f"something was lost: {state} {report}")
    print(f"controller {'other' if controller_too else 'ours'}: nothing was lost, {report['requests']} requests")


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: ./dev compat OTHER_BINARY")
    # What runs on the lab's nodes is started in another directory.
    ours, other = (os.path.abspath(path) for path in sys.argv[1:])
    for binary in (ours, other):
        print(binary, run(binary, "--version").strip())
    for controller_too in (False, True):
        try:
            turn(ours, other, controller_too)
        finally:
            subprocess.run([ours, "lab", "down", "--name", LAB], check=False)


if __name__ == "__main__":
    main()
