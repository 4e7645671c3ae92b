# What can be done here. `just` lists it.

default:
    @just --list

# Everything CI checks.
check:
    ./scripts/test

# The demo: a slow shop before and after.
demo:
    cargo run --release -- demo

# An upstream killed or stopped under load, bursts for one slow answer: prints asked and measured.
faults:
    cargo bench --bench faults

# A fleet before a real Redis: cold keys, Redis away, purges, tampering, processor time: prints asked and measured.
bench-fleet *PARTS:
    cargo bench --bench fleet -- {{PARTS}}

# The fleet's promises under random faults of Redis, links and sidecars, against an oracle; `--runs 60` for hours.
check-fleet *OPTIONS="--seconds 60":
    cargo test --features otlp --bench check_fleet -- {{OPTIONS}}

# The race: hits and pass-through beside nginx, HAProxy, Varnish and a bare server; memory, rules, start. Needs wrk,
# nginx, haproxy, varnish. Parts: hits pass rules many start.
bench *PARTS:
    cargo build --release --example bare
    cargo bench --bench race -- {{PARTS}}

# What a look-up, a key, a verdict, an answer cost by themselves.
bench-parts:
    cargo bench --bench parts

# How soon /health is there: under full load, and while upstream and Redis hang. Needs wrk.
bench-health:
    cargo bench --bench health

# The public conformance suite for HTTP caches (npm: http-cache-tests), through the sidecar: fails below the floor in
# tests/conformance/floor.json. Variants: default everyone redis redis-only. Needs node, npm.
conformance *VARIANTS:
    ./tests/conformance/run {{VARIANTS}}

# The dashboard in headless Chromium; pictures in target/dashboard. Needs chromium, npm.
dashboard:
    ./tests/dashboard/run

# What lies in k8s/, without a cluster.
k8s:
    ./tests/k8s/run

# What hostile clients and upstreams send (needs varnish, slowhttptest).
attack:
    ./scripts/attack

# Slow, idle and greedy clients: how do the others fare?
siege:
    cargo bench --bench siege

# Coverage-guided fuzzing, so many seconds a target (needs cargo-fuzz).
fuzz SECONDS="60":
    ./scripts/fuzz {{SECONDS}}

# What finding a rule costs, with 5 rules and with 200.
route:
    cargo bench --bench route

# The official Shopify client for Python, through the sidecar.
python-client:
    ./tests/clients/python/run

# Licences, advisories, banned crates (needs cargo-deny).
deny:
    cargo deny check
