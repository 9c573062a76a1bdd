"""``python -m kvatlas.deploy``: the ``kvatlas`` command, for processes that start themselves again."""

import sys

from kvatlas.deploy.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
