# make setup | demo | study | test: each does all that it needs on a fresh machine (Python 3.11 or newer) and nothing twice.
PYTHON ?= python3
BIN := .venv/bin
RANKS = $(shell $(BIN)/python -c "import torch; n = torch.cuda.device_count() or 2; print(max(r for r in (1, 2, 4) if r <= n))")
CORPUS := runs/corpus
DEMO := runs/demo
seeds := 1
STUDY = seeds=$(seeds) $(if $(filter 1,$(seeds)),folder=runs/study,full=true folder=runs/study_full)
PROCESSES = $(shell $(BIN)/python -c "import torch; print('ranks=$(RANKS)' if torch.cuda.is_available() else 'jobs=2')")
OCR := tesseract-ocr+tesseract-ocr-rus+tesseract-ocr-ara+tesseract-ocr-ell+tesseract-ocr-hin+tesseract-ocr-chi-sim
TOOLS := java=default-jre-headless chromium=chromium tesseract=$(OCR)
SLURM := slurmctld slurmd slurm-client munge iproute2
export OMP_NUM_THREADS ?= 1
# Images of containers often set it; every process would then compile what it imports.
export PYTHONDONTWRITEBYTECODE =

.PHONY: setup demo study slurm tools test lint unit clean

setup: .venv/ready

# torch comes first and by exactly one version: anything looser, or a package that asks for it, may bring another build.
# pip would compile 19,000 files -> the last line compiles the 3,700 that a run imports.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[wandb,mpi,slurm,corpus,ocr,test]"
	$(BIN)/python -c "import train.pretrain, train.evaluate, train.submit, parallel.engine.zero3, transformers, wandb"
	touch $@

demo: setup $(CORPUS)/tokenizer.model $(DEMO)_vit/done
	$(BIN)/torchrun --nproc_per_node $(RANKS) -m train.pretrain experiment=demo run.folder=$(DEMO)
	$(BIN)/torchrun --nproc_per_node $(RANKS) -m train.evaluate run.folder=$(DEMO)

# Always asked for, but a corpus of the same settings stays as it is: then nothing that follows from it is made again.
$(CORPUS)/corpus.json: setup
	$(BIN)/python -m data.miniature folder=$(CORPUS) aligned=true objects=16000 evaluation=330

$(CORPUS)/tokenizer.model: $(CORPUS)/corpus.json
	$(BIN)/python -m data.tokenizer root=$(CORPUS) records=1000

$(CORPUS)/labels.txt: $(CORPUS)/corpus.json
	$(BIN)/python -m data.labels root=$(CORPUS) texts=objects,ocr

# Of another corpus, a ViT is trained anew: its run would go on from its checkpoint.
$(DEMO)_vit/done: $(CORPUS)/labels.txt
	rm -rf $(DEMO)_vit
	$(BIN)/torchrun --nproc_per_node $(RANKS) -m train.pretrain_vit experiment=demo_vit run.folder=$(DEMO)_vit
	touch $@

# A first pass, or with seeds=3 runs of full length; the same command goes on. On CPUs two sweeps side by side.
study: setup $(CORPUS)/tokenizer.model $(CORPUS)/labels.txt
	$(BIN)/python -m train.study $(STUDY) $(PROCESSES)
	$(BIN)/python -m train.study_report $(STUDY)

# tests/slurm starts a real Slurm on this machine; where it cannot be installed, those tests are skipped.
slurm:
	@PATH="$$PATH:/usr/sbin"; \
	for program in slurmctld slurmd srun ss; do command -v $$program > /dev/null || missing=$$program; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM); } \
	    || echo "tests/slurm will be skipped: apt-get install $(SLURM) failed"; \
	else echo "tests/slurm will be skipped: as root, apt-get install $(SLURM)"; fi

# Official captions' scores need Java, the test of report.html a browser, one of OCR Tesseract; others are skipped.
tools: slurm
	@for tool in $(TOOLS); do command -v $${tool%=*} > /dev/null || missing="$$missing $$(echo $${tool#*=} | tr + ' ')"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; } \
	    || echo "some tests will be skipped: apt-get install$$missing failed"; \
	else echo "some tests will be skipped: as root, apt-get install$$missing"; fi

# Two downloads side by side: of pip and of Debian. Then two workers of unit tests beside the linters, which use one core.
test:
	@$(MAKE) --no-print-directory --jobs 2 setup tools
	@$(MAKE) --no-print-directory --jobs 2 lint unit
	$(BIN)/python -m pytest tests/distributed tests/slurm --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest tests/unit --numprocesses 2

clean:
	rm -rf .venv runs
