// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the qlean authors
//
// The small pure parts: recognising zeroes, and the status page.

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "filter/status.h"
#include "filter/zero_payload.h"
#include "tests/catch.h"

using namespace qlean;

TEST_CASE("One byte anywhere makes a payload not zero") {
    for (std::size_t length : {1u, 7u, 15u, 16u, 17u, 31u, 33u, 100u, 4096u, 4097u}) {
        std::vector<unsigned char> buffer(length + 1);
        for (std::size_t shift : {0u, 1u}) { // aligned or not
            unsigned char *payload = buffer.data() + shift;
            CHECK(is_all_zero(payload, length));
            for (std::size_t i = 0; i < length; i++) {
                payload[i] = 1;
                REQUIRE_FALSE(is_all_zero(payload, length));
                payload[i] = 0;
            }
        }
    }
}

namespace {

std::string padded(std::string text) {
    text.resize(status_page_size - 1, ' ');
    return text + '\n';
}

} // namespace

TEST_CASE("The status page keeps the plugin's part and gets the filter's") {
    const std::string page = padded(R"({"qlean":1,"image":{"file":"/a","cluster_size":131072},"poisoned":false})");
    CHECK(cluster_size_in(page) == 131072u);
    const auto amended = with_reclaim_status(page, {4096, 1, 2, 3});
    REQUIRE(amended);
    CHECK(amended->size() == status_page_size);
    CHECK(amended->back() == '\n');
    const auto json = nlohmann::json::parse(*amended);
    CHECK(json["qlean"] == 1);
    CHECK(json["image"]["file"] == "/a");
    CHECK(json["reclaim"] == nlohmann::json::parse(R"({"granularity":4096,"recorded_bytes":1,"ready_bytes":2,
                                                       "given_back_bytes":3})"));
}

TEST_CASE("A page that is no status is left alone") {
    for (const std::string &page : {std::string(status_page_size, '\0'), padded("[1]"), padded("{\"a\":"),
                                    padded("{\"file\":\"\xff\xfe\"}"), std::string()}) {
        CHECK_FALSE(with_reclaim_status(page, {}));
        CHECK_FALSE(cluster_size_in(page));
    }
    for (const char *text : {"{}", "{\"image\":1}", "{\"image\":{}}", "{\"image\":{\"cluster_size\":null}}",
                             "{\"image\":{\"cluster_size\":-1}}"})
        CHECK_FALSE(cluster_size_in(padded(text)));
}

TEST_CASE("A page without room for the filter's part is left alone") {
    const std::string full = "{\"a\":\"" + std::string(status_page_size - 9, 'x') + "\"}\n";
    REQUIRE(full.size() == status_page_size);
    CHECK_FALSE(with_reclaim_status(full, {}));
}
