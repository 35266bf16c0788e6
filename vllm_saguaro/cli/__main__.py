"""`python -m vllm_saguaro.cli`: the same as the `vllm-saguaro` command, also where no script was installed."""

from __future__ import annotations

import sys

from vllm_saguaro.cli.main import main

sys.exit(main())
