# sidecache in a container: user 65532, nothing to write, one file of the program. docker build -t sidecache .
FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src ./src
COPY benches ./benches
COPY tests/main.rs ./tests/main.rs
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin sidecache \
    && cp target/release/sidecache /sidecache \
    && strip /sidecache

# Debian rather than distroless: `sleep` for preStop before Kubernetes 1.29, a shell to look around in.
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /sidecache /usr/local/bin/sidecache
USER 65532:65532
EXPOSE 18080 18081 18082
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["sidecache", "health", "--ready"]
ENTRYPOINT ["sidecache"]
