#!/usr/bin/env bash
# Every figure of this machine's GPU in one call of at most ten minutes, without network, from a clone alone.
#
#   benchmarks/gpu_figures.sh [--tiny] [--out FILE] [--table FILE]
#
# Python is $PYTHON, else .venv's, else python3; it needs torch with CUDA and the packages that a training bundle names.
# What it lacks may lie as wheels in $WHEELS (.whl of the clone unless set) and is installed into a temporary folder.
# A figure that breaks the GPU's process costs its own part: the others run in a new process.
set -uo pipefail
cd "$(dirname "$0")/.."
until=$(($(date +%s) + ${SECONDS_AT_MOST:-570}))
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
wheels=${WHEELS:-.whl}
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
if compgen -G "$wheels/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$temporary" "$wheels"/*.whl || exit 2
fi
export PYTHONPATH="$PWD:$temporary${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
"$python" - <<'CHECK' || exit 2
import importlib.util, sys
names = "torch diffusers transformers tokenizers safetensors numpy polars pyarrow scipy PIL tomlkit fsspec zstandard"
missing = [name for name in names.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: put their wheels into .whl and start again")
CHECK
resume=()
for _ in 1 2 3; do
  "$python" benchmarks/gpu_figures.py --until "$until" "${resume[@]}" "$@"
  status=$?
  [ "$status" -le 2 ] && exit "$status"
  resume=(--resume)
done
exit "$status"
