// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
#include "backing_name.h"

#include "error.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>

namespace qlean {

namespace {

using nlohmann::json;
using Options = std::map<std::string, json>;

[[noreturn]] void refuse(const std::string &image, const std::string &what) {
    throw Error(Error::Kind::unsupported, ENOTSUP,
                fmt::format("the backing file of '{}' {}; only raw and QCOW2 files of this host can lie below an image",
                            image, what));
}

/// "nbd" of "nbd://host/x", nothing of "./a:b" and "/a:b".
std::string_view protocol_of(std::string_view name) {
    const auto at = name.find_first_of(":/");
    return at != name.npos && name[at] == ':' ? name.substr(0, at) : std::string_view{};
}

std::string beside(const std::string &image, const std::string &name) {
    const auto slash = image.rfind('/');
    return slash == image.npos ? name : image.substr(0, slash + 1) + name;
}

/// QEMU's JSON has strings in single quotes too, and \' in either kind.
std::string with_double_quotes(std::string_view text) {
    std::string out;
    char open = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (open == 0) {
            if (c == '\'' || c == '"')
                open = c;
            out += c == '\'' ? '"' : c;
        } else if (c == '\\' && i + 1 < text.size()) {
            if (text[i + 1] != '\'')
                out += c;
            out += text[++i];
        } else if (c == open) {
            open = 0;
            out += '"';
        } else {
            if (c == '"')
                out += '\\';
            out += c;
        }
    }
    return out;
}

/// {"a": {"b": 1}} and {"a.b": 1} are the same.
void flatten(const json &object, const std::string &prefix, Options &options) {
    for (const auto &[key, value] : object.items()) {
        if (value.is_object())
            flatten(value, prefix + key + ".", options);
        else
            options[prefix + key] = value;
    }
}

/// Options that change how QEMU works, and not what the disk holds; `.` at the end stands for all that begin so.
constexpr std::array harmless = {
    "aio",
    "auto-read-only",
    "cache.",
    "check-cache-dropped",
    "discard",
    "detect-zeroes",
    "drop-cache",
    "force-share",
    "locking",
    "node-name",
    "pr-manager",
    "read-only",
    "x-check-cache-dropped",
    "cache-clean-interval",
    "cache-size",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "overlap-check",
    "overlap-check.",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "refcount-cache-size",
};

class Node {
  public:
    Node(const std::string &image, const Options &options) : image_(image), options_(options) {}

    /// Takes the option `key` out: what is left at the end is not understood.
    std::optional<std::string> take(const std::string &key) {
        const auto found = options_.find(key);
        if (found == options_.end())
            return std::nullopt;
        const json value = found->second;
        options_.erase(found);
        if (value.is_string())
            return value.get<std::string>();
        if (value.is_number_unsigned())
            return value.dump();
        refuse(image_, fmt::format("is named by JSON whose '{}' is neither text nor a number", key));
    }
    std::optional<std::uint64_t> take_bytes(const std::string &key) {
        const auto text = take(key);
        if (!text)
            return std::nullopt;
        // No unit, and short enough not to overflow.
        if (text->empty() || text->size() > 18 ||
            !std::all_of(text->begin(), text->end(), [](char c) { return c >= '0' && c <= '9'; }))
            refuse(image_, fmt::format("is named by JSON whose '{}' is not a number of bytes: '{}'", key, *text));
        return std::stoull(*text);
    }
    bool has(const std::string &prefix) const {
        const auto found = options_.lower_bound(prefix);
        return found != options_.end() && found->first.starts_with(prefix);
    }
    void require_understood() const {
        for (const auto &[key, value] : options_) {
            // "file.file.locking" is "locking" of a node below.
            std::string_view option = key;
            while (option.starts_with("file."))
                option.remove_prefix(5);
            const bool known = std::any_of(harmless.begin(), harmless.end(), [&](std::string_view name) {
                return name.ends_with('.') ? option.starts_with(name) : option == name;
            });
            if (!known)
                refuse(image_, fmt::format("is named by JSON with '{}', which is not supported", key));
        }
    }

  private:
    const std::string &image_;
    Options options_;
};

BackingName::Format format_of(const std::string &image, const std::string &driver) {
    if (driver.empty())
        return BackingName::Format::probe;
    if (driver == "qcow2")
        return BackingName::Format::qcow2;
    // The drivers of plain files and devices, without a format on top of them, are raw.
    if (driver == "raw" || driver == "file" || driver == "host_device")
        return BackingName::Format::raw;
    refuse(image, fmt::format("is of format '{}', which is not supported", driver));
}

/// What the driver of a node without a node below says of its file.
BackingName::Host host_of(std::string_view driver) {
    return driver == "file"          ? BackingName::Host::file
           : driver == "host_device" ? BackingName::Host::device
                                     : BackingName::Host::any;
}

BackingName parse_json(const std::string &image, std::string_view text, const std::string &format) {
    const json parsed = json::parse(with_double_quotes(text), nullptr, false);
    if (!parsed.is_object())
        refuse(image, "has a name that begins with 'json:' and goes on with no JSON object");
    Options options;
    flatten(parsed, "", options);
    Node node(image, options);

    BackingName found;
    const auto driver = node.take("driver");
    const std::string effective = format.empty() ? driver.value_or("") : format; // QEMU lets the header's word count
    found.format = format_of(image, effective);
    found.host = host_of(effective);
    std::string prefix;
    if (found.host == BackingName::Host::any) {
        if (found.format == BackingName::Format::raw) {
            found.offset = node.take_bytes("offset").value_or(0);
            found.size = node.take_bytes("size");
        }
        // Nodes that pass everything through may lie between the format and the file.
        do {
            prefix += "file.";
            const std::string below = node.take(prefix + "driver").value_or("");
            found.host = host_of(below);
            if (below.empty() || found.host != BackingName::Host::any)
                break;
            if (below != "raw")
                refuse(image, fmt::format("lies on '{}', which is not supported", below));
        } while (node.has(prefix + "file."));
    }
    const auto filename = node.take(prefix + "filename");
    if (!filename || filename->empty())
        refuse(image, fmt::format("is named by JSON without '{}filename'", prefix));
    node.require_understood();
    found.path = *filename;
    return found;
}

} // namespace

BackingName parse_backing_name(const std::string &image, const std::string &name, const std::string &format) {
    constexpr std::string_view json_prefix = "json:", file_prefix = "file:", device_prefix = "host_device:";
    const std::string_view view = name;
    if (view.starts_with(json_prefix))
        return parse_json(image, view.substr(json_prefix.size()), format);
    BackingName found;
    found.format = format_of(image, format);
    found.host = host_of(format);
    if (view.starts_with(file_prefix)) {
        found.path = view.substr(file_prefix.size());
        found.host = BackingName::Host::file;
    } else if (view.starts_with(device_prefix)) {
        found.path = view.substr(device_prefix.size());
        found.host = BackingName::Host::device;
    } else if (const auto protocol = protocol_of(view); !protocol.empty()) {
        // Only the protocol: the rest may hold a password.
        refuse(image, fmt::format("is reached by the protocol '{}', which is not supported", protocol));
    } else {
        found.path = view.starts_with('/') ? name : beside(image, name);
    }
    return found;
}

} // namespace qlean
