#!/usr/bin/env bash
# Makes .venv if it is missing, installs what is needed, and shows saguaro at work (--serve: starts the server).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/install.sh
exec .venv/bin/python scripts/demo.py "$@"
