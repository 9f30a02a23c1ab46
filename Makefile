# make run       the main job: a node, a real chat trace through it, a report; serves until Ctrl-C
#                (ONCE=1 ends after the report; KVAR_DATA, KVAR_SIZE, KVAR_DRAM, KVAR_BLOCK say where and how large)
# make test      every test but the engines'
# make e2e       stock vLLM on this machine's CPU, killed and restarted, against the same prompts
# make bench     engine against fio, links against plain sockets
# make bench-peers   the engine beside foyer and fjall: same values, same folder, same run (BENCH_ARGS goes to it)
# make bench-peers-net  a node beside Mooncake Store and Redis over TCP: rates, latencies, CPU, a plot (root; BENCH_ARGS goes to it)
# make lint      what CI refuses
SHELL := /bin/bash

.PHONY: run test e2e bench bench-peers bench-peers-net lint tools

run:
	@ONCE=$(ONCE) scripts/run.sh

test: tools
	@scripts/test.sh

e2e: tools
	@e2e/run.sh $(E2E_ARGS)

bench: tools
	@scripts/bench.sh

bench-peers: tools
	cargo run --release --locked --quiet --manifest-path bench/peers/Cargo.toml -- $(BENCH_ARGS)

bench-peers-net: tools
	bench/peers_net/run.sh $(BENCH_ARGS)

lint: tools
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet

tools:
	@scripts/tools.sh
