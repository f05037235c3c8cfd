// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "format_probe.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string_view>

namespace qlean {

namespace {

using namespace std::string_view_literals;

struct Magic {
    std::string_view format;
    std::size_t at;
    std::string_view bytes;
};

constexpr std::array magics = {
    Magic{"qcow", 0, "QFI\xfb\0\0\0\1"sv},
    Magic{"vmdk", 0, "KDMV"},
    Magic{"vmdk", 0, "COWD"},
    Magic{"vpc", 0, "conectix"},
    Magic{"vdi", 64, "\x7f\x10\xda\xbe"},
    Magic{"vhdx", 0, "vhdxfile"},
    Magic{"qed", 0, "QED\0"sv},
    Magic{"parallels", 0, "WithoutFreeSpace\2\0\0\0"sv},
    Magic{"parallels", 0, "WithouFreSpacExt\2\0\0\0"sv},
    Magic{"bochs", 0, "Bochs Virtual HD Image\0"sv},
    Magic{"cloop", 0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop"},
    Magic{"luks", 0, "LUKS\xba\xbe\0\1"sv},
};

/// The text file that describes a VMDK: after comments and blank lines comes its version.
bool is_vmdk_description(std::string_view text) {
    for (auto end = text.find('\n'); end != text.npos; end = text.find('\n')) {
        std::string_view line = text.substr(0, end);
        text.remove_prefix(end + 1);
        if (line.ends_with('\r'))
            line.remove_suffix(1);
        if (!line.starts_with('#') && line.find_first_not_of(' ') != line.npos)
            return line == "version=1" || line == "version=2" || line == "version=3";
    }
    return false;
}

} // namespace

std::string probe_format(std::span<const std::byte> head, const std::string &path) {
    const std::string_view text(reinterpret_cast<const char *>(head.data()), std::min(head.size(), format_probe_bytes));
    // Every later version of QCOW is of the same family; the image itself says if it is too new.
    if (text.starts_with("QFI\xfb"sv) && text.size() >= 8 && text.substr(4, 4) >= "\0\0\0\2"sv)
        return "qcow2";
    for (const Magic &magic : magics)
        if (text.size() >= magic.at && text.substr(magic.at).starts_with(magic.bytes))
            return std::string(magic.format);
    if (is_vmdk_description(text))
        return "vmdk";
    if (path.size() > 4 && path.ends_with(".dmg"))
        return "dmg";
    return "raw";
}

} // namespace qlean
