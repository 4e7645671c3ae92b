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

# What finding a rule costs, with 5 rules and with 200.
route:
    cargo bench --bench route

# The official Shopify client for Python, through the sidecar.
python-client:
    ./tests/clients/python/run

# Licences, advisories, banned crates (needs cargo-deny).
deny:
    cargo deny check
