# Two commands do all the set-up: `make run` and `make test`. All the work is in tools/dev; see `tools/dev --help`.
PYTHON ?= python3

.PHONY: run test build check guests bench wheel clean help

help:            ## show this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/ /'

run:             ## build, fetch the default guest, boot it to a prompt (with no terminal: a short demonstration)
	@$(PYTHON) tools/dev run

test:            ## every check and every test
	@$(PYTHON) tools/dev test

build:           ## build the Rust core and the small guests into .venv
	@$(PYTHON) tools/dev build

check:           ## format, lints, types, import rules, docs paths
	@$(PYTHON) tools/dev check

guests:          ## compile the small guests
	@$(PYTHON) tools/dev guests

bench:           ## measure against QEMU TCG on this machine
	@$(PYTHON) tools/dev bench boot
	@$(PYTHON) tools/dev bench compute

wheel:           ## make an abi3 wheel in dist/
	@$(PYTHON) tools/dev build --wheel

clean:           ## remove what a build made; the fetched guests stay in the cache
	rm -rf .venv target build dist python/ringzero/_core*.so python/ringzero/images/builtin
