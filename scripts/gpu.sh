#!/usr/bin/env bash
# What a meeting with a GPU should bring, in one call of under ten minutes and without network: scripts/gpu.sh quick OUTDIR [--wheels DIR]
exec python3 "$(dirname "$0")/gpu_evidence.py" "$@"
