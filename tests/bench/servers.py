# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""Starts the servers that are compared. A server ends with the `with` block that started it, and by its own process id."""

import json
import os
import signal
import socket
import subprocess
import time


def uri(sock):
    return f"nbd+unix:///?socket={sock}"


class Server:
    """A running server process that listens on a Unix socket of its own."""

    def __init__(self, ctx, name, command, sock):
        self.name = name
        self.sock = sock
        self.log = open(sock + ".log", "w+b")
        self.proc = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self._wait_until_listening(command)

    def _wait_until_listening(self, command):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self.proc.poll() is not None:
                self.log.seek(0)
                said = self.log.read().decode(errors="replace").strip()
                raise RuntimeError(f"{self.name} ended at once ({' '.join(command)}): {said}")
            with socket.socket(socket.AF_UNIX) as s:
                try:
                    s.connect(self.sock)
                    return
                except OSError:
                    time.sleep(0.005)
        self.stop()
        raise RuntimeError(f"{self.name} does not listen after 60 s: {' '.join(command)}")

    def io(self, field):
        """A counter of /proc/PID/io, such as write_bytes."""
        with open(f"/proc/{self.proc.pid}/io") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(field + ":"))

    def cpu_seconds(self):
        """Used so far by all threads, those that have ended included."""
        with open(f"/proc/{self.proc.pid}/stat") as f:
            user, system = f.read().rsplit(")", 1)[1].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self, field="VmHWM"):
        """Bytes; VmHWM is the highest resident size so far."""
        with open(f"/proc/{self.proc.pid}/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))

    def stop(self):
        if self.proc.poll() is None:
            self.proc.send_signal(signal.SIGTERM)
            try:
                self.proc.wait(60)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait()
        self.log.close()
        for path in (self.sock, self.sock + ".log"):
            if os.path.exists(path):
                os.unlink(path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def ours_command(ctx, image, sock, *, read_only=False, parameters=()):
    command = ["nbdkit", "-f", "-U", sock]
    if read_only:
        command.append("-r")
    elif ctx.with_filter:
        command.append(f"--filter={ctx.filter}")
    return command + [ctx.plugin, f"file={image}", *parameters]


def raw_command(ctx, image, sock, *, read_only=False):
    return ["nbdkit", "-f", "-U", sock] + (["-r"] if read_only else []) + ["file", image]


def qemu_command(ctx, variant, image, sock, *, read_only=False):
    """`variant` is a key of ctx.qemu. 64 clients may connect; discards reach the file, as they do for ours."""
    command = ctx.qemu[variant] + ["-t", "-e", "64", "-f", "qcow2", "--discard=unmap", "-k", sock]
    return command + (["-r"] if read_only else []) + [image]


def is_qemu(name):
    return name.startswith("qemu")


def command_of(ctx, name, image, sock, **options):
    if name == "ours":
        return ours_command(ctx, image, sock, **options)
    if name == "raw":
        return raw_command(ctx, image, sock, **options)
    return qemu_command(ctx, name, image, sock, **options)


def start(ctx, name, image, **options):
    sock = ctx.path(f"{ctx.serial()}.sock")
    return Server(ctx, name, command_of(ctx, name, image, sock, **options), sock)


class StorageDaemon(Server):
    """qemu-storage-daemon, driven over QMP: only what a mirror job needs."""

    def __init__(self, ctx):
        sock = ctx.path(f"{ctx.serial()}.sock")
        super().__init__(ctx, "qemu-storage-daemon",
                         ["qemu-storage-daemon", "--chardev", f"socket,path={sock},server=on,wait=off,id=qmp",
                          "--monitor", "chardev=qmp"], sock)
        # The monitor serves one client at a time, and the probe above was one: a greeting tells that it is our turn.
        self.conn = socket.socket(socket.AF_UNIX)
        self.conn.settimeout(600)
        self.conn.connect(sock)
        self.lines = self.conn.makefile("rb")
        self.lines.readline()
        self.events = []
        self.call("qmp_capabilities")

    def call(self, command, **arguments):
        self.conn.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait_for_status(self, status):
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == "JOB_STATUS_CHANGE" and event["data"]["status"] == status:
                    return
            answer = json.loads(self.lines.readline())
            if "event" in answer:
                self.events.append(answer)

    def add(self, node, path):
        self.call("blockdev-add", **{"driver": "qcow2", "node-name": node, "discard": "unmap",
                                     "file": {"driver": "file", "filename": path, "discard": "unmap"}})

    def mirror(self, source, target):
        self.add("source", source)
        self.add("target", target)
        self.call("blockdev-mirror", **{"job-id": "mirror", "device": "source", "target": "target", "sync": "full"})
        self.wait_for_status("ready")
        self.call("job-complete", id="mirror")
        self.wait_for_status("concluded")
        for job in self.call("query-jobs"):
            if "error" in job:
                raise RuntimeError(f"mirror job: {job['error']}")

    def stop(self):
        if getattr(self, "lines", None):
            self.lines.close()
            self.conn.close()
        super().stop()
