#!/bin/bash
# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) 2026, the qlean authors
#
# nbdkit's TLS, with keys and with certificates, from end to end: a guest and `qlean` at work over it, and whoever has
# no key, the wrong one or a certificate of somebody else is kept out.
. "$(dirname "$0")/../lib.sh"
need openssl qemu-io nbdcopy

random_file "$W/data" 8M
key() { openssl rand -hex 32; }
echo "alice:$(key)" >"$W/keys.psk"
echo "alice:$(key)" >"$W/wrong.psk"

# authority NAME, certificate DIRECTORY AUTHORITY NAME...: as nbdkit, libnbd and QEMU want to find them
authority() {
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj "/CN=authority $1" -keyout "$W/$1.key" -out "$W/$1.pem" \
        -addext basicConstraints=critical,CA:true -addext keyUsage=critical,keyCertSign 2>/dev/null
}
certificate() {
    local directory=$1 authority=$2 who
    shift 2
    mkdir -p "$directory"
    cp "$W/$authority.pem" "$directory/ca-cert.pem"
    for who; do
        openssl req -newkey rsa:2048 -nodes -subj "/CN=localhost" -keyout "$directory/$who-key.pem" -out "$W/request.pem" 2>/dev/null
        openssl x509 -req -in "$W/request.pem" -CA "$W/$authority.pem" -CAkey "$W/$authority.key" -CAcreateserial -days 2 \
            -extfile <(printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nkeyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth,clientAuth') \
            -out "$directory/$who-cert.pem" 2>/dev/null
    done
}
authority ours
authority theirs
certificate "$W/pki" ours server client
certificate "$W/stranger" theirs client
cp "$W/ours.pem" "$W/stranger/ca-cert.pem" # it trusts us; we do not trust it

serve() { # NBDKIT OPTIONS: a new image on a TCP port
    create "$W/disk.qcow2" 64M
    qemu-io -c "write -s $W/data 0 8M" -c "write -s $W/data 16M 8M" -c 'discard 0 8M' "$W/disk.qcow2" >/dev/null
    qemu-img convert -f qcow2 -O raw "$W/disk.qcow2" "$W/model"
    before=$(length "$W/disk.qcow2")
    port=$((20000 + RANDOM % 20000))
    rm -f "$W/pid"
    run_pid "$W/server.log" nbdkit -f -P "$W/pid" -i 127.0.0.1 -p $port --tls=require "$@" "$PLUGIN" file="$W/disk.qcow2"
    SERVER=$PID
    server_ready || fail "no server on port $port"
}
works() { # EXPORT-URI-BEGINNING PARAMETERS, QEMU-IO'S ARGUMENTS: the guest writes, qlean compacts, the bytes are right
    local uri=$1 parameters=$2
    shift 2
    qemu-io "$@" -c 'write -P 7 40M 1M' -c flush >"$W/qemu-io.txt" 2>&1 || { cat "$W/qemu-io.txt" >&2; fail "qemu-io over TLS"; }
    qemu-io -f raw -c 'write -P 7 40M 1M' "$W/model" >/dev/null
    "$QLEAN" status "$uri/?$parameters" >/dev/null
    "$QLEAN" compact -q "$uri/?$parameters" >"$W/compact.txt"
    [ "$(length "$W/disk.qcow2")" -lt $((before - 4 * 1024 * 1024)) ] || fail "nothing was gained: $(cat "$W/compact.txt")"
    "$QLEAN" check "$uri/?$parameters" >/dev/null
    nbdcopy "$uri/?$parameters" "$W/copy"
    cmp "$W/copy" "$W/model"
}
kept_out() { # WHAT URI: with one sentence
    expect_failure "$1" "$QLEAN" status "$2"
    [ "$(wc -l <"$W/failed.txt")" = 1 ] || fail "$1: not one line but: $(cat "$W/failed.txt")"
    echo "  $1: $(cat "$W/failed.txt")"
}

serve --tls-psk="$W/keys.psk"
mkdir "$W/psk"
cp "$W/keys.psk" "$W/psk/keys.psk"
works "nbds://alice@localhost:$port" "tls-psk-file=$W/keys.psk" \
    --object "tls-creds-psk,id=t,dir=$W/psk,username=alice,endpoint=client" \
    --image-opts "driver=nbd,server.type=inet,server.host=127.0.0.1,server.port=$port,tls-creds=t"
kept_out "no TLS" "nbd://localhost:$port/"
grep -q nbds:// "$W/failed.txt" || fail "no word of what is missing"
kept_out "the wrong key" "nbds://alice@localhost:$port/?tls-psk-file=$W/wrong.psk"
kept_out "an unknown user" "nbds://mallory@localhost:$port/?tls-psk-file=$W/wrong.psk"
stop_server
judge "$W/disk.qcow2" "$W/model"
say "pre-shared keys"

serve --tls-certificates="$W/pki" --tls-verify-peer
works "nbds://localhost:$port" "tls-certificates=$W/pki" \
    --object "tls-creds-x509,id=t,dir=$W/pki,endpoint=client" \
    --image-opts "driver=nbd,server.type=inet,server.host=localhost,server.port=$port,tls-creds=t"
kept_out "no TLS" "nbd://localhost:$port/"
kept_out "a stranger's certificate" "nbds://localhost:$port/?tls-certificates=$W/stranger"
stop_server
judge "$W/disk.qcow2" "$W/model"
say "certificates"
