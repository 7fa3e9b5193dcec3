#!/usr/bin/env bash
# Train PaLI-3B's first phase on one node of 8 GPUs: tensor 4 x pipeline 2, ZeRO-1 inside each stage.
#
#   bash examples/train_8_gpus.sh                         # with torchrun, on the node itself
#   DRY_RUN=1 bash examples/train_8_gpus.sh               # print the command only
#   srun --nodes 1 --ntasks 8 --gpus-per-node 8 bash examples/train_8_gpus.sh   # one task a GPU, in a Slurm job
#
# Further arguments are overrides, such as run.rehearse=true. DATA holds the sources and tokenizer.model. The weights are
# folders of Hugging Face, big_vision's .npz, safetensors files or runs: docs/weights.md.
set -euo pipefail
DATA=${DATA:-/data}
command=(-m train.pretrain experiment=paper_3b parallel=tp4_pp2_zero1 "data.root=$DATA"
    "weights.vit=$DATA/vit-g.npz" "weights.mt5=$DATA/mt5-large" "$@")
if [ -n "${SLURM_PROCID-}" ]; then
    launcher=(python) # srun started one task a GPU: each is a rank
else
    launcher=(torchrun --nproc_per_node 8)
fi
if [ -n "${DRY_RUN-}" ]; then
    echo "${launcher[@]}" "${command[@]}"
else
    exec "${launcher[@]}" "${command[@]}"
fi
