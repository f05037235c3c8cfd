// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// Names of backing files, and formats that nobody wrote down: read as QEMU reads them, refused by name otherwise.
#include "lib/backing_name.h"
#include "lib/error.h"
#include "lib/format_probe.h"
#include "tests/catch.h"

using namespace qlean;
using namespace std::string_literals;
using Format = BackingName::Format;
using Host = BackingName::Host;

namespace {

BackingName parse(const std::string &name, const std::string &format = "") {
    return parse_backing_name("/images/disk.qcow2", name, format);
}

std::string refusal(const std::string &name, const std::string &format = "") {
    try {
        parse(name, format);
    } catch (const Error &error) {
        CHECK(error.kind() == Error::Kind::unsupported);
        return error.what();
    }
    FAIL("accepted: " << name);
    return {};
}

bool says(const std::string &text, const std::string &part) { return text.find(part) != std::string::npos; }

std::string probe(std::string head, const std::string &path = "disk") {
    return probe_format(std::as_bytes(std::span(head)), path);
}

} // namespace

TEST_CASE("a plain name is relative to the image that holds it") {
    CHECK(parse("base.qcow2", "qcow2") == BackingName{"/images/base.qcow2", Format::qcow2, Host::any, 0, {}});
    CHECK(parse("../a/b", "raw") == BackingName{"/images/../a/b", Format::raw, Host::any, 0, {}});
    CHECK(parse("/x/base", "") == BackingName{"/x/base", Format::probe, Host::any, 0, {}});
    CHECK(parse("./a:b").path == "/images/./a:b");
    CHECK(parse("/a:b").path == "/a:b");
    CHECK(parse_backing_name("disk.qcow2", "base", "raw").path == "base");
    CHECK(parse_backing_name("sub/disk.qcow2", "base", "raw").path == "sub/base");
}

TEST_CASE("file: takes the rest as it is") {
    CHECK(parse("file:base", "qcow2").path == "base");
    CHECK(parse("file:///x/base", "qcow2").path == "///x/base");
    CHECK(parse("file:a:b", "qcow2").path == "a:b");
    CHECK(parse("file:base", "qcow2").host == Host::file);
    CHECK(parse("host_device:/dev/x", "raw") == BackingName{"/dev/x", Format::raw, Host::device, 0, {}});
}

TEST_CASE("formats") {
    CHECK(parse("b", "file").format == Format::raw);
    CHECK(parse("b", "host_device").format == Format::raw);
    CHECK(says(refusal("b", "vmdk"), "'vmdk'"));
    CHECK(says(refusal("b", "QCOW2"), "'QCOW2'"));
}

TEST_CASE("json: over a file") {
    const BackingName qcow2{"/x/b", Format::qcow2, Host::any, 0, {}};
    BackingName on_file = qcow2;
    on_file.host = Host::file;
    CHECK(parse(R"(json:{"driver":"qcow2","file":{"driver":"file","filename":"/x/b"}})") == on_file);
    CHECK(parse(R"(json:{"file":{"driver":"file","filename":"/x/b"}})", "qcow2") == on_file);
    CHECK(parse(R"(json:{"driver":"qcow2","file.filename":"/x/b","file.driver":"file"})") == on_file);
    CHECK(parse(R"(json:{'driver':'qcow2','file.filename':'/x/b'})") == qcow2);
    CHECK(parse(R"(json:{"driver":"raw","file.filename":"/x/b"})", "qcow2") == qcow2); // the header's word counts
    CHECK(parse(R"(json:{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"file","filename":"/x/b"}}})") ==
          on_file);
    CHECK(parse(R"(json:{"driver":"qcow2","lazy-refcounts":"on","read-only":true,"node-name":"n",)"
                R"("file":{"driver":"file","filename":"/x/b","locking":"off","cache":{"direct":true}}})") == on_file);
    CHECK(parse(R"(json:{"file.filename":"/x/b"})").format == Format::probe);
    CHECK(parse(R"(json:{"driver":"file","filename":"/x/b"})") == BackingName{"/x/b", Format::raw, Host::file, 0, {}});
    CHECK(parse(R"(json:{"driver":"raw","offset":65536,"size":"1048576","file.filename":"/x/b"})") ==
          BackingName{"/x/b", Format::raw, Host::any, 65536, 1048576});
    // Relative to the working directory, as QEMU has it.
    CHECK(parse(R"(json:{"driver":"raw","file.filename":"b"})").path == "b");
    CHECK(parse(R"(json:{'driver':'raw','file.filename':'a"b\'c'})").path == "a\"b'c");
    CHECK(parse(R"(json:{"driver":"raw","file.filename":"a'b\'c\"d"})").path == "a'b'c\"d");
}

TEST_CASE("what is no file is refused by its name, and nothing else of it") {
    CHECK(says(refusal("nbd://host/x", "raw"), "'nbd'"));
    CHECK(says(refusal("nbd:unix:/x", "raw"), "'nbd'"));
    CHECK(says(refusal("foo:bar"), "'foo'"));
    const std::string url = refusal("https://user:secret@host/x", "qcow2");
    CHECK(says(url, "'https'"));
    CHECK(!says(url, "secret"));
    CHECK(says(refusal(R"(json:{"driver":"raw","file":{"driver":"nbd","host":"h","password":"secret"}})"), "'nbd'"));
    CHECK(says(refusal(R"(json:{"driver":"quorum","file.filename":"/x"})"), "'quorum'"));
    CHECK(says(refusal(R"(json:{"driver":"qcow2","backing":{"driver":"raw"},"file.filename":"/x"})"),
               "'backing.driver'"));
    CHECK(says(refusal(R"(json:{"driver":"qcow2","backing":null,"file.filename":"/x"})"), "'backing'"));
    CHECK(says(refusal(R"(json:{"driver":"qcow2","offset":512,"file.filename":"/x"})"), "'offset'"));
    CHECK(says(refusal(R"(json:{"driver":"qcow2","file":{"driver":"raw","offset":512,"file":{"filename":"/x"}}})"),
               "'file.offset'"));
    CHECK(says(refusal(R"(json:{"driver":"file","filename":"/x"})", "qcow2"), "file.filename"));
    CHECK(says(refusal(R"(json:{"driver":"raw","file":"node"})"), "file.filename"));
    refusal(R"(json:{"driver":"raw","size":-1,"file.filename":"/x"})");
    refusal(R"(json:{"driver":"raw","size":1.5,"file.filename":"/x"})");
    refusal(R"(json:{"driver":"raw","size":"99999999999999999999","file.filename":"/x"})");
    refusal(R"(json:{"driver":["raw"],"file.filename":"/x"})");
    refusal("json:");
    refusal("json:[]");
    refusal("json:{\"driver\":\"raw\"");
    refusal("json:{'driver'");
}

TEST_CASE("formats are probed as QEMU probes them") {
    CHECK(probe("QFI\xfb\0\0\0\3"s) == "qcow2");
    CHECK(probe("QFI\xfb\0\0\0\2"s) == "qcow2");
    CHECK(probe("QFI\xfb\0\0\0\1"s) == "qcow");
    CHECK(probe("QFI\xfb\0\0"s) == "raw");
    CHECK(probe("KDMV") == "vmdk");
    CHECK(probe("# Disk DescriptorFile\r\n \nversion=1\nCID=1\n") == "vmdk");
    CHECK(probe("# only a comment\n") == "raw");
    CHECK(probe("version=9\n") == "raw");
    CHECK(probe("conectix") == "vpc");
    CHECK(probe("vhdxfile") == "vhdx");
    CHECK(probe("QED\0"s) == "qed");
    CHECK(probe("QED ") == "raw");
    CHECK(probe("LUKS\xba\xbe\0\1"s) == "luks");
    CHECK(probe("WithouFreSpacExt\2\0\0\0"s) == "parallels");
    CHECK(probe(std::string(64, 'x') + "\x7f\x10\xda\xbe") == "vdi");
    CHECK(probe("", "x.dmg") == "dmg");
    CHECK(probe("") == "raw");
    CHECK(probe(std::string(512, '\0')) == "raw");
}
