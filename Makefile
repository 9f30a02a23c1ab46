# make run       the main job: a node, a real chat trace through it, a report; serves until Ctrl-C
#                (ONCE=1 ends after the report; KVAR_DATA, KVAR_SIZE, KVAR_DRAM, KVAR_BLOCK say where and how large)
# make test      every test but the engines'
# make e2e       stock vLLM on this machine's CPU, killed and restarted, against the same prompts
# make e2e-lmcache   stock vLLM over the real LMCache server over a node, all killed and restarted
# make scenario-random | scenario-chat | scenario-sharing | scenario-outages | scenario-burden | scenarios
#                stock vLLM with and without kvar on real input: tables, plots, bench/scenarios/out/report.html
#                (SCENARIO_ARGS goes to it; --quick is a short form)
# make bench     engine against fio, links against plain sockets
# make bench-peers   the engine beside foyer and fjall: same values, same folder, same run (BENCH_ARGS goes to it)
# make bench-peers-net  a node beside Mooncake Store and Redis over TCP: rates, latencies, CPU, a plot (root; BENCH_ARGS goes to it)
# make compare-lmcache vLLM over kvar beside vLLM over LMCache with its own files: times to the first token
# make bench-lmcache LMCache's own benchmark on kvar and on its fs_native, in turns (BENCH_ARGS goes to it)
# make lint      what CI refuses
SHELL := /bin/bash

.PHONY: run test e2e e2e-lmcache compare-lmcache scenarios bench bench-peers bench-peers-net bench-lmcache lint tools

run:
	@ONCE=$(ONCE) scripts/run.sh

test: tools
	@scripts/test.sh

e2e: tools
	@e2e/run.sh $(E2E_ARGS)

e2e-lmcache: tools
	@e2e/lmcache.sh run $(E2E_ARGS)

compare-lmcache: tools
	@e2e/lmcache.sh compare $(E2E_ARGS)

bench-lmcache: tools
	@e2e/lmcache.sh bench $(BENCH_ARGS)

scenario-%: tools
	@bench/scenarios/run.sh $* $(SCENARIO_ARGS)

scenarios: scenario-all

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
