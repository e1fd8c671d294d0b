"""The process that draws: Vega-Lite specifications as a JSON list on stdin, their SVGs as one on stdout.

The drawing library ends its whole process when memory is refused to it, so it gets one of its own.
"""

from __future__ import annotations

import json
import resource
import sys


def main() -> None:
    import vl_convert

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    specs = json.load(sys.stdin)
    json.dump([vl_convert.vegalite_to_svg(json.dumps(spec)) for spec in specs], sys.stdout)


if __name__ == "__main__":
    main()
