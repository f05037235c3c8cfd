#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# Hostile clients of a real server: handshakes and requests that are nearly right, on several connections at once, on
# every export. Between them a client that behaves has to be served. At the end the server has not died, ends with 0 on
# SIGTERM, has not taken more memory than `most_memory`, and the image is sound and holds what it should: the first half
# of the disk is never written, the second half is the clients' to spoil.
#
# Usage: nbd_fuzz.py BUILD SECONDS [SEED]. What the last connections sent is kept in BUILD/fuzz if something is wrong.
import os, random, shutil, signal, socket, struct, subprocess, sys, tempfile, threading, time

MIB = 1 << 20
SIZE, KEPT, CLUSTER = 4 * MIB, 2 * MIB, 4096
CLIENTS = 3
# A request of 64 MiB for each client, the metadata cache, the process itself.
MOST_MEMORY = (CLIENTS + 1) * 64 * MIB + 256 * MIB
IHAVEOPT, REPLY_MAGIC, REQUEST, SIMPLE, CHUNK = 0x49484156454F5054, 0x3E889045565A9, 0x25609513, 0x67446698, 0x668E33EF
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
NAMES = [b"", b"compact", b"zeroes", b"status", b"check", b"snapshots", b"snapshot/one", b"snapshot/1", b"reclaim"]
ODD_NAMES = [b"snapshot/", b"snapshot/\xff\xfe", b"snapshot-delete/none", b"resize/", b"resize/-1", b"resize/1x",
             b"resize/99999999999999999999999", b"COMPACT", b"/", b"..", b"\0", b"%s%n", b"a" * 4096, b"b" * 4097]


class Closed(Exception):
    pass


class Wrong(Exception):
    pass


class HungUp(Exception):
    """On a client that behaves: wrong, unless the server is no more."""


class Client:
    """One connection, with everything that it sent."""

    def __init__(self, path, rng):
        self.rng, self.sent = rng, bytearray()
        self.structured = False
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(path)

    def send(self, data):
        self.sent += data[:4096]
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as gone:
            raise Closed from gone

    def receive(self, length):
        data = bytearray()
        while len(data) < length:
            try:
                piece = self.socket.recv(min(length - len(data), MIB))
            except ConnectionResetError as gone:
                raise Closed from gone
            except socket.timeout as silence:
                raise Wrong("the server does not answer") from silence
            if not piece:
                raise Closed
            data += piece
        return bytes(data)

    def odd(self, one_in):
        return self.rng.randrange(one_in) == 0

    # --- handshake

    def greet(self, flags=3):
        magic, options, _ = struct.unpack(">8sQH", self.receive(18))
        if magic != b"NBDMAGIC" or options != IHAVEOPT:
            raise Wrong("no greeting")
        self.send(struct.pack(">I", flags))

    def option(self, option, data, length=None, magic=IHAVEOPT):
        """Sends one; what is answered, to the end of it: (type, data) of the last reply."""
        self.send(struct.pack(">QII", magic, option, len(data) if length is None else length) + data)
        while True:
            got_magic, _, kind, n = struct.unpack(">QIII", self.receive(20))
            if got_magic != REPLY_MAGIC or n > 65536:
                raise Wrong("an option is answered with something else than an option's reply")
            answer = self.receive(n)
            if kind == 1 or kind >= 1 << 31:
                if option == STRUCTURED and kind == 1:
                    self.structured = True
                return kind, answer

    def go(self, name):
        kind, _ = self.option(GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
        return kind == 1

    def meta(self, option, name, queries):
        body = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
        return self.option(option, body + b"".join(struct.pack(">I", len(q)) + q for q in queries))

    def odd_option(self):
        rng = self.rng
        name = rng.choice(NAMES + ODD_NAMES)
        data = rng.choice([b"", name, struct.pack(">I", len(name)) + name + struct.pack(">H", 0),
                           struct.pack(">I", rng.choice([0, 1, 4096, 1 << 31, 0xFFFFFFFF])) + name + b"\0\0",
                           struct.pack(">I", len(name)) + name + struct.pack(">H", rng.randrange(65536)),
                           struct.pack(">I", len(name)) + name + struct.pack(">I", rng.choice([0, 1, 1 << 20, 0xFFFFFFFF])),
                           rng.randbytes(rng.randrange(200))])
        length = rng.choice([0, 1, len(data) + 1, 65536, 0xFFFFFFFF]) if self.odd(6) else None
        magic = rng.getrandbits(64) if self.odd(20) else IHAVEOPT
        kinds = [EXPORT_NAME, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, 11, 4, rng.getrandbits(32)]
        option = rng.choice(kinds)
        if option in (GO, EXPORT_NAME):
            option = INFO  # the handshake goes on
        if length is not None and length > len(data):
            self.send(struct.pack(">QII", magic, option, length) + data)
            raise Closed  # leaves the server waiting for the rest
        self.option(option, data, length, magic)

    # --- requests

    def request(self, kind, offset, length, flags=0, data=b"", magic=REQUEST):
        """Sends one and reads its answer: (error, data read)."""
        handle = self.rng.getrandbits(64)
        self.send(struct.pack(">IHHQQI", magic, flags, kind, handle, offset, length) + data)
        got = bytearray(length if kind == READ and length <= 64 * MIB else 0)
        error = 0
        while True:
            magic = struct.unpack(">I", self.receive(4))[0]
            if magic == SIMPLE:
                error, of = struct.unpack(">IQ", self.receive(12))
                if error == 0 and kind == READ:
                    got = self.receive(length)
                done = True
            elif magic == CHUNK and self.structured:
                chunk_flags, chunk, of, n = struct.unpack(">HHQI", self.receive(16))
                body = self.receive(n)
                done = chunk_flags & 1
                if chunk == 1:
                    at = struct.unpack(">Q", body[:8])[0] - offset
                    got[at:at + n - 8] = body[8:]
                elif chunk & 0x8000:
                    error = struct.unpack(">I", body[:4])[0]
            else:
                raise Wrong(f"a reply begins with {magic:#x}")
            if of != handle:
                raise Wrong("a reply to something that was not asked")
            if done:
                return error, bytes(got)

    def odd_request(self, model, disk):
        rng = self.rng
        kind = rng.choice([READ, READ, WRITE, TRIM, ZEROES, FLUSH, CACHE, STATUS, rng.randrange(8, 65536)])
        flags = rng.choice([0, 0, 1, 2, 4, 8, 16, rng.getrandbits(16)])
        if kind in (WRITE, TRIM, ZEROES):  # what is not refused stays in the half that may change
            offset = rng.choice([KEPT + rng.randrange(KEPT), SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1, (1 << 64) - 512])
            lengths = [0, 1, 511, 4096, rng.randrange(2 * CLUSTER), KEPT, 32 * MIB, 64 * MIB + 1, 0xFFFFFFFF]
        else:
            offset = rng.choice([0, rng.randrange(SIZE), rng.randrange(SIZE), SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1])
            lengths = [0, 1, 511, 512, 4096, rng.randrange(65536), SIZE, 64 * MIB, 64 * MIB + 1, 0xFFFFFFFF]
        length = rng.choice(lengths)
        magic = rng.getrandbits(32) if self.odd(60) else REQUEST
        data = b""
        if kind == WRITE:
            if length > 65536 or self.odd(10):  # the payload never comes, or not all of it
                self.send(struct.pack(">IHHQQI", magic, flags, kind, 1, offset, length) + rng.randbytes(300))
                raise Closed
            data = rng.randbytes(length)
        if self.odd(60):  # half a request
            self.send(struct.pack(">IHHQQI", magic, flags, kind, 1, offset, length)[:rng.randrange(28)])
            raise Closed
        if magic != REQUEST:
            self.send(struct.pack(">IHHQQI", magic, flags, kind, 1, offset, length))
            raise Closed
        error, got = self.request(kind, offset, length, flags, data)
        if kind == READ and error == 0 and disk and offset + length <= KEPT and got != model[offset:offset + length]:
            raise Wrong("a read gave something else than the disk has")

    def close(self):
        self.socket.close()


def misbehave(path, rng, model, log):
    client = Client(path, rng)
    log.append(client)
    try:
        client.greet(rng.choice([3, 3, 3, 3, 1, 0, 2, 7, rng.getrandbits(32)]))
        for _ in range(rng.randrange(6)):
            client.odd_option()
        if rng.randrange(4):
            client.option(STRUCTURED, b"")
        name = rng.choice(NAMES) if rng.randrange(8) else rng.choice(ODD_NAMES)
        if rng.randrange(3):
            client.meta(rng.choice([SET_META, SET_META, LIST_META]), rng.choice([name, name, b"compact"]),
                        rng.choice([[b"base:allocation"], [], [b"base:"], [b"base:allocation"] * 40, [b"x" * 4096],
                                    [b"qemu:dirty-bitmap:", b"\0\xff"]]))
        if not client.go(name):
            return
        for _ in range(rng.randrange(25)):
            client.odd_request(model, name == b"")
        if rng.randrange(2):
            client.send(struct.pack(">IHHQQI", REQUEST, 0, DISC, 0, 0, 0))
    except Closed:
        pass
    finally:
        client.close()


def behave(path, rng, model):
    """A guest that reads a piece, and an administrator who reads the status."""
    try:
        for name in (b"", b"status"):
            client = Client(path, rng)
            client.greet()
            if not client.go(name):
                raise Wrong(f"export '{name.decode()}' is not served")
            at = rng.randrange(KEPT - 65536) if name == b"" else 0
            error, got = client.request(READ, at, 65536)
            if error or (name == b"" and got != model[at:at + 65536]):
                raise Wrong("a client that behaves is not served")
            client.send(struct.pack(">IHHQQI", REQUEST, 0, DISC, 0, 0, 0))
            client.close()
    except Closed as gone:
        raise HungUp("the server hangs up on a client that behaves") from gone


def make_image(directory, rng):
    model, raw, image = rng.randbytes(KEPT) + bytes(SIZE - KEPT), f"{directory}/raw", f"{directory}/disk.qcow2"
    with open(raw, "wb") as file:
        file.write(model)
    for words in (["convert", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}", raw, image],
                  ["snapshot", "-c", "one", image]):
        subprocess.run(["qemu-img", *words], check=True)
    return model, image


def kept_half(image):
    subprocess.run(["qemu-img", "dd", "-f", "qcow2", "-O", "raw", f"if={image}", f"of={image}.raw", f"bs={CLUSTER}",
                    f"count={KEPT // CLUSTER}"], check=True, capture_output=True)
    with open(f"{image}.raw", "rb") as file:
        return file.read()


def memory_of(pid):
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), 0)  # 0: a zombie


def known_abort(server, log):
    """nbdkit before 1.34 aborts when the other side of a connection goes away at the wrong moment (README.md)."""
    version = subprocess.run(["nbdkit", "--dump-config"], check=True, capture_output=True, text=True).stdout
    fields = dict(line.split("=", 1) for line in version.splitlines() if "=" in line)
    if server.returncode != 134 or (int(fields["version_major"]), int(fields["version_minor"])) >= (1, 34):
        return False
    with open(log, "rb") as file:
        return b"raw_send_socket: Assertion" in file.read()[-4096:]


class Attack:
    """Some clients, and one server after another: more than one only if it ends in the one way that is known."""

    def __init__(self, build, filters, seconds, seed, directory):
        self.command = [*filters, f"{build}/plugin/nbdkit-qcow2-plugin.so"]
        self.ends, self.seed, self.directory = time.monotonic() + seconds, seed, directory
        self.rng = random.Random(seed)
        self.model, self.image = make_image(directory, self.rng)
        self.path, self.log = f"{directory}/socket", f"{directory}/server.log"
        self.problems, self.sent, self.connections, self.servers, self.memory = [], [], 0, 0, 0

    def client(self, server, number):
        rng, sent, count = random.Random(f"{self.seed} {self.servers} {number}"), self.sent[number], 0
        try:
            while time.monotonic() < self.ends and not self.problems:
                misbehave(self.path, rng, self.model, sent)
                del sent[:-20]
                count += 1
                if count % 20 == 0:
                    behave(self.path, rng, self.model)
        except Wrong as error:
            self.problems.append(f"Wrong: {error}")
        except (HungUp, OSError) as error:
            self.hung_up(server, error)
        self.connections += count

    def hung_up(self, server, error):
        """No problem if the server is no more: what it ended with is looked at when it is waited for."""
        try:
            server.wait(10)  # not poll(): where two threads ask at once, it says of a dead one that it lives
        except subprocess.TimeoutExpired:
            self.problems.append(f"{type(error).__name__}: {error}")

    def wait_until_served(self, server):
        while server.poll() is None:
            try:
                Client(self.path, self.rng).close()
                return
            except (FileNotFoundError, ConnectionRefusedError):  # refused: it has a name, and does not listen yet
                time.sleep(0.02)

    def serve(self):
        self.servers += 1
        self.sent = [[] for _ in range(CLIENTS)]
        if os.path.exists(self.path):
            os.unlink(self.path)
        with open(self.log, "wb") as log:
            server = subprocess.Popen(["nbdkit", "-f", "-U", self.path, *self.command, self.image], stderr=log)
        try:
            self.wait_until_served(server)
            threads = [threading.Thread(target=self.client, args=(server, n)) for n in range(CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if server.poll() is None:
                self.memory = max(self.memory, memory_of(server.pid))
                behave(self.path, self.rng, self.model)
        except Wrong as error:
            self.problems.append(f"Wrong: {error}")
        except (HungUp, OSError) as error:
            self.hung_up(server, error)
        finally:
            asked = server.poll() is None
            if asked:
                server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                self.problems.append("the server does not end")
        if (server.wait() != 0 or not asked) and not known_abort(server, self.log):
            self.problems.append(f"the server ended with {server.returncode}")

    def run(self):
        while time.monotonic() < self.ends and not self.problems:
            self.serve()
            check = subprocess.run(["qemu-img", "check", self.image], capture_output=True, text=True)
            if check.returncode != 0:
                self.problems.append(f"qemu-img check: {check.stdout}{check.stderr}")
            elif kept_half(self.image) != self.model[:KEPT]:
                self.problems.append("the half that nobody wrote is not what it was")
        if self.memory > MOST_MEMORY:
            self.problems.append(f"the server took {self.memory // MIB} MiB, more than {MOST_MEMORY // MIB}")
        print(f"{self.connections} connections, {self.servers} servers, {self.memory // MIB} MiB at the most")


def main():
    build, seconds = os.path.abspath(sys.argv[1]), float(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    variants = [[], [f"--filter={build}/filter/nbdkit-reclaim-filter.so"]]
    for number, filters in enumerate(variants):
        directory = tempfile.mkdtemp(prefix="qlean-nbd-fuzz.")
        try:
            attack = Attack(build, filters, seconds / len(variants), seed + number, directory)
            attack.run()
            if attack.problems:
                kept = f"{build}/fuzz/nbd-{seed}"
                shutil.copytree(directory, kept, ignore=shutil.ignore_patterns("socket"), dirs_exist_ok=True)
                for thread, clients in enumerate(attack.sent):
                    for age, client in enumerate(reversed(clients)):
                        with open(f"{kept}/sent-{thread}-{age}", "wb") as file:
                            file.write(client.sent)
                print("\n".join(attack.problems))
                print(f"what was sent and the image: {kept}; again: {sys.argv[0]} {build} {seconds:g} {seed}")
                return 1
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
