# make demo   label the sample archive with the small model that ships
# make test   everything the tests need, then the tests
# make lint   format, lint, types, import layers
# make bench  this machine against what people would otherwise run
# make soak   three workers, 20,000 articles, kills and a bad wire, on moto and on ministack

VENV ?= .venv
export MINISTACK_VENV ?= .venv-ministack
CONSTRAINTS := .ci/constraints.txt
# the first Python here that is new enough
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
DEMO_OUTPUT := demo-output
DEMO_MODEL := data/models/bbc-small

.PHONY: demo test lint bench soak clean

demo: $(VENV)/.installed
	@rm -rf $(DEMO_OUTPUT)
	$(VENV)/bin/batchclf classify data/sample --model $(DEMO_MODEL) --output $(DEMO_OUTPUT) \
		--keep-columns title,category
	@echo
	@echo "Some of the rows in $(DEMO_OUTPUT):"
	@$(VENV)/bin/python -c "import pyarrow.dataset as ds; \
		rows = ds.dataset('$(DEMO_OUTPUT)').to_table().to_pylist()[::25]; \
		print(*(f\"  {r['label']:13} {r['score']:.2f}  {r['title'][:54]}\" for r in rows), sep='\n')"
	@echo
	@echo "Next:"
	@echo "  $(VENV)/bin/batchclf verify $(DEMO_OUTPUT) data/sample"
	@echo "  $(VENV)/bin/batchclf report $(DEMO_OUTPUT)"
	@echo "  $(VENV)/bin/batchclf classify news.csv --model $(DEMO_MODEL) --output labelled"
	@echo "  $(VENV)/bin/batchclf classify --help"

test: $(VENV)/.installed-dev $(MINISTACK_VENV)/.installed
	BATCHCLF_REQUIRE_SERVERS=1 $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.installed
	$(VENV)/bin/batchclf bench

soak: $(VENV)/.installed-dev $(MINISTACK_VENV)/.installed
	for server in moto ministack; do \
		$(VENV)/bin/python tests/soak.py --articles 20000 --shards 200 --workers 3 \
			--server $$server --json data/bench/soak-$$server.json || exit 1; \
	done

clean:
	rm -rf $(VENV) $(MINISTACK_VENV) $(DEMO_OUTPUT)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv found; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	@echo "Installing batchclf and what it needs into $(VENV); this can take some minutes."
	@$(PIP) install -q -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# An S3 and SQS server of its own venv: it pins another botocore.
$(MINISTACK_VENV)/.installed: .ci/constraints-ministack.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv found; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(MINISTACK_VENV)
	$(MINISTACK_VENV)/bin/python -m pip --disable-pip-version-check install -q -r $<
	@touch $@
