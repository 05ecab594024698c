# The two commands of a newcomer, and a few more. The build itself is meson's (meson.build).
#
#   make          a release in build/ (the program is build/flexkv)
#   make demo     sets everything up; the real vLLM without and with FlexKV, tokens compared
#   make test     sets everything up, runs all tests; last line: N passed, N failed, N skipped
#   make help     the rest

BUILD ?= build
MESON := $(shell command -v /usr/bin/meson || command -v meson || echo meson)

.PHONY: all deps demo demo-replay test fuzz soak bench lint clean install help

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

demo-replay:            ## an hour of traffic through the tiers, every byte checked; no engine
	@tools/install-deps
	@$(MAKE) --no-print-directory all
	@tools/demo-replay

test:
	@tools/install-deps --test
	@tools/test

fuzz:                   ## every fuzz target for FUZZ_SECONDS (60)
	@tools/install-deps --test
	@tools/fuzz

soak:                   ## simulator and kill -9 for SOAK_SECONDS (600)
	@tools/install-deps --test
	@tools/soak

bench: all              ## index, hash, copy and ssd against their limits
	@$(BUILD)/flexkv bench all

install: all
	@$(MESON) install -C $(BUILD)

clean:
	@rm -rf build build-*

help:
	@sed -n 's/^#   //p' Makefile; sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile
