.PHONY: install test lint types format

install:  ## into the current environment, with what the tests need
	pip install -c constraints.txt -e '.[test]'

test:     ## the whole suite; pytest -m slow runs the long checks
	OMP_NUM_THREADS=1 pytest

lint:
	ruff check .

types:
	.ci/types

format:   ## what ruff can mend by itself; it does not re-wrap code
	ruff check --fix .
