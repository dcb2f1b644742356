# make setup   a virtual environment in .venv with the tested versions and Detectron2
# make demo    the main job on the embedded data
# make test    the tests; choose some with ARGS="tests/losses -k cosine"
# make clean   remove .venv
# Another interpreter: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: setup demo test clean

setup: $(READY)

demo: $(READY)
	$(VENV)/bin/python datasets/make_balloon_demo.py
	$(VENV)/bin/python tools/train_net.py --config-file configs/demo.yaml
	@echo "The demo starts from random weights, a small ResNet-18-FPN on small drawn pictures, and" \
	      "trains for minutes: it shows that everything runs. Its AP is not the point." \
	      "Look at output/demo/report.html"

test: $(READY)
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile $(or $(ARGS),tests)

clean:
	rm -rf $(VENV)

# Re-made when one of these changes. An installer that changed must replace what it installed.
# --no-compile: Python makes byte code at first import anyway, and only of what is imported.
$(READY): setup.py constraints.txt tools/install_detectron2.py
	@echo "setting up $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "cannot make a virtual environment with $(PYTHON); on Debian or Ubuntu:" \
	       "apt install python3-venv" >&2; exit 1; }
	$(VENV)/bin/python -m pip install -q --no-compile -c constraints.txt -e ".[test]"
	@$(VENV)/bin/python -m pip uninstall -qq -y detectron2
	PIP_CONSTRAINT="$(CURDIR)/constraints.txt" $(VENV)/bin/python tools/install_detectron2.py
	@touch $@
