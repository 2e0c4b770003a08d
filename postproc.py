"""`post_proc.py` under the name that OBC's own recipes use."""

import obc.toolkit.starting  # noqa: F401  # isort: skip

from post_proc import main

if __name__ == "__main__":
    raise SystemExit(main())
