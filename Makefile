# The two commands of a newcomer, and a few more. The build itself is meson's (meson.build).
#
#   make          a release in build/ (the program is build/flexkv)
#   make demo     sets everything up; the real vLLM without and with FlexKV, tokens compared
#   make test     sets everything up, runs all tests; last line: N passed, N failed, N skipped
#   make help     the rest

BUILD ?= build
MESON := $(shell command -v /usr/bin/meson || command -v meson || echo meson)

.PHONY: all deps demo demo-cluster demo-dynamo demo-replay test test-engine test-rdma fuzz soak soak-engine soak-cluster bench bench-engine \
        bench-routing clean install help

all: | $(BUILD)/build.ninja
	@ninja -C $(BUILD)

$(BUILD)/build.ninja:
	@command -v ninja >/dev/null && command -v $(MESON) >/dev/null || tools/install-deps
	@$(MESON) setup $(BUILD) --buildtype=release

deps:
	@tools/install-deps

demo:
	@tools/install-deps
	@tools/demo

demo-dynamo:            ## NVIDIA Dynamo's router and four engines with FlexKV; what is credited, tier by tier
	@tools/install-deps --dynamo
	@examples/dynamo/start.sh $(DYNAMO_ARGS)

demo-cluster:           ## several vLLM servers whose nodes read from each other; DEMO_ARGS="--nodes 4 --network --alone"
	@tools/install-deps --engine
	@tools/install-deps --cluster
	@examples/multi_node/demo.sh $(DEMO_ARGS)

demo-replay:            ## an hour of traffic through the tiers, every byte checked; no engine
	@tools/install-deps
	@$(MAKE) --no-print-directory all
	@tools/demo-replay

test:
	@tools/install-deps --test
	@tools/test

test-engine:            ## all tests against the real vLLM, also those that make test leaves out
	@tools/install-deps --test
	@FLEXKV_ENGINE_TESTS=all tools/test engine

test-rdma:              ## reads over libfabric's verbs: soft-RoCE, in a guest that QEMU runs
	@tools/install-deps --rdma
	@tools/test rdma

fuzz:                   ## every fuzz target for FUZZ_SECONDS (60)
	@tools/install-deps --test
	@tools/fuzz

bench-engine:           ## the real vLLM: time to first token, cost of new prompts, of a request, memory
	@tools/install-deps --engine
	@p=$$(tools/engine-env) && d=$$(tools/engine-env --package) && PYTHONPATH=$$d $$p bench/engine.py

bench-routing:          ## Dynamo's router, four workers, the whole conversation trace; FlexKV on and off, no engine
	@examples/dynamo/routing.sh $(DYNAMO_ARGS)

soak-engine:            ## the real vLLM under load, its processes killed or stopped at random, 50 rounds
	@tools/install-deps --engine
	@tools/soak-engine

soak:                   ## simulators and kill -9 for SOAK_SECONDS (600)
	@tools/install-deps --test
	@tools/soak

soak-cluster: all       ## nodes that share, under load, killed, stopped, cut off with their Redis at random, 100 rounds
	@tools/install-deps --test
	@SHARING_ROUNDS=$${SHARING_ROUNDS:-100} FLEXKV_BIN=$(BUILD)/flexkv FLEXKV_BUILD=$(BUILD) \
	    python3 -m pytest -q -s -p no:cacheprovider tests/e2e/test_sharing.py -k faults
	@PARTITION_ROUNDS=$${SHARING_ROUNDS:-100} FLEXKV_BIN=$(BUILD)/flexkv FLEXKV_BUILD=$(BUILD) \
	    python3 -m pytest -q -s -p no:cacheprovider tests/e2e/test_partition.py

bench: all              ## index, hash, copy and ssd against their limits
	@$(BUILD)/flexkv bench all

install: all
	@$(MESON) install -C $(BUILD)

clean:
	@rm -rf build build-*

help:
	@sed -n 's/^#   //p' Makefile; sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile
