# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
"""status and plan: what they print, for every kind of target, and that they change nothing."""

from harness import *


class StatusPlan(Case):
    def test_status_json_is_the_servers(self):
        server = self.server("size=64M", "pending=3")
        page = self.run_json("status", server.socket)
        self.assertEqual(page["qlean"], 1)
        self.assertEqual(list(page)[0], "qlean")
        self.assertEqual(page["a_field_from_the_future"], [1, 2, 3])
        self.assertEqual(page["compact"]["pending"], 3)

    def test_status_for_people(self):
        server = self.server("size=64M", "busy=compact", "todo=compact:0+1M")
        text = self.run_qlean("status", server.socket).stdout
        self.assertRegex(text, r"virtual size +64\.0 MiB")
        self.assertRegex(text, r"file length +65\.0 MiB")
        self.assertRegex(text, r"allocated on host +32\.5 MiB")
        self.assertRegex(text, r"in use +6\.2 MiB \(100 clusters, data 90, metadata 10, pinned 0, retired 0\)")
        self.assertRegex(text, r"compact would save +58\.8 MiB")
        self.assertRegex(text, r"fragmentation +50\.00 %")
        self.assertRegex(text, r"maintenance +'compact' is run by connection 77")
        self.assertRegex(text, r"last error +none")

    def test_export_name_in_uri_is_replaced(self):
        server = self.server("size=64M", "todo=compact:1M+2M")
        for uri in ("nbd+unix:///?socket=", "nbd+unix:///disk?socket=", "nbd+unix:///zeroes?socket="):
            page = self.run_json("status", uri + server.socket)
            self.assertEqual(page["qlean"], 1)
            plan = self.run_json("plan", uri + server.socket, "compact")
            self.assertEqual(plan["exports"], [{"name": "compact", "bytes": 2 * M, "ranges": 1}])

    def test_tcp_and_tls(self):
        with open(self.dir + "/psk", "w") as f:
            f.write("alice:" + "0123456789abcdef" * 4 + "\n")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for scheme, user, query, arguments in (
                ("nbd", "", "", []),
                ("nbds", "alice@", "?tls-psk-file=" + self.dir + "/psk",
                 ["--tls=require", "--tls-psk=" + self.dir + "/psk"])):
            with self.subTest(scheme=scheme):
                process = subprocess.Popen(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), *arguments, FAKE_PLUGIN,
                                            "size=64M", "todo=compact:0+1M"])
                try:
                    uri = f"{scheme}://{user}127.0.0.1:{port}/disk{query}"
                    wait_for(lambda: subprocess.run([QLEAN, "status", uri], capture_output=True).returncode == 0, uri, 5)
                    summary = self.run_json("compact", uri)
                    self.assertEqual(summary["operations"][-1]["handled_bytes"], M)
                finally:
                    process.terminate()
                    process.wait()

    def test_plan_of_every_export(self):
        server = self.server("size=64M", "exports=compact,reclaim,zeroes,defrag", "todo=compact:1M+2M",
                             "todo=zeroes:0+64K", "todo=zeroes:63M+1M")
        plan = self.run_json("plan", server.socket)
        self.assertEqual([(e["name"], e["bytes"], e["ranges"]) for e in plan["exports"]],
                         [("reclaim", 0, 0), ("zeroes", M + 65536, 2), ("compact", 2 * M, 1), ("defrag", 0, 0)])
        text = self.run_qlean("plan", server.socket).stdout
        self.assertRegex(text, r"(?m)^zeroes +1\.1 MiB +2$")
        self.assertEqual(events(server.log(), "cache") + events(server.log(), "flush"), [])
        self.assertEqual(events(server.log(), "pread"), [], "a read of a maintenance export forfeits CACHE")

    def test_what_is_no_operation_has_no_plan(self):
        server = self.server("size=64M")
        for name in ("status", "check", "snapshots", "snapshot/monday"):
            result = self.run_qlean("plan", server.socket, name, code=ERROR)
            self.assert_one_sentence(result.stderr, f"export '{name}' is no operation")

    def test_map(self):
        server = self.server("size=64M", "pattern=compact:1M:128K")
        wanted = [{"offset": i * M, "length": 131072} for i in range(64)]
        plan = self.run_json("plan", "--map", server.socket, "compact")
        self.assertEqual(plan["exports"][0]["map"], wanted)
        lines = self.run_qlean("plan", "--map", server.socket, "compact").stdout.splitlines()
        self.assertEqual([tuple(map(int, l.split())) for l in lines[2:]],
                         [(r["offset"], r["length"]) for r in wanted])

    def test_ranges_are_joined_across_questions(self):
        # 9 GiB of one range takes three questions and is still one range.
        server = self.server("size=10G", "todo=compact:512M+9G")
        plan = self.run_json("plan", "--map", server.socket, "compact")
        self.assertEqual(plan["exports"][0]["map"], [{"offset": 512 * M, "length": 9 * 1024 * M}])
        asked = events(server.log(), "extents")
        self.assertEqual(len(asked), 3)
        self.assertTrue(all(e["length"] <= 4096 * M - 1 for e in asked))

    def test_eight_tebibytes_are_quick(self):
        server = self.server("size=8T", "todo=compact:7T+64K")
        plan = self.run_json("plan", server.socket, "compact")
        self.assertEqual(plan["exports"][0]["bytes"], 65536)
        asked = events(server.log(), "extents")
        self.assertLessEqual(len(asked), 2100)

    def test_read_only_server(self):
        server = self.server("size=64M", "todo=compact:0+1M", arguments=["-r"])
        self.assertEqual(self.run_json("plan", server.socket, "compact")["exports"][0]["bytes"], M)

    def test_unknown_export(self):
        server = self.server("size=64M")
        result = self.run_qlean("plan", server.socket, "nope", code=ERROR)
        self.assert_one_sentence(result.stderr, "'nope'")
        self.assertEqual(result.stdout, "")

    def test_server_without_structured_replies(self):
        server = self.server("size=64M", arguments=["--no-sr"])
        self.assert_one_sentence(self.run_qlean("plan", server.socket, "compact", code=ERROR).stderr, "block status")

    def test_some_other_nbd_server(self):
        path = self.dir + "/other"
        process = subprocess.Popen(["nbdkit", "-f", "-U", path, "memory", "1M"])
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        wait_for(lambda: listening(path), "nbdkit memory")
        # The memory plugin serves every export name as the disk: "status" is a megabyte of zeroes.
        self.assert_one_sentence(self.run_qlean("status", path, code=ERROR).stderr, "status", "qcow2")

    def test_nobody_listens(self):
        path = self.dir + "/dead"
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path)
        self.assert_one_sentence(self.run_qlean("status", path, code=ERROR).stderr, path, "refused")


main()
