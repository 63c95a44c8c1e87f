#!/usr/bin/env bash
# Accuracy of a real checkpoint under each method and budget, by lmms-eval's own evaluator.
#   bench/paper/tables.sh BASE CHECKPOINT OUT [MODEL_ARGS]
# TASKS, METHODS, BUDGETS, LIMIT, PROCESSES and INCLUDE (a folder of tasks) may be set in the environment.
set -euo pipefail
base=$1 checkpoint=$2 out=$3 more=${4:+,$4}
tasks=${TASKS:-videomme,nextqa_mc_test,nextqa_oe_test,egoschema_subset,mlvu_dev}
halves="framefusion:stages=(merge) framefusion:stages=(prune) framefusion:stages=(prune;merge)"  # commas split model_args
methods=${METHODS:-framefusion fastv streamingllm uniformframes randomtokens $halves}
budgets=${BUDGETS:-0.7 0.5 0.3 0.2}

run() {  # METHOD BUDGET
    accelerate launch --num_processes "${PROCESSES:-1}" -m lmms_eval --model fftriton --tasks "$tasks" --batch_size 1 \
        --model_args "base=$base,pretrained=$checkpoint,method=$1,budget=$2$more" \
        --log_samples --output_path "$out/$1-$2" ${LIMIT:+--limit "$LIMIT"} ${INCLUDE:+--include_path "$INCLUDE"}
}

run keep-all 1
for method in $methods; do
    for budget in $budgets; do
        run "$method" "$budget"
    done
done
