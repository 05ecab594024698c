# To be sourced on the GPU machine, in the root of the checkout: puts .device/ (tests/device/bundle) to use.
#
#   . tests/device/env.sh && python3 -m pytest ...
#
# vLLM is unpacked into $HOME/vsite if it is not there. Only the first call of a lent machine needs vllm.tar.xz.

_device=$PWD/.device
[ -d "$_device/bin" ] || { echo "env.sh: no .device/ here; carry it, and source this in the checkout's root" >&2; return 1; }

if [ -f "$_device/vllm.tar.xz" ] && ! [ -d "$HOME/vsite" ]; then
    python3 - "$_device/vllm.tar.xz" "$HOME/vsite" <<'END' || return 1
import os, sys, tarfile
archive, site = sys.argv[1:]
with tarfile.open(archive, "r:xz") as tar:
    tar.extractall(site + ".part", filter="fully_trusted")
os.rename(site + ".part", site)
END
fi

export PATH="$_device/bin:$PATH"
export LD_LIBRARY_PATH="$_device/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export PYTHONPATH="$_device/python:$HOME/vsite${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
# No model and no statistics from the network; no sampler that is compiled at the start.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_WORKER_MULTIPROC_METHOD=spawn

! ldd "$_device"/bin/* | grep 'not found' >&2 || return 1
unset _device
